"""Who wins, by the truth of a world: pairwise win rates, Elo, and what is left of a win at equal length."""

import math

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from rlhfjax.evaluation.gold_metrics import worth
from rlhfjax.feedback.raters import Rater, compare
from rlhfjax.types import PreferenceBatch, Rollout
from rlhfjax.worlds.gold_world import GoldWorld


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


def compare_policies(world: GoldWorld, first: Rollout, second: Rollout) -> dict[str, float]:
    """By r* of their answers to the same prompts: win_rate of the first, at_one_length, and elo."""
    worths = [np.asarray(world.gold(r.prompts, r.tokens, r.mask).helpfulness) for r in (first, second)]
    lengths = [np.asarray(r.mask).sum(-1) for r in (first, second)]
    wins = win_rate(*worths)
    return {"win_rate": wins, "at_one_length": length_controlled_win_rate(*worths, *lengths), "elo": elo(wins)}


def order_agreement(one, other) -> float:
    """Share of pairs that two scorers put in the same order, pairs of equal scores left out; scores `[2 N]`, the two
    answers to a prompt next to each other."""
    gaps = np.stack([np.diff(np.asarray(x, float).reshape(-1, 2))[:, 0] for x in (one, other)])
    told = (gaps != 0).all(0)
    return float(np.mean(np.sign(gaps[0, told]) == np.sign(gaps[1, told])))


def people_win_rate(world: GoldWorld, rater: Rater, first: Rollout, second: Rollout, seed: int) -> float:
    """Share of prompts on which simulated people prefer the first policy's answer to the second's."""
    beside = lambda name: np.stack([np.asarray(getattr(first, name)), np.asarray(getattr(second, name))], 1)
    labels = compare(world, rater, first.prompts, first.prompt_mask, beside("tokens"), beside("mask"), seed)
    return float(np.mean(labels.helpful.prefs))


def gold_agreement(world: GoldWorld, pairs: PreferenceBatch, kept: np.ndarray) -> float:
    """Share of the pairs in `kept [N]` bool whose label favours the answer of higher r*; equal worths are left out, a
    label of 0.5 counts half."""
    gap = worth(world, pairs) @ [1, -1]
    kept = kept & (gap != 0)
    return float(np.mean((1 + np.sign(gap[kept]) * np.sign(np.asarray(pairs.prefs)[kept] - 0.5)) / 2))
