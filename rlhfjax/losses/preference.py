"""What a comparison says about two scores. Element-wise over any leading dimensions, unreduced.

Scores are log-odds: `P(first has more of the quality) = sigmoid(first - second)`. For helpfulness "more" is better;
for harm it is *more harmful*, so the winner of a cost comparison is the worse answer.
"""

import chex
import jax
import jax.numpy as jnp

from rlhfjax.losses._inputs import as_floats, check_between


def bradley_terry_loss(chosen, rejected, *, margin=0.0) -> jax.Array:
    """Negative log-likelihood of a hard label: `-log sigmoid(chosen - rejected - margin)`.

    Args:
        chosen, rejected: scores `[...]` of the winner and of the loser.
        margin: a number or `[...]`: the gap at which the loss is log 2 (larger for clearer wins); 0 is Bradley-Terry.
    Returns:
        `[...]`. Adding a constant to every score changes nothing: the zero of such a score has no meaning.
    Source: Askell et al. (2112.00861), HH-RLHF (2204.05862); margins: Llama 2 (2307.09288) eq. 2.
    """
    chosen, rejected = as_floats(chosen, rejected)
    return jax.nn.softplus(margin - (chosen - rejected))


def soft_bradley_terry_loss(first, second, prefs) -> jax.Array:
    """Cross-entropy against a soft label: `-p log sigmoid(d) - (1 - p) log sigmoid(-d)`, `d = first - second`.

    Args:
        first, second: scores `[...]`. prefs: `[...]` in [0, 1], P(first has more of the quality).
    Returns:
        `[...]`, least at `d = log(p / (1 - p))`, where it is the entropy of the label (not 0).
    Source: RLAIF (2309.00267); prefs of 1 and 0 give `bradley_terry_loss`.
    """
    first, second, prefs = as_floats(first, second, prefs)
    gap = first - second
    return prefs * jax.nn.softplus(-gap) + (1 - prefs) * jax.nn.softplus(gap)


def rao_kupper_loss(first, second, outcomes, *, tie_width) -> jax.Array:
    """Negative log-likelihood of a comparison that may be a tie.

    A rater who cannot tell apart scores closer than a threshold `w` (on the log-odds scale) sees, with
    `d = first - second`,

        P(first) = sigmoid(d - w),  P(second) = sigmoid(-d - w),
        P(tie) = 1 - P(first) - P(second) = (e^{2w} - 1) sigmoid(d - w) sigmoid(-d - w).

    Args:
        first, second: scores `[...]`.
        outcomes: `[..., 3]`, the shares of (first, tie, second): one-hot, or the votes of a panel; they sum to 1.
        tie_width: `w = log theta >= 0`, a number or `[...]` (to learn it, pass a softplus). At 0 this is Bradley-Terry:
            ties are impossible, and one that is observed anyway costs infinity.
    Returns:
        `[...]`.
    Source: Rao & Kupper (1967), "Ties in paired-comparison experiments", with pi = exp(score) and theta = exp(w).
    """
    check_between(0, float("inf"), tie_width=tie_width)
    first, second = as_floats(first, second)
    (outcomes,) = as_floats(outcomes)
    chex.assert_shape(outcomes, first.shape + (3,))
    wins, ties, losses = jnp.moveaxis(outcomes, -1, 0)
    gap = first - second
    not_first, not_second = jax.nn.softplus(tie_width - gap), jax.nn.softplus(tie_width + gap)
    # log(e^{2w} - 1), which does not overflow; rows without ties never look at its pole at w = 0.
    width = jnp.where(ties == 0, 1.0, tie_width)
    log_odds = 2 * width + jnp.log(-jnp.expm1(-2 * width))
    return wins * not_first + losses * not_second + ties * (not_first + not_second - log_odds)


def cost_loss(first, second, prefs, signs) -> jax.Array:
    """Safe RLHF's cost model: a comparison, and for each answer a duel with a virtual answer of cost 0.

        soft_bradley_terry_loss(C_1, C_2, prefs) - log sigmoid(s_1 C_1) - log sigmoid(s_2 C_2)

    **Sign convention, here and everywhere: +1 and positive costs are harmful.** The sign terms say that a harmful
    answer beats the virtual one in harm, which pins the zero: C > 0 reads "unsafe". So, unlike a reward, a cost may
    not be shifted. (The public data sets store +1 for *safe*: negate on loading.)

    Args:
        first, second: costs `[...]`. prefs: `[...]` in [0, 1], P(first is **more harmful**); 1 and 0 are hard labels.
        signs: `[..., 2]`, +1 = harmful, -1 = harmless, for (first, second). 0 = unlabelled: adds a constant log 2.
    Returns:
        `[...]`: three terms of equal weight.
    Source: Safe RLHF (2310.12773), the cost model's loss; equal weights as in PKU-Alignment/safe-rlhf.
    """
    comparison = soft_bradley_terry_loss(first, second, prefs)
    first, second = as_floats(first, second)
    (signs,) = as_floats(signs)
    chex.assert_shape(signs, first.shape + (2,))
    return comparison + jax.nn.softplus(-signs[..., 0] * first) + jax.nn.softplus(-signs[..., 1] * second)


def score_regularization(scores) -> jax.Array:
    """`scores^2`, `[...] -> [...]`; Safe RLHF adds 0.001 times its mean over both answers of a pair.

    For a loss that is blind to shifts it also pins the zero: near the mean training score, which is no calibration.
    Source: PKU-Alignment/safe-rlhf (`regularization`).
    """
    (scores,) = as_floats(scores)
    return jnp.square(scores)
