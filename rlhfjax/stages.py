"""The stages every experiment repeats: base model, fine-tuning, labels, preference models, RL, evaluation.

Each is a plain function of explicit inputs, so `StageCache.run` can key it by their content. Their order, their numbers
and what they are claimed to show stand in the experiment files. `log(step, metrics)` receives metrics as they come;
the cache records them and replays them on a hit.
"""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.io.run import progress
from rlhfjax.models.transformer import TransformerConfig, make_language_model, make_scalar_model, scalar_params_from
from rlhfjax.rl.fit import LossFn, adamw, batch_order, make_fit_step
from rlhfjax.rl.ppo import Algorithm
from rlhfjax.rl.sampling import make_sampler
from rlhfjax.rl.sft import make_next_token_loss
from rlhfjax.types import Demonstrations, Params, PreferenceBatch, Rollout, TrainState, check_finite

Log = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a supervised stage is optimised."""

    num_steps: int
    """Optimiser steps."""
    batch_size: int = 32
    """Demonstrations or pairs per step."""
    learning_rate: float = 1e-3
    """Peak of the cosine schedule."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices."""

    def __post_init__(self):
        for field in ("num_steps", "batch_size", "learning_rate"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")


def fit(loss_fn: LossFn, params: Params, data, config: FitConfig, *, seed: int, log: Log, name: str) -> Params:
    """Minimise `loss_fn` over `data` (a pytree with a leading row axis) and return the parameters."""
    optimizer = adamw(config.learning_rate, config.num_steps, weight_decay=config.weight_decay)
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
    fit_step = make_fit_step(loss_fn, optimizer)
    data = jax.tree.map(jnp.asarray, data)
    chunk = min(25, config.num_steps)
    starts = range(0, config.num_steps, chunk)
    for first in (bar := progress(starts, name, unit=f"{chunk} steps")):
        count = min(chunk, config.num_steps - first)
        rows = batch_order(seed, first, count, len(data), config.batch_size)
        state, metrics = fit_step(state, data, rows)
        metrics = {key: float(value) for key, value in metrics.items()}
        check_finite(f"{name}: loss", metrics["loss"], f" (steps {first} to {first + count}): lower the learning rate")
        log(first + count, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
    return state.params


def train_language_model(
    *,
    config: TransformerConfig,
    demonstrations: Demonstrations,
    optimisation: FitConfig,
    seed: int,
    start: Params | None = None,
    log: Log,
) -> Params:
    """A base model from scratch (all tokens count), or supervised fine-tuning from `start` (responses count)."""
    model = make_language_model(config)
    loss_fn = make_next_token_loss(model, prompts=start is None)
    params = model.init(jax.random.key(seed)) if start is None else start
    return fit(loss_fn, params, demonstrations, optimisation, seed=seed, log=log,
               name="base language model" if start is None else "fine-tuning")


def fit_preference_model(
    *,
    config: TransformerConfig,
    start: Params,
    pairs: PreferenceBatch,
    make_loss: Callable,
    optimisation: FitConfig,
    seed: int,
    log: Log,
) -> Params:
    """A reward or cost model (`make_loss` from `rl.preference_models`) from a language model's trunk and a zero head."""
    model = make_scalar_model(config)
    params = scalar_params_from(start, model, jax.random.key(seed))
    return fit(make_loss(model), params, pairs, optimisation, seed=seed, log=log, name="preference model")


def sample_all(sample: Callable, params: Params, prompts, prompt_mask, *, seed: int, block: int) -> Rollout:
    """Responses to any number of prompts through one compiled block size (the last block wraps around)."""
    num = len(prompts)
    rows = np.arange(-(-num // block) * block) % num
    blocks = [
        sample(params, prompts[r], prompt_mask[r], jax.random.fold_in(jax.random.key(seed), i))
        for i, r in enumerate(rows.reshape(-1, block))
    ]
    return jax.tree.map(lambda *x: np.concatenate(x)[:num], *blocks)


def run_rl(
    *,
    algorithm: Algorithm,
    state,
    ref_params: Params,
    sample: Callable,
    feedback: Callable[[Rollout], tuple[jax.Array, ...]],
    prompts,
    prompt_mask,
    num_iterations: int,
    batch_size: int,
    seed: int,
    log: Log,
    name: str,
    observe: Callable[[Rollout], Mapping[str, jax.Array]] = lambda rollout: {},
    ptx: Demonstrations | None = None,
):
    """The loop of every paper: prompts -> rollout -> feedback(rollout) -> step. Returns the last state.

    `feedback(rollout)` gives what `algorithm.step` takes behind the rollout (scores, or scores and costs);
    `observe(rollout)` gives further metrics for the log and never reaches the learner.
    """
    step = jax.jit(algorithm.step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, state)  # donated: the caller's networks (the reference too) must survive
    base_key = jax.random.key(seed)
    for iteration in (bar := progress(range(num_iterations), name, unit="iterations")):
        rows = batch_order(seed, iteration, 1, len(prompts), batch_size)[0]
        sample_key, step_key = jax.random.split(jax.random.fold_in(base_key, iteration))
        rollout = sample(state.policy.params, prompts[rows], prompt_mask[rows], sample_key)
        signals = feedback(rollout)
        for label, signal in zip(("scores", "costs"), signals):
            check_finite(f"{name}: {label}", signal, f" (iteration {iteration})")
        batch = None
        if ptx is not None:
            batch = jax.tree.map(lambda x: x[batch_order(seed + 1, iteration, 1, len(ptx), batch_size)[0]], ptx)
        observed = observe(rollout)
        state, metrics = step(state, ref_params, rollout, *signals, key=step_key, ptx=batch)
        metrics = {key: float(value) for key, value in {**metrics, **observed}.items()}
        check_finite(f"{name}: policy loss", metrics["policy_loss"], f" (iteration {iteration})")
        log(iteration, metrics)
        shown = ("score", "cost", "lambda", "kl")
        bar.set_postfix({key: f"{metrics[key]:.3f}" for key in shown if key in metrics})
    return state


def side_by_side(*jobs: Callable[[], object]) -> list:
    """Run independent stages at once and return their results in order.

    On a CPU the small matrices of the embedded world leave cores idle, and threads fill them. Elsewhere the jobs run
    one after the other: an accelerator is busy already, and hosts of a pod must launch their programs in one order.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]
