"""Statistics and figures of self-play: where policies go, what a best reply wins from them, how soon they get far."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhfjax.evaluation.figures import ARMS, GIVEN, INK, finish
from rlhfjax.evaluation.laws import first_crossing

CORNERS = np.array([[0.5, np.sqrt(3) / 2], [0.0, 0.0], [1.0, 0.0]])  # of classes A, B, C


def simplex_figure(
    arms: Mapping[str, tuple[np.ndarray, np.ndarray]], winner: np.ndarray, classes: tuple[str, ...] = ("A", "B", "C")
) -> Figure:
    """Policies over three classes as points of a triangle, one panel per arm.

    arms: `{title: (policies [R, 3], their running average [R, 3])}`. winner: the minimax winner `[3]`, a star.
    """
    figure = Figure((3.5 * len(arms), 3.5), layout="constrained")
    for axis, (title, paths), color in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms.items(), ARMS):
        axis.fill(*CORNERS.T, facecolor="#f7f7f7", edgecolor=GIVEN, lw=1)
        for corner, name in zip(CORNERS, classes):
            away = corner + 0.07 * (corner - CORNERS.mean(0)) / np.linalg.norm(corner - CORNERS.mean(0))
            axis.text(*away, name, ha="center", va="center", color=INK, fontweight="bold")
        last, average = (np.asarray(path) @ CORNERS for path in paths)
        axis.plot(*last.T, color=color, lw=0.7, alpha=0.35)
        axis.plot(*average.T, color=color, lw=2)
        axis.plot(*average[-1], "o", color=color, ms=7, mec="white")
        axis.plot(*(np.asarray(winner) @ CORNERS), "*", color=INK, ms=13, mec="white")
        axis.set(aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.1, 0.98))
        axis.set_title(title, fontsize=10, color=color, loc="left", fontweight="bold")
        axis.set_axis_off()
    figure.supxlabel("thick: average policy, thin: policy of the round, star: minimax winner", fontsize=9, color=INK)
    return figure


def exploitability_figure(panels: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> Figure:
    """Exploitability over rounds on logarithmic axes: of the average policy (thick) and of each round's own (thin).

    panels: `{title: {arm: {"round", "average", "policy"}}}`, each `[R]`. Dashed: a fall like 1 / sqrt(rounds).
    """
    figure = Figure((4.8 * len(panels), 3.6), layout="constrained")
    for axis, (title, arms) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for (arm, curve), color in zip(arms.items(), ARMS):
            axis.loglog(curve["round"], curve["policy"], color=color, lw=0.7, alpha=0.35)
            axis.loglog(curve["round"], curve["average"], color=color, lw=2, label=arm)
        _inverse_root(axis, *next(iter(arms.values())).values())
        axis.legend(frameon=False, fontsize=8, labelcolor="linecolor", loc="lower left")
        finish(axis, "exploitability", "rounds", title)
    return figure


def _inverse_root(axis: Axes, rounds: np.ndarray, values: np.ndarray, *_) -> None:
    middle = len(rounds) // 2
    guide = 1.6 * values[middle] * np.sqrt(rounds[middle] / rounds)
    axis.loglog(rounds[middle // 2 :], guide[middle // 2 :], color=GIVEN, lw=1.2, ls="--")


def sector_paths(history: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of sectors at each of N iterations, averaged over a tenth of the run and over all iterations so far, each
    `[N, K]`: an iterate drawn at random ends in a sector as often as the latter says.

    history: has "sector_0", "sector_1", ... (`worlds.control.sector_shares`).
    """
    shares = np.stack([history[name] for name in sorted(history) if name.startswith("sector_")], -1)
    total = np.cumsum(np.concatenate([0 * shares[:1], shares]), 0)
    index, width = np.arange(1, len(total)), max(1, len(shares) // 10)
    before = np.maximum(index - width, 0)
    return (total[index] - total[before]) / (index - before)[:, None], total[1:] / index[:, None]


def gain_statistics(returns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far arms get whose mean returns per iteration `[N]` are "oracle", "SPO" and "reward model".

    share_of_oracle: the gain of SPO's return, from the start (the first iteration, the same in all arms) to the last
    tenth of its iterations, over the oracle's. samples_ratio: iterations until the mean of five has 90 % of the
    oracle's gain, SPO's over the reward model's; an arm that never does counts as N + 1.
    """
    start, num = returns["oracle"][0], len(returns["oracle"])
    gains = {arm: np.mean(values[-(num // 10) :]) - start for arm, values in returns.items()}
    needed = {arm: first_crossing(values, start + 0.9 * gains["oracle"]) for arm, values in returns.items()}
    return {
        "share_of_oracle": gains["SPO"] / gains["oracle"],
        "reward_model_share_of_oracle": gains["reward model"] / gains["oracle"],
        "samples_ratio": needed["SPO"] / needed["reward model"],
        **{f"iterations_{arm.replace(' ', '_')}": steps for arm, steps in needed.items()},
    }
