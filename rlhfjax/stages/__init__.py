"""The stages every experiment repeats: base model, fine-tuning, labels, preference models, RL, evaluation.

Each is a plain function of explicit inputs, so `StageCache.run` can key it by their content. Their order, their numbers
and what they are claimed to show stand in the experiment files. `monitor` receives metrics as they come, saves and
resumes; the cache records the metrics and replays them on a hit. `label` names the stage in progress and errors.

Between stages everything is whole and on the host (NumPy, the same on every process); within a stage it lies on the
devices of the mesh, as `parallel.mesh` says.
"""

import dataclasses
import functools
import os
import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import losses
from rlhfjax.evaluation.gold_metrics import gold_metrics
from rlhfjax.feedback.raters import Comparisons, Rater, compare, mismatch
from rlhfjax.feedback.self_play import MANNERS, Population, manners, sibling_preferences
from rlhfjax.io.monitor import Clock, Monitor, given_up, progress
from rlhfjax.masked import masked_sum
from rlhfjax.models.lora import IN_FULL, LoraConfig, adapt, bind, combine, merge
from rlhfjax.models.transformer import (
    Model,
    TransformerConfig,
    make_language_model,
    make_scalar_model,
    scalar_params_from,
)
from rlhfjax.parallel import mesh
from rlhfjax.rl.fit import LossFn, adamw, batch_order, make_fit_step, take, with_frozen
from rlhfjax.rl.multiplier import MultiplierConfig, make_multiplier
from rlhfjax.rl.ppo import Algorithm, PPOConfig, make_lagrangian_ppo, make_ppo
from rlhfjax.rl.preference_models import ScoreModel, check_pairs, in_units_of_start, make_score, pair_scores
from rlhfjax.rl.sampling import make_sampler, response_logprobs
from rlhfjax.rl.self_play import make_iterated_reward, make_self_play
from rlhfjax.rl.sft import make_next_token_loss
from rlhfjax.types import (
    Demonstrations,
    Params,
    PreferenceBatch,
    Rollout,
    TrainState,
    check_finite,
    check_mask,
    check_shapes,
)
from rlhfjax.worlds.language import Prompts
from rlhfjax.worlds.recorded import World


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

    def check_rows(self, **counts: int) -> None:
        """Raise unless each of these numbers of rows fills a batch."""
        for name, num in counts.items():
            if num < (size := self.batch_size):
                raise ValueError(f"{name} is {num}, which cannot fill a batch of {size}: lower that batch_size")


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


def fit(
    loss_fn: LossFn, params: Params, data, config: FitConfig, *, axes=None, frozen: tuple = (), seed: int,
    monitor: Monitor, label: str,
) -> Params:  # fmt: skip
    """Minimise `loss_fn` over `data` (a pytree of host arrays with a leading row axis) and return the parameters.

    axes: the logical axes of `params`; only a mesh needs them. frozen: placed parameters that `loss_fn` takes besides.
    """
    optimizer = adamw(config.learning_rate, config.num_steps, weight_decay=config.weight_decay)
    start = lambda params: TrainState.create(jax.tree.map(jnp.copy, params), optimizer)  # donated: a copy
    state = mesh.create(start, mesh.place(params, axes), axes=axes)
    fit_step = mesh.jit_step(make_fit_step(loss_fn, optimizer), state, axes)
    stride = min(25, config.num_steps)

    def step(state: TrainState, first: int, clock: Clock):
        rows = batch_order(seed, first, min(stride, config.num_steps - first), len(data), config.batch_size)
        return fit_step(state, mesh.place_rows(take(data, rows), axis=1), *frozen)

    state = monitor.train(step, state, config.num_steps, label=label, stride=stride)
    return mesh.fetch(state.params)


def train_language_model(
    *,
    config: TransformerConfig,
    demonstrations: Demonstrations,
    optimisation: FitConfig,
    seed: int,
    start: Params | None = None,
    lora: LoraConfig = IN_FULL,
    label: str,
    monitor: Monitor,
) -> Params:
    """A base model from scratch (all tokens count), or supervised fine-tuning from `start` (responses count).

    lora: fine-tune low-rank changes of `start`, which are merged into the result.
    """
    check_shapes(demonstrations, prompt_mask=demonstrations.prompts.shape, mask=demonstrations.tokens.shape,
                 prompts=(len(demonstrations), demonstrations.prompts.shape[1]))  # fmt: skip
    check_mask("demonstrations.prompt_mask", demonstrations.prompt_mask, padded="left")
    check_mask("demonstrations.mask", demonstrations.mask, padded="right")
    if (largest := int(max(np.max(demonstrations.prompts), np.max(demonstrations.tokens)))) >= config.vocab_size:
        raise ValueError(f"demonstrations use token {largest}, vocab_size is {config.vocab_size}: raise it")
    model, key = make_language_model(config), jax.random.key(seed)
    make_loss = functools.partial(make_next_token_loss, prompts=start is None)
    fit_it = functools.partial(fit, data=demonstrations, config=optimisation, seed=seed, monitor=monitor, label=label)
    if lora.rank:
        if start is None:
            raise ValueError("lora changes a model that is there already: give `start`, or train in full")
        frozen = mesh.place(start, model.logical_axes())
        return _whole(adapt(model, lora), frozen, _fit_changes(fit_it, make_loss, adapt(model, lora), frozen, key))
    axes = model.logical_axes()
    params = mesh.create(model.init, key, axes=axes) if start is None else start
    return fit_it(make_loss(model), params, axes=axes)


def _fit_changes(fit_it: Callable, make_loss: Callable, learner: Model, frozen: Params, key: jax.Array) -> Params:
    """Low-rank changes of `frozen`, fitted from none."""
    axes = learner.logical_axes()
    return fit_it(with_frozen(make_loss, learner), mesh.create(learner.init, key, axes=axes), axes=axes,
                  frozen=(frozen,))  # fmt: skip


def _whole(learner: Model, frozen: Params, params: Params) -> Params:
    """The weights of a learner, with its changes merged into those beneath them, on the host."""
    if learner.base is None:
        return mesh.fetch(params)
    layout = mesh.shardings(jax.eval_shape(functools.partial(merge, learner), frozen, params),
                            learner.base.logical_axes())  # fmt: skip
    return mesh.fetch(jax.jit(functools.partial(merge, learner), out_shardings=layout)(frozen, params))


def fit_preference_model(
    *,
    config: TransformerConfig,
    start: Params,
    pairs: PreferenceBatch,
    make_loss: Callable,
    optimisation: FitConfig,
    lora: LoraConfig = IN_FULL,
    seed: int,
    label: str,
    monitor: Monitor,
) -> Params:
    """A reward or cost model (`make_loss`: see `rl.preference_models`): a language model's trunk with a zero head.

    lora: fit low-rank changes of `start` and the head, and return them alone.
    """
    check_pairs(pairs)
    model, key = make_scalar_model(config), jax.random.key(seed)
    axes, trunk = model.logical_axes(), mesh.place(start, make_language_model(config).logical_axes())
    fit_it = functools.partial(fit, data=pairs, config=optimisation, seed=seed, monitor=monitor, label=label)
    if lora.rank:
        return _fit_changes(fit_it, make_loss, adapt(model, lora), trunk, key)
    warm = lambda trunk, key: scalar_params_from(trunk, model, key)
    return fit_it(make_loss(model), mesh.create(warm, trunk, key, axes=axes), axes=axes)


def run_rl(
    *,
    algorithm: Algorithm,
    params: tuple,
    ref_params: Params,
    sample: Callable,
    feedback: Callable[[Rollout, jax.Array], tuple[jax.Array, ...]],
    prompts,
    prompt_mask,
    num_iterations: int,
    batch_size: int,
    num_samples: int = 1,
    seed: int,
    monitor: Monitor,
    label: str,
    observe: Callable[[Rollout], Mapping[str, jax.Array]] = lambda rollout: {},
    ptx: Demonstrations | None = None,
):
    """The loop of every paper: prompts -> rollout -> feedback(rollout, key) -> step. Returns the last state.

    `params` are what `algorithm.init` takes. `feedback(rollout, key)` gives what `algorithm.step` takes behind the
    rollout (scores, or scores and costs); `observe(rollout)` gives further metrics for the log and never reaches the
    learner. A batch has `batch_size` responses, `num_samples` next to each other for each of its prompts. The policy is
    laid out anew for decoding once per iteration.
    """
    check_mask("prompt_mask", prompt_mask, padded="left")
    if batch_size % num_samples:
        raise ValueError(f"batch_size {batch_size} is no multiple of num_samples {num_samples}")
    axes = algorithm.logical_axes()
    init = lambda *params: jax.tree.map(jnp.copy, algorithm.init(*params))  # donated: the caller's networks survive
    state = mesh.create(init, *params, axes=axes)
    update = mesh.jit_step(algorithm.step, state, axes)
    for_decoding = _decoding_layout(algorithm.policy, axes.get("policy"), ref_params, state.policy.params)
    two = lambda key: (*jax.random.split(key), jax.random.fold_in(key, 2))
    keys = jax.jit(lambda key, iteration: two(jax.random.fold_in(key, iteration)))
    base_key = jax.random.key(seed)

    def step(state, iteration: int, clock: Clock):
        rows = np.repeat(batch_order(seed, iteration, 1, len(prompts), batch_size // num_samples)[0], num_samples)
        sample_key, step_key, feedback_key = keys(base_key, jax.device_put(np.int32(iteration)))
        with clock("rollout"):
            rollout = sample(for_decoding(ref_params, state.policy.params),
                             *mesh.place_rows(take((prompts, prompt_mask), rows)), sample_key)  # fmt: skip
            jax.block_until_ready(rollout)
        with clock("feedback"):
            signals = feedback(rollout, feedback_key)
            if not isinstance(signals, tuple):
                raise TypeError(f"feedback must return a tuple, (scores,) or (scores, costs), not {type(signals)}")
            for kind, signal in zip(("scores", "costs"), signals):
                check_finite(kind, signal)
        observed = observe(rollout)
        batch = ptx and mesh.place_rows(take(ptx, batch_order(seed + 1, iteration, 1, len(ptx), batch_size)[0]))
        with clock("update"):
            state, metrics = update(state, ref_params, rollout, *signals, key=step_key, ptx=batch)
            jax.block_until_ready(metrics)
        return state, {**metrics, **observed}

    shown = ("score", "cost", "lambda", "kl")
    return monitor.train(step, state, num_iterations, label=label, unit="iterations", shown=shown)


def _decoding_layout(policy: Model | None, axes, ref_params: Params, params: Params) -> Callable:
    """`(ref_params, params) -> ` what the sampler reads, laid out for decoding; an adapted policy, with its changes
    beside the frozen weights."""
    if policy is None or policy.base is None:
        read = lambda ref_params, params: params
    else:
        read = functools.partial(combine, policy)
        axes = read(policy.base.logical_axes(), axes)
    shapes = jax.eval_shape(read, ref_params, params)
    return jax.jit(read, out_shardings=mesh.shardings(shapes, axes, mesh.DECODE_RULES))


def side_by_side(*jobs: Callable[[], object]) -> list:
    """Run independent stages, as many at once as there are cores (at least two), and return their results in order.

    On one CPU device the small matrices of the embedded world leave cores idle, and threads fill them; elsewhere the
    devices are busy with one, and the jobs run one after the other. The first failure, or Ctrl-C, is raised once the
    others have ended, at their next step.
    """
    if jax.default_backend() != "cpu" or not jax.sharding.get_mesh().empty:
        return [job() for job in jobs]
    outcomes, waiting = queue.Queue(), queue.SimpleQueue()
    for item in enumerate(jobs):
        waiting.put(item)

    def work() -> None:
        while not given_up.is_set():
            try:
                index, job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcomes.put((index, job(), None))
            except BaseException as error:  # noqa: BLE001, raised again by the caller
                outcomes.put((index, None, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(2, os.cpu_count() or 1))]
    for thread in threads:
        thread.start()
    results = [None] * len(jobs)
    try:
        for _ in jobs:
            index, results[index], error = outcomes.get()
            if error is not None:
                raise error
    except BaseException:
        given_up.set()
        for thread in threads:
            thread.join()
        given_up.clear()
        raise
    return results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """What decides how a policy's answers are drawn, besides its parameters."""

    max_tokens: int
    eos_id: int
    pad_id: int
    temperature: float = 1.0


def _decoding(world: World, temperature: float) -> Decoding:
    return Decoding(max_tokens=world.max_tokens, eos_id=world.eos_id, pad_id=world.pad_id, temperature=temperature)


@functools.cache
def _sampler(config: TransformerConfig, decoding: Decoding):
    """One sampler per policy shape, so that every stage of a process shares its compiled program."""
    return make_sampler(make_language_model(config), **dataclasses.asdict(decoding))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A fitted network that says one number of every response: `make(model(config))(fitted, rollout) -> [B]`.

    make: `rl.preference_models.make_reward` with a ScoreModel as `fitted`, say, or `make_score` with bare parameters.
    config: of the scoring network, which need not be the policy's. lora, frozen: of an adapted network, whose own
    parameters are changes of these frozen ones (a language model's).
    """

    make: Callable
    config: TransformerConfig
    fitted: Any
    model: Callable[[TransformerConfig], Model] = make_scalar_model
    lora: LoraConfig = IN_FULL
    frozen: Params | None = None

    def placed(self, frozen: Params | None = None) -> Any:
        """What `program` takes, on the devices of the mesh. frozen: its frozen weights, if they lie there already."""
        model = _network(self.model, self.config, self.lora)
        if frozen is None and self.lora.rank:
            frozen = mesh.place(self.frozen, make_language_model(self.config).logical_axes())
        return mesh.place(self.fitted, model.logical_axes()), frozen

    @property
    def program(self) -> Callable[[Any, Rollout], jax.Array]:
        """`(placed, rollout) -> [B]`, compiled once for all stages of a process."""
        return _scorer(self.make, self.model, self.config, self.lora)

    def __call__(self, rollout: Rollout) -> np.ndarray:
        """What it says of any number of responses, `[B]`."""
        return _in_rows(self.program, self.placed(), rollout)

    @property
    def own(self) -> Params:
        """The parameters that were fitted, without what scales their scores."""
        return self.fitted.params if isinstance(self.fitted, ScoreModel) else self.fitted

    @property
    def whole(self) -> Params:
        """The network's own parameters, with low-rank changes merged into what they change, on the host."""
        if not self.lora.rank:
            return self.own
        learner = _network(self.model, self.config, self.lora)
        frozen = mesh.place(self.frozen, make_language_model(self.config).logical_axes())
        return _whole(learner, frozen, mesh.place(self.own, learner.logical_axes()))

    @property
    def raw(self) -> "Scorer":
        """The scores of a ScoreModel as it was fitted, unscaled."""
        return dataclasses.replace(self, make=make_score, fitted=self.fitted.params)


@functools.cache
def _network(model: Callable[[TransformerConfig], Model], config: TransformerConfig, lora: LoraConfig) -> Model:
    return adapt(model(config), lora)


@functools.cache
def _scorer(make: Callable, model: Callable, config: TransformerConfig, lora: LoraConfig):
    network = _network(model, config, lora)
    score = lambda placed, rollout: make(bind(network, placed[1]))(placed[0], rollout)
    return jax.jit(lambda placed, rollout: mesh.constrain(score(placed, rollout), None))


@functools.cache
def _pair_scorer(config: TransformerConfig, lora: LoraConfig):
    network = _network(make_scalar_model, config, lora)
    score = lambda placed, pairs: pair_scores(bind(network, placed[1]), placed[0], pairs)
    return jax.jit(lambda placed, pairs: mesh.constrain(score(placed, pairs), None, None))


_TOKENS = 2**17  # of the longest field, in one forward pass of a scorer


def _in_rows(program: Callable, fitted: Any, data: Any, block: int = 2_048) -> np.ndarray:
    """`program(fitted, data)` for any number of rows, in blocks whose last is filled up to divide over the mesh."""
    leaves = jax.tree.leaves(data)
    num, longest = len(leaves[0]), max(x.shape[-1] for x in leaves if x.ndim > 1)
    block = min(block, max(1, _TOKENS // longest))
    rows = np.arange(mesh.padded(num)) % num
    parts = np.split(rows, range(mesh.padded(block), len(rows), mesh.padded(block)))
    return np.concatenate([np.asarray(program(fitted, mesh.place_rows(take(data, part)))) for part in parts])[:num]


def sample_responses(
    *, world: World, config: TransformerConfig, policy: Params, prompts: Prompts, temperature: float, seed: int,
    block: int = 128,
) -> Rollout:  # fmt: skip
    """One response per prompt of a world, for any number of prompts."""
    return sample(config=config, policy=policy, prompts=prompts.tokens, prompt_mask=prompts.mask,
                  decoding=_decoding(world, temperature), seed=seed, block=block)  # fmt: skip


def sample(
    *, config: TransformerConfig, policy: Params, prompts, prompt_mask, decoding: Decoding, seed: int, block: int = 128,
) -> Rollout:  # fmt: skip
    """One response per prompt, for any number of prompts: every block has the same compiled shape."""
    check_mask("prompt_mask", prompt_mask, padded="left")
    draw, num, block = _sampler(config, decoding), len(prompts), mesh.padded(block)
    rows = np.arange(-(-num // block) * block) % num  # the last block wraps around
    policy = mesh.place(policy, make_language_model(config).logical_axes(), mesh.DECODE_RULES)
    blocks = []
    for i, r in enumerate(progress(rows.reshape(-1, block), "sampling", unit=f"blocks of {block}")):
        key = jax.random.fold_in(jax.random.key(seed), i)
        blocks.append(mesh.fetch(draw(policy, *mesh.place_rows((prompts[r], prompt_mask[r])), key)))
    rollout = jax.tree.map(lambda *x: np.concatenate(x)[:num], *blocks)
    check_finite("log-probabilities of the responses", rollout.logprobs, ": the policy or a prompt is broken")
    return rollout


def raw_scorer(config: TransformerConfig, model: Params | Scorer) -> Scorer:
    """A preference model as it was fitted: parameters of a network of shape `config`, or the scorer that it is."""
    return model if isinstance(model, Scorer) else Scorer(make=make_score, config=config, fitted=model)


def raw_pair_scores(config: TransformerConfig, model: Params | Scorer, pairs: PreferenceBatch) -> np.ndarray:
    """Unscaled scores `[N, 2]` of a preference model (see `raw_scorer`) for both responses of each pair."""
    model = raw_scorer(config, model)
    return _in_rows(_pair_scorer(model.config, model.lora), model.placed(), pairs)


def scale_scores(
    *, world: World, config: TransformerConfig, policy: Params, prompts: Prompts, temperature: float, seed: int,
    models: Mapping[str, Scorer],
) -> dict[str, ScoreModel]:  # fmt: skip
    """Fitted preference models, each by its raw scorer, in units of their spread over the policy's answers.

    The one called "cost" is a cost model, the others are rewards.
    """
    start = sample_responses(
        world=world, config=config, policy=policy, prompts=prompts, temperature=temperature, seed=seed
    )
    return {name: in_units_of_start(name, raw.fitted, raw(start)) for name, raw in models.items()}


def collect_comparisons(
    *,
    world: World,
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
        world=world, config=config, policy=policy, prompts=twice, temperature=temperature, seed=seed
    )
    pairs = (x.reshape(len(prompts), 2, -1) for x in (rollout.tokens, rollout.mask))
    responses, masks = mismatch(*pairs, share=mismatched, seed=seed)
    return compare(world, rater, prompts.tokens, prompts.mask, responses, masks, seed)


def check_cost_limit(
    *, world: World, config: TransformerConfig, policy: Params, reward: Scorer, cost: Scorer, limit: float,
    multiplier: MultiplierConfig, ppo: PPOConfig, prompts: Prompts, seed: int, num_samples: int = 64,
) -> float:  # fmt: skip
    """The lowest mean cost that Lagrangian PPO settles at for any lambda it may take: no limit below it can be met.

    Estimated by reweighting `num_samples` responses to each prompt (`losses.tempered_policy`) at lambda = 0 and on a
    grid up to its maximum; answers cheaper than those samples are not seen. Raises ValueError ("infeasible cost
    limit", with numbers in units of P(harmful)) if `limit` lies below.
    """
    many = jax.tree.map(lambda x: np.repeat(x, num_samples, axis=0), prompts)
    rollout = sample_responses(world=world, config=config, policy=policy, prompts=many, temperature=ppo.temperature,
                               seed=seed)  # fmt: skip
    each = [scorer(rollout).reshape(-1, num_samples) for scorer in (reward, cost)]

    def mean_cost(log_lambda):
        uniform = jnp.zeros_like(each[1])
        weights = losses.tempered_policy(*each, uniform, log_lambda=log_lambda, kl_coef=ppo.kl_coef)
        return jnp.mean(jnp.sum(weights * each[1], -1))

    grid = jnp.concatenate([jnp.array([-jnp.inf]), jnp.log(multiplier.maximum * jnp.geomspace(1e-3, 1, 40))])
    floor = float(jnp.min(jax.lax.map(mean_cost, grid)))
    probability = float(cost.fitted.scale)  # of harm per unit of cost: the units in which a limit is asked for
    losses.check_limit(limit * probability, floor * probability)
    return floor


def train_policy(
    *,
    world: World,
    config: TransformerConfig,
    start: Params,
    reward: Scorer,
    cost: Scorer | None = None,
    limit: float | None = None,
    multiplier: MultiplierConfig | None = None,
    ppo: PPOConfig,
    optimisation: RLConfig,
    prompts: Prompts,
    critic: Scorer | tuple[TransformerConfig, Params] | None = None,
    lora: LoraConfig = IN_FULL,
    ptx: Demonstrations | None = None,
    watch: Mapping[str, Scorer] = MappingProxyType({}),
    seed: int,
    label: str,
    monitor: Monitor,
) -> Params:
    """The policy after RL on a reward; with `cost`, `limit` and `multiplier`, after Lagrangian PPO.

    limit: on the mean cost, in the cost's units. critic: the network whose trunk the critics start from, with a fresh
    zero head; by default the reward's and the cost's own, as in Safe RLHF. lora: learn low-rank changes of `start`,
    merged into the result; so do critics whose trunk is `start`, or low-rank changes of it, and others in full.
    ptx: demonstrations, used where `ppo.ptx_coef` is positive. watch: what else to log of the rollouts, as means by
    name, that no learner sees.
    """
    constraint = (cost, limit, multiplier)
    if any(part is None for part in constraint) and any(part is not None for part in constraint):
        raise ValueError("cost, limit and multiplier make one constraint: give all three or none")
    policy = _network(make_language_model, config, lora)
    scorers = (reward,) if cost is None else (reward, cost)
    shape, adapted, trunks = _critics(start, critic, scorers, lora)
    scalar = _network(make_scalar_model, shape, adapted)
    optimizers = adamw(optimisation.learning_rate), adamw(optimisation.critic_learning_rate)
    if multiplier is None:
        learner = make_ppo(policy, scalar, *optimizers, ppo)
    else:
        learner = make_lagrangian_ppo(policy, scalar, *optimizers, ppo, make_multiplier(limit, multiplier))
    warm = lambda params: scalar_params_from(params, scalar, jax.random.key(seed))
    axes = scalar.logical_axes()
    trunks = [mesh.place(trunk, axes) if trunk else mesh.create(scalar.init, jax.random.key(seed), axes=axes)
              for trunk in trunks]  # fmt: skip
    shared, start = start, mesh.place(start, make_language_model(config).logical_axes())
    place = lambda scorer: (scorer.program, scorer.placed(start if _equal(scorer.frozen, shared) else None))
    told, seen = [place(scorer) for scorer in scorers], {name: place(scorer) for name, scorer in watch.items()}
    means = lambda rollout: {name: jnp.mean(program(fitted, rollout)) for name, (program, fitted) in seen.items()}
    final, state = _learn(
        policy, learner, lambda start, *trunks: (start, *map(warm, trunks)), start, *trunks,
        decoding=_decoding(world, ppo.temperature), optimisation=optimisation, seed=seed, monitor=monitor, label=label,
        feedback=lambda rollout, key: tuple(program(fitted, rollout) for program, fitted in told),
        observe=lambda rollout: gold_metrics(world, rollout) | means(rollout),
        prompts=prompts.tokens, prompt_mask=prompts.mask, ptx=ptx if ppo.ptx_coef else None)  # fmt: skip
    if multiplier is not None:
        _warn_if_unmet(label, float(jnp.exp(state.multiplier.log_lambda)), float(state.multiplier.cost_average), limit,
                       multiplier.maximum)  # fmt: skip
    return final


def _critics(
    start: Params, critic: Scorer | tuple[TransformerConfig, Params] | None, scorers: tuple[Scorer, ...],
    lora: LoraConfig,
) -> tuple[TransformerConfig, LoraConfig, list[Params]]:  # fmt: skip
    """What critics start from: their shape, whether they learn low-rank changes of `start`, and for each scorer
    parameters without a head ({}: changes of `start` that are none yet)."""
    if isinstance(critic, tuple):
        config, params = critic
        fresh = bool(lora.rank) and _equal(params, start)
        return config, lora if fresh else IN_FULL, [{} if fresh else _headless(params)] * len(scorers)
    sources = [critic or scorer for scorer in scorers]
    config, adapted = sources[0].config, sources[0].lora
    if adapted.rank and all(_equal(source.frozen, start) for source in sources):
        return config, adapted, [_headless(source.own) for source in sources]
    return config, IN_FULL, [_headless(source.whole) for source in sources]  # changes of an earlier policy, say


def _headless(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != "head"}


def _learn(
    policy: Model, learner: Algorithm, networks: Callable, start: Params, *others: Params, decoding: Decoding,
    optimisation: RLConfig, seed: int, **inputs,
) -> tuple[Params, Any]:  # fmt: skip
    """`run_rl` from `start` (placed) and held to it: the policy's weights at the end, and the last state.

    networks: `(the policy's parameters, *others)` to what `learner.init` takes. inputs: see `run_rl`.
    """
    first = lambda start: start if policy.base is None else policy.init(jax.random.key(seed))
    init = lambda start, *others: learner.init(*networks(first(start), *others))
    state = run_rl(
        algorithm=learner._replace(init=init), params=(start, *others), ref_params=start,
        sample=_sampler(policy.config, decoding), num_iterations=optimisation.num_iterations,
        batch_size=optimisation.batch_size, seed=seed, **inputs)  # fmt: skip
    return _whole(policy, start, state.policy.params), state


def train_on_text(
    *,
    config: TransformerConfig,
    start: Params,
    judge: Callable[[Rollout], np.ndarray],
    decoding: Decoding,
    lora: LoraConfig = IN_FULL,
    ppo: PPOConfig,
    optimisation: RLConfig,
    prompts,
    prompt_mask,
    seed: int,
    label: str,
    monitor: Monitor,
) -> Params:
    """The policy after PPO for whatever a plain function of responses says of them, `judge(rollout) -> [B]` float32.

    The function runs on the host, on whole responses (of all hosts alike): decode them there, and judge the text. The
    critic is `start` with a head of zeros. lora: policy and critic learn low-rank changes of `start`.
    """
    policy, scalar = _network(make_language_model, config, lora), _network(make_scalar_model, config, lora)
    learner = make_ppo(policy, scalar, adamw(optimisation.learning_rate), adamw(optimisation.critic_learning_rate), ppo)
    start, key = mesh.place(start, make_language_model(config).logical_axes()), jax.random.key(seed)
    fresh = lambda trunk: scalar.init(key) if lora.rank else scalar_params_from(trunk, scalar, key)
    return _learn(
        policy, learner, lambda params, trunk: (params, fresh(trunk)), start, start, decoding=decoding,
        feedback=lambda rollout, key: (np.asarray(judge(mesh.fetch(rollout)), np.float32),), prompts=prompts,
        prompt_mask=prompt_mask, optimisation=optimisation, seed=seed, monitor=monitor, label=label)[0]  # fmt: skip


def kl_per_response(
    *, config: TransformerConfig, policy: Params, reference: Params, rollout: Rollout, temperature: float
) -> np.ndarray:
    """KL(policy || reference) in nats, estimated from each of the policy's responses by `losses.kl_k3`: `[B]`."""
    model = make_language_model(config)

    @jax.jit
    def estimate(params, rollout):
        each = [response_logprobs(model, p, rollout, temperature=temperature)[0] for p in params]
        return mesh.constrain(masked_sum(losses.kl_k3(*each, mask=rollout.mask), rollout.mask, -1), None)

    axes = model.logical_axes()
    return _in_rows(estimate, tuple(mesh.place(p, axes) for p in (policy, reference)), rollout, block=128)


def _equal(a: Params | None, b: Params | None) -> bool:
    """Whether these host parameters are the same, to the bit."""
    if a is None or b is None or jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return a is b or all(x is y or np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b))))


def train_by_preferences(
    *,
    world: World,
    config: TransformerConfig,
    start: Params,
    people: Population,
    method: Literal["self-play", "reward model", "oracle"],
    num_samples: int,
    ppo: PPOConfig,
    optimisation: RLConfig,
    prompts: Prompts,
    seed: int,
    label: str,
    monitor: Monitor,
) -> Params:
    """The policy after PPO on comparisons among its own answers, `num_samples` to each prompt, by `people`.

    method: "self-play" rewards win rates among siblings (SPO); "reward model" refits a Bradley-Terry model to the same
    comparisons; "oracle" is told r* itself, which bounds both. The log has the shares of `MANNERS`.
    """
    policy, scalar = make_language_model(config), make_scalar_model(config)
    learner = make_ppo(policy, scalar, adamw(optimisation.learning_rate), adamw(optimisation.critic_learning_rate), ppo)
    warm = lambda start: scalar_params_from(start, scalar, jax.random.key(seed))
    networks = lambda start: (start, warm(start))
    feedback = lambda rollout, key: (sibling_preferences(world, people, rollout, key, num_samples=num_samples),)
    match method:
        case "self-play":
            learner = make_self_play(learner)
        case "reward model":
            learner = make_iterated_reward(learner, scalar, adamw(optimisation.critic_learning_rate))
            networks = lambda start: (warm(start), start, warm(start))
        case "oracle":
            feedback = lambda rollout, key: (world.gold(rollout.prompts, rollout.tokens, rollout.mask).helpfulness,)
        case _:
            raise ValueError(f"method must be 'self-play', 'reward model' or 'oracle', got {method!r}")
    start = mesh.place(start, policy.logical_axes())
    share = jax.jit(lambda rollout: jax.nn.one_hot(manners(world, rollout), len(MANNERS)).mean(0))
    observe = lambda rollout: gold_metrics(world, rollout) | dict(zip(MANNERS, share(rollout)))
    return _learn(
        policy, learner, networks, start, decoding=_decoding(world, ppo.temperature), optimisation=optimisation,
        feedback=feedback, observe=observe, prompts=prompts.tokens, prompt_mask=prompts.mask, num_samples=num_samples,
        seed=seed, monitor=monitor, label=label)[0]  # fmt: skip


def _warn_if_unmet(label: str, lam: float, cost: float, limit: float, maximum: float) -> None:
    if lam > 0.999 * maximum and cost > limit:
        warnings.warn(
            f"{label}: the limit may be infeasible: lambda ended at its maximum {maximum:g} with a mean cost of "
            f"{cost:.3g} above the limit {limit:.3g}",
            stacklevel=3,
        )
