"""Intervals and verdicts. The seed is the unit of replication; prompts inside a run are not replicates.

A bootstrap over 5 seeds covers about 83% instead of 95%, and a sign test over 5 seeds cannot go below p = 0.06: neither
is here.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

Direction = Literal[">=", "<=", "within"]
Verdict = Literal["supported", "contradicted", "inconclusive", "not judged"]
MIN_SEEDS = 3


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def t_interval(per_seed, level: float = 0.95) -> Interval:
    """`mean -+ t_{n-1} s / sqrt(n)` over one number per seed `[n]`, with s the sample standard deviation.

    Five seeds at 95%: t = 2.776. Raises ValueError below two seeds: one number says nothing of its own spread.
    """
    per_seed = _per_seed(per_seed)
    if not 0 < level < 1:
        raise ValueError(f"a level is a probability, such as 0.95, got {level}")
    if len(per_seed) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, got {len(per_seed)}")
    mean, error = per_seed.mean(), per_seed.std(ddof=1) / math.sqrt(len(per_seed))
    half = stats.t.ppf((1 + level) / 2, len(per_seed) - 1) * error
    return Interval(float(mean), float(mean - half), float(mean + half))


def paired_difference(treatment, control) -> np.ndarray:
    """`treatment - control` seed by seed `[n]`: arms share seed, prompts, labels and start, so their noise cancels."""
    treatment, control = _per_seed(treatment), _per_seed(control)
    if treatment.shape != control.shape:
        raise ValueError(f"arms have {len(treatment)} and {len(control)} seeds: pair them seed by seed")
    return treatment - control


def equivalent(differences, margin: float, alpha: float = 0.05) -> bool:
    """Two one-sided t-tests (TOST) at `alpha` each: are the mean of seed-level differences `[n]` and 0 within `margin`?

    The same as asking whether the `1 - 2 alpha` interval lies inside `[-margin, margin]`. At 5 seeds and a true
    difference of 0 it succeeds four times in five only if the seeds' standard deviation is below about 0.62 margins.
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin must be positive, got {margin}")
    interval = t_interval(differences, 1 - 2 * alpha)
    return -margin <= interval.low and interval.high <= margin


def verdict(per_seed, threshold: float, direction: Direction, level: float = 0.95) -> Verdict:
    """What seeds say of "mean >= threshold", "mean <= threshold" or "|mean| within threshold".

    Supported if the whole interval lies on the claimed side; contradicted if it lies wholly on the other; else
    inconclusive. "within" is an equivalence: supported by two one-sided tests at `1 - level` each, contradicted if
    the interval lies wholly outside. Fewer than 3 seeds are not judged.
    """
    per_seed = _per_seed(per_seed)
    if len(per_seed) < MIN_SEEDS:
        return "not judged"
    _, low, high = t_interval(per_seed, level)
    if direction == ">=":
        supported, contradicted = low >= threshold, high < threshold
    elif direction == "<=":
        supported, contradicted = high <= threshold, low > threshold
    elif direction == "within":
        supported = equivalent(per_seed, threshold, 1 - level)
        contradicted = low > threshold or high < -threshold
    else:
        raise ValueError(f"direction must be '>=', '<=' or 'within', got {direction!r}")
    return "supported" if supported else "contradicted" if contradicted else "inconclusive"


def rank_correlation(x, y) -> float:
    """Spearman's rho of paired values `[n]` of *one run*."""
    return float(stats.spearmanr(x, y).statistic)


def one_run_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson's binomial interval for a share of prompts. It describes *one run*, and says nothing of other seeds."""
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"a share needs 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    z = stats.norm.ppf((1 + level) / 2)
    share, scale = successes / trials, 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Interval(share, float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def _per_seed(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"one number per seed is needed, shape [n], got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise FloatingPointError(f"value {np.argmin(np.isfinite(values))} of {len(values)} is not finite")
    return values
