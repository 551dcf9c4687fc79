"""What the labels of AI labelers are worth, by people and by the truth: statistics, and one figure."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping

import numpy as np
import scipy.special
import scipy.stats
from matplotlib.figure import Figure

from rlhfjax.evaluation import figures
from rlhfjax.evaluation.calibration import calibration_slope, pair_accuracy, reliability
from rlhfjax.feedback.judge import Verdicts
from rlhfjax.feedback.raters import Comparisons, Rater, agreement, compare
from rlhfjax.rl.fit import take
from rlhfjax.types import PreferenceBatch
from rlhfjax.worlds.gold_world import GoldWorld


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What one judge said of held-out pairs.

    num_params: of the judge. verdicts: in both orders. scores `[N, 2]`: expected score of each answer by itself;
    elsewhere `[N, 2]`: of the same answers given to other prompts (`moved`).
    """

    num_params: int
    verdicts: Verdicts
    scores: np.ndarray
    elsewhere: np.ndarray


def worth(world: GoldWorld, pairs: PreferenceBatch) -> np.ndarray:
    """Gold helpfulness r* of both answers of each pair, `[N, 2]`."""
    gold = world.gold(np.repeat(pairs.prompts[:, None], 2, 1), pairs.responses, pairs.responses_mask)
    return np.asarray(gold.helpfulness)


def told_apart(world: GoldWorld, pairs: PreferenceBatch) -> PreferenceBatch:
    """The pairs with a better answer: those of equal worth, the same answer twice among them, are left out."""
    return take(pairs, np.flatnonzero(abs(_gap(worth(world, pairs))) > 1e-4))


def moved(pairs: PreferenceBatch) -> PreferenceBatch:
    """The same answers, each given to the prompt of the row before: what only a reader of prompts can tell."""
    roll = lambda x: np.roll(x, 1, axis=0)
    return dataclasses.replace(pairs, prompts=roll(pairs.prompts), prompt_mask=roll(pairs.prompt_mask))


def judge_statistics(world: GoldWorld, pairs: PreferenceBatch, judged: Judged) -> dict[str, float]:
    """One judge on held-out `pairs` (`told_apart`) with people's labels.

    With l12 and l21 the logits of "1" in the two orders, position S = (l12 + l21) / 2, content A = (l12 - l21) / 2:

    Returns:
        alignment, alignment_gold: share of pairs whose likelier answer, after averaging both orders, is the one that
        people prefer / that is worth more. one_order(_gold): the mean of that share over the two orders; gain(_gold):
        what averaging adds; gap_1 to gap_4: alignment_gold by quarter of |gap in worth|.
        same_position: share of pairs where the same position wins in both orders; first: of these, where it is the
        first. position, content: mean of S and sd of A; same_predicted: P(|A| < |mean S|), the same-position rate that
        a constant position bias would give.
        error, error_one_order: calibration error of the averaged soft labels and of those of one order, against
        people's labels; slope: of the averaged ones (below 1: overconfident).
        score_correlation: Spearman, expected score and worth of single answers; score_alignment_gold: pairs by their
        scores. reading: of an answer with its own and with another prompt, how often the higher score goes to where it
        is worth more: 0.5 for a judge that sees answers only.
        worth, length, style: direction (unit vector) of the linear weights of A on differences of these, each in units
        of its sd.
    """
    gold, verdicts = worth(world, pairs), judged.verdicts
    better = _sides(gold)
    p12, p21 = (np.asarray(p, float) for p in (verdicts.as_given, verdicts.swapped))
    orders = [_beside(p12), _beside(1 - p21)]
    averaged, l12, l21 = _beside(np.asarray(verdicts.prefs, float)), _logit(p12), _logit(p21)
    one_order = lambda labels: np.mean([pair_accuracy(order, labels) for order in orders])
    same = (p12 > 0.5) == (p21 > 0.5)
    position, content = (l12 + l21) / 2, (l12 - l21) / 2
    seen = world.features(np.repeat(pairs.prompts[:, None], 2, 1), pairs.responses, pairs.responses_mask)
    gaps = np.stack([_gap(gold), _gap(np.asarray(seen.length)), _gap(np.asarray(seen.style))], 1).astype(float)
    weights = np.linalg.lstsq(gaps / np.maximum(gaps.std(0), 1e-9), content, rcond=None)[0]
    weights /= max(np.linalg.norm(weights), 1e-9)
    found = {
        "alignment": pair_accuracy(averaged, pairs.prefs), "alignment_gold": pair_accuracy(averaged, better),
        "one_order": one_order(pairs.prefs), "one_order_gold": one_order(better),
        "same_position": same.mean(), "first": np.mean(p12[same] > 0.5) if same.any() else 0.5,
        "position": position.mean(), "content": content.std(),
        "same_predicted": np.mean(abs(content) < abs(position.mean())),
        "error": reliability(averaged[:, 0], pairs.prefs).error,
        "error_one_order": np.mean([reliability(order[:, 0], pairs.prefs).error for order in orders]),
        "slope": calibration_slope(np.stack([_logit(averaged[:, 0]), 0 * p12], 1), pairs.prefs),
        "score_correlation": scipy.stats.spearmanr(judged.scores.ravel(), gold.ravel()).statistic,
        "score_alignment_gold": pair_accuracy(judged.scores, better),
        "reading": pair_accuracy(*_with_either_prompt(world, pairs, judged, gold)),
        **dict(zip(("worth", "length", "style"), weights)),
    }  # fmt: skip
    right, quarter = (averaged[:, 0] > 0.5) == (better == 1), _quantile_bins(abs(_gap(gold)), 4)
    found |= {f"gap_{i + 1}": right[quarter == i].mean() for i in range(4)}
    gains = {f"gain{of}": found[f"alignment{of}"] - found[f"one_order{of}"] for of in ("", "_gold")}
    return {name: float(value) for name, value in (found | gains).items()}


def shared_errors(gold, one, other, num_bins: int = 10) -> float:
    """Correlation of two labelers' errors beyond what the gap in worth `gold [N, 2]` explains.

    one, other `[N]`: their P(first better). From each one's indicator of error its mean among pairs with a like gap (a
    quantile bin) is taken off; independent noise then leaves 0.
    """
    bins = _quantile_bins(abs(_gap(gold)), num_bins)

    def unexplained(prefs):
        wrong = ((np.asarray(prefs) > 0.5) != (_gap(gold) > 0)).astype(float)
        return wrong - (np.bincount(bins, wrong) / np.bincount(bins))[bins]

    return _correlation(unexplained(one), unexplained(other))


def report(
    directory: pathlib.Path, world: GoldWorld, rater: Rater, pairs: PreferenceBatch, judges: Mapping[str, Judged],
    balanced: Mapping[str, Judged],
) -> dict[str, float]:  # fmt: skip
    """All statistics of `judges`, in the order of their size, taught on pairs whose preferred answer mostly stands
    first, and of `balanced`, the same taught on a balanced order; draws the figure.

    Returns those of every judge as "judge statistic", and
        alignment_step, alignment_gold_step: smallest rise of alignment from one size to the next;
        same_position_step: smallest fall of the same-position rate;
        swap_gain, swap_gain_gold: what averaging adds to alignment, mean over `judges`;
        gain_correlation: of gain and same-position rate over all judges (0 where one of them does not vary);
        shared_errors: of the two largest judges; shared_errors_people: of two people;
        ceiling: share of people's labels that their own feelings without noise agree with.
    """
    every = {**judges, **balanced}
    found = {name: judge_statistics(world, pairs, judged) for name, judged in every.items()}
    steps = lambda name: [found[large][name] - found[small][name] for small, large in itertools.pairwise(judges)]
    over = lambda name, which: [found[judge][name] for judge in which]
    gold, prefs = worth(world, pairs), {name: np.asarray(judged.verdicts.prefs) for name, judged in judges.items()}
    asked = pairs.prompts, pairs.prompt_mask, pairs.responses, pairs.responses_mask
    people = [compare(world, rater, *asked, seed=seed) for seed in (0, 1)]
    measured = {
        "alignment_step": min(steps("alignment")),
        "alignment_gold_step": min(steps("alignment_gold")),
        "same_position_step": -max(steps("same_position")),
        "swap_gain": np.mean(over("gain", judges)),
        "swap_gain_gold": np.mean(over("gain_gold", judges)),
        "gain_correlation": _correlation(over("gain", every), over("same_position", every)),
        "shared_errors": shared_errors(gold, *list(prefs.values())[-2:]),
        "shared_errors_people": shared_errors(gold, *(labels.helpful.prefs for labels in people)),
        "ceiling": agreement(world, rater, Comparisons(helpful=pairs, harm=people[0].harm))["helpful"],
    }
    figure = judges_figure(gold, pairs, judges, balanced, found, measured["ceiling"])
    figures.save(figure, directory / "figures" / "judges.png")
    columns = ("alignment", "alignment_gold", "one_order", "same_position", "first", "error", "reading")
    print("\n".join(_table([("judge", *columns), *((judge, *(f"{seen[c]:.3f}" for c in columns))
                                                   for judge, seen in found.items())])))  # fmt: skip
    return {name: float(value) for name, value in measured.items()} | {
        f"{judge} {name}": value for judge, seen in found.items() for name, value in seen.items()
    }


def judges_figure(
    gold, pairs: PreferenceBatch, judges: Mapping[str, Judged], balanced: Mapping[str, Judged],
    found: Mapping[str, Mapping[str, float]], ceiling: float,
) -> Figure:  # fmt: skip
    """Alignment and same-position rate by size, what averaging adds; alignment by gap, calibration and scores by judge.

    gold `[N, 2]`: worth of the answers of `pairs`. found: `judge_statistics` of all. Arguments else as in `report`.
    """
    figure = Figure((12.4, 7.4), layout="constrained")
    (by_size, bias, gain), (by_gap, calibration, scores) = figure.subplots(2, 3)
    of = lambda name, which: np.array([found[judge][name] for judge in which])
    size = lambda which: [judged.num_params for judged in which.values()]
    sized = {judge: f"{judged.num_params / 1000:.0f} k" for judge, judged in judges.items()}
    ink = dict(zip(judges, figures.ARMS))

    by_size.axhline(ceiling, color=figures.GIVEN, lw=1.2, ls="--")
    by_size.text(size(judges)[0], ceiling, "people, without their noise", color=figures.GIVEN, fontsize=8, va="bottom")
    by_size.plot(size(judges), of("one_order", judges), "o--", color=figures.REWARD, mfc="white", label="one order")
    by_size.plot(size(judges), of("alignment", judges), "o-", color=figures.REWARD, label="both orders averaged")
    bias.plot(size(judges), of("same_position", judges), "o-", color=figures.COST, label="preferred mostly first")
    bias.plot(size(balanced), of("same_position", balanced), "o--", color=figures.COST, mfc="white", label="balanced")
    for judge, judged in {**judges, **balanced}.items():
        bias.annotate(f"{found[judge]['first']:.0%} first", (judged.num_params, found[judge]["same_position"]), (4, 5),
                      textcoords="offset points", fontsize=7.5, color=figures.INK)  # fmt: skip
    for axis in (by_size, bias):
        axis.set_xscale("log")
        axis.set_xticks(size(judges), sized.values())
        axis.set_xticks([], minor=True)
        axis.margins(x=0.15)
        axis.legend(frameon=False, fontsize=8)
    bias.set_ylim(0, 1.15 * max(np.max(of("same_position", which)) for which in (judges, balanced)))

    gain.axhline(0, color=figures.GIVEN, lw=1.2, ls="--")
    for which, fill in ((judges, None), (balanced, "white")):
        for judge, color in zip(which, figures.ARMS):
            gain.plot(found[judge]["same_position"], 100 * found[judge]["gain"], "o", color=color, mfc=fill or color)

    bins, by_people = _quantile_bins(abs(_gap(gold)), 8), (np.asarray(pairs.prefs) > 0.5) == (_gap(gold) > 0)
    binned = lambda x: [x[bins == b].mean() for b in range(8)]
    by_gap.plot(binned(abs(_gap(gold))), binned(by_people), color=figures.GIVEN, lw=1.2, ls="--")
    edges = np.linspace(*np.quantile(gold, (0.01, 0.99)), 9)
    place = np.clip(np.digitize(gold.ravel(), edges) - 1, 0, 7)
    by_worth = lambda x: [x.ravel()[place == b].mean() for b in np.unique(place)]
    for line, (judge, judged) in enumerate(judges.items()):
        right = (np.asarray(judged.verdicts.prefs) > 0.5) == (_gap(gold) > 0)
        by_gap.plot(binned(abs(_gap(gold))), binned(right), "o-", color=ink[judge], ms=4)
        scores.plot(by_worth(gold), by_worth(judged.scores), "o-", color=ink[judge], ms=4)
        by_gap.text(0.97, 0.13 + 0.08 * line, sized[judge], color=ink[judge], transform=by_gap.transAxes,
                    fontsize=9, ha="right", fontweight="bold")  # fmt: skip
    by_gap.text(0.97, 0.05, "people", color=figures.GIVEN, fontsize=9, ha="right", transform=by_gap.transAxes)

    largest = list(judges.values())[-1]
    calibration.plot([0, 1], [0, 1], color=figures.GIVEN, lw=1.2, ls="--")
    for prefs, style, fill in ((largest.verdicts.as_given, "o--", "white"), (largest.verdicts.prefs, "o-", None)):
        seen = reliability(np.asarray(prefs, float), pairs.prefs)
        label = f"{'averaged' if fill is None else 'one order'}: error {seen.error:.3f}"
        color = ink[list(judges)[-1]]
        calibration.plot(seen.predicted, seen.observed, style, color=color, mfc=fill or color, ms=4, label=label)
    calibration.legend(frameon=False, fontsize=8)
    for axis, ylabel, xlabel, title in (
        (by_size, "share of pairs", "parameters", "agreement with people"),
        (bias, "share of pairs", "parameters", "the same position wins in both orders"),
        (gain, "points of agreement", "same-position rate", "what averaging adds (white: balanced)"),
        (by_gap, "share of pairs", "gap in gold helpfulness r*", "agreement with the truth"),
        (calibration, "people prefer the first", "P(first better)", "soft labels of the largest judge"),
        (scores, "expected score, 1 to 10", "gold helpfulness r*", "answers by themselves"),
    ):
        figures._finish(axis, ylabel, xlabel, title)
    return figure


def _sides(gold) -> np.ndarray:
    """Labels `[N]` that the truth gives to `[N, 2]`: 1 where the first is worth more, 0.5 for a tie."""
    return (1 + np.sign(_gap(gold))) / 2


def _with_either_prompt(world, pairs, judged: Judged, gold) -> tuple[np.ndarray, np.ndarray]:
    """Each answer with its own prompt and with another: scores `[2 N, 2]`, and where it is worth more."""
    both = lambda own, other: np.stack([own.ravel(), other.ravel()], 1)
    gold = both(gold, worth(world, moved(pairs)))
    return both(judged.scores, judged.elsewhere), np.where(abs(_gap(gold)) > 1e-4, _sides(gold), 0.5)


def _beside(p) -> np.ndarray:
    return np.stack([p, 1 - p], 1)


def _gap(x) -> np.ndarray:
    return x[:, 0] - x[:, 1]


def _logit(p) -> np.ndarray:
    return scipy.special.logit(np.clip(p, 1e-6, 1 - 1e-6))


def _quantile_bins(x, num_bins: int) -> np.ndarray:
    """The rank of each of `x [N]` among equally filled bins: ints in 0 .. num_bins - 1."""
    return np.argsort(np.argsort(x, kind="stable")) * num_bins // len(x)


def _correlation(x, y) -> float:
    x, y = np.asarray(x) - np.mean(x), np.asarray(y) - np.mean(y)
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale > 1e-12 else 0.0


def _table(rows) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
