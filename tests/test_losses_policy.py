"""Policy and value losses: golden numbers, clipping, and which divergence the gradient of each KL estimator is of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import clipped_value_loss, entropy, kl_k1, kl_k2, kl_k3, ppo_clip_loss, reinforce_loss

close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def test_ppo_clip_by_hand():
    ratio, advantages = np.array([0.7, 0.9, 1.1, 1.3]), np.array([1.0, -1.0, 1.0, -1.0])
    loss = ppo_clip_loss(np.log(ratio), np.zeros(4), advantages, clip=0.2)
    close(loss, [-0.7, 0.9, -1.1, 1.3])
    close(loss.mean(), 0.1)


def test_ppo_gradient_is_zero_only_where_the_policy_has_moved_far_enough_the_right_way():
    """Better actions above 1 + clip and worse ones below 1 - clip are done; mistakes are always corrected."""
    ratio = np.array([1.3, 1.3, 0.7, 0.7, 1.1, 0.9])
    advantages = np.array([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    gradient = jax.grad(lambda x: ppo_clip_loss(x, jnp.zeros(6), advantages, clip=0.2).sum())(jnp.log(ratio))
    close(gradient, np.array([0, 1, 1, 0, 1, 1]) * -advantages * ratio)


def test_ppo_gradient_at_ratio_one_is_the_policy_gradient():
    logprobs, advantages = jnp.array([-0.3, -2.0, -1.1]), jnp.array([1.0, -0.5, 0.0])
    ppo = jax.grad(lambda x: ppo_clip_loss(x, logprobs, advantages, clip=0.2).sum())(logprobs)
    reinforce = jax.grad(lambda x: reinforce_loss(x, advantages).sum())(logprobs)
    np.testing.assert_array_equal(ppo, reinforce)
    close(reinforce, -advantages)


def test_clipped_value_by_hand():
    loss = clipped_value_loss(np.array([1.0, 0.0]), np.array([0.5, 0.1]), np.array([0.8, 0.6]), clip=0.2)
    close(loss, [0.5 * max(0.2**2, 0.1**2), 0.5 * max(0.6**2, 0.6**2)])
    close(loss.mean(), 0.1)


def test_the_clip_of_the_value_is_around_the_old_value():
    """Per entry: moved less than the clip; too far, towards the return (no more gradient); too far, away from it."""
    values, old_values = jnp.array([0.6, 3.0, -1.0]), np.array([0.5, 0.0, 0.0])
    loss = lambda v: clipped_value_loss(v, old_values, np.array([0.0, 3.0, 3.0]), clip=0.2)
    close(loss(values), [0.5 * 0.6**2, 0.5 * 2.8**2, 0.5 * 4.0**2])
    close(jax.grad(lambda v: loss(v).sum())(values), [0.6, 0.0, -4.0])


def test_entropy_by_hand():
    close(entropy(np.zeros(8)), np.log(8))
    close(entropy(np.log([0.5, 0.25, 0.25])), 1.5 * np.log(2))
    assert entropy(np.array([1e4, 0.0, -1e4])) == 0


def test_entropy_of_forbidden_tokens():
    """-inf logits have no share, in value and in gradient; a NaN logit is not mistaken for one."""
    logits = jnp.array([0.3, -0.2, -jnp.inf])
    value, gradient = jax.value_and_grad(entropy)(logits)
    expected, expected_gradient = jax.value_and_grad(entropy)(logits[:2])
    close(value, expected)
    close(gradient, [*expected_gradient, 0.0])
    assert np.isnan(entropy(jnp.array([0.3, jnp.nan, -jnp.inf])))


@pytest.mark.parametrize(
    "shift, expected",
    [
        (0.1, {kl_k1: (0, 20.0), kl_k2: (0.0025, 1.418), kl_k3: (0, 1.417)}),
        (1.0, {kl_k1: (0, 2.0), kl_k2: (0.25, 1.732), kl_k3: (0, 1.695)}),
    ],
)
def test_bias_and_spread_of_the_kl_estimators(shift, expected):
    """(bias, standard deviation) over the true KL, for pi = N(0, 1) against N(shift, 1), by quadrature."""
    x, dx = np.linspace(-12, 12, 20_001, retstep=True)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    true = shift**2 / 2
    for estimator, (bias, spread) in expected.items():
        with jax.enable_x64(True):
            samples = np.asarray(estimator(-(x**2) / 2, -((x - shift) ** 2) / 2))
        mean = (density * samples).sum() * dx
        std = np.sqrt((density * samples**2).sum() * dx - mean**2)
        close(mean / true - 1, bias, atol=5e-5)
        close(std / true, spread, rtol=0, atol=5e-4)


def test_what_the_gradients_of_the_kl_estimators_are():
    """On-policy and for one token's distribution: k1 nothing, k2 KL(pi || ref), k3 KL(ref || pi)."""
    logits, ref_logits = jax.random.normal(jax.random.key(0), (2, 5))
    ref = jax.nn.log_softmax(ref_logits)
    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q))
    sampled = jax.nn.softmax(logits)

    def expected_gradient(estimator):
        return jax.grad(lambda x: jnp.sum(sampled * estimator(jax.nn.log_softmax(x), ref)))(logits)

    reverse = jax.grad(lambda x: kl(jax.nn.log_softmax(x), ref))(logits)
    forward = jax.grad(lambda x: kl(ref, jax.nn.log_softmax(x)))(logits)
    assert np.abs(reverse - forward).max() > 0.05
    close(expected_gradient(kl_k1), np.zeros(5))
    close(expected_gradient(kl_k2), reverse)
    close(expected_gradient(kl_k3), forward)


def test_k2_and_k3_are_never_negative():
    u = np.linspace(-20, 5, 1001, dtype=np.float32)
    assert (kl_k2(u, 0 * u) >= 0).all() and (kl_k3(u, 0 * u) >= 0).all()
    assert kl_k3(np.float32(1e-4), np.float32(0)) > 0, "expm1 keeps the small ones"
