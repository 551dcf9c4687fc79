"""The dual: golden numbers, invariance of the KL weight, and a bandit whose multiplier is known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from rlhfjax.losses import (
    check_limit,
    clamp_log_lambda,
    gae,
    kl_shaped_rewards_and_costs,
    mixed_advantages,
    moving_average,
    multiplier_loss,
    ppo_clip_loss,
    reachable_cost,
    tempered_policy,
)

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
rng = np.random.default_rng(3)
REWARD_ADVANTAGES, COST_ADVANTAGES = rng.normal(size=(2, 40)).astype(np.float32)


@pytest.mark.parametrize("lam", [1e-6, 0.5, 1.0, 5.0, 1e6])
def test_mixed_advantages_by_the_formula(lam):
    mixed = mixed_advantages(REWARD_ADVANTAGES, COST_ADVANTAGES, np.float32(np.log(lam)))
    close(mixed, (np.float64(REWARD_ADVANTAGES) - lam * COST_ADVANTAGES) / (1 + lam))


def test_without_a_multiplier_the_mixed_advantage_is_the_reward_advantage_exactly():
    np.testing.assert_array_equal(mixed_advantages(REWARD_ADVANTAGES, COST_ADVANTAGES, -np.inf), REWARD_ADVANTAGES)
    np.testing.assert_array_equal(mixed_advantages(REWARD_ADVANTAGES, COST_ADVANTAGES, np.inf), -COST_ADVANTAGES)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 5.0, 1e4])
def test_kl_weight_of_the_mixed_advantage_does_not_depend_on_lambda(lam):
    """SR-10. With the penalty on the reward alone it would be kl_coef / (1 + lambda): 1/6 of it at lambda = 5."""
    logprobs, ref_logprobs = rng.normal(size=(2, 3, 4)).astype(np.float32)
    nothing, mask = np.zeros(3, np.float32), np.ones((3, 4), bool)
    log_lambda = jnp.log(lam)
    streams = kl_shaped_rewards_and_costs(nothing, nothing, logprobs, ref_logprobs, mask, kl_coef=0.2)
    advantages = [gae(x, 0 * x, mask, gamma=1.0, gae_lambda=0.0)[0] for x in streams]
    close(mixed_advantages(*advantages, log_lambda), -0.1 * (logprobs - ref_logprobs))
    reward_only = mixed_advantages(advantages[0], 0 * advantages[1], log_lambda)
    close(reward_only, -0.1 * (logprobs - ref_logprobs) / (1 + lam))


def test_multiplier_steps_by_hand():
    log_lambda = jnp.zeros(())
    for cost, expected in zip([2.0, 2.0, 0.0, -1.0, -1.0], [1.221403, 1.559368, 1.559368, 1.334216, 1.167567]):
        log_lambda -= 0.1 * jax.grad(multiplier_loss)(log_lambda, cost, limit=0.0)
        close(jnp.exp(log_lambda), expected)


def test_the_limit_is_minus_d():
    """E[C] + d <= 0 with d = 3: a cost of -3 is on the boundary and moves nothing, -4 is slack."""
    slope = lambda cost: jax.grad(multiplier_loss)(0.0, cost, limit=-3.0)
    assert slope(-3.0) == 0 and slope(-4.0) > 0 > slope(-2.0)


def test_clamp_bounds_lambda_itself_and_keeps_the_dtype():
    log_lambda = jnp.log(jnp.array([0.01, 1.0, 100.0]))
    close(jnp.exp(clamp_log_lambda(log_lambda, minimum=0.1, maximum=5.0)), [0.1, 1.0, 5.0])
    np.testing.assert_array_equal(clamp_log_lambda(log_lambda), log_lambda)
    assert clamp_log_lambda(log_lambda.astype(jnp.bfloat16), maximum=5.0).dtype == jnp.bfloat16
    assert np.isnan(clamp_log_lambda(jnp.array(jnp.nan), maximum=5.0))
    assert jax.jit(clamp_log_lambda)(-jnp.inf) == -jnp.inf


def test_moving_average_starts_at_the_first_value():
    values, average, averages = rng.normal(size=12), 123.0, []
    for count, value in enumerate(values):
        average = moving_average(average, value, decay=0.75, count=count)
        averages.append(float(average))
    close(averages[:4], np.cumsum(values[:4]) / np.arange(1, 5))  # plain means, for 1 / (1 - decay) values
    for before, value, after in zip(averages[3:], values[4:], averages[4:]):
        close(after, 0.75 * before + 0.25 * value)


# A bandit in which the arm that helps most harms most. Truth by root finding on the closed forms, in NumPy.
REWARD, COST, REFERENCE = np.array([2.0, 1.0, -0.5]), np.array([1.5, 0.2, -1.0]), np.array([0.5, 0.3, 0.2])
KL_COEF, LIMIT = 1.0, 0.0


def expected_cost(weight_of_reward, weight_of_cost):
    policy = REFERENCE * np.exp(weight_of_reward * REWARD - weight_of_cost * COST)
    return policy @ COST / policy.sum()


K = KL_COEF / 2
ours = lambda lam: expected_cost(1 / ((1 + lam) * K), lam / ((1 + lam) * K))
textbook = lambda lam: expected_cost(1 / K, lam / K)
TRUE_LAMBDA = brentq(lambda lam: ours(lam) - LIMIT, 0, 100)
TEXTBOOK_LAMBDA = brentq(lambda lam: textbook(lam) - LIMIT, 0, 100)
FLOOR = expected_cost(0, 1 / K)


@functools.partial(jax.jit, static_argnames=("limit", "drive_by_shaped_costs"))
def solve_bandit(*, limit, drive_by_shaped_costs=False):
    """Exact policy gradients and multiplier steps with the shipped losses: (lambda, expected cost, policy)."""
    ref_logprobs, mask = jnp.log(REFERENCE)[:, None], np.ones((3, 1), bool)

    def step(state, _):
        logits, log_lambda = state
        old = jax.nn.log_softmax(logits)
        policy = jnp.exp(old)
        streams = kl_shaped_rewards_and_costs(REWARD, COST, old[:, None], ref_logprobs, mask, kl_coef=KL_COEF)
        values = [jnp.broadcast_to(policy @ x, x.shape) for x in streams]
        advantages = [gae(x, v, mask, gamma=1.0, gae_lambda=0.95)[0] for x, v in zip(streams, values)]
        mixed = mixed_advantages(*advantages, log_lambda)[:, 0]
        loss = lambda logits: policy @ ppo_clip_loss(jax.nn.log_softmax(logits), old, mixed, clip=0.2)
        mean_cost = policy @ (streams[1][:, 0] if drive_by_shaped_costs else COST)
        logits -= 0.5 * jax.grad(loss)(logits)
        log_lambda -= 0.02 * jax.grad(multiplier_loss)(log_lambda, mean_cost, limit=limit)
        return (logits, clamp_log_lambda(log_lambda, maximum=50.0)), None

    (logits, log_lambda), _ = jax.lax.scan(step, (jnp.log(REFERENCE), jnp.zeros(())), length=4000)
    policy = jax.nn.softmax(logits)
    return jnp.exp(log_lambda), policy @ COST, policy


def assert_finds_the_dual(solve):
    lam, cost, policy = solve(limit=LIMIT)
    close(lam, TRUE_LAMBDA, rtol=1e-3)
    close(cost, LIMIT, atol=1e-3)
    tempered = tempered_policy(REWARD, COST, np.log(REFERENCE), log_lambda=np.log(TRUE_LAMBDA), kl_coef=KL_COEF)
    close(policy, tempered, atol=1e-3)


def test_known_dual_of_this_objective():
    """1.872 for the fixed point of (A_r - lambda A_c) / (1 + lambda) with the even KL split; the textbook has 1.322."""
    assert_finds_the_dual(solve_bandit)
    close([TRUE_LAMBDA, TEXTBOOK_LAMBDA], [1.8721, 1.3225], atol=1e-4)


def test_planted_fault_lambda_on_the_kl_shaped_cost():
    with pytest.raises(AssertionError):
        assert_finds_the_dual(functools.partial(solve_bandit, drive_by_shaped_costs=True))


def test_infeasible_limit_is_detected_and_named():
    limit, ref_logprobs = -0.9, np.log(REFERENCE)
    floor = reachable_cost(COST, ref_logprobs, kl_coef=KL_COEF)
    close(floor, FLOOR)
    lam, cost, _ = solve_bandit(limit=limit)
    assert lam > 49.9 and limit < FLOOR < cost, "what it looks like in training: lambda at its bound, cost above limit"
    with pytest.raises(ValueError, match=r"infeasible cost limit -0.9: .* cannot fall below -0.8218"):
        check_limit(limit, floor)
    check_limit(LIMIT, floor)


@pytest.mark.parametrize("log_lambda", [-np.inf, -1.0, 0.0, 2.0, np.inf])
def test_tempered_policy_is_a_fixed_point_of_the_mixed_advantage(log_lambda):
    """There the mixed, KL-shaped return is the same for all arms, so the policy gradient vanishes."""
    policy = tempered_policy(REWARD, COST, np.log(REFERENCE), log_lambda=log_lambda, kl_coef=KL_COEF)
    streams = kl_shaped_rewards_and_costs(
        REWARD, COST, jnp.log(policy)[:, None], np.log(REFERENCE)[:, None], np.ones((3, 1), bool), kl_coef=KL_COEF
    )
    returns = mixed_advantages(*streams, log_lambda)
    close(returns, np.broadcast_to(returns.mean(), (3, 1)), atol=2e-6)
    assert np.std(mixed_advantages(REWARD, COST, log_lambda)) > 0.05, "though the raw ones differ"


def test_reachable_cost_is_the_limit_of_the_constrained_costs():
    """Helpfulness pulls towards harm here, so the expected cost falls all the way to the floor as lambda grows."""
    path = [ours(lam) for lam in np.logspace(-2, 6, 50)]
    assert (np.diff(path) < 0).all()
    close(path[-1], reachable_cost(COST, np.log(REFERENCE), kl_coef=KL_COEF), atol=1e-5)
    # n samples of the reference with uniform weights are the same thing by counting
    samples = np.repeat(COST, [5, 3, 2])
    close(reachable_cost(samples, np.zeros(10), kl_coef=KL_COEF), FLOOR)
