"""PPO, Lagrangian PPO and the multiplier: identities, known optima, and planted faults."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import losses, masked
from rlhfjax.models.transformer import TransformerConfig, make_language_model, make_scalar_model
from rlhfjax.rl import ppo
from rlhfjax.rl.multiplier import Multiplier, MultiplierConfig, make_multiplier
from rlhfjax.rl.ppo import PPOConfig, make_lagrangian_ppo, make_ppo
from rlhfjax.rl.sampling import make_sampler, response_logprobs
from rlhfjax.rl.sft import next_token_nll
from rlhfjax.types import Demonstrations, sequences

CONFIG = TransformerConfig(vocab_size=11, d_model=16, num_layers=1, num_heads=2, d_ff=32)
POLICY, CRITIC = make_language_model(CONFIG), make_scalar_model(CONFIG)
PAD, EOS = 0, 1
ROWS, PROMPT, TOKENS = 16, 4, 6
SGD = optax.sgd(0.1)
TINY = MultiplierConfig(initial=1e-30, average_decay=0.0)  # lambda = 0 to every digit


@functools.cache
def setting():
    keys = jax.random.split(jax.random.key(0), 6)
    params, ref = POLICY.init(keys[0]), POLICY.init(keys[1])
    critics = [jax.tree.map(lambda p: p + 0.05, CRITIC.init(k)) for k in keys[2:4]]
    prompts = jax.random.randint(keys[4], (ROWS, PROMPT), 2, 11)
    prompt_mask = jnp.arange(PROMPT) >= (jnp.arange(ROWS) % 3)[:, None]
    sample = make_sampler(POLICY, max_tokens=TOKENS, eos_id=EOS, pad_id=PAD)
    rollout = sample(params, prompts, prompt_mask, keys[5])
    scores, costs = jax.random.normal(keys[5], (2, ROWS))
    return params, ref, critics, rollout, scores, costs


def algorithm(lagrangian=False, multiplier=TINY, limit=-1.0, **options):
    config = PPOConfig(**{"kl_coef": 0.1, "num_minibatches": 2} | options)
    if not lagrangian:
        return make_ppo(POLICY, CRITIC, SGD, SGD, config)
    return make_lagrangian_ppo(POLICY, CRITIC, SGD, SGD, config, make_multiplier(limit, multiplier))


def one_step(lagrangian=False, multiplier=TINY, limit=-1.0, rollout=None, scores=None, ptx=None, **options):
    params, ref, critics, default_rollout, default_scores, costs = setting()
    rollout = default_rollout if rollout is None else rollout
    signals = (default_scores if scores is None else scores,) + ((costs,) if lagrangian else ())
    init, step, *_ = algorithm(lagrangian, multiplier, limit, **options)
    state = init(params, *critics[: 2 if lagrangian else 1])
    return jax.jit(step)(state, ref, rollout, *signals, key=jax.random.key(7), ptx=ptx)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_moved(a, b):
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b))) > 1e-4


# --- identities ------------------------------------------------------------------------------------------------------


def test_lambda_zero_is_plain_ppo():
    # The reward carries half of the KL penalty in the Lagrangian step, hence the doubled coefficient.
    plain, plain_metrics = one_step(kl_coef=0.1)
    constrained, metrics = one_step(lagrangian=True, kl_coef=0.2)
    assert_close(plain.policy.params, constrained.policy.params, atol=2e-6)
    assert_close(plain.critic.params, constrained.critic.params, atol=2e-6)
    for name in ("kl", "policy_loss", "critic_loss", "clip_fraction"):
        np.testing.assert_allclose(plain_metrics[name], metrics[name], atol=1e-5, err_msg=name)
    harmful, _ = one_step(lagrangian=True, kl_coef=0.2, multiplier=dataclasses.replace(TINY, initial=1.0))
    assert_moved(plain.policy.params, harmful.policy.params)


@pytest.mark.parametrize("lagrangian", [False, True])
def test_accumulation_changes_memory_only(lagrangian):
    multiplier = MultiplierConfig()
    whole, whole_metrics = one_step(lagrangian, multiplier, num_accumulation=1)
    pieces, metrics = one_step(lagrangian, multiplier, num_accumulation=4)
    assert_close(whole, pieces, atol=2e-6)
    assert_close(whole_metrics, metrics, atol=1e-5)


def multiplier_steps(step, **options):
    """How often the multiplier moved in one `step` of Lagrangian PPO."""
    params, ref, critics, rollout, scores, costs = setting()
    init, *_ = algorithm(True, MultiplierConfig(), **options)
    state, _ = step(init(params, *critics), ref, rollout, scores, costs, key=jax.random.key(1))
    return int(state.multiplier.learner.step)


def test_multiplier_moves_once_per_rollout_batch():
    options = dict(num_epochs=2, num_minibatches=4, num_accumulation=2)
    _, step, *_ = algorithm(True, MultiplierConfig(), **options)
    assert multiplier_steps(step, **options) == 1


def test_planted_multiplier_per_minibatch_is_caught():
    multiplier = make_multiplier(-1.0, MultiplierConfig())

    def faulty(state, ref, rollout, scores, costs, *, key):
        for quarter in costs.reshape(4, -1):
            state = dataclasses.replace(state, multiplier=multiplier.update(state.multiplier, quarter))
        return state, {}

    assert multiplier_steps(faulty) != 1


def test_first_ratio_is_one():
    _, metrics = one_step(num_minibatches=1)
    assert float(metrics["clip_fraction"]) == 0.0
    np.testing.assert_allclose(metrics["old_kl"], 0.0, atol=1e-7)


def test_planted_stale_old_logprobs_are_caught(monkeypatch):
    ref = setting()[1]

    def stale(policy, params, reference, ref_params, rollout, config):
        logprobs, _ = response_logprobs(policy, ref, rollout, temperature=1.0)  # those of an earlier policy
        return logprobs, logprobs, {}

    monkeypatch.setattr(ppo, "_logprobs", stale)
    _, metrics = one_step(num_minibatches=1)
    assert float(metrics["clip_fraction"]) > 0 and float(metrics["old_kl"]) > 1e-4


def test_sampler_mismatch_is_logged_and_small_and_shows_a_missing_temperature():
    params, _, _, rollout, _, _ = setting()
    assert float(one_step()[1]["sampler_mismatch"]) < 1e-5
    sample = make_sampler(POLICY, max_tokens=TOKENS, eos_id=EOS, pad_id=PAD, temperature=0.7)
    cool = sample(params, rollout.prompts, rollout.prompt_mask, jax.random.key(3))
    assert float(one_step(rollout=cool, temperature=0.7)[1]["sampler_mismatch"]) < 1e-5
    assert float(one_step(rollout=cool)[1]["sampler_mismatch"]) > 1e-2


def test_padding_reaches_nothing():
    rollout = setting()[3]
    assert not rollout.mask.all()
    junk = dataclasses.replace(
        rollout,
        tokens=jnp.where(rollout.mask, rollout.tokens, 5),
        prompts=jnp.where(rollout.prompt_mask, rollout.prompts, 9),
        logprobs=jnp.where(rollout.mask, rollout.logprobs, jnp.nan),
    )
    assert_close(one_step(True), one_step(True, rollout=junk), atol=1e-6)


def test_one_trace_for_all_iterations():
    traces = []
    params, ref, critics, rollout, scores, costs = setting()
    init, step, *_ = algorithm(True)

    def counted(*args, **kwargs):
        traces.append(1)
        return step(*args, **kwargs)

    jitted, state = jax.jit(counted), init(params, *critics)
    for i in range(3):
        state, _ = jitted(state, ref, rollout, scores, costs, key=jax.random.key(i))
    assert len(traces) == 1


# --- what the pieces do ----------------------------------------------------------------------------------------------


def kl_by_loop():
    params, ref, _, rollout, _, _ = setting()
    pairs = [response_logprobs(POLICY, p, rollout, temperature=1.0)[0] for p in (params, ref)]
    k3 = lambda u: np.exp(-u) - 1 + u
    return np.mean([sum(k3(float(a - b)) for a, b, kept in zip(*row) if kept) for row in zip(*pairs, rollout.mask)])


def test_kl_counts_response_tokens_only():
    _, metrics = one_step()
    np.testing.assert_allclose(metrics["kl"], kl_by_loop(), rtol=1e-4)


def test_planted_kl_on_prompt_tokens_is_caught(monkeypatch):
    shipped = ppo._logprobs

    def faulty(policy, params, reference, ref_params, rollout, config):
        logprobs, ref, metrics = shipped(policy, params, reference, ref_params, rollout, config)
        whole = Demonstrations(prompts=rollout.prompts[:, :1], prompt_mask=rollout.prompt_mask[:, :1],
                               tokens=sequences(rollout)[0][:, 1:],
                               mask=jnp.concatenate([rollout.prompt_mask[:, 1:], rollout.mask], -1))
        (mine, kept), (other, _) = (next_token_nll(policy, p, whole, prompts=False) for p in (params, ref_params))
        k3 = losses.kl_k3(-mine, -other, mask=kept)
        return logprobs, ref, metrics | {"kl": jnp.mean(masked.masked_sum(k3, kept, -1))}

    monkeypatch.setattr(ppo, "_logprobs", faulty)
    _, metrics = one_step()
    assert abs(float(metrics["kl"]) - kl_by_loop()) > 0.1


def test_unfinished_responses_are_counted_and_penalised_by_option():
    rollout = setting()[3]
    rollout = dataclasses.replace(rollout, finished=jnp.arange(ROWS) % 4 != 0)
    _, free = one_step(rollout=rollout)
    _, priced = one_step(rollout=rollout, unfinished_penalty=2.0)
    np.testing.assert_allclose(free["unfinished"], 0.25)
    np.testing.assert_allclose(free["score"] - priced["score"], 0.5, rtol=1e-5)


def test_ptx_pulls_towards_demonstrations():
    rollout = setting()[3]
    demonstrations = Demonstrations(
        prompts=rollout.prompts, prompt_mask=rollout.prompt_mask, tokens=rollout.tokens, mask=rollout.mask
    )
    _, before = one_step(ptx=demonstrations, ptx_coef=1.0, num_epochs=1, num_minibatches=1)
    _, after = one_step(ptx=demonstrations, ptx_coef=1.0, num_epochs=8, num_minibatches=1)
    assert float(after["ptx_loss"]) < float(before["ptx_loss"])  # the mean over epochs falls if each epoch learns


def test_multiplier_golden_sequence():
    multiplier = make_multiplier(0.0, MultiplierConfig(average_decay=0.0))
    state, seen = multiplier.init(), []
    for cost in (2.0, 2.0, 0.0, -1.0, -1.0):
        state = multiplier.update(state, jnp.full(3, cost))
        seen.append(float(jnp.exp(state.log_lambda)))
    np.testing.assert_allclose(seen, [1.221403, 1.559368, 1.559368, 1.334216, 1.167567], rtol=1e-6)


def test_multiplier_is_bounded_and_averages_costs():
    multiplier = make_multiplier(0.0, MultiplierConfig(maximum=1.5, average_decay=0.5))
    state = multiplier.init()
    for _ in range(20):
        state = multiplier.update(state, jnp.array([4.0, 2.0]))
    np.testing.assert_allclose(jnp.exp(state.log_lambda), 1.5, rtol=1e-6)
    np.testing.assert_allclose(state.cost_average, 3.0, rtol=1e-6)


def lambda_is_blind_to_kl(make_step):
    """Whether lambda after one step is the same whatever the KL coefficient."""
    params, ref, critics, rollout, scores, costs = setting()
    seen = []
    for kl_coef in (0.0, 5.0):
        init, step, *_ = make_step(PPOConfig(kl_coef=kl_coef, num_minibatches=2))
        _, metrics = step(init(params, *critics), ref, rollout, scores, costs, key=jax.random.key(0))
        seen.append(float(metrics["lambda"]))
    return abs(seen[0] - seen[1]) < 1e-6


RAW = MultiplierConfig(average_decay=0.0)


def test_multiplier_is_driven_by_raw_costs():
    make = lambda config: make_lagrangian_ppo(POLICY, CRITIC, SGD, SGD, config, make_multiplier(-0.25, RAW))
    assert lambda_is_blind_to_kl(make)
    mean = float(setting()[5].mean())
    np.testing.assert_allclose(one_step(True, RAW, limit=-0.25)[1]["lambda"], np.exp(0.1 * (mean + 0.25)), rtol=1e-5)


def test_planted_multiplier_on_shaped_costs_is_caught():
    params, ref, _, rollout, _, _ = setting()
    pairs = [response_logprobs(POLICY, p, rollout, temperature=1.0)[0] for p in (params, ref)]

    def faulty(config):
        init, update, limit = make_multiplier(-0.25, RAW)
        shaped = lambda costs: losses.kl_shaped_rewards_and_costs(
            costs, costs, *pairs, rollout.mask, kl_coef=config.kl_coef
        )[1].sum(-1)
        return make_lagrangian_ppo(
            POLICY, CRITIC, SGD, SGD, config, Multiplier(init, lambda state, costs: update(state, shaped(costs)), limit)
        )

    assert not lambda_is_blind_to_kl(faulty)


# --- known optima ----------------------------------------------------------------------------------------------------


def bandit(lagrangian, rewards, costs, steps, kl_coef, multiplier=TINY):
    """One-token responses to one prompt: PPO on a bandit whose fixed point is known."""
    sample = make_sampler(POLICY, max_tokens=1, eos_id=EOS, pad_id=PAD)
    optimizer = optax.adam(optax.linear_schedule(3e-3, 1e-4, steps * 4))
    config = PPOConfig(kl_coef=kl_coef, num_minibatches=4, whiten_advantages=False)
    if lagrangian:
        duals = make_multiplier(-0.05, multiplier)
        init, step, *_ = make_lagrangian_ppo(POLICY, CRITIC, optimizer, optimizer, config, duals)
    else:
        init, step, *_ = make_ppo(POLICY, CRITIC, optimizer, optimizer, config)
    prompts, prompt_mask = jnp.full((256, 2), 3), jnp.ones((256, 2), bool)
    ref = POLICY.init(jax.random.key(5))

    def iteration(state, key):
        sample_key, step_key = jax.random.split(key)
        rollout = sample(state.policy.params, prompts, prompt_mask, sample_key)
        signals = (rewards[rollout.tokens[:, 0]],) + ((costs[rollout.tokens[:, 0]],) if lagrangian else ())
        state, metrics = step(state, ref, rollout, *signals, key=step_key)
        return state, metrics

    state = init(ref, *[CRITIC.init(jax.random.key(i)) for i in range(2 if lagrangian else 1)])
    run = jax.jit(lambda state, keys: jax.lax.scan(iteration, state, keys))
    state, metrics = run(state, jax.random.split(jax.random.key(9), steps))
    logits = lambda params: POLICY.apply(params, prompts[:1], prompt_mask[:1])[0][0, -1]
    return jax.nn.softmax(logits(state.policy.params)), jax.nn.log_softmax(logits(ref)), metrics


def test_ppo_reaches_the_tempered_reference():
    rewards = jnp.linspace(-1, 1, 11)[jnp.array([3, 9, 0, 5, 10, 2, 7, 1, 8, 4, 6])]
    policy, ref, _ = bandit(False, rewards, None, 300, kl_coef=0.5)
    optimum = jax.nn.softmax(ref + rewards / 0.5)
    assert 0.5 * float(jnp.abs(jax.nn.softmax(ref) - optimum).sum()) > 0.2  # there is something to learn
    assert 0.5 * float(jnp.abs(policy - optimum).sum()) < 0.02


def test_lagrangian_ppo_reaches_the_known_dual():
    rewards = jnp.linspace(-1, 1, 11)
    costs = jnp.linspace(-1, 1, 11) ** 3  # helpful arms are harmful
    multiplier = MultiplierConfig(learning_rate=0.3, maximum=50.0)
    policy, ref, metrics = bandit(True, rewards, costs, 500, kl_coef=1.0, multiplier=multiplier)

    def excess(log_lambda):  # independent of the library: the fixed point ref exp((r - lambda c) / ((1 + lambda) k))
        lam, k = np.exp(log_lambda), 0.5
        weights = np.exp(np.asarray(ref, float) + (np.asarray(rewards) - lam * np.asarray(costs)) / ((1 + lam) * k))
        return (weights * np.asarray(costs)).sum() / weights.sum() + 0.05

    low, high = np.log(1e-3), np.log(50)
    assert excess(low) > 0 > excess(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    np.testing.assert_allclose(float(jnp.mean(metrics["lambda"][-100:])), np.exp(low), rtol=0.1)
    np.testing.assert_allclose(float(policy @ costs), -0.05, atol=0.03)


def test_without_reward_the_policy_stays_or_returns():
    params, ref, critics, rollout, scores, _ = setting()
    init, step, *_ = algorithm(kl_coef=0.5, whiten_advantages=False)
    zero = init(ref, CRITIC.init(jax.random.key(0)))
    state, _ = jax.jit(step)(zero, ref, rollout, jnp.zeros(ROWS), key=jax.random.key(0))
    assert_close(state.policy.params, ref, atol=1e-7)
