"""What the labels of AI labelers are worth, by people and by the truth."""

import numpy as np
import scipy.special
import scipy.stats

from rlhfjax.evaluation.calibration import pair_accuracy, reliability
from rlhfjax.evaluation.gold_metrics import worth
from rlhfjax.feedback.judge import Verdicts
from rlhfjax.rl.fit import take
from rlhfjax.types import PreferenceBatch
from rlhfjax.worlds.gold_world import GoldWorld


def told_apart(world: GoldWorld, pairs: PreferenceBatch) -> PreferenceBatch:
    """The pairs with a better answer: those of equal worth, the same answer twice among them, are left out."""
    return take(pairs, np.flatnonzero(abs(worth(world, pairs) @ [1, -1]) > 1e-4))


def judge_statistics(
    world: GoldWorld, pairs: PreferenceBatch, verdicts: Verdicts, scores: np.ndarray
) -> dict[str, float]:
    """One judge on held-out `pairs` (`told_apart`) with people's labels; scores `[N, 2]`: its ratings of each answer.

    Returns:
        alignment, alignment_gold: share of pairs whose likelier answer, both orders averaged, is the one that people
        prefer / that is worth more. one_order: the mean of alignment over the two orders; gain: what averaging adds.
        same_position: share of pairs where the same position wins in both orders; first: of these, where it is the
        first. same_predicted: that rate if position were a constant offset, P(|A| < |mean S|), with l12 and l21 the
        logits of "1" in both orders, S = (l12 + l21) / 2 for position and A = (l12 - l21) / 2 for content.
        error: calibration error of the averaged soft labels, against people's. score_correlation: Spearman, expected
        score and worth of single answers.
    """
    gold = worth(world, pairs)
    p12, p21 = (np.asarray(p, float) for p in (verdicts.as_given, verdicts.swapped))
    sides, beside = (1 + np.sign(gold @ [1, -1])) / 2, lambda p: np.stack([p, 1 - p], 1)
    averaged, same = beside(np.asarray(verdicts.prefs, float)), (p12 > 0.5) == (p21 > 0.5)
    l12, l21 = (scipy.special.logit(np.clip(p, 1e-6, 1 - 1e-6)) for p in (p12, p21))
    found = {
        "alignment": pair_accuracy(averaged, pairs.prefs),
        "alignment_gold": pair_accuracy(averaged, sides),
        "one_order": np.mean([pair_accuracy(beside(p), pairs.prefs) for p in (p12, 1 - p21)]),
        "same_position": same.mean(),
        "first": np.mean(p12[same] > 0.5) if same.any() else 0.5,
        "same_predicted": np.mean(abs(l12 - l21) < abs(np.mean(l12 + l21))),
        "error": reliability(averaged[:, 0], pairs.prefs).error,
        "score_correlation": scipy.stats.spearmanr(scores.ravel(), gold.ravel()).statistic,
    }
    return {name: float(value) for name, value in found.items()} | {
        "gain": float(found["alignment"] - found["one_order"])}  # fmt: skip
