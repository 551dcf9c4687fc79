"""Preferences as a game between answers: no reward is assumed, so preferences may be cyclic.

`prefs[i, j] = P(i is preferred to j)`, with `prefs + prefs^T = 1`; `payoffs = 2 prefs - 1` is what i wins from j, in
[-1, 1] and antisymmetric. Diagonals are never read. The *minimax winner* is the policy (a mixture of answers) that no
other beats on average: the symmetric equilibrium of the game.
"""

import chex
import jax
import jax.numpy as jnp

from rlhfjax.losses._inputs import as_floats, check_between

TOLERANCE = 0.01  # on sums of concrete inputs: wide enough for bfloat16, narrow enough for an order not un-swapped


def self_play_rewards(prefs) -> jax.Array:
    """Win rate of each of K sibling answers among the others: `R_i = mean_{j != i} prefs[i, j] - 1/2`.

    By antisymmetry the rewards of siblings sum to 0. Comparing an answer with itself would pull all towards 0, and
    dividing by the siblings' standard deviation would change the game.

    Args:
        prefs: `[..., K, K]` in [0, 1]: probabilities, or single labels 0 and 1 (ties 1/2). The diagonal may hold
            anything, NaN too.
    Returns:
        `[..., K]` in [-1/2, 1/2], higher is better.
    Raises:
        ValueError: fewer than 2 siblings; or, outside jit, prefs that leave [0, 1] or break `prefs + prefs^T = 1`.
    Source: SPO (2401.04056), the queue of rivals being the siblings.
    """
    prefs, others = _square("prefs", prefs)
    num = prefs.shape[-1]
    if num < 2:
        raise ValueError(f"an answer needs siblings to be compared with, prefs are of {num}: sample at least 2")
    _check_concrete("prefs must lie in [0, 1]", jnp.where(others, jnp.abs(prefs - 0.5) - 0.5, 0.0))
    both_orders = jnp.where(others, prefs + jnp.swapaxes(prefs, -1, -2) - 1, 0.0)
    _check_concrete("prefs + prefs^T must be 1 off the diagonal", jnp.abs(both_orders))
    return jnp.sum(jnp.where(others, prefs, 0.0), -1) / (num - 1) - 0.5


def exploitability(payoffs, policy) -> jax.Array:
    """What the best reply wins from a policy: `max_k sum_j payoffs[k, j] policy[j]`.

    It is 0 for the minimax winner and positive for every other policy. For the average of the policies that self-play
    has played it equals their regret per round, since a policy wins nothing from itself.

    Args:
        payoffs: `[..., K, K]` in [-1, 1], antisymmetric. policy: `[..., K]`, probabilities.
    Returns:
        `[...]`.
    Raises:
        ValueError: outside jit, payoffs that are not antisymmetric, or a policy that is no distribution.
    Source: SPO (2401.04056) section 2; the value of the game is 0 by symmetry.
    """
    payoffs, others = _square("payoffs", payoffs)
    (policy,) = as_floats(policy)
    chex.assert_shape(policy, payoffs.shape[:-1])
    both_orders = jnp.where(others, payoffs + jnp.swapaxes(payoffs, -1, -2), 0.0)
    _check_concrete("payoffs + payoffs^T must be 0", jnp.abs(both_orders))
    _check_concrete("probabilities must sum to 1", jnp.abs(jnp.sum(policy, -1) - 1))
    _check_concrete("probabilities must not be negative", -policy)
    return jnp.max(jnp.einsum("...ij,...j->...i", jnp.where(others, payoffs, 0.0), policy), -1)


def hedge_update(log_policy, payoffs, *, learning_rate) -> jax.Array:
    """Multiplicative weights: `pi_{t+1} proportional to pi_t exp(learning_rate payoffs)`, in logarithms.

    The no-regret learner of self-play, and the softmax policy's natural-gradient step. From the first policy and the
    *sum* of all payoffs it is follow-the-regularised-leader, whose rate may fall with t. At a constant rate and
    payoffs in [-1, 1] the regret after T rounds is at most `log(1 / min pi_1) / learning_rate + learning_rate T / 2`.

    Args:
        log_policy: `[..., K]`, need not be normalised. payoffs: `[..., K]`, higher is better (a loss enters negated).
        learning_rate: not negative.
    Returns:
        log-probabilities `[..., K]`.
    Source: Freund & Schapire (1997), "A decision-theoretic generalization of on-line learning".
    """
    check_between(0, float("inf"), learning_rate=learning_rate)
    log_policy, payoffs = as_floats(log_policy, payoffs)
    return jax.nn.log_softmax(log_policy + learning_rate * payoffs)


def _square(name: str, matrix) -> tuple[jax.Array, jax.Array]:
    """The matrix `[..., K, K]` in float32 at least, and where it is off its diagonal."""
    (matrix,) = as_floats(matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} must have shape [..., K, K], got {list(matrix.shape)}")
    return matrix, ~jnp.eye(matrix.shape[-1], dtype=bool)


def _check_concrete(rule: str, violation: jax.Array) -> None:
    """Raise if any violation is above the tolerance, or NaN. Under jit there is no value yet: nothing is checked."""
    if not isinstance(violation, jax.core.Tracer) and not bool(jnp.all(violation <= TOLERANCE)):
        raise ValueError(f"{rule}, got a violation of {float(jnp.max(violation)):.3g}")
