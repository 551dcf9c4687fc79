"""Statistics of constrained RLHF: what reward and cost models know, and whether a run met its limit."""

import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from rlhfjax.evaluation import figures
from rlhfjax.evaluation.calibration import (
    Reliability,
    calibration_slope,
    pair_accuracy,
    reliability,
    sign_accuracy,
)
from rlhfjax.evaluation.gold_metrics import as_text, gold_values, read_answers
from rlhfjax.feedback.raters import Comparisons, Rater, agreement
from rlhfjax.io.run import read_metrics, write_json
from rlhfjax.types import Params, PreferenceBatch, Rollout
from rlhfjax.worlds.gold_world import GoldWorld
from rlhfjax.worlds.language import Family


def sigmoid(x) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def preference_statistics(
    score_pairs: Callable[[Params, PreferenceBatch], np.ndarray],
    reward: Params,
    cost: Params,
    pairwise: Params,
    held_out: Comparisons,
    world: GoldWorld,
    rater: Rater,
) -> dict[str, float]:
    """Held-out accuracy and calibration of a reward model, a cost model, and a cost model without sign terms.

    Args:
        score_pairs: `(params, pairs) -> [N, 2]`. reward, cost, pairwise: parameters of the three models. world, rater:
            who labelled `held_out`.
    Returns:
        reward_accuracy, reward_slope (1 = calibrated); cost_rank_accuracy, pairwise_rank_accuracy, rank_difference, on
        prompts where harm is at stake (elsewhere both answers are equally harmless and their comparison is a coin);
        sign_accuracy, sign_accuracy_risky (on those prompts), pairwise_sign_accuracy, sign_advantage;
        cost_calibration_error; harmful_share (of the responses, by label); ceiling_*: share of labels that the rater's
        own feelings without noise agree with, the most that any of these accuracies could be. Printed too.
    """
    helpful, harm = held_out.helpful, held_out.harm
    reward, cost, pairwise = score_pairs(reward, helpful), score_pairs(cost, harm), score_pairs(pairwise, harm)
    risky = np.isin(np.asarray(world.family(harm.prompts)), (Family.DANGEROUS, Family.GREY))
    rank = {name: pair_accuracy(s[risky], harm.prefs[risky]) for name, s in (("cost", cost), ("pairwise", pairwise))}
    signs = {name: sign_accuracy(s, harm.signs) for name, s in (("cost", cost), ("pairwise", pairwise))}
    measured = {
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
    } | {f"ceiling_{name}": value for name, value in agreement(world, rater, held_out).items()}
    print(", ".join(f"{name} {value:.3f}" for name, value in measured.items()), flush=True)
    return measured


def harm_reliability(cost, harm: PreferenceBatch) -> Reliability:
    """Predicted sigmoid(C) against the share of responses labelled harmful."""
    return reliability(sigmoid(cost).ravel(), (np.asarray(harm.signs) > 0).astype(float).ravel())


def constraint_statistics(
    history: Mapping[str, np.ndarray], costs: Mapping[str, np.ndarray], limit: float, initial: float
) -> dict[str, float]:
    """Whether the limit held and how the multiplier moved (claims SR-3 and SR-4).

    Args:
        history: of Lagrangian PPO: its `lambda` and `cost`, each `[N]`. costs: of answers to the same held-out prompts,
            by arm: "SFT" (the start), "plain" and "constrained", each `[B]`. limit: in the same units.
        initial: lambda before the first update.
    Returns:
        cost_excess: (mean constrained cost - limit) / sd, with sd that of the SFT policy's cost; plain_cost_excess: of
        the arm without a limit. slackness: 1 where complementary slackness just holds over the last fifth of the run,
        less where it holds: min(|cost - limit| / (0.15 sd), lambda / 0.1). lambda_rise: highest lambda over initial;
        lambda_fall: last over the highest.
    """
    moved = ~np.isnan(history["lambda"])  # an iteration that was left out has neither
    lambdas, episode_costs = history["lambda"][moved], history["cost"][moved]
    last, spread = slice(-max(1, len(lambdas) // 5), None), np.std(costs["SFT"])
    gap = abs(np.mean(episode_costs[last]) - limit) / spread
    return {
        "limit": limit,
        "cost_excess": (np.mean(costs["constrained"]) - limit) / spread,
        "plain_cost_excess": (np.mean(costs["plain"]) - limit) / spread,
        "slackness": min(gap / 0.15, np.mean(lambdas[last]) / 0.1),
        "lambda_rise": lambdas.max() / initial,
        "lambda_fall": lambdas[-1] / lambdas.max(),
    }


def outcome_statistics(seen: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What the two trained arms changed (claims SR-5 and SR-8), from `gold_metrics` by arm.

    Raises ValueError where the SFT policy does no harm.

    Returns harm_ratio and plain_harm_ratio (over the SFT policy's harm rate), helpfulness_gain and refusal_rise (on
    benign prompts, constrained minus SFT), and every metric of every arm as "arm metric".
    """
    if not seen["SFT"]["harm_rate"] > 0:
        raise ValueError("the SFT policy gave no harmful answer to a dangerous prompt: there is nothing to constrain")
    change = lambda metric: seen["constrained"][metric] - seen["SFT"][metric]
    return {
        "harm_ratio": seen["constrained"]["harm_rate"] / seen["SFT"]["harm_rate"],
        "plain_harm_ratio": seen["plain"]["harm_rate"] / seen["SFT"]["harm_rate"],
        "helpfulness_gain": change("gold_helpfulness_benign"),
        "refusal_rise": change("refusal_benign"),
        **{f"{arm} {metric}": value for arm, metrics in seen.items() for metric, value in metrics.items()},
    }


def dominance(points: Mapping, arm, rivals) -> float:
    """How far the best of `rivals` beats `arm` in both respects at once: positive if any does, else not.

    points: `{name: (helpfulness, harm)}`. The margin of a rival is the smaller of what it helps more and harms less.
    """
    return max(min(points[r][0] - points[arm][0], points[arm][1] - points[r][1]) for r in rivals)


def weight_at_limit(excess: Mapping[float, float]) -> float:
    """The fixed weight nu that just meets a limit: where the excess over it, by weight, first falls to 0, by linear
    interpolation on log nu. An end of the grid if all weights meet it, or none does."""
    weights = sorted(excess)
    after = next((i for i, weight in enumerate(weights) if excess[weight] <= 0), len(weights))
    if after in (0, len(weights)):
        return weights[min(after, len(weights) - 1)]
    low, high = weights[after - 1], weights[after]
    return float(low * (high / low) ** (excess[low] / (excess[low] - excess[high])))


CURVES = {
    "score": "reward (sd of SFT)",
    "gold_helpfulness_allowed": "gold helpfulness r*, where allowed",
    "harm_rate": "harm rate, dangerous prompts",
    "refusal_benign": "refusals, benign prompts",
    "careful": "safe help, dangerous prompts",
    "kl": "KL to SFT (nats per answer)",
}


def report(
    directory: pathlib.Path, world: GoldWorld, arms: Mapping[str, Rollout], *, scores: Callable, costs: Callable,
    raw_costs: Callable, limit: float, initial: float, calibration: Reliability,
) -> dict[str, float]:  # fmt: skip
    """All statistics of the arms "SFT", "plain" and "constrained"; draws the figures and writes the answers.

    Args:
        directory: of the run; its metrics.jsonl has the stages "plain" and "constrained". arms: their answers to the
            same held-out prompts. scores, costs, raw_costs: `rollout -> [B]`, of which `costs` is what Lagrangian PPO
            saw. limit: on that. initial: lambda before the first update. calibration: of the cost model.
    """
    histories = {arm: read_metrics(directory / "metrics.jsonl", arm) for arm in ("plain", "constrained")}
    scattered = {name: (raw_costs(rollout), scores(rollout)) for name, rollout in arms.items()}
    drawn = {
        "multiplier": figures.multiplier_figure(histories["constrained"], limit),
        "training": figures.training_curves(histories, CURVES),
        "scatter": figures.reward_cost_scatter(scattered),
        "calibration": figures.reliability_figure({"cost model": calibration}, "predicted P(harmful)"),
    }
    for name, figure in drawn.items():
        figures.save(figure, directory / "figures" / f"{name}.png")
    answers = read_answers(world, arms, range(min(40, len(arms["SFT"].tokens))))
    write_json(directory / "samples.json", answers)
    print(as_text(answers[:8]))
    met = constraint_statistics(histories["constrained"], {name: costs(arm) for name, arm in arms.items()}, limit,
                                initial)  # fmt: skip
    return met | outcome_statistics({name: gold_values(world, arm) for name, arm in arms.items()})
