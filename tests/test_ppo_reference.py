"""One whole PPO step, plain and Lagrangian, against loops in NumPy that share no line with the library.

The networks are tables: the policy's logits and the critics' values depend on the last token only. So the gradients of
the clipped objectives are written by hand, and every parameter and every metric of a step is recomputed. All clips act,
rows differ in length, no coefficient is at a value where it could be ignored, and everything is in float64.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.models.transformer import Model
from rlhfjax.rl import ppo
from rlhfjax.rl.multiplier import MultiplierConfig, MultiplierState, make_multiplier
from rlhfjax.types import Demonstrations, Rollout, TrainState

CONFIG = ppo.PPOConfig(
    kl_coef=0.6, clip=0.1, value_clip=0.2, reward_clip=1.0, gamma=0.9, gae_lambda=0.8, num_epochs=2, num_minibatches=2,
    num_accumulation=2, ptx_coef=0.7, unfinished_penalty=0.6, temperature=1.3,
)  # fmt: skip
POLICY_RATE, CRITIC_RATE = 2.0, 0.9
LIMIT, DUAL = -0.5, MultiplierConfig(learning_rate=0.5, average_decay=0.3)
OLD_LAMBDA, OLD_COST_AVERAGE, OLD_COUNT = 0.8, 0.5, 4  # a multiplier that has moved before
VOCAB, ROWS, PROMPT, TOKENS = 5, 8, 3, 6
KEY = 11

rng = np.random.default_rng(0)
TABLE, REF_TABLE = rng.normal(size=(2, VOCAB, VOCAB))
CRITIC, COST_CRITIC = rng.normal(size=(2, VOCAB))
SCORES, COSTS = rng.normal(size=(2, ROWS)) + [[0.0], [0.4]]
PROMPT_MASK = np.arange(PROMPT) >= rng.integers(0, PROMPT, (ROWS, 1))
MASK = np.arange(TOKENS) < np.array([6, 2, 3, 1, 6, 4, 6, 2])[:, None]
PROMPTS, DEMO_PROMPTS = rng.integers(0, VOCAB, (2, ROWS, PROMPT), np.int32)
RESPONSES, DEMO_RESPONSES = rng.integers(0, VOCAB, (2, ROWS, TOKENS), np.int32)
SAMPLER_LOGPROBS = np.where(MASK, rng.normal(size=MASK.shape), 99.0)
FINISHED = np.array([False, True, True, True, True, True, False, True])
ROLLOUT = Rollout(
    prompts=PROMPTS, prompt_mask=PROMPT_MASK, tokens=RESPONSES, mask=MASK, logprobs=SAMPLER_LOGPROBS, finished=FINISHED
)
DEMO_MASK = MASK[::-1]
DEMOS = Demonstrations(prompts=DEMO_PROMPTS, prompt_mask=PROMPT_MASK, tokens=DEMO_RESPONSES, mask=DEMO_MASK)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# --- the reference: flat lists of kept tokens ------------------------------------------------------------------------


def kept_tokens(prompts, tokens, mask):
    """Over all kept response tokens, row after row: row, token before, token."""
    flat = []
    for row in range(ROWS):
        for t in range(mask[row].sum()):
            flat.append((row, tokens[row, t - 1] if t else prompts[row, -1], tokens[row, t]))
    return np.array(flat).T


ROW, BEFORE, TOKEN = kept_tokens(PROMPTS, RESPONSES, MASK)
DEMO_ROW, DEMO_BEFORE, DEMO_TOKEN = kept_tokens(DEMO_PROMPTS, DEMO_RESPONSES, DEMO_MASK)
LAST = np.append(ROW[1:] != ROW[:-1], True)


def probabilities(table, before, temperature=CONFIG.temperature):
    weights = np.exp(table[before] / temperature)
    return weights / weights.sum(-1, keepdims=True)


def reference_gae(rewards, values):
    """A_t as the discounted sum of its temporal differences, and the returns."""
    advantages = np.zeros(len(ROW))
    for t in range(len(ROW)):
        for k in range(t, len(ROW)):
            if ROW[k] == ROW[t]:
                next_value = 0.0 if LAST[k] else values[k + 1]
                error = rewards[k] + CONFIG.gamma * next_value - values[k]
                advantages[t] += (CONFIG.gamma * CONFIG.gae_lambda) ** (k - t) * error
    return advantages, advantages + values


def policy_step(table, rows, old, advantages, active):
    """Gradient and metrics of the clipped surrogate (mean over the minibatch's tokens) plus ptx, at this table."""
    grad, sums = np.zeros_like(table), collections.Counter()
    batch, demos = np.flatnonzero(np.isin(ROW, rows)), np.flatnonzero(np.isin(DEMO_ROW, rows))
    for i in batch:
        probs = probabilities(table, BEFORE[i])
        ratio = probs[TOKEN[i]] / np.exp(old[i])
        raw, clipped = (-advantages[i] * r for r in (ratio, min(max(ratio, 1 - CONFIG.clip), 1 + CONFIG.clip)))
        sums["policy_loss"] += max(raw, clipped) / len(batch)
        sums["clip_fraction"] += (abs(ratio - 1) > CONFIG.clip) / len(batch)
        sums["old_kl"] += (1 / ratio - 1 + np.log(ratio)) / len(batch)
        active["ratio clip"] += raw < clipped
        if raw >= clipped:
            grad[BEFORE[i]] += raw * (np.eye(VOCAB)[TOKEN[i]] - probs) / CONFIG.temperature / len(batch)
    for i in demos:  # at temperature 1
        probs = probabilities(table, DEMO_BEFORE[i], temperature=1.0)
        sums["ptx_loss"] -= np.log(probs[DEMO_TOKEN[i]]) / len(demos)
        grad[DEMO_BEFORE[i]] += CONFIG.ptx_coef * (probs - np.eye(VOCAB)[DEMO_TOKEN[i]]) / len(demos)
    return grad, sums | {"policy_gradient_norm": np.sqrt((grad**2).sum())}


def critic_step(name, vector, rows, old_values, returns, active):
    grad, loss = np.zeros_like(vector), 0.0
    batch = np.flatnonzero(np.isin(ROW, rows))
    for i in batch:
        value = vector[BEFORE[i]]
        clipped = min(max(value, old_values[i] - CONFIG.value_clip), old_values[i] + CONFIG.value_clip)
        raw_loss, clipped_loss = 0.5 * (value - returns[i]) ** 2, 0.5 * (clipped - returns[i]) ** 2
        loss += max(raw_loss, clipped_loss) / len(batch)
        active[f"{name} clip"] += raw_loss < clipped_loss
        if raw_loss >= clipped_loss:
            grad[BEFORE[i]] += (value - returns[i]) / len(batch)
    return grad, {f"{name}_loss": loss, f"{name}_gradient_norm": np.sqrt((grad**2).sum())}


@functools.cache
def reference(lagrangian, whiten):
    """(parameters, multiplier and metrics after one step, how often each clip acted)."""
    params = {"policy": TABLE.copy(), "critic": CRITIC.copy(), "cost_critic": COST_CRITIC.copy()}
    active = collections.Counter()
    probs = probabilities(TABLE, BEFORE)
    old, ref = (np.log(probabilities(table, BEFORE)[np.arange(len(ROW)), TOKEN]) for table in (TABLE, REF_TABLE))
    scores = SCORES - CONFIG.unfinished_penalty * ~FINISHED
    result = {
        "kl": (np.exp(ref - old) - 1 + old - ref).sum() / ROWS,
        "kl_k1": (old - ref).sum() / ROWS,
        "entropy": -(probs * np.log(probs)).sum() / len(ROW),
        "length": len(ROW) / ROWS,
        "unfinished": 2 / ROWS,
        "sampler_mismatch": abs(old - SAMPLER_LOGPROBS[MASK]).max(),
        "score": scores.mean(),
    }
    streams = {"critic": (scores, -CONFIG.kl_coef)}
    if lagrangian:  # each stream carries half of the penalty, with its own sign
        streams = {"critic": (scores, -CONFIG.kl_coef / 2), "cost_critic": (COSTS, CONFIG.kl_coef / 2)}
    advantages, targets = {}, {}
    for name, (ends, kl_price) in streams.items():
        raw = LAST * ends[ROW] + kl_price * (old - ref)
        rewards = np.clip(raw, -CONFIG.reward_clip, CONFIG.reward_clip)
        active[f"{name} reward clip"] += (raw != rewards).sum()
        values = params[name][BEFORE]
        advantages[name], returns = reference_gae(rewards, values)
        targets[name] = values, returns
        result[f"{name}_value"] = values.mean()
        result[f"{name}_explained_variance"] = 1 - (returns - values).var() / returns.var()
    mixed = advantages["critic"]
    if lagrangian:
        average = DUAL.average_decay * OLD_COST_AVERAGE + (1 - DUAL.average_decay) * COSTS.mean()
        excess = average - LIMIT
        new_lambda = OLD_LAMBDA * np.exp(DUAL.learning_rate * OLD_LAMBDA * excess)
        mixed = (mixed - new_lambda * advantages["cost_critic"]) / (1 + new_lambda)
        result |= {"cost": COSTS.mean(), "cost_average": average, "cost_excess": excess, "lambda": new_lambda}
        result["multiplier state"] = OLD_COUNT + 1, np.log(new_lambda), average
    if whiten:
        mixed = (mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-8)

    history = collections.defaultdict(list)
    for epoch_key in jax.random.split(jax.random.key(KEY), CONFIG.num_epochs):
        for rows in np.asarray(jax.random.permutation(epoch_key, ROWS)).reshape(CONFIG.num_minibatches, -1):
            policy_grad, metrics = policy_step(params["policy"], rows, old, mixed, active)
            params["policy"] -= POLICY_RATE * policy_grad
            for name in streams:
                grad, more = critic_step(name, params[name], rows, *targets[name], active)
                params[name] -= CRITIC_RATE * grad
                metrics |= more
            for name, value in metrics.items():
                history[name].append(value)
    result |= {name: np.mean(values) for name, values in history.items()}
    result |= {f"{name} params": params[name] for name in ("policy", *streams)} | {"skipped": 0}
    return result, active


# --- the shipped step ------------------------------------------------------------------------------------------------


def shipped(lagrangian, whiten, change_update=lambda update: update):
    """The step of `ppo`, as one dict like the reference's; `change_update` plants a fault in the multiplier."""

    def lookup(params, tokens, mask, *, cache=None, num_outputs=None):
        return params[tokens][:, -num_outputs:], None

    model = Model(config=None, init=None, apply=lookup, init_cache=None, logical_axes=None)
    optimizers = optax.sgd(POLICY_RATE), optax.sgd(CRITIC_RATE)
    config = dataclasses.replace(CONFIG, whiten_advantages=whiten)
    options = dict(key=jax.random.key(KEY), ptx=DEMOS)
    if not lagrangian:
        init, step, *_ = ppo.make_ppo(model, model, *optimizers, config)
        state, metrics = jax.jit(step)(init(TABLE, CRITIC), REF_TABLE, ROLLOUT, SCORES, **options)
    else:
        multiplier = make_multiplier(LIMIT, DUAL)
        multiplier = multiplier._replace(update=change_update(multiplier.update))
        init, step, *_ = ppo.make_lagrangian_ppo(model, model, *optimizers, config, multiplier)
        learner = TrainState.create(jnp.log(OLD_LAMBDA), optax.sgd(DUAL.learning_rate))
        learner = dataclasses.replace(learner, step=jnp.int32(OLD_COUNT))
        moved = MultiplierState(learner=learner, cost_average=jnp.asarray(OLD_COST_AVERAGE))
        state = dataclasses.replace(init(TABLE, CRITIC, COST_CRITIC), multiplier=moved)
        state, metrics = jax.jit(step)(state, REF_TABLE, ROLLOUT, SCORES, COSTS, **options)
        new = state.multiplier
        metrics["multiplier state"] = new.learner.step, new.log_lambda, new.cost_average
    names = [name for name in ("policy", "critic", "cost_critic") if hasattr(state, name)]
    return metrics | {f"{name} params": getattr(state, name).params for name in names}


def differences(actual, expected):
    """Largest absolute error of everything that is not what the reference says."""
    assert actual.keys() == expected.keys()
    errors = {name: float(np.abs(np.subtract(actual[name], expected[name])).max()) for name in expected}
    return {name: error for name, error in errors.items() if not error < 1e-6}


# Whitening cancels the division by 1 + lambda, hence the third case.
@pytest.mark.parametrize("lagrangian, whiten", [(False, True), (True, True), (True, False)])
def test_step_is_the_reference(lagrangian, whiten):
    expected, active = reference(lagrangian, whiten)
    assert len(active) == (5 if lagrangian else 3) and min(active.values()) > 0
    assert differences(shipped(lagrangian, whiten), expected) == {}


def test_planted_kl_of_prompt_tokens_in_the_penalty_is_caught(monkeypatch):
    probs = [probabilities(table, PROMPTS[:, :-1]) for table in (TABLE, REF_TABLE)]
    logprobs = [np.log(np.take_along_axis(p, PROMPTS[:, 1:, None], -1)[..., 0]) for p in probs]
    leak = np.where(PROMPT_MASK[:, :-1], logprobs[0] - logprobs[1], 0.0).sum(-1, keepdims=True)
    shaped = ppo.losses.kl_shaped_rewards_and_costs

    def leaking(scores, costs, old, ref, mask, **options):
        return shaped(scores, costs, old + leak * (np.arange(TOKENS) == 0), ref, mask, **options)

    monkeypatch.setattr(ppo.losses, "kl_shaped_rewards_and_costs", leaking)
    wrong = differences(shipped(True, True), reference(True, True)[0])
    assert {"policy params", "critic params", "cost_critic params"} <= wrong.keys()
    assert not {"kl", "score", "cost", "lambda"} & wrong.keys()  # the statistics themselves are right


def test_planted_multiplier_per_minibatch_is_caught():
    def per_minibatch(update):
        return lambda state, costs: functools.reduce(update, costs.reshape(CONFIG.num_minibatches, -1), state)

    wrong = differences(shipped(True, True, per_minibatch), reference(True, True)[0])
    assert {"multiplier state", "lambda", "policy params"} <= wrong.keys()
    assert not {"critic params", "cost_critic params"} & wrong.keys()  # lambda reaches the policy only
