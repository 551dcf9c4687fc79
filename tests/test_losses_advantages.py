"""KL-shaped rewards and GAE: golden numbers, plain loops over the kept tokens, and three planted faults."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import (
    adaptive_kl_coef,
    discounted_returns,
    gae,
    kl_shaped_rewards,
    kl_shaped_rewards_and_costs,
    whiten,
)

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
rng = np.random.default_rng(2)
B, T = 5, 7
LENGTHS = np.array([7, 1, 4, 6, 2])[:, None]
HOLES = rng.uniform(size=(B, T)) < 0.6
HOLES[:, 3] = True
MASKS = {"right padded": np.arange(T) < LENGTHS, "left padded": np.arange(T) >= T - LENGTHS, "holes": HOLES}
SCORES, COSTS = rng.normal(size=(2, B))
LOGPROBS, REF_LOGPROBS, REWARDS, VALUES = rng.normal(size=(4, B, T))
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


class Golden:
    """Four tokens (the last one EOS) and three slots of padding that hold garbage."""

    pad = [np.nan, 0.4, np.inf]
    logprobs = np.array([-1.0, -0.5, -2.0, -0.1, *pad])
    ref_logprobs = np.array([-1.2, -0.4, -2.5, -0.3, *pad])
    values = np.array([0.2, 0.3, 0.5, 0.7, 0.4, *pad[1:]])  # the slot after EOS holds a plausible value
    mask = np.arange(7) < 4
    rewards = [-0.02, 0.01, -0.05, 0.98, 0, 0, 0]
    advantages = [0.65494, 0.6052, 0.416, 0.28, 0, 0, 0]
    returns = [0.85494, 0.9052, 0.916, 0.98, 0, 0, 0]
    whitened = [1.105735, 0.774224, -0.486769, -1.393191, 0, 0, 0]
    rewards_whitened = [-0.346659, -0.27746, -0.415858, 1.959976, 0, 0, 0]


def test_golden_rewards():
    shaped = kl_shaped_rewards(np.array(1.0), Golden.logprobs, Golden.ref_logprobs, Golden.mask, kl_coef=0.1)
    close(shaped, Golden.rewards)
    close(whiten(shaped, Golden.mask, shift_mean=False), Golden.rewards_whitened)


def assert_ends_at_eos(gae):
    """Golden advantages and returns, though padding holds a plausible value, a NaN and an infinity."""
    rewards = np.array(Golden.rewards[:4] + Golden.pad)
    advantages, returns = gae(rewards, Golden.values, Golden.mask, gamma=1.0, gae_lambda=0.95)
    close(advantages, Golden.advantages)
    close(returns, Golden.returns)


def assert_moments_of_kept_tokens(whiten):
    close(whiten(np.array(Golden.advantages), Golden.mask), Golden.whitened)
    white = whiten(REWARDS, MASKS["right padded"])[MASKS["right padded"]]
    close(white.mean(), 0.0)
    close(white.std(), 1.0)


def assert_score_sits_on_eos(shaped_rewards):
    close(shaped_rewards(np.array(1.0), Golden.logprobs, Golden.ref_logprobs, Golden.mask), Golden.rewards)


def test_golden_advantages():
    assert_ends_at_eos(gae)
    assert_moments_of_kept_tokens(whiten)


def test_planted_fault_value_bootstrapped_past_eos():
    def bootstrapped(rewards, values, mask, **options):
        after = np.arange(len(mask)) == np.flatnonzero(mask)[-1] + 1
        return gae(np.where(mask, rewards, np.where(after, values, 0)), values, mask | after, **options)

    with pytest.raises(AssertionError):
        assert_ends_at_eos(bootstrapped)


def test_planted_fault_whitening_across_padding():
    with pytest.raises(AssertionError):
        assert_moments_of_kept_tokens(lambda x, mask: whiten(jnp.asarray(x), np.ones_like(mask)))
    with pytest.raises(AssertionError):  # zeros at the padding of the result do not hide wrong moments
        assert_moments_of_kept_tokens(lambda x, mask: jnp.where(mask, whiten(x * mask, np.ones_like(mask)), 0))


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_planted_fault_mask_off_by_one(shift):
    def shaped(scores, logprobs, ref_logprobs, mask):
        finite = [np.nan_to_num(x, nan=0.0, posinf=0.0) for x in (logprobs, ref_logprobs)]
        kept = np.arange(len(mask)) < mask.sum() + shift
        return kl_shaped_rewards(scores, *finite, kept, kl_coef=0.1)

    if shift == 0:
        assert_score_sits_on_eos(shaped)
    else:
        with pytest.raises(AssertionError):
            assert_score_sits_on_eos(shaped)


def test_a_score_behind_the_eos_costs_one_more_lambda():
    """The other convention in use: rewards, values and mask reach one slot further. Ours does not do that."""
    rewards, mask = np.array([*Golden.rewards[:3], -0.02, 1.0]), np.ones(5, bool)
    advantages, _ = gae(rewards, Golden.values[:5], mask, gamma=1.0, gae_lambda=0.95)
    close(advantages, [0.629219, 0.578125, 0.3875, 0.25, 0.6])


@every_mask
def test_gae_is_a_loop_over_the_kept_tokens(mask):
    advantages, returns = gae(REWARDS, VALUES, mask, gamma=0.9, gae_lambda=0.8)
    expected = np.zeros((B, T))
    for b in range(B):
        next_value = next_advantage = 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            delta = REWARDS[b, t] + 0.9 * next_value - VALUES[b, t]
            next_value, next_advantage = VALUES[b, t], delta + 0.9 * 0.8 * next_advantage
            expected[b, t] = next_advantage
    close(advantages, expected)
    close(returns, np.where(mask, expected + VALUES, 0))


@every_mask
def test_returns_are_discounted_sums_over_the_kept_tokens(mask):
    expected = np.zeros((B, T))
    for b in range(B):
        kept = np.flatnonzero(mask[b])
        for i, t in enumerate(kept):
            expected[b, t] = sum(0.9**j * REWARDS[b, s] for j, s in enumerate(kept[i:]))
    close(discounted_returns(REWARDS, mask, gamma=0.9), expected)


@every_mask
def test_shaped_rewards_and_costs_are_a_loop(mask):
    """The penalty is split evenly, the scores sit at the last kept token, totals are clipped to +-1."""
    options = {"kl_coef": 0.3, "clip": 1.0}
    rewards, costs = kl_shaped_rewards_and_costs(SCORES, COSTS, LOGPROBS, REF_LOGPROBS, mask, **options)
    alone = kl_shaped_rewards(SCORES, LOGPROBS, REF_LOGPROBS, mask, **options)
    expected = np.zeros((3, B, T))
    for b in range(B):
        kept = np.flatnonzero(mask[b])
        for t in kept:
            u = LOGPROBS[b, t] - REF_LOGPROBS[b, t]
            expected[:, b, t] = -0.15 * u, 0.15 * u, -0.3 * u
        expected[:, b, kept[-1]] += SCORES[b], COSTS[b], SCORES[b]
    assert (np.abs(expected) > 1).any(), "the clip must bite somewhere"
    close([rewards, costs, alone], np.clip(expected, -1, 1))


def test_advantages_of_the_true_values_are_zero_when_nothing_is_random():
    mask = MASKS["right padded"]
    values = discounted_returns(REWARDS, mask, gamma=0.97)
    advantages, returns = gae(REWARDS, values, mask, gamma=0.97, gae_lambda=0.5)
    close(advantages, np.zeros((B, T)), atol=2e-5)
    close(returns, values, atol=2e-5)


def test_extreme_lambdas():
    """gae_lambda = 0 is the one-step error; gae_lambda = 1 is return minus value."""
    mask = MASKS["right padded"]
    next_values = np.where(np.roll(mask, -1, axis=1) & (np.arange(T) < T - 1), np.roll(VALUES, -1, axis=1), 0)
    one_step, _ = gae(REWARDS, VALUES, mask, gamma=0.9, gae_lambda=0.0)
    close(one_step, np.where(mask, REWARDS + 0.9 * next_values - VALUES, 0))
    full, _ = gae(REWARDS, VALUES, mask, gamma=0.9, gae_lambda=1.0)
    close(full, np.where(mask, discounted_returns(REWARDS, mask, gamma=0.9) - VALUES, 0))


def test_advantages_depend_on_the_future_only():
    """d A_t / d r_s is (gamma lambda)^(s - t) for s >= t within the response, and exactly 0 before t."""
    mask = np.arange(T) < 5
    jacobian = jax.jacobian(lambda r: gae(r, VALUES[0], mask, gamma=0.9, gae_lambda=0.8)[0])(jnp.asarray(REWARDS[0]))
    lag = np.arange(T)[None, :] - np.arange(T)[:, None]
    close(jacobian, np.where((lag >= 0) & mask & mask[:, None], 0.72 ** np.maximum(lag, 0), 0))


def test_adaptive_kl_by_hand():
    options = {"target": 6.0, "num_samples": 512, "horizon": 10_000}
    for kl, expected in {9.0: 0.151536, 3.0: 0.148464, 6.3: 0.150384, 6.0: 0.15}.items():
        close(adaptive_kl_coef(0.15, kl, **options), expected)
