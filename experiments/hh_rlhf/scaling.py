"""HH-RLHF (Bai et al., 2204.05862): preference models over data and size, and whether their scores mean what they say.

Claim     Held-out accuracy grows about linearly with the logarithms of data and of model size; the largest model is
          calibrated; where both answers score high it is right less often than its own scores say.
Paper     Accuracy = 0.72 + 0.007 ln(P / 1e11) + 0.015 ln(D / 8e4) on helpfulness, 13M to 52B (full text). Models
          trained on helpfulness alone are calibrated; accuracy falls as both scores exceed a threshold.
Command   python experiments/hh_rlhf/scaling.py               one seed on a laptop
          python experiments/hh_rlhf/scaling.py --seeds 5     verdicts
Cost      about 13 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   Sizes of 7 k to 324 k parameters, 750 to 12,000 pairs, in a world with a known truth; no pretraining on other
          preferences (PMP); `epochs` passes over the data where the paper makes one.
"""

import dataclasses

import numpy as np
from jax import tree

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.calibration import calibration_slope, pair_accuracy, reliability, upper_tail
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.laws import scaling_law
from rlhfjax.evaluation.statistics import rank_correlation
from rlhfjax.experiment import main
from rlhfjax.models.lora import IN_FULL
from rlhfjax.pipeline import Pipeline, PipelineConfig, scales
from rlhfjax.rl.fit import take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """A grid of preference models on answers of one SFT policy."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Of the preference models; parameters grow about fourfold at each step (the paper's sizes do too)."""
    amounts: tuple[int, ...] = (750, 1_500, 3_000, 6_000, 12_000)
    """Labelled pairs; smaller sets are the beginning of larger ones."""
    epochs: int = 2
    """Passes over them (1)."""
    num_evaluated: int = 4_096
    """Held-out pairs."""

    def at_width(self, fit, width: int, **change):
        """Learning rates go with the inverse root of the width."""
        return dataclasses.replace(fit, learning_rate=fit.learning_rate * (96 / width) ** 0.5, **change)


SCALES = scales(Config,
                smoke=dict(num_pairs=512, widths=(16, 32), amounts=(64, 128, 256, 512)),
                real=dict(widths=(64, 128, 256, 512), amounts=(3_000, 6_000, 12_000, 24_000)))  # fmt: skip
CLAIMS = claims(
    "HH-RLHF (2204.05862)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("HH-1 size", "size_slope", ">=", 0.0, "0.007", "accuracy per unit of ln(parameters)"),
    ("HH-1 data", "data_slope", ">=", 0.0, "0.015", "accuracy per unit of ln(pairs)"),
    ("HH-1 law", "r2", ">=", 0.9, "roughly log-linear", "R2 of the log-linear law over the grid"),
    ("HH-1 bend", "curvature", "<=", 2.0, "-", "what squares of both logarithms add to it, in AIC"),
    ("HH-4", "slope_error", "within", 0.1, "well calibrated", "logistic slope of label on score gap, minus 1"),
    ("HH-5 order", "tail_correlation", "<=", -0.9, "falls", "rank correlation of score threshold and accuracy"),
    ("HH-5 excess", "tail_excess", ">=", 0.0, "-", "fall of accuracy beyond what calibrated scores would show"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    policy = house.sft(house.base())
    labels, held_out = house.compare("labels", policy).helpful, house.compare("held-out", policy, split="test").helpful

    def models_of(width: int) -> dict[int, tuple[float, np.ndarray]]:
        """By amount of data: parameters and held-out scores of the model of this width."""
        shape, found = config.network_of(width), {}
        start = house.base(f"base-{width}", config=shape, optimisation=config.at_width(config.pretraining, width))
        for amount in config.amounts:
            steps = max(1, config.epochs * amount // config.preference.batch_size)
            fitted = house.fit(f"reward-{width}-{amount}", take(labels, np.arange(amount)), start, config=shape,
                               lora=IN_FULL,
                               optimisation=config.at_width(config.preference, width, num_steps=steps))
            size = sum(x.size for x in tree.leaves(fitted))
            found[amount] = size, stages.raw_pair_scores(shape, fitted, held_out)
        return found

    grid = dict(zip(config.widths, stages.side_by_side(*(lambda w=width: models_of(w) for width in config.widths))))
    cells = [(amount, size, pair_accuracy(scores, held_out.prefs))
             for models in grid.values() for amount, (size, scores) in models.items()]
    amounts, sizes, accuracies = map(np.array, zip(*cells))
    _, best = grid[config.widths[-1]][config.amounts[-1]]
    tail = upper_tail(best, held_out.prefs)
    right = {"largest model": reliability(1 / (1 + np.exp(best[:, 1] - best[:, 0])), held_out.prefs)}
    by_size = {f"{size:,} parameters": accuracies[sizes == size] for size in sorted(set(sizes))}
    figures.save(figures.lines(np.array(config.amounts), by_size, "labelled pairs", "held-out accuracy", log=True),
                 run.path / "figures/scaling.png")
    figures.save(figures.reliability_figure(right, "predicted P(first preferred)"),
                 run.path / "figures/calibration.png")
    figures.save(figures.lines(tail.threshold, {"accuracy": tail.accuracy, "if calibrated": tail.calibrated},
                               "both scores above", "accuracy"), run.path / "figures/upper_tail.png")
    return scaling_law(accuracies, sizes, amounts) | {
        "slope_error": calibration_slope(best, held_out.prefs) - 1,
        "tail_correlation": rank_correlation(tail.threshold, tail.accuracy),
        "tail_excess": (tail.accuracy[0] - tail.accuracy[-1]) - (tail.calibrated[0] - tail.calibrated[-1]),
        **{f"accuracy {size} {amount}": accuracy for amount, size, accuracy in cells}}  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
