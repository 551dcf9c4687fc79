"""The audit of a run: its rows and disclosures as plain values, for a person as Markdown, and figures."""

import inspect
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import expit

from rlhfjax.audit.probes import PROBES, Absent, gaps, tell
from rlhfjax.audit.taxonomy import DISCLOSURE, PROBLEMS, THRESHOLDS
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.calibration import reliability
from rlhfjax.evaluation.statistics import Interval
from rlhfjax.io.run import write_json

HEADER = """# Audit of {run}

Red: a number of this run lies beyond a bound that was fixed beforehand. Ok: none does, which does not say that the
problem is solved. Intervals are 95 % and describe this one run. Rows with a proxy ask the world's truth, which nobody
knows at full scale: the proxy would stand in. After Casper et al. (2307.15217). Config {config_hash}.

Stages: {named}.
"""
CURVES = {"score": "reward (sd of start)", "gold_helpfulness": "gold helpfulness r*", "kl": "KL (nats per answer)"}
FIGURES = {
    "training": lambda history: figures.training_curves({"policy": history}, CURVES),
    "calibration": lambda held_out, reward: figures.reliability_figure(
        {"reward model": reliability(expit(gaps(reward, held_out.helpful)), held_out.helpful.prefs)}),
}  # fmt: skip
rounded = lambda x: float(f"{x:.4g}") if math.isfinite(x) else None  # no report depends on the last bits of a sum


def measure(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """One row of audit.json."""
    (problem, mark, note), probe, sources = PROBLEMS[name], PROBES.get(name, lambda: {}), parts["sources"]
    asked = set(inspect.signature(probe).parameters)
    row = {"id": name, "problem": problem, "mark": mark, "status": "absent", "flag": "none", "value": {},
           "ci95_of_this_run": {}, "reasons": [], "needs_gold": not asked <= set(sources), "proxy": note,
           "config": parts["config_hash"], "evidence": sorted({sources.get(part, "truth") for part in asked})}
    if name not in PROBES:
        return row | {"status": "not applicable" if name in ("H5", "P4") else "absent", "reasons": [note], "proxy": ""}
    try:
        found = tell(parts, probe)
    except (Absent, ValueError) as reason:  # gone, or nothing in it to measure
        return row | {"reasons": [str(reason)]}
    for key, value in found.items():
        mean, *ends = value if isinstance(value, Interval) else (value,)
        row["value"][key] = rounded(mean)
        row["ci95_of_this_run"] |= {key: [rounded(end) for end in ends]} if ends else {}
        for _, _, side, bound, why in (t for t in THRESHOLDS if t[:2] == (name, key)):
            if not (min([mean, *ends]) <= bound if side == ">" else max([mean, *ends]) >= bound):  # NaN is red
                row["reasons"].append(f"{key} {rounded(mean)} {side} {bound:g}: {why}")
    flag = "red" if row["reasons"] else "ok" if any(t[0] == name for t in THRESHOLDS) else "none"
    return row | {"status": "declared" if name == "H1" else "measured", "flag": flag}


def audit(parts: Mapping[str, Any], declared: Mapping[str, str]) -> dict[str, Any]:
    """All of audit.json, from what `probes.load` gives; a fault is planted by another part in the place of one.

    declared: what a person says of the items "9", "10" and "11", and "signed_by"; or nothing."""
    if declared and not {"signed_by"} <= declared.keys() <= {"9", "10", "11", "signed_by"}:
        raise ValueError(f'declarations are of items "9", "10", "11" and name who has "signed_by", got {[*declared]}')
    parts, items = dict(parts), []
    rows = [measure(name, parts) for name in PROBLEMS]
    known = {row["id"]: row["value"] for row in rows if row["status"] == "measured"}
    if not isinstance(parts["world"], Absent):
        known |= parts["config"] | {
            "world": parts["world"].version, "feedback": "which is more helpful, which more harmful; is each harmful",
            "losses": "Bradley-Terry: disagreement is noise; for the cost, sign terms"}  # fmt: skip
    for number, (item, names) in enumerate(DISCLOSURE, 1):
        said = {name: known[name] for name in names.split() if name in known}
        if str(number) in declared:
            said = {"declared": declared[str(number)], "signed_by": declared["signed_by"]}
        items.append({"item": number, "disclosed": item, "status": "declared" if said else "absent", "value": said})
    whole = {key: parts[key] for key in ("run", "config_hash", "audited")}
    return whole | {"rows": rows, "disclosure": items}


def table(rows: Sequence[Mapping[str, Any]], hidden: Sequence[str] = ()) -> str:
    columns, cell = [c for c in rows[0] if c not in hidden], lambda x: json.dumps(x).replace('"', "") if x else ""
    lines = [columns, ["---"] * len(columns), *([cell(row[column]) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def side_by_side(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Two runs' audits as one Markdown table: every number that has a bound, in bold where its flag is red."""

    def cell(row, key):
        value, ends = row["value"].get(key, row["status"]), row["ci95_of_this_run"].get(key)
        red = any(reason.startswith(f"{key} ") for reason in row["reasons"]) and key in row["value"]
        return ("**{}**" if red else "{}").format(f"{value} [{ends[0]}, {ends[1]}]" if ends else f"{value}")

    runs = {f"{found['run']}, {found['audited']['policy']}{mark}": {row["id"]: row for row in found["rows"]}
            for found, mark in ((first, ""), (second, "'" * (first["run"] == second["run"])))}  # fmt: skip
    return table([{"row": name, "what": f"{PROBLEMS[name][0]}: {key.replace('_', ' ')}", "red if": f"{side} {bound:g}"}
                  | {run: cell(rows[name], key) for run, rows in runs.items()}
                  for name, key, side, bound, _ in THRESHOLDS])  # fmt: skip


def write(found: Mapping[str, Any], parts: Mapping[str, Any], out: pathlib.Path) -> None:
    """Write audit.json, audit.md and the figures that there is evidence for to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "audit.json", found)
    tables = table(found["rows"], ["config", "needs_gold"]), table(found["disclosure"])
    named = ", ".join(f"{role} {stage}" for role, stage in found["audited"].items() if stage) or "none"
    (out / "audit.md").write_text("\n".join([HEADER.format(**found, named=named), *tables]))
    for name, figure in FIGURES.items():
        try:
            figures.save(tell(dict(parts), figure), out / f"{name}.png")
        except (Absent, ValueError):
            (out / f"{name}.png").unlink(missing_ok=True)
