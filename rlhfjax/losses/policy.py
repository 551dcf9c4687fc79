"""What a policy and its critic minimise, token by token. Unreduced: reduce with `rlhfjax.masked.masked_mean`.

Arrays are `[...]`, usually `[B, T]` over response tokens. With `mask=` the masked-out entries give loss 0 and gradient
0 whatever they hold; without it NaN in padding would survive in the gradient (0 * nan), even behind a masked mean.
A NaN that counts is never swallowed.
"""

import jax
import jax.numpy as jnp

from rlhfjax.losses._inputs import as_floats, check_positive


def ppo_clip_loss(logprobs, old_logprobs, advantages, *, clip, mask=None) -> jax.Array:
    """PPO's pessimistic surrogate: `max(-A rho, -A clip(rho, 1 - clip, 1 + clip))`, `rho = exp(logprobs - old)`.

    Args:
        logprobs: under the policy that learns; old_logprobs: under the one that sampled. advantages: larger is better.
        clip: 0.2 in most of the literature. Only `logprobs` receives a gradient.
    Returns:
        `[...]`. Where `A rho` is clipped the gradient is 0; at `rho = 1` it is that of `reinforce_loss`.
    Source: Schulman et al. (1707.06347) eq. 7, as in lm-human-preferences and PKU-Alignment/safe-rlhf.
    """
    check_positive(clip=clip)
    logprobs, old_logprobs, advantages = as_floats(logprobs, old_logprobs, advantages, mask=mask)
    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    ratio = jnp.exp(logprobs - old_logprobs)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip))


def clipped_value_loss(values, old_values, returns, *, clip, mask=None) -> jax.Array:
    """`0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)`.

    Args:
        values: of the critic that learns; old_values: its values at sampling time; returns: unwhitened targets.
        clip: in units of the value, so it must fit their scale: 0.2 for whitened rewards, 5 in Safe RLHF.
            Only `values` receives a gradient.
    Returns:
        `[...]`.
    Source: lm-human-preferences; PKU-Alignment/safe-rlhf.
    """
    check_positive(clip=clip)
    values, old_values, returns = as_floats(values, old_values, returns, mask=mask)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def reinforce_loss(logprobs, advantages, *, mask=None) -> jax.Array:
    """`-logprobs * stop_gradient(advantages)`: its *gradient* is the policy gradient, its value means nothing.

    advantages are return minus baseline. `[...] -> [...]`. Source: Williams (1992); RLAIF (2309.00267).
    """
    logprobs, advantages = as_floats(logprobs, advantages, mask=mask)
    return -logprobs * jax.lax.stop_gradient(advantages)


def kl_k1(logprobs, ref_logprobs, *, mask=None) -> jax.Array:
    """`u = log pi - log ref` on samples from pi: an unbiased, noisy estimate of KL(pi || ref), of either sign.

    As a *reward* (`kl_shaped_rewards`) it is the right thing. As a differentiated *loss* it does nothing on average:
    its gradient is the score function, whose mean is 0.
    Source, for all three: Schulman, "Approximating KL divergence" (2020).
    """
    logprobs, ref_logprobs = as_floats(logprobs, ref_logprobs, mask=mask)
    return logprobs - ref_logprobs


def kl_k2(logprobs, ref_logprobs, *, mask=None) -> jax.Array:
    """`u^2 / 2`, `u = log pi - log ref`: never negative, biased (slightly so when the policies are close).

    Differentiated on samples from pi it gives the gradient of KL(pi || ref): exactly so for whole sequences, or for
    one token's distribution; summed over tokens it misses a token's effect on later states.
    """
    return 0.5 * jnp.square(kl_k1(logprobs, ref_logprobs, mask=mask))


def kl_k3(logprobs, ref_logprobs, *, mask=None) -> jax.Array:
    """`e^{-u} - 1 + u`, `u = log pi - log ref`: unbiased for KL(pi || ref), never negative: the one to *report*.

    Differentiated on samples from pi it gives the gradient of the *other* divergence, KL(ref || pi); the remark of
    `kl_k2` on summing over tokens holds too.
    """
    log_ratio = kl_k1(logprobs, ref_logprobs, mask=mask)
    return jnp.expm1(-log_ratio) + log_ratio


def entropy(logits, *, mask=None) -> jax.Array:
    """Entropy in nats of `softmax(logits)` over the last axis: `[..., V] -> [...]`; logits of -inf have no share."""
    (logits,) = as_floats(logits)
    if mask is not None:
        logits = jnp.where(mask[..., None], logits, 0.0)
    logprobs = jax.nn.log_softmax(logits)
    # p log p -> 0 as p -> 0, where 0 * -inf would be NaN.
    result = -jnp.sum(jnp.exp(logprobs) * jnp.where(jnp.isneginf(logprobs), 0.0, logprobs), axis=-1)
    return result if mask is None else jnp.where(mask, result, 0.0)
