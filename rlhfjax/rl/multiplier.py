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
    """Gradient ascent on log lambda for the dual `lambda (E[C] - limit)` of Safe RLHF (2310.12773)."""

    initial: float = 1.0
    """Starting lambda (Safe RLHF's rounds: 1, 0.5, 1; public code 1)."""
    learning_rate: float = 0.1
    """Step of gradient ascent on log lambda (Safe RLHF's rounds: 0.01 to 0.04; public code 0.1)."""
    maximum: float = 5.0
    """Upper bound on lambda (public code: 5)."""
    minimum: float = 0.0
    """Lower bound on lambda. Its steps scale with lambda itself: from far down it is slow to return."""
    average_decay: float = 0.3
    """Weight of the old value in the moving average of episode costs; 0 uses the batch mean alone."""

    def __post_init__(self):
        if not 0 <= self.minimum <= self.initial <= self.maximum < float("inf") or self.initial == 0:
            raise ValueError(f"initial multiplier {self.initial} must be positive and lie in "
                             f"[minimum, maximum] = [{self.minimum}, {self.maximum}]")  # fmt: skip
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must lie in [0, 1), got {self.average_decay}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"the multiplier's learning_rate must be positive and finite, got {self.learning_rate}")


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
    limit: float


def make_multiplier(
    limit: float, config: MultiplierConfig, optimizer: optax.GradientTransformation | None = None
) -> Multiplier:
    """The learner of lambda for the constraint E[cost] <= limit (the paper's E[C] + d <= 0, with limit = -d).

    `update(state, costs [B])` is to be called once per rollout batch. `limit` is in the units of `costs`, and those are
    raw episode costs, never KL-shaped ones: the constraint is on what the cost model says. With the default optimiser
    (plain SGD) one update is `ln lambda += learning_rate * lambda * (average cost - limit)`.
    """
    if not abs(limit) < float("inf"):
        raise ValueError(f"the cost limit must be finite, got {limit}")
    optimizer = optimizer or optax.sgd(config.learning_rate)

    def init() -> MultiplierState:
        learner = TrainState.create(jnp.log(jnp.float32(config.initial)), optimizer)
        return MultiplierState(learner=learner, cost_average=jnp.zeros((), jnp.float32))

    def update(state: MultiplierState, costs: jax.Array) -> MultiplierState:
        average = losses.moving_average(
            state.cost_average, jnp.mean(costs), decay=config.average_decay, count=state.learner.step
        )
        grad = jax.grad(losses.multiplier_loss)(state.log_lambda, average, limit=limit)
        learner = state.learner.apply_gradients(grad, optimizer)
        clamped = losses.clamp_log_lambda(learner.params, minimum=config.minimum, maximum=config.maximum)
        return MultiplierState(learner=dataclasses.replace(learner, params=clamped), cost_average=average)

    return Multiplier(init, update, limit)
