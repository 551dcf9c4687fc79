"""Do a preference model's scores mean what they say? Host-side NumPy over held-out labels, float64."""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import spearmanr


def pair_accuracy(scores, prefs) -> float:
    """Share of pairs whose first response scores higher exactly when it is preferred.

    scores `[N, 2]`; prefs `[N]`: P(first preferred), rounded to the side it favours. Equal scores count half; pairs
    labelled a tie (0.5) are left out, and ValueError is raised if nothing else is there.
    """
    gap, prefs = _gap(scores), _probabilities("prefs", prefs, len(scores))
    decided = prefs != 0.5
    if not decided.any():
        raise ValueError("every pair is labelled a tie: there is nothing to be accurate about")
    return _agreement(gap[decided], prefs[decided] - 0.5)


def sign_accuracy(scores, signs) -> float:
    """Share of responses on the labelled side of score 0: Safe RLHF's cost, harmful (+1) above 0, harmless (-1) below.

    scores, signs: the same shape, signs all +1 or -1. A score of exactly 0 counts half.
    """
    scores, signs = np.asarray(scores, float), np.asarray(signs, float)
    if scores.shape != signs.shape or not np.isin(signs, (-1.0, 1.0)).all():
        raise ValueError(f"signs must be +1 or -1 and shaped like scores {scores.shape}, got shape {signs.shape}")
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"score {np.argmin(np.isfinite(scores))} is not finite")
    return _agreement(scores, signs)


class Reliability(NamedTuple):
    """Per non-empty bin, `[bins]`: mean predicted probability, mean label, count; and the calibration error."""

    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray
    error: float


def reliability(probabilities, labels, num_bins: int = 10) -> Reliability:
    """Predicted against observed frequency in equal bins of [0, 1], and the expected calibration error

        ECE = sum_bins count/N |observed - predicted|

    probabilities `[N]`, say sigmoid of a score gap; labels `[N]` in [0, 1]. The bins are closed above, the first on
    both sides. Source: Guo et al. (1706.04599), eq. 3.
    """
    probabilities = _probabilities("probabilities", probabilities)
    labels = _probabilities("labels", labels, len(probabilities))
    index = np.clip(np.ceil(probabilities * num_bins).astype(int) - 1, 0, num_bins - 1)
    count = np.bincount(index, minlength=num_bins)
    kept = count > 0
    mean = lambda values: np.bincount(index, values, num_bins)[kept] / count[kept]
    predicted, observed, count = mean(probabilities), mean(labels), count[kept]
    return Reliability(predicted, observed, count, float(np.sum(count * np.abs(observed - predicted)) / count.sum()))


def calibration_slope(scores, prefs) -> float:
    """The b that makes `P(first preferred) = sigmoid(b (score_1 - score_2))` most likely; 1 = calibrated.

    Below 1 the scores are overconfident, above 1 too timid. No intercept: which response comes first is arbitrary.
    scores `[N, 2]`, prefs `[N]` in [0, 1]. Infinite (+ or -) where a threshold at 0 separates the labels without error.
    """
    gap, prefs = _gap(scores), _probabilities("prefs", prefs, len(scores))
    if not gap.any():
        raise ValueError("all pairs score equally: there is no slope to fit")
    gap, prefs = gap[gap != 0], prefs[gap != 0]
    for sign in (1.0, -1.0):
        if np.array_equal(prefs, sign * gap > 0):
            return sign * math.inf
    derivative = lambda b: float(np.sum(gap * (prefs - expit(b * gap))))  # of the log-likelihood; falls in b
    bound = 1.0
    while derivative(bound) > 0 or derivative(-bound) < 0:
        bound *= 2
    return brentq(derivative, -bound, bound)


class UpperTail(NamedTuple):
    """Pairs whose scores both exceed a threshold, `[thresholds]` each: accuracy, and what calibration would give."""

    threshold: np.ndarray
    accuracy: np.ndarray
    calibrated: np.ndarray
    count: np.ndarray


def upper_tail(scores, prefs, shares=(1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)) -> UpperTail:
    """Accuracy where both responses score high (HH-RLHF, 2204.05862, section 3.3), beside that of a calibrated scorer.

    Where both scores are high their gap is small, so accuracy falls there whoever scores: a perfectly calibrated
    scorer with these very scores would be right with probability sigmoid(|gap|). shares: of all pairs that are to lie
    above each threshold on the lower score of a pair. scores `[N, 2]`, prefs `[N]`; ties in the labels are left out.
    """
    gap, prefs = _gap(scores), _probabilities("prefs", prefs, len(scores))
    lower = np.min(scores, axis=1)
    rows = []
    for share in shares:
        threshold = np.quantile(lower, 1 - share)
        kept = (lower >= threshold) & (prefs != 0.5)
        calibrated = float(np.mean(expit(np.abs(gap[kept]))))
        rows.append((threshold, _agreement(gap[kept], prefs[kept] - 0.5), calibrated, kept.sum()))
    return UpperTail(*map(np.array, zip(*rows)))


class ByGap(NamedTuple):
    """Pairs in groups of one size by how far their scores are apart, `[groups]` each."""

    gap: np.ndarray
    accuracy: np.ndarray
    calibrated: np.ndarray
    count: np.ndarray


def accuracy_by_gap(scores, prefs, num_groups: int = 5) -> ByGap:
    """Accuracy where scores are close and where they are far apart, beside that of a calibrated scorer, sigmoid(|gap|).

    gap: the mean |gap| of a group. scores `[N, 2]`, prefs `[N]`; ties in the labels are left out.
    """
    gap, prefs = _gap(scores), _probabilities("prefs", prefs, len(scores))
    order = np.flatnonzero(prefs != 0.5)
    groups = np.array_split(order[np.argsort(np.abs(gap[order]), kind="stable")], num_groups)
    if not len(groups[-1]):
        raise ValueError(f"{len(order)} pairs with a preference do not make {num_groups} groups")
    rows = [(np.abs(gap[g]).mean(), _agreement(gap[g], prefs[g] - 0.5), expit(np.abs(gap[g])).mean(), len(g))
            for g in groups if len(g)]  # fmt: skip
    return ByGap(*map(np.array, zip(*rows)))


def length_correlation(gap, length_gap) -> float:
    """Spearman's correlation of score gaps with gaps in length, `[N]` each: how far a scorer goes by length. NaN where
    either does not vary."""
    return float(spearmanr(gap, length_gap).statistic)


def _agreement(values: np.ndarray, sides: np.ndarray) -> float:
    return float(np.mean(np.where(values == 0, 0.5, np.sign(values) == np.sign(sides))))


def _gap(scores) -> np.ndarray:
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or scores.shape[1] != 2 or not len(scores):
        raise ValueError(f"scores must be pairs, shape [N, 2] with N > 0, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"scores of pair {np.argmin(np.isfinite(scores).all(1))} are not finite")
    return scores[:, 0] - scores[:, 1]


def _probabilities(name: str, values, length: int | None = None) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or (length is not None and len(values) != length):
        raise ValueError(f"{name} must have shape [{length or 'N'}], got {values.shape}")
    inside = (values >= 0) & (values <= 1)
    if not inside.all():
        raise ValueError(f"{name} must lie in [0, 1]: row {np.argmin(inside)} does not")
    return values
