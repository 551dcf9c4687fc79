"""Shapes that papers claim, fitted beside their rivals. Host-side NumPy, ordinary least squares."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Least squares: the coefficients, R^2 about the mean, and Akaike's criterion

    AIC = n ln(RSS / n) + 2 k, lower is better: what remains unexplained against how many coefficients explain it.
    """

    coefficients: np.ndarray
    r2: float
    aic: float


def least_squares(columns: Mapping[str, np.ndarray], y, intercept: bool = True) -> Fit:
    """Fit `y [n]` by a linear combination of `columns`, each `[n]`, behind an intercept (then the first coefficient).

    Raises ValueError for fewer rows than two more than coefficients.
    """
    y = np.asarray(y, float)
    design = np.stack([*[np.ones_like(y)] * intercept, *(np.asarray(x, float) for x in columns.values())], -1)
    if len(y) < design.shape[1] + 2:
        raise ValueError(f"{design.shape[1]} coefficients need at least {design.shape[1] + 2} rows, got {len(y)}")
    coefficients = np.linalg.lstsq(design, y)[0]
    rest = np.sum((y - design @ coefficients) ** 2)
    spread = np.sum((y - y.mean()) ** 2)
    return Fit(coefficients, float(1 - rest / spread), len(y) * math.log(rest / len(y)) + 2 * design.shape[1])


def kl_laws(kl, gain) -> dict[str, Fit]:
    """A policy's gain in reward over its start as a function of d = sqrt(KL): one law, and three rivals.

        sqrt          a d                         HH-RLHF (2204.05862)
        linear        a d^2
        best-of-n     d (a - b d)                 Gao et al. (2210.10760)
        optimisation  d (a - b ln d)              Gao et al. (2210.10760), for RL

    kl, gain: `[n]`, KL in nats per response, positive; all laws pass through (0, 0).
    """
    d = np.sqrt(np.asarray(kl, float))
    laws = {"sqrt": [d], "linear": [d**2], "best-of-n": [d, d**2], "optimisation": [d, d * np.log(d)]}
    return {name: least_squares(dict(enumerate(x)), gain, intercept=False) for name, x in laws.items()}


def early_kl_laws(kl, scores) -> dict[str, Fit]:
    """`kl_laws` of a run's curves `[iterations]`, from its start until half of its largest gain, at least 5 points."""
    gain = np.asarray(scores) - scores[0]
    kept = slice(1, max(6, int(np.argmax(gain > gain.max() / 2)) + 1))
    return kl_laws(np.maximum(kl[kept], 1e-6), gain[kept])  # rounding can leave the first below 0


def at_one_kl(*curves: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """Mean value of each curve (KL, values) `[iterations]` over the tenth of its points whose KL is nearest to the KL
    that all of them reach: the least of their medians over the last tenth."""
    tenth = lambda kl: max(1, len(kl) // 10)
    reach = min(np.median(kl[-tenth(kl) :]) for kl, _ in curves)
    return [float(np.mean(values[np.argsort(abs(kl - reach))[: tenth(kl)]])) for kl, values in curves]


def first_crossing(values, aim: float, window: int = 5) -> int:
    """Steps until the mean of the last `window` of `values [n]` has reached `aim`; n + 1 if it never does."""
    window = min(window, len(values))
    means = np.convolve(values, np.ones(window) / window, "valid")
    reached = np.flatnonzero(means >= aim)
    return int(reached[0]) + window if reached.size else len(values) + 1


def scaling_law(accuracy, num_params, num_pairs) -> dict[str, float]:
    """Accuracy as a linear function of the logarithms of model size and of data, all `[n]` (HH-RLHF, section 3).

        accuracy = a + b_P ln P + b_D ln D

    Returns size_slope b_P, data_slope b_D, r2, and curvature: by how much AIC falls if squares of both logarithms are
    added (below 2: no sign of a bend).
    """
    logs = {"size": np.log(num_params), "data": np.log(num_pairs)}
    logs = {name: x - x.mean() for name, x in logs.items()}
    law = least_squares(logs, accuracy)
    bent = least_squares(logs | {f"{name}^2": x**2 for name, x in logs.items()}, accuracy)
    return {"size_slope": float(law.coefficients[1]), "data_slope": float(law.coefficients[2]), "r2": law.r2,
            "curvature": law.aic - bent.aic}  # fmt: skip
