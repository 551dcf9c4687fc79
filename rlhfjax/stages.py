"""The stages every experiment repeats: base model, fine-tuning, labels, preference models, RL, evaluation.

Each is a plain function of explicit inputs, so `StageCache.run` can key it by their content. Their order, their numbers
and what they are claimed to show stand in the experiment files. `log(step, metrics)` receives metrics as they come;
the cache records them and replays them on a hit. `label` names the stage
in progress and errors.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import losses
from rlhfjax.evaluation.behaviour import behaviour
from rlhfjax.feedback.raters import Comparisons, Rater, compare, mismatch
from rlhfjax.io.run import progress
from rlhfjax.models.transformer import (
    TransformerConfig,
    make_language_model,
    make_scalar_model,
    scalar_params_from,
    score,
)
from rlhfjax.rl.fit import LossFn, adamw, batch_order, make_fit_step
from rlhfjax.rl.multiplier import MultiplierConfig, make_multiplier
from rlhfjax.rl.ppo import Algorithm, PPOConfig, make_lagrangian_ppo, make_ppo
from rlhfjax.rl.preference_models import ScoreModel, make_cost, make_reward, pair_scores
from rlhfjax.rl.sampling import make_sampler
from rlhfjax.rl.sft import make_next_token_loss
from rlhfjax.types import Demonstrations, Params, PreferenceBatch, Rollout, TrainState, check_finite, sequences
from rlhfjax.worlds.gold_world import gold_world
from rlhfjax.worlds.language import Prompts

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """How a policy is optimised."""

    num_iterations: int
    """Rollout batches."""
    batch_size: int = 128
    """Prompts per rollout batch."""
    learning_rate: float = 6e-4
    """Of the policy, constant."""
    critic_learning_rate: float = 5e-4
    """Of the critics, constant."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")


def fit(loss_fn: LossFn, params: Params, data, config: FitConfig, *, seed: int, log: Log, label: str) -> Params:
    """Minimise `loss_fn` over `data` (a pytree with a leading row axis) and return the parameters."""
    optimizer = adamw(config.learning_rate, config.num_steps, weight_decay=config.weight_decay)
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
    fit_step = make_fit_step(loss_fn, optimizer)
    data = jax.tree.map(jnp.asarray, data)
    chunk = min(25, config.num_steps)
    starts = range(0, config.num_steps, chunk)
    for first in (bar := progress(starts, label, unit=f"{chunk} steps")):
        count = min(chunk, config.num_steps - first)
        rows = batch_order(seed, first, count, len(data), config.batch_size)
        state, metrics = fit_step(state, data, rows)
        metrics = {key: float(value) for key, value in metrics.items()}
        check_finite(f"{label}: loss", metrics["loss"], f" (steps {first} to {first + count}): lower the learning rate")
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
    label: str,
    log: Log,
) -> Params:
    """A base model from scratch (all tokens count), or supervised fine-tuning from `start` (responses count)."""
    model = make_language_model(config)
    loss_fn = make_next_token_loss(model, prompts=start is None)
    params = model.init(jax.random.key(seed)) if start is None else start
    return fit(loss_fn, params, demonstrations, optimisation, seed=seed, log=log, label=label)


def fit_preference_model(
    *,
    config: TransformerConfig,
    start: Params,
    pairs: PreferenceBatch,
    make_loss: Callable,
    optimisation: FitConfig,
    seed: int,
    label: str,
    log: Log,
) -> Params:
    """A reward or cost model (`make_loss`: see `rl.preference_models`): a language model's trunk with a zero head."""
    model = make_scalar_model(config)
    params = scalar_params_from(start, model, jax.random.key(seed))
    return fit(make_loss(model), params, pairs, optimisation, seed=seed, log=log, label=label)


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
    label: str,
    observe: Callable[[Rollout], Mapping[str, jax.Array]] = lambda rollout: {},
    ptx: Demonstrations | None = None,
):
    """The loop of every paper: prompts -> rollout -> feedback(rollout) -> step. Returns the last state.

    `feedback(rollout)` gives what `algorithm.step` takes behind the rollout (scores, or scores and costs);
    `observe(rollout)` gives further metrics for the log and never reaches the learner.
    """
    step = jax.jit(algorithm.step, donate_argnums=0)
    take = lambda data, rows: jax.tree.map(lambda x: x[rows], data)
    state = jax.tree.map(jnp.copy, state)  # donated: the caller's networks (the reference too) must survive
    base_key = jax.random.key(seed)
    for iteration in (bar := progress(range(num_iterations), label, unit="iterations")):
        rows = batch_order(seed, iteration, 1, len(prompts), batch_size)[0]
        sample_key, step_key = jax.random.split(jax.random.fold_in(base_key, iteration))
        rollout = sample(state.policy.params, prompts[rows], prompt_mask[rows], sample_key)
        signals = feedback(rollout)
        for kind, signal in zip(("scores", "costs"), signals):
            check_finite(f"{label}: {kind}", signal, f" (iteration {iteration})")
        observed = observe(rollout)
        batch = ptx and take(ptx, batch_order(seed + 1, iteration, 1, len(ptx), batch_size)[0])
        state, metrics = step(state, ref_params, rollout, *signals, key=step_key, ptx=batch)
        metrics = {key: float(value) for key, value in {**metrics, **observed}.items()}
        check_finite(f"{label}: policy loss", metrics["policy_loss"], f" (iteration {iteration})")
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


@functools.cache
def _sampler(truth: str, config: TransformerConfig, temperature: float = 1.0):
    """One sampler per policy shape, so that every stage of a process shares its compiled program."""
    world, model = gold_world(truth), make_language_model(config)
    return make_sampler(
        model, max_tokens=world.max_tokens, eos_id=world.eos_id, pad_id=world.pad_id, temperature=temperature
    )


@functools.cache
def _scorer(config: TransformerConfig):
    raw = score(make_scalar_model(config))
    return jax.jit(lambda params, rollout: raw(params, *sequences(rollout)))


def sample_responses(
    *, truth: str, config: TransformerConfig, policy: Params, prompts: Prompts, seed: int, block: int = 128
) -> Rollout:
    """One response per prompt at temperature 1, for any number of prompts: every block has the same compiled shape."""
    sample, num = _sampler(truth, config), len(prompts)
    rows = np.arange(-(-num // block) * block) % num  # the last block wraps around
    blocks = [
        sample(policy, prompts.tokens[r], prompts.mask[r], jax.random.fold_in(jax.random.key(seed), i))
        for i, r in enumerate(rows.reshape(-1, block))
    ]
    return jax.tree.map(lambda *x: np.concatenate(x)[:num], *blocks)


def raw_scores(config: TransformerConfig, params: Params, rollout: Rollout) -> np.ndarray:
    """Unscaled scores `[B]` of a reward or cost model for a rollout's responses."""
    return np.asarray(_scorer(config)(params, rollout))


def raw_pair_scores(config: TransformerConfig, params: Params, pairs: PreferenceBatch) -> np.ndarray:
    """Unscaled scores `[N, 2]` of a reward or cost model for both responses of each pair."""
    return np.asarray(jax.jit(pair_scores, static_argnums=0)(make_scalar_model(config), params, pairs))


def collect_comparisons(
    *,
    truth: str,
    rater: Rater,
    config: TransformerConfig,
    policy: Params,
    prompts: Prompts,
    mismatched: float = 0.0,
    seed: int,
) -> Comparisons:
    """Two responses of the policy to every prompt, and a rater's answers to both questions about each pair.

    In a share `mismatched` of the pairs the second response belongs to another prompt, so that off-topic answers, which
    a policy under pressure would find, carry labels too.
    """
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), prompts)
    rollout = sample_responses(truth=truth, config=config, policy=policy, prompts=twice, seed=seed)
    pairs = (x.reshape(len(prompts), 2, -1) for x in (rollout.tokens, rollout.mask))
    responses, masks = mismatch(*pairs, share=mismatched, seed=seed)
    return compare(gold_world(truth), rater, prompts.tokens, prompts.mask, responses, masks, seed)


def check_cost_limit(
    *, truth: str, config: TransformerConfig, policy: Params, cost: ScoreModel, limit: float, kl_coef: float,
    prompts: Prompts, seed: int, num_samples: int = 16,
) -> float:  # fmt: skip
    """The lowest mean cost in reach of a policy held by `kl_coef`, from `num_samples` responses to each prompt.

    Raises ValueError ("infeasible cost limit") if `limit` lies below it: no multiplier could ever meet it.
    """
    many = jax.tree.map(lambda x: np.repeat(x, num_samples, axis=0), prompts)
    rollout = sample_responses(truth=truth, config=config, policy=policy, prompts=many, seed=seed)
    costs = make_cost(make_scalar_model(config))(cost, *sequences(rollout)).reshape(-1, num_samples)
    floor = float(jnp.mean(losses.reachable_cost(costs, jnp.zeros_like(costs), kl_coef=kl_coef)))
    losses.check_limit(limit, floor)
    return floor


def train_policy(
    *,
    truth: str,
    config: TransformerConfig,
    start: Params,
    reward: ScoreModel,
    cost: ScoreModel | None = None,
    ppo: PPOConfig,
    multiplier: MultiplierConfig | None = None,
    optimisation: RLConfig,
    prompts: Prompts,
    seed: int,
    label: str,
    log: Log,
) -> Params:
    """The policy after PPO on a reward model, or with `multiplier` Lagrangian PPO with a limit on a cost model's costs.

    Critics start from the reward and the cost model, as in Safe RLHF, with a fresh zero head.
    """
    world, policy, scalar = gold_world(truth), make_language_model(config), make_scalar_model(config)
    optimizers = adamw(optimisation.learning_rate), adamw(optimisation.critic_learning_rate)
    critic = lambda fitted: scalar_params_from(fitted.params, scalar, jax.random.key(seed))
    if multiplier is None:
        algorithm = make_ppo(policy, scalar, *optimizers, ppo)
        state = algorithm.init(start, critic(reward))
    else:
        algorithm = make_lagrangian_ppo(policy, scalar, *optimizers, ppo, make_multiplier(multiplier))
        state = algorithm.init(start, critic(reward), critic(cost))
    scorers = [(make_reward(scalar), reward)] + ([(make_cost(scalar), cost)] if multiplier else [])

    @jax.jit
    def judge(fitted, rollout: Rollout):
        return tuple(scorer(model, *sequences(rollout)) for (scorer, _), model in zip(scorers, fitted))

    state = run_rl(
        algorithm=algorithm,
        state=state,
        ref_params=start,
        sample=_sampler(truth, config, ppo.temperature),
        feedback=lambda rollout: judge([model for _, model in scorers], rollout),
        observe=lambda rollout: behaviour(world, rollout),
        prompts=prompts.tokens,
        prompt_mask=prompts.mask,
        num_iterations=optimisation.num_iterations,
        batch_size=optimisation.batch_size,
        seed=seed,
        log=log,
        label=label,
    )
    return state.policy.params
