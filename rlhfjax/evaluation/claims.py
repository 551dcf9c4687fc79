"""Claims, named with their thresholds before the run, and the verdict of the seeds on each."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhfjax.evaluation.statistics import Direction, t_interval, verdict
from rlhfjax.io.run import read_json, write_json

KEYS = (
    "id", "paper", "statement", "paper_says", "statistic", "per_seed", "mean", "ci95", "threshold", "direction",
    "verdict", "world", "seeds", "config_hash", "commit", "seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence that a number per seed can contradict."""

    id: str
    """Such as "SR-3"."""
    paper: str
    """Such as "Safe RLHF (2310.12773)"."""
    statement: str
    """What is claimed here, in words and units."""
    paper_says: str
    """What the paper reports, at its scale."""
    statistic: str
    """Name of the number that each seed yields."""
    threshold: float
    """The bound, or the margin of an equivalence; fixed before the report seeds are run."""
    direction: Direction
    """Which side of the threshold is claimed: ">=" or "<=", or "within": |mean| within the threshold."""

    def __post_init__(self):
        if self.direction not in (">=", "<=", "within"):
            raise ValueError(f"{self.id}: direction must be '>=', '<=' or 'within', got {self.direction!r}")
        if not math.isfinite(self.threshold) or (self.direction == "within" and self.threshold <= 0):
            raise ValueError(f"{self.id}: threshold {self.threshold} is no bound for direction {self.direction!r}")


def claims(paper: str, *rows: tuple[str, str, Direction, float, str, str]) -> tuple[Claim, ...]:
    """Claims of one paper from rows of (id, statistic, direction, threshold, paper_says, statement)."""
    fields = ("id", "statistic", "direction", "threshold", "paper_says", "statement")
    return tuple(Claim(paper=paper, **dict(zip(fields, row, strict=True))) for row in rows)


def judge(
    claims: Sequence[Claim],
    results: Mapping[int, Mapping[str, float]],
    *,
    world: str,
    config_hash: str,
    commit: str | None,
    seconds: float,
) -> list[dict[str, Any]]:
    """One row of claims.json (`KEYS`) per claim, in the order of `claims`.

    Args:
        results: `{seed: {statistic: value}}`; every seed must have every claim's statistic.
        world: name and version of the truth the seeds were run on.
        seconds: what the seeds cost together.
    Raises:
        ValueError: no seed, or an id that is used twice. KeyError: a statistic that a seed lacks; no claim is ever
        dropped. FloatingPointError: a statistic that is not finite. Each names the claim and the seed.
    """
    if not results:
        raise ValueError("there is no seed to judge by")
    ids = [claim.id for claim in claims]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"claim ids must differ, these are used twice: {', '.join(twice)}")
    seeds = sorted(results)
    rows = []
    for claim in claims:
        per_seed = [_statistic(claim, seed, results[seed]) for seed in seeds]
        measured = {
            "per_seed": per_seed,
            "mean": sum(per_seed) / len(per_seed),
            "ci95": list(t_interval(per_seed)[1:]) if len(per_seed) > 1 else None,
            "verdict": verdict(per_seed, claim.threshold, claim.direction),
            "world": world,
            "seeds": seeds,
            "config_hash": config_hash,
            "commit": commit,
            "seconds": seconds,
        }
        row = asdict(claim) | measured
        rows.append({key: row[key] for key in KEYS})
    return rows


def _statistic(claim: Claim, seed: int, result: Mapping[str, float]) -> float:
    if claim.statistic not in result:
        raise KeyError(f"{claim.id}: seed {seed} has no statistic {claim.statistic!r}; it has {', '.join(result)}")
    value = float(result[claim.statistic])
    if not math.isfinite(value):
        raise FloatingPointError(f"{claim.id}: {claim.statistic} of seed {seed} is {value}")
    return value


def write_claims(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of `judge` as JSON."""
    write_json(path, list(rows))


def read_claims(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a claims.json. Raises ValueError for a row whose keys are not `KEYS`."""
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of claims: let the run write it again")
    for row in rows:
        if set(row) != set(KEYS):
            raise ValueError(f"{path}: claim {row.get('id')} has other keys than expected: {set(row) ^ set(KEYS)}")
    return rows


def table(rows: Sequence[Mapping[str, Any]], width: int | None = 120) -> str:
    """The rows of `judge` as an aligned Markdown table.

    Statements are wrapped to keep lines within `width` characters (a terminal); None keeps each claim on one line.
    """
    cells = [("claim", "statement", "measured", "claimed", "seeds", "verdict")]
    for row in rows:
        low, high = row["ci95"] or (row["mean"], row["mean"])
        digits = max(0, 2 - math.floor(math.log10(max(abs(low), abs(high), 1e-3))))  # three, of the larger end
        measured = f"{row['mean']:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if row["ci95"] else "")
        claimed = f"{row['direction']} {row['threshold']:g}"
        statement = f"{row['statement']} (paper: {row['paper_says']})"
        cells.append((row["id"], statement, measured, claimed, str(len(row["seeds"])), row["verdict"]))
    widths = [max(len(cell[column]) for cell in cells) for column in range(6)]
    if width is not None:
        widths[1] = min(widths[1], max(20, width - sum(widths) + widths[1] - 3 * 6 - 1))
    lines = []
    for cell in cells:
        for index, part in enumerate(textwrap.wrap(cell[1], widths[1], break_on_hyphens=False)):
            rest = cell if index == 0 else ("",) * 6
            shown = (rest[0], part, *rest[2:])
            lines.append("| " + " | ".join(text.ljust(w) for text, w in zip(shown, widths)) + " |")
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def summary(results: Mapping[int, Mapping[str, float]]) -> str:
    """Every statistic of two seeds or more, `{seed: {statistic: value}}`, as Markdown: mean and 95 % t-interval."""
    first = next(iter(results.values()))
    intervals = {name: t_interval([result[name] for result in results.values()]) for name in first}
    rows = [f"| {name} | {mean:.4g} | [{low:.4g}, {high:.4g}] |" for name, (mean, low, high) in intervals.items()]
    return "\n".join([f"| statistic | mean of {len(results)} seeds | 95 % interval |", "|---|---|---|", *rows])
