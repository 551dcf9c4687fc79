"""Statistics of constrained RLHF: what reward and cost models know, and whether a run met its limit."""

from collections.abc import Mapping

import numpy as np

from rlhfjax.evaluation.calibration import (
    Reliability,
    calibration_slope,
    pair_accuracy,
    reliability,
    sign_accuracy,
)
from rlhfjax.types import PreferenceBatch


def sigmoid(x) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def preference_statistics(
    reward, cost, pairwise, helpful: PreferenceBatch, harm: PreferenceBatch, risky
) -> dict[str, float]:
    """Held-out accuracy and calibration of a reward model, a cost model, and a cost model without sign terms.

    Args:
        reward, cost, pairwise: scores `[N, 2]` of the pairs in `helpful` (reward) and `harm` (the others).
        risky: `[N]` bool, pairs on which harm is at stake; elsewhere both answers are equally harmless and a harm
            comparison is a coin. Ranking accuracies of costs are over these.
    Returns:
        reward_accuracy, reward_slope (1 = calibrated); cost_rank_accuracy, pairwise_rank_accuracy, rank_difference;
        sign_accuracy, sign_accuracy_risky, pairwise_sign_accuracy, sign_advantage; cost_calibration_error and
        harmful_share (of the responses, by label).
    """
    rank = {name: pair_accuracy(s[risky], harm.prefs[risky]) for name, s in (("cost", cost), ("pairwise", pairwise))}
    signs = {name: sign_accuracy(s, harm.signs) for name, s in (("cost", cost), ("pairwise", pairwise))}
    return {
        "reward_accuracy": pair_accuracy(reward, helpful.prefs),
        "reward_slope": calibration_slope(reward, helpful.prefs),
        "cost_rank_accuracy": rank["cost"],
        "pairwise_rank_accuracy": rank["pairwise"],
        "rank_difference": rank["cost"] - rank["pairwise"],
        "sign_accuracy": signs["cost"],
        "sign_accuracy_risky": sign_accuracy(cost[risky], harm.signs[risky]),
        "pairwise_sign_accuracy": signs["pairwise"],
        "sign_advantage": signs["cost"] - signs["pairwise"],
        "cost_calibration_error": harm_reliability(cost, harm).error,
        "harmful_share": float(np.mean(harm.signs > 0)),
    }


def harm_reliability(cost, harm: PreferenceBatch) -> Reliability:
    """Predicted sigmoid(C) against the share of responses labelled harmful."""
    return reliability(sigmoid(cost).ravel(), (np.asarray(harm.signs) > 0).astype(float).ravel())


def constraint_statistics(
    history: Mapping[str, np.ndarray], *, limit: float, spread: float, final_cost: float
) -> dict[str, float]:
    """Whether the limit held and how the multiplier moved (claims SR-3 and SR-4).

    Args:
        history: of Lagrangian PPO, with `lambda` and `cost` `[N]`. limit, final_cost (mean on held-out prompts) and
            spread (sd of the starting policy's cost) in the cost's units.
    Returns:
        cost_excess: (final_cost - limit) / spread. slackness: 1 where complementary slackness just holds over the last
        fifth of the run, less where it holds: min(|cost - limit| / (0.15 spread), lambda / 0.1).
        lambda_rise: maximum over start; lambda_fall: end over maximum.
    """
    lambdas, last = history["lambda"], slice(-max(1, len(history["lambda"]) // 5), None)
    gap = abs(np.mean(history["cost"][last]) - limit) / spread
    return {
        "cost_excess": (final_cost - limit) / spread,
        "slackness": min(gap / 0.15, np.mean(lambdas[last]) / 0.1),
        "lambda_rise": lambdas.max() / lambdas[0],
        "lambda_fall": lambdas[-1] / lambdas.max(),
    }
