"""From scores of whole responses to advantages of tokens. Arrays are `[..., T]` over response tokens, mask bool.

The mask may be any pattern: masked-out tokens are skipped as if they were absent, hold 0 in every result, and nothing
they contain reaches a value or a gradient. A row that keeps nothing loses its score: `rlhfjax.types.check_mask` first.
"""

import chex
import jax
import jax.numpy as jnp

from rlhfjax.losses._inputs import as_floats, check_between, check_positive
from rlhfjax.losses.policy import kl_k1
from rlhfjax.masked import last_index


def kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, *, kl_coef, clip=None) -> jax.Array:
    """Token rewards: `-kl_coef (log pi - log ref)` everywhere, plus the score at the last kept token.

    Args:
        scores: `[...]`, one per response, larger is better. logprobs (of the policy that sampled), ref_logprobs:
            `[..., T]`.
        kl_coef: price of one nat. clip: each token's total is clipped to `[-clip, clip]` (50 in Safe RLHF).
    Returns:
        `[..., T]`.
    Source: lm-human-preferences; the score sits at the EOS itself, not one slot behind it.
    """
    check_between(0, float("inf"), kl_coef=kl_coef)
    (scores,) = as_floats(scores)
    penalty = kl_coef * kl_k1(logprobs, ref_logprobs, mask=mask)
    chex.assert_shape(scores, penalty.shape[:-1])
    at_end = jnp.arange(mask.shape[-1]) == last_index(mask)[..., None]
    rewards = jnp.where(at_end, scores[..., None], 0.0) - penalty
    if clip is None:
        return rewards
    check_positive(clip=clip)
    return jnp.clip(rewards, -clip, clip)


def kl_shaped_rewards_and_costs(
    scores, costs, logprobs, ref_logprobs, mask, *, kl_coef, clip=None
) -> tuple[jax.Array, jax.Array]:
    """Token rewards and token costs that share the KL penalty evenly: half is taken from the rewards, half added to
    the costs.

        r_t = [t = end] scores - (kl_coef / 2) u_t,    c_t = [t = end] costs + (kl_coef / 2) u_t

    with `u = log pi - log ref`, so that in (r - lambda c) / (1 + lambda) the KL weighs kl_coef / 2 whatever lambda is.

    Args:
        scores, costs: `[...]`; positive costs are harmful. kl_coef is the *total* of both streams. Otherwise as in
            `kl_shaped_rewards`.
    Returns:
        (rewards, costs), `[..., T]` each. These costs train the cost critic; the multiplier is driven by the raw ones.
    Source: Safe RLHF (2310.12773); PKU-Alignment/safe-rlhf pull request 173 (its `kl_coeff` is our half).
    """
    check_between(0, float("inf"), kl_coef=kl_coef)
    shaped = lambda ends: kl_shaped_rewards(ends, logprobs, ref_logprobs, mask, kl_coef=kl_coef / 2, clip=clip)
    return shaped(scores), -shaped(-costs)


def gae(rewards, values, mask, *, gamma, gae_lambda) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation:

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma gae_lambda A_{t+1},    V, A = 0 after the end.

    An unfinished response ends at its last token too: nothing is bootstrapped behind the budget.

    Args:
        rewards, values, mask: `[..., T]`; `values[t]` is that of the state before token t.
        gamma, gae_lambda: in [0, 1]; 1 and 0.95 for language models.
    Returns:
        (advantages, returns), `[..., T]` each; returns = advantages + values, so whiten the advantages afterwards.
    Source: Schulman et al. (1506.02438) eq. 16, as in lm-human-preferences.
    """
    check_between(0, 1, gamma=gamma, gae_lambda=gae_lambda)
    rewards, values = as_floats(rewards, values, mask=mask)

    def step(carry, token):
        next_value, next_advantage = carry
        reward, value, keep = token
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        carry = jnp.where(keep, value, next_value), jnp.where(keep, advantage, next_advantage)
        return carry, jnp.where(keep, advantage, 0.0)

    time_first = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask)]
    after_the_end = jnp.zeros_like(rewards[..., 0])
    _, advantages = jax.lax.scan(step, (after_the_end, after_the_end), time_first, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, advantages + values


def discounted_returns(rewards, mask, *, gamma) -> jax.Array:
    """`R_t = r_t + gamma R_{t+1}` over kept tokens, `[..., T]`: GAE without a critic (V = 0, gae_lambda = 1)."""
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0)[1]


def adaptive_kl_coef(kl_coef, kl, *, target, num_samples, horizon) -> jax.Array:
    """`kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon)`: a proportional controller.

    Args:
        kl_coef: `[]`, the current coefficient. kl, target: nats per response, measured and wanted.
        num_samples: responses since the last update. horizon: responses (10,000) over which an error takes effect.
    Source: Ziegler et al. (1909.08593) section 2.2, lm-human-preferences.
    """
    check_positive(target=target, num_samples=num_samples, horizon=horizon)
    kl_coef, kl = as_floats(kl_coef, kl)
    return kl_coef * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)
