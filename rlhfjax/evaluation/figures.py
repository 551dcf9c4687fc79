"""Figures from plain arrays. Each function returns a matplotlib Figure; nothing touches pyplot's global state.

Blue is reward and helpfulness, red is cost and harm, grey is what is given (limits, references).
"""

import os
import pathlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhfjax.evaluation.calibration import Reliability
from rlhfjax.io.launch import is_main

REWARD, COST, GIVEN, INK = "#2166ac", "#c0392b", "#8a8a8a", "#222222"
ARMS = ("#2166ac", "#e08214", "#1b7837", "#762a83", "#8c510a")
History = Mapping[str, np.ndarray]


def multiplier_figure(history: History, limit: float) -> Figure:
    """Lambda over the iterations of a run, above the episode cost it answers to.

    history: `step`, `lambda`, `cost` and `cost_average`, each `[N]`. limit: in the cost's units.
    """
    figure = Figure((6.4, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    step = history["step"]
    top.plot(step, history["lambda"], color=INK, lw=1.8)
    top.set_ylim(0, 1.1 * np.nanmax(history["lambda"]))
    finish(top, "multiplier λ")
    bottom.fill_between(step, limit, history["cost_average"], where=np.asarray(history["cost_average"]) > limit,
                        color=COST, alpha=0.12, lw=0, interpolate=True)  # fmt: skip
    bottom.plot(step, history["cost"], color=COST, lw=0.8, alpha=0.4)
    bottom.plot(step, history["cost_average"], color=COST, lw=1.8)
    bottom.axhline(limit, color=GIVEN, lw=1.2, ls="--")
    last = history["cost_average"][-1]
    _label(bottom, limit, f"limit {limit:.3g}", GIVEN, away_from=last)
    _label(bottom, last, "moving average", COST, away_from=limit)
    finish(bottom, "mean episode cost", "iteration")
    return figure


def reward_cost_scatter(arms: Mapping[str, tuple[np.ndarray, np.ndarray]], boundary: float = 0.0) -> Figure:
    """Answers as points, cost across and reward up, one panel per arm on common axes, with marginal histograms.

    arms: `{title: (costs [N], rewards [N])}`, such as before and after. boundary: the cost above which an answer is
    unsafe. A white cross marks the mean. After the reward-cost scatter plots of Safe RLHF (2310.12773).
    """
    costs, rewards = (np.concatenate([np.asarray(arm[i], float) for arm in arms.values()]) for i in (0, 1))
    x_edges, y_edges = _edges(costs, boundary), _edges(rewards, 0.0)
    tallest = lambda index, edges: 1.05 * max(np.histogram(arm[index], edges)[0].max() for arm in arms.values())
    figure = Figure((4.6 * len(arms), 4.9), layout="constrained")
    grid = figure.add_gridspec(2, 2 * len(arms), height_ratios=(1, 4.5), width_ratios=(4.5, 1) * len(arms))
    for column, (title, (cost, reward)) in enumerate(arms.items()):
        cost, reward = np.asarray(cost, float), np.asarray(reward, float)
        main = figure.add_subplot(grid[1, 2 * column])
        top = figure.add_subplot(grid[0, 2 * column], sharex=main)
        right = figure.add_subplot(grid[1, 2 * column + 1], sharey=main)
        for safe, color in ((cost <= boundary, REWARD), (cost > boundary, COST)):
            main.scatter(cost[safe], reward[safe], s=7, color=color, alpha=0.35, lw=0, rasterized=True)
            top.hist(cost[safe], x_edges, color=color, alpha=0.75)
        right.hist(reward, y_edges, orientation="horizontal", color=GIVEN, alpha=0.75)
        main.axvline(boundary, color=INK, lw=1, ls="--")
        main.plot(cost.mean(), reward.mean(), "P", ms=10, mfc="white", mec=INK, mew=1.4)
        main.set(xlim=x_edges[[0, -1]], ylim=y_edges[[0, -1]])
        top.set_ylim(0, tallest(0, x_edges))
        right.set_xlim(0, tallest(1, y_edges))
        share = np.mean(cost <= boundary)
        corner = {"transform": main.transAxes, "fontsize": 9, "va": "top", "fontweight": "bold"}
        main.text(0.02, 0.985, f"{share:.0%} safe", color=REWARD, **corner)
        main.text(0.98, 0.985, f"{1 - share:.0%} unsafe", color=COST, ha="right", **corner)
        top.set_title(f"{title}\nmean reward {reward.mean():.2f}, mean cost {cost.mean():.2f}", fontsize=10, loc="left")
        finish(main, "reward" if column == 0 else "", "cost")
        for margin in (top, right):
            margin.set_axis_off()
    return figure


def training_curves(histories: Mapping[str, History], metrics: Mapping[str, str], columns: int = 3) -> Figure:
    """A grid of curves over steps, one panel per metric, one colour per arm.

    histories: `{arm: {"step": [N], metric: [N]}}`; an arm without a metric is left out of its panel.
    metrics: `{metric: axis label with units}`.
    """
    if len(histories) > len(ARMS):
        raise ValueError(f"at most {len(ARMS)} arms can be told apart, got {len(histories)}")
    rows = -(-len(metrics) // columns)
    figure = Figure((3.4 * columns, 2.5 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (metric, label) in zip(axes, metrics.items()):
        for history, color in zip(histories.values(), ARMS):
            if metric in history:
                axis.plot(history["step"], history[metric], color=color, lw=0.7, alpha=0.3)
                axis.plot(history["step"], smooth(history[metric]), color=color, lw=1.7)
        finish(axis, title=label)
    for axis in axes[: len(metrics)][-columns:]:
        axis.set_xlabel("iteration", color=INK)
    for axis in axes[len(metrics) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=color, lw=2.5, label=arm) for arm, color in zip(histories, ARMS)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, labelcolor="linecolor")
    return figure


def lines(x, curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, *, log: bool = False) -> Figure:
    """Curves over a common x, or each `(x, y)` over an x of its own, one colour each, named beside their ends."""
    if len(curves) > len(ARMS):
        raise ValueError(f"at most {len(ARMS)} curves can be told apart, got {len(curves)}")
    figure = Figure((5.6, 3.8), layout="constrained")
    axis = figure.subplots()
    for (name, curve), color in zip(curves.items(), ARMS):
        at, values = curve if isinstance(curve, tuple) else (x, curve)
        axis.plot(at, values, color=color, lw=1.8, marker="o" if len(at) < 30 else None, ms=3.5, label=name)
    axis.legend(frameon=False, labelcolor="linecolor", fontsize=9)
    if log:
        axis.set_xscale("log")
    finish(axis, ylabel, xlabel)
    return figure


def frontier(points: Mapping[object, tuple[float, float]], xlabel: str, ylabel: str) -> Figure:
    """Policies as named points, `{name: (y, x)}`: harm across, helpfulness up; numbers (fixed weights) are joined."""
    figure = Figure((5.2, 4.2), layout="constrained")
    axis = figure.subplots()
    joined = sorted(name for name in points if isinstance(name, float))
    axis.plot([points[name][1] for name in joined], [points[name][0] for name in joined], color=GIVEN, lw=1.2)
    for name, (y, x) in points.items():
        color = INK if isinstance(name, float) else REWARD
        axis.plot(x, y, "o", color=color, ms=5)
        axis.annotate(f"{name:g}" if isinstance(name, float) else name, (x, y), (5, 4), textcoords="offset points",
                      fontsize=9, color=color)  # fmt: skip
    finish(axis, ylabel, xlabel)
    return figure


def grid(marks: Mapping[str, Collection[str]], columns: Sequence[str]) -> Figure:
    """A row per name in `marks`, a dot in each column it marks."""
    figure = Figure((0.32 * len(columns) + 2.2, 0.3 * len(marks) + 0.8), layout="constrained")
    axis = figure.subplots()
    for y, marked in enumerate(marks.values()):
        axis.plot([columns.index(column) for column in marked], [y] * len(marked), "o", color=COST, ms=7)
    finish(axis)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(marks)), marks)
    axis.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(marks) - 0.5, -0.5))
    return figure


def reliability_figure(models: Mapping[str, Reliability], xlabel: str = "predicted probability") -> Figure:
    """Observed against predicted frequency, one curve per model; the area of a point is its number of labels."""
    figure = Figure((4.4, 4.3), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=GIVEN, lw=1.2, ls="--")
    for position, ((name, bins), color) in enumerate(zip(models.items(), ARMS)):
        axis.plot(bins.predicted, bins.observed, color=color, lw=1.6)
        axis.scatter(bins.predicted, bins.observed, s=300 * bins.count / bins.count.sum() + 8, color=color, lw=0)
        axis.text(0.03, 0.97 - 0.065 * position, f"{name}: calibration error {bins.error:.3f}", color=color, va="top",
                  fontsize=9, fontweight="bold")  # fmt: skip
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    finish(axis, "observed frequency", xlabel)
    return figure


def save(figure: Figure, path: str | os.PathLike) -> pathlib.Path:
    """Write the figure (process 0 does) in the format of its suffix and return the path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_main():
        figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white")
    return path


def finish(axis: Axes, ylabel: str = "", xlabel: str = "", title: str = "") -> None:
    """Thin axes, light grid, labels in ink: the look of every panel here."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GIVEN)
    axis.tick_params(colors=INK, labelsize=8, length=3, color=GIVEN)
    axis.grid(axis="y", color="#ececec", lw=0.8)
    axis.set_axisbelow(True)
    axis.set_ylabel(ylabel, color=INK)
    axis.set_xlabel(xlabel, color=INK)
    if title:
        axis.set_title(title, fontsize=10, color=INK, loc="left")


def _label(axis: Axes, y: float, text: str, color: str, away_from: float) -> None:
    """Write beside the right end of a line, on the side that is away from another line's label."""
    side = "bottom" if y > away_from else "top"
    axis.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), color=color, fontsize=9, va=side)


def _edges(values: np.ndarray, anchor: float) -> np.ndarray:
    """About 48 equal bins that hold all values with room to spare; `anchor` is an edge, so no bin straddles it."""
    low, high = np.min(values, initial=anchor), np.max(values, initial=anchor)
    width = max(high - low, 1e-6) / 44
    return anchor + width * np.arange(np.floor((low - anchor) / width) - 1, np.ceil((high - anchor) / width) + 4)


def smooth(values: Sequence[float]) -> np.ndarray:
    """A centred moving average over a twentieth of the curve, narrower at its ends."""
    values = np.asarray(values, float)
    half = len(values) // 40
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])
