"""The Lagrange multiplier as a learner: optax around the losses of `losses/lagrange.py`."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax import losses
from rlhfjax.types import TrainState, pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplierConfig:
    """Safe RLHF's multiplier: maximise over lambda > 0 of `lambda (E[C] - limit)`, in log space."""

    limit: float
    """Upper bound on the expected episode cost, in the cost's own units (the paper's -d)."""
    initial: float = 1.0
    """Starting lambda (Safe RLHF: 1 / 0.5 / 1 in its three rounds)."""
    learning_rate: float = 0.1
    """Step of gradient ascent on log lambda (paper 0.01 to 0.04; public code 0.1)."""
    maximum: float = 5.0
    """Upper bound on lambda (public code: 5). There is no lower bound: log space keeps lambda positive."""
    average_decay: float = 0.3
    """Weight of the old value in the moving average of episode costs; 0 uses the batch mean alone."""

    def __post_init__(self):
        if not 0 < self.initial <= self.maximum:
            raise ValueError(f"initial multiplier {self.initial} must lie in (0, maximum = {self.maximum}]")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must lie in [0, 1), got {self.average_decay}")
        if self.learning_rate <= 0:
            raise ValueError(f"the multiplier's learning_rate must be positive, got {self.learning_rate}")


@pytree
class MultiplierState:
    """learner: a TrainState whose params are `log_lambda []`; cost_average `[]`: moving average of episode costs."""

    learner: TrainState
    cost_average: jax.Array

    @property
    def log_lambda(self) -> jax.Array:
        return self.learner.params


class Multiplier(NamedTuple):
    init: Callable[[], MultiplierState]
    update: Callable[[MultiplierState, jax.Array], MultiplierState]


def make_multiplier(config: MultiplierConfig, optimizer: optax.GradientTransformation | None = None) -> Multiplier:
    """`(init, update)` of the multiplier; `update(state, costs [B])` is to be called once per rollout batch.

    `costs` are raw episode costs, never KL-shaped ones: the constraint is on what the cost model says. With the
    default optimiser (plain SGD) one update is `ln lambda += learning_rate * lambda * (average cost - limit)`.
    """
    optimizer = optimizer or optax.sgd(config.learning_rate)

    def init() -> MultiplierState:
        learner = TrainState.create(jnp.log(jnp.float32(config.initial)), optimizer)
        return MultiplierState(learner=learner, cost_average=jnp.zeros((), jnp.float32))

    def update(state: MultiplierState, costs: jax.Array) -> MultiplierState:
        average = losses.moving_average(
            state.cost_average, jnp.mean(costs), decay=config.average_decay, count=state.learner.step
        )
        grad = jax.grad(losses.multiplier_loss)(state.log_lambda, average, limit=config.limit)
        learner = state.learner.apply_gradients(grad, optimizer)
        clamped = losses.clamp_log_lambda(learner.params, maximum=config.maximum)
        return MultiplierState(learner=dataclasses.replace(learner, params=clamped), cost_average=average)

    return Multiplier(init, update)
