"""Helpfulness under a limit on expected harm: maximise E[r] subject to E[c] <= limit, by a multiplier lambda >= 0.

lambda is carried as `log_lambda`, which keeps it positive. Costs are harm: larger is worse. Safe RLHF writes the
constraint as `E[C] + d <= 0`: its d is `-limit`.
"""

import math

import chex
import jax
import jax.numpy as jnp

from rlhfjax.losses._inputs import as_floats, check_between, check_positive


def mixed_advantages(reward_advantages, cost_advantages, log_lambda) -> jax.Array:
    """`(A_r - lambda A_c) / (1 + lambda)`: one advantage for the policy, whose scale does not grow with lambda.

    Written as `sigmoid(-log_lambda) A_r - sigmoid(log_lambda) A_c`, which is the same and overflows nowhere:
    `log_lambda = -inf` (lambda = 0) gives `A_r` exactly, `+inf` gives `-A_c`.

    Args:
        reward_advantages, cost_advantages: `[...]`. log_lambda: `[]`, or any shape that broadcasts.
    Returns:
        `[...]`.
    Source: Safe RLHF (2310.12773); PKU-Alignment/safe-rlhf.
    """
    reward_advantages, cost_advantages = as_floats(reward_advantages, cost_advantages)
    (log_lambda,) = as_floats(log_lambda)
    return jax.nn.sigmoid(-log_lambda) * reward_advantages - jax.nn.sigmoid(log_lambda) * cost_advantages


def multiplier_loss(log_lambda, mean_cost, *, limit) -> jax.Array:
    """`-lambda (mean_cost - limit)`: its descent in `log_lambda` is ascent on the dual.

    SGD with rate alpha gives `log_lambda += alpha lambda (mean_cost - limit)`: lambda rises while the policy is too
    harmful, falls while there is slack, and the step scales with lambda itself.

    Args:
        log_lambda: `[]`. mean_cost: `[]`, average raw cost per response, *without* KL shaping; it is a constant here.
    Source: Safe RLHF (2310.12773), ln lambda_{k+1} = ln lambda_k + alpha lambda_k J_C(theta_k).
    """
    check_between(-float("inf"), float("inf"), limit=limit)
    log_lambda, mean_cost = as_floats(log_lambda, mean_cost)
    return -jnp.exp(log_lambda) * (jax.lax.stop_gradient(mean_cost) - limit)


def clamp_log_lambda(log_lambda, *, minimum=0.0, maximum=math.inf) -> jax.Array:
    """`log_lambda` with **lambda itself** bounded to `[minimum, maximum]`; apply after each step. Keeps the dtype.

    A maximum (5 in Safe RLHF) keeps an infeasible limit from drowning the reward. A minimum keeps lambda from falling
    so low that its steps, which scale with lambda, cannot bring it back in time.
    """
    check_between(0, maximum, minimum=minimum)
    chex.assert_type(log_lambda, float)
    return jnp.clip(log_lambda, jnp.log(minimum), jnp.log(maximum))


def moving_average(average, new, *, decay, count) -> jax.Array:
    """Plain mean of the first `1 / (1 - decay)` values, exponential after that; the first value counts in full.

        average + max(1 - decay, 1 / (count + 1)) (new - average)

    Args:
        average: `[]`, the result of the last call, anything finite at first. new: `[]`. decay: in [0, 1].
        count: how many values `average` has seen: 0 at first.
    Source: in place of the window of the last 128 episode costs of PKU-Alignment/safe-rlhf, and without its state.
    """
    check_between(0, 1, decay=decay)
    average, new = as_floats(average, new)
    return average + jnp.maximum(1 - decay, 1 / (count + 1)) * (new - average)


def tempered_policy(rewards, costs, ref_logprobs, *, log_lambda, kl_coef) -> jax.Array:
    """The policy that `mixed_advantages` of `kl_shaped_rewards_and_costs` converge to at a fixed lambda:

        pi proportional to ref exp((r - lambda c) / ((1 + lambda) k)),    k = kl_coef / 2,

    not the textbook's `ref exp((r - lambda c) / k)`: the division by 1 + lambda stays, so lambda only moves the
    trade-off and never the distance from the reference.

    Args:
        rewards, costs, ref_logprobs: `[..., A]` over the arms (all responses to a prompt); ref_logprobs need not be
            normalised. log_lambda: `[]`.
    Returns:
        probabilities `[..., A]`.
    Source: derived (stationarity of the regularised objective on the simplex).
    """
    check_positive(kl_coef=kl_coef)
    rewards, costs, ref_logprobs = as_floats(rewards, costs, ref_logprobs)
    return jax.nn.softmax(ref_logprobs + mixed_advantages(rewards, costs, log_lambda) / (kl_coef / 2))


def reachable_cost(costs, ref_logprobs, *, kl_coef) -> jax.Array:
    """Expected cost as lambda grows without bound, under `ref exp(-c / k)`, `k = kl_coef / 2`: where pressure ends.

    The KL penalty holds the policy even then, so a limit below this floor cannot be met by any lambda as long as
    helpfulness pulls towards harm (`r + c` rises with `c`; otherwise lambda = 0 is cheaper still, and no constraint is
    needed). Lower `kl_coef` or raise the limit.

    Args:
        costs, ref_logprobs: `[..., A]` over the arms. For responses sampled from the reference, n per prompt, pass
            `ref_logprobs = 0` (uniform): an estimate that cannot see below the cheapest of the n, hence errs upwards.
    Returns:
        `[...]`, one per prompt; a limit on the mean cost is compared with their mean.
    Source: derived.
    """
    (costs,) = as_floats(costs)
    policy = tempered_policy(jnp.zeros_like(costs), costs, ref_logprobs, log_lambda=math.inf, kl_coef=kl_coef)
    return jnp.sum(policy * costs, axis=-1)


def check_limit(limit: float, floor: float) -> None:
    """Raise ValueError if a cost limit does not lie above the `reachable_cost` (host values, early)."""
    if not float(limit) > float(floor):
        raise ValueError(
            f"infeasible cost limit {float(limit):g}: with this kl_coef the expected cost cannot fall below "
            f"{float(floor):g}, however large lambda grows; raise the limit, lower kl_coef or start from a safer policy"
        )
