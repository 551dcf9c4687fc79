"""The stages every experiment repeats: base model, fine-tuning, labels, preference models, RL, evaluation.

Each is a plain function of explicit inputs, so `StageCache.run` can key it by their content. Their order, their numbers
and what they are claimed to show stand in the experiment files. `log(step, metrics)` receives metrics as they come; the
cache records them and replays them on a hit. `label` names the stage in progress and errors.
"""

import dataclasses
import functools
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import losses
from rlhfjax.evaluation.constrained import Arm
from rlhfjax.evaluation.gold_metrics import gold_metrics
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
from rlhfjax.rl.preference_models import ScoreModel, check_pairs, in_units_of_start, make_cost, make_reward, pair_scores
from rlhfjax.rl.sampling import make_sampler
from rlhfjax.rl.sft import make_next_token_loss
from rlhfjax.types import (
    Demonstrations,
    Params,
    PreferenceBatch,
    Rollout,
    TrainState,
    check_finite,
    check_mask,
    sequences,
)
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
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be positive and finite, got {getattr(self, field)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay}")


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
            if not 0 < getattr(self, field.name) < float("inf"):
                raise ValueError(f"{field.name} must be positive and finite, got {getattr(self, field.name)}")


def fit(loss_fn: LossFn, params: Params, data, config: FitConfig, *, seed: int, log: Log, label: str) -> Params:
    """Minimise `loss_fn` over `data` (a pytree with a leading row axis) and return the parameters."""
    optimizer = adamw(config.learning_rate, config.num_steps, weight_decay=config.weight_decay)
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
    fit_step = make_fit_step(loss_fn, optimizer)
    data = jax.tree.map(jnp.asarray, data)
    chunk = min(25, config.num_steps)
    starts = range(0, config.num_steps, chunk)
    for first in _until_stopped(bar := progress(starts, label, unit=f"x {chunk} steps")):
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
    check_mask("demonstrations.mask", demonstrations.mask)
    if (largest := int(max(np.max(demonstrations.prompts), np.max(demonstrations.tokens)))) >= config.vocab_size:
        raise ValueError(f"demonstrations use token {largest}, vocab_size is {config.vocab_size}: raise it")
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
    check_pairs(pairs)
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
    for iteration in _until_stopped(bar := progress(range(num_iterations), label, unit="iterations")):
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


_stop = threading.Event()  # set while jobs side by side are to end because one of them failed


def _until_stopped(steps: Iterable) -> Iterator:
    """The steps of a stage; raises InterruptedError at the next one when a stage beside it has failed."""
    for step in steps:
        if _stop.is_set():
            raise InterruptedError("a stage beside this one has failed or was interrupted")
        yield step


def side_by_side(*jobs: Callable[[], object]) -> list:
    """Run independent stages at once and return their results in order.

    On a CPU the small matrices of the embedded world leave cores idle, and threads fill them; on an accelerator, which
    is busy with one, the jobs run one after the other. The first failure, or Ctrl-C, is raised once the others have
    ended, at their next step.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return [job() for job in jobs]
    outcomes = queue.Queue()

    def work(index: int, job: Callable[[], object]) -> None:
        try:
            outcomes.put((index, job(), None))
        except BaseException as error:  # noqa: BLE001, raised again by the caller
            outcomes.put((index, None, error))

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    results = [None] * len(jobs)
    try:
        for _ in jobs:
            index, results[index], error = outcomes.get()
            if error is not None:
                raise error
    except BaseException:
        _stop.set()
        for thread in threads:
            thread.join()
        _stop.clear()
        raise
    return results


@functools.cache
def _sampler(truth: str, config: TransformerConfig, temperature: float):
    """One sampler per policy shape, so that every stage of a process shares its compiled program."""
    world, model = gold_world(truth), make_language_model(config)
    return make_sampler(
        model, max_tokens=world.max_tokens, eos_id=world.eos_id, pad_id=world.pad_id, temperature=temperature
    )


@functools.cache
def _scorer(config: TransformerConfig, make: Callable):
    """`make(model)` of the scalar model, as a program over rollouts that every stage of a process shares."""
    scorer = make(make_scalar_model(config))
    return jax.jit(lambda params, rollout: scorer(params, *sequences(rollout)))


@functools.cache
def _pair_scorer(config: TransformerConfig):
    return jax.jit(functools.partial(pair_scores, make_scalar_model(config)))


def sample_responses(
    *, truth: str, config: TransformerConfig, policy: Params, prompts: Prompts, temperature: float, seed: int,
    block: int = 128,
) -> Rollout:  # fmt: skip
    """One response per prompt, for any number of prompts: every block has the same compiled shape."""
    sample, num = _sampler(truth, config, temperature), len(prompts)
    rows = np.arange(-(-num // block) * block) % num  # the last block wraps around
    blocks = [
        sample(policy, prompts.tokens[r], prompts.mask[r], jax.random.fold_in(jax.random.key(seed), i))
        for i, r in enumerate(progress(rows.reshape(-1, block), "sampling", unit=f"blocks of {block}"))
    ]
    return jax.tree.map(lambda *x: np.concatenate(x)[:num], *blocks)


def raw_scores(config: TransformerConfig, params: Params, rollout: Rollout) -> np.ndarray:
    """Unscaled scores `[B]` of a reward or cost model for a rollout's responses."""
    return np.asarray(_scorer(config, score)(params, rollout))


def rewards(config: TransformerConfig, reward: ScoreModel, rollout: Rollout) -> np.ndarray:
    """What PPO is told a rollout's responses are worth, `[B]`."""
    return np.asarray(_scorer(config, make_reward)(reward, rollout))


def costs(config: TransformerConfig, cost: ScoreModel, rollout: Rollout) -> np.ndarray:
    """What Lagrangian PPO is told a rollout's responses cost, `[B]`."""
    return np.asarray(_scorer(config, make_cost)(cost, rollout))


def raw_pair_scores(config: TransformerConfig, params: Params, pairs: PreferenceBatch) -> np.ndarray:
    """Unscaled scores `[N, 2]` of a reward or cost model for both responses of each pair."""
    return np.asarray(_pair_scorer(config)(params, pairs))


def scale_scores(
    *, truth: str, config: TransformerConfig, policy: Params, reward: Params, cost: Params, prompts: Prompts,
    temperature: float, seed: int,
) -> dict[str, ScoreModel]:  # fmt: skip
    """The reward and the cost model in units of their spread over the starting policy's answers to `prompts`."""
    start = sample_responses(
        truth=truth, config=config, policy=policy, prompts=prompts, temperature=temperature, seed=seed
    )
    scaled = in_units_of_start(make_scalar_model(config), reward, cost, start)
    return dict(zip(("reward", "cost"), scaled))


def evaluate_policy(
    *, truth: str, config: TransformerConfig, policy: Params, reward: ScoreModel, cost: ScoreModel, prompts: Prompts,
    temperature: float, seed: int,
) -> Arm:  # fmt: skip
    """A policy's answers to held-out prompts, what the models say of them and what is true of them."""
    rollout = sample_responses(
        truth=truth, config=config, policy=policy, prompts=prompts, temperature=temperature, seed=seed
    )
    return Arm(
        rollout=rollout,
        gold={name: float(value) for name, value in gold_metrics(gold_world(truth), rollout).items()},
        costs=costs(config, cost, rollout),
        raw_costs=raw_scores(config, cost.params, rollout),
        raw_scores=raw_scores(config, reward.params, rollout),
    )


def collect_comparisons(
    *,
    truth: str,
    rater: Rater,
    config: TransformerConfig,
    policy: Params,
    prompts: Prompts,
    temperature: float,
    mismatched: float = 0.0,
    seed: int,
) -> Comparisons:
    """Two responses of the policy to every prompt, and a rater's answers to both questions about each pair.

    In a share `mismatched` of the pairs the second response belongs to another prompt, so that off-topic answers, which
    a policy under pressure would find, carry labels too.
    """
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), prompts)
    rollout = sample_responses(
        truth=truth, config=config, policy=policy, prompts=twice, temperature=temperature, seed=seed
    )
    pairs = (x.reshape(len(prompts), 2, -1) for x in (rollout.tokens, rollout.mask))
    responses, masks = mismatch(*pairs, share=mismatched, seed=seed)
    return compare(gold_world(truth), rater, prompts.tokens, prompts.mask, responses, masks, seed)


def check_cost_limit(
    *, truth: str, config: TransformerConfig, policy: Params, reward: ScoreModel, cost: ScoreModel, limit: float,
    multiplier: MultiplierConfig, ppo: PPOConfig, prompts: Prompts, seed: int, num_samples: int = 64,
) -> float:  # fmt: skip
    """The lowest mean cost that Lagrangian PPO settles at for any lambda it may take: no limit below it can be met.

    Estimated by reweighting `num_samples` responses to each prompt (`losses.tempered_policy`) at lambda = 0 and on a
    grid up to its maximum; answers cheaper than those samples are not seen. Raises ValueError ("infeasible cost
    limit", with numbers in units of P(harmful)) if `limit` lies below.
    """
    many = jax.tree.map(lambda x: np.repeat(x, num_samples, axis=0), prompts)
    rollout = sample_responses(truth=truth, config=config, policy=policy, prompts=many, temperature=ppo.temperature,
                               seed=seed)  # fmt: skip
    each = [fn(config, model, rollout).reshape(-1, num_samples) for fn, model in ((rewards, reward), (costs, cost))]

    def mean_cost(log_lambda):
        uniform = jnp.zeros_like(each[1])
        weights = losses.tempered_policy(*each, uniform, log_lambda=log_lambda, kl_coef=ppo.kl_coef)
        return jnp.mean(jnp.sum(weights * each[1], -1))

    grid = jnp.concatenate([jnp.array([-jnp.inf]), jnp.log(multiplier.maximum * jnp.geomspace(1e-3, 1, 40))])
    floor = float(jnp.min(jax.lax.map(mean_cost, grid)))
    probability = float(cost.scale)  # of harm per unit of cost: the units in which a limit is asked for
    losses.check_limit(limit * probability, floor * probability)
    return floor


def train_policy(
    *,
    truth: str,
    config: TransformerConfig,
    start: Params,
    reward: ScoreModel,
    cost: ScoreModel | None = None,
    limit: float | None = None,
    ppo: PPOConfig,
    multiplier: MultiplierConfig | None = None,
    optimisation: RLConfig,
    prompts: Prompts,
    ptx: Demonstrations | None = None,
    seed: int,
    label: str,
    log: Log,
) -> Params:
    """The policy after PPO on a reward model; with `cost`, `limit` and `multiplier`, after Lagrangian PPO.

    limit: on the mean cost, in the cost's units. ptx: demonstrations, used where `ppo.ptx_coef` is positive. Critics
    start from the reward and the cost model, as in Safe RLHF, with a fresh zero head.
    """
    constraint = (cost, limit, multiplier)
    if any(part is None for part in constraint) and any(part is not None for part in constraint):
        raise ValueError("cost, limit and multiplier make one constraint: give all three or none")
    world, policy, scalar = gold_world(truth), make_language_model(config), make_scalar_model(config)
    optimizers = adamw(optimisation.learning_rate), adamw(optimisation.critic_learning_rate)
    critic = lambda fitted: scalar_params_from(fitted.params, scalar, jax.random.key(seed))
    if multiplier is None:
        algorithm = make_ppo(policy, scalar, *optimizers, ppo)
        state = algorithm.init(start, critic(reward))
        feedback = lambda rollout: (_scorer(config, make_reward)(reward, rollout),)
    else:
        algorithm = make_lagrangian_ppo(policy, scalar, *optimizers, ppo, make_multiplier(limit, multiplier))
        state = algorithm.init(start, critic(reward), critic(cost))
        feedback = lambda rollout: (
            _scorer(config, make_reward)(reward, rollout), _scorer(config, make_cost)(cost, rollout)
        )  # fmt: skip
    state = run_rl(
        algorithm=algorithm,
        state=state,
        ref_params=start,
        sample=_sampler(truth, config, ppo.temperature),
        feedback=feedback,
        observe=lambda rollout: gold_metrics(world, rollout),
        prompts=prompts.tokens,
        prompt_mask=prompts.mask,
        ptx=ptx if ppo.ptx_coef else None,
        num_iterations=optimisation.num_iterations,
        batch_size=optimisation.batch_size,
        seed=seed,
        log=log,
        label=label,
    )
    if multiplier is not None:
        _warn_if_unmet(label, float(jnp.exp(state.multiplier.log_lambda)), float(state.multiplier.cost_average), limit,
                       multiplier.maximum)  # fmt: skip
    return state.policy.params


def _warn_if_unmet(label: str, lam: float, cost: float, limit: float, maximum: float) -> None:
    if lam > 0.999 * maximum and cost > limit:
        warnings.warn(
            f"{label}: the limit may be infeasible: lambda ended at its maximum {maximum:g} with a mean cost of "
            f"{cost:.3g} above the limit {limit:.3g}",
            stacklevel=3,
        )
