"""Who wins, by the truth of a world: pairwise win rates, Elo, and what is left of a win at equal length."""

import math

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit


def win_rate(first, second) -> float:
    """Share of prompts on which the first policy's answer is worth more, ties half; worths `[N]`, paired by prompt."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"both policies answer the same prompts, [N] each, got {first.shape} and {second.shape}")
    return float(np.mean((np.sign(first - second) + 1) / 2))


def elo(win: float) -> float:
    """`400 log10(w / (1 - w))`: Elo points between policies of which the first wins a share `w`; 1 / 1 is infinite."""
    return 400 * math.log10(win / (1 - win)) if 0 < win < 1 else math.copysign(math.inf, win - 0.5)


def length_controlled_win_rate(first, second, first_lengths, second_lengths) -> float:
    """The win rate to expect if both answers had one length (RLAIF, 2309.00267, appendix).

    A logistic regression of the win on the ratio of lengths, `P(win) = sigmoid(a + b (ratio - 1))`, read at ratio 1:
    sigmoid(a). worths and lengths `[N]`; ties count as half a win.
    """
    wins = (np.sign(np.asarray(first, float) - np.asarray(second, float)) + 1) / 2
    ratio = np.asarray(first_lengths, float) / np.asarray(second_lengths, float) - 1

    def loss(ab):
        logits = ab[0] + ab[1] * ratio
        rest = expit(logits) - wins
        return np.mean(np.logaddexp(0, logits) - wins * logits), np.array([rest.mean(), (rest * ratio).mean()])

    return float(expit(minimize(loss, np.zeros(2), jac=True).x[0]))
