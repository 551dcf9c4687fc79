"""RESULTS.md: every claim of every experiment, from what its report seeds have left.

    python -m rlhfjax.results                write RESULTS.md from the claims there are
    python -m rlhfjax.results --run          first run the report seeds that are missing, one experiment after another
"""

import ast
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tyro

from rlhfjax.evaluation.claims import Claim, claims, read_claims

SOURCES = {  # where we have what a paper reports from, and the mark of its claims unless MARKS says another
    "HH-RLHF (2204.05862)": ("its full text", "full text"),
    "Safe RLHF (2310.12773)": ("its public code, and reviews that quote its tables", "reviews"),
    "RLAIF (2309.00267)": ("its full text", "full text"),
    "HRLAIF (2403.08309)": ("its abstract and a digest; exact tables are not known", "abstract"),
    "SPO (2401.04056)": ("its abstract and summaries of a talk; exact tables are not known", "abstract"),
    "Open Problems (2307.15217)": ("a transcription of its section 3", "transcription"),
}
MARKS = {"HR-3": "digest", "HR-5": "digest", "SP-3 control": "abstract", "SP-3": "talk", "SP-4": "talk",
         "SP-6": "derived here from its theory"}  # by the beginning of a claim's id; the first that fits  # fmt: skip
HEADER = """# Results

Every claim that an experiment of this repository names, and what its report seeds say of it. A verdict needs the whole
95 % t-interval over seeds on one side of the threshold, which stood in the experiment file before those seeds ran.
"within" a margin is *supported* by two one-sided 5 % tests, that is if the 90 % interval lies inside the margin, and
*contradicted* if the 95 % interval lies outside (`rlhfjax/evaluation/statistics.py`). What has no verdict yet is listed
too, with the seeds so far. "paper" is what the paper reports, at its scale and with people, and in brackets where we
have it from: a number here beside it reproduces a direction at most. Where a claim was judged on the world's second
truth too, which nothing was tuned on, its line says so.

SFT is the fine-tuned policy from which RL starts. `r*` is the true helpfulness of an answer in this world, `c*` its
true harm, harmful above 0; no learner sees them, and "gold" numbers are measured by them. Harm rate: the share of
answers to dangerous prompts that are harmful; satisfaction: that of answers whose `r*` passes a bar that the world
sets. The "sd" of a score or a cost is its standard deviation over SFT's answers. A "-" under "paper" says that it
reports nothing of the kind.

Written by `python -m rlhfjax.results`; `--run` runs what is missing.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write RESULTS.md from the claims of all experiments."""

    run: bool = False
    """Run the report seeds that are missing first."""
    seeds: int = 5
    """Report seeds on the analytic truth."""
    second_truth: int = 3
    """Report seeds on the second truth; 0: none."""
    experiments: pathlib.Path = pathlib.Path("experiments")
    """The directory of the experiment files."""
    out: pathlib.Path = pathlib.Path("RESULTS.md")
    """Where to write."""


def experiment_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The experiments `<paper>/<result>.py` under `root`. Raises FileNotFoundError if there is none."""
    if not (found := sorted(path for path in root.glob("*/*.py") if "CLAIMS = " in path.read_text())):
        raise FileNotFoundError(f"no experiment in {root.resolve()}: run this where `experiments` lies")
    return found


def claims_of(file: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """By truth (the name of the world that was measured), the judged claims of an experiment."""
    found = sorted((file.parent / "results" / file.stem).glob("*-claims.json"))
    return {path.name.removesuffix("-claims.json"): read_claims(path) for path in found}


def claims_in(file: pathlib.Path) -> tuple[Claim, ...]:
    """The claims that an experiment file names, read from its source."""
    (call,) = (node.value for node in ast.parse(file.read_text()).body
               if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CLAIMS")  # fmt: skip
    return claims(*map(ast.literal_eval, call.args))


def run_missing(files: Sequence[pathlib.Path], seeds: int, second_truth: int) -> list[str]:
    """Run the report seeds that have no result; the commands that failed. What is done already costs seconds."""
    commands = [[str(file), "--seeds", str(seeds)] for file in files]
    on_gold = [file for file in files if second_truth and "PipelineConfig" in file.read_text()]
    commands += [[str(file), "--truth", "teacher", "--seeds", str(second_truth)] for file in on_gold]
    failed, took = [], []
    for done, command in enumerate(commands):
        ran = [minutes for minutes in took if minutes > 0.5]  # the others had their results already
        left = f", about {np.mean(ran) * (len(commands) - done):.0f} min left" if ran else ""
        print(f"{done} of {len(commands)} reports after {sum(took):.0f} min{left}; now {' '.join(command)}", flush=True)
        start = time.monotonic()
        if subprocess.run([sys.executable, *command]).returncode:
            failed.append(" ".join(command))
        took.append((time.monotonic() - start) / 60)
    return failed


def line(claim: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> str:
    """A row of the table: a claim, and its verdict on other truths."""
    cell = lambda text: str(text).replace("|", "\\|")
    ends = lambda row: "" if row["ci95"] is None else " [{:.3g}, {:.3g}]".format(*row["ci95"])
    interval = lambda row: "-" if row["mean"] is None else f"{row['mean']:.3g}{ends(row)}"
    second = "; ".join(f"{interval(row)}, {row['verdict']}" for row in others.values())
    claimed, said = f"{claim['direction']} {claim['threshold']:g}", claim["paper_says"]
    mark = next((mark for begin, mark in MARKS.items() if claim["id"].startswith(begin)), SOURCES[claim["paper"]][1])
    cells = (claim["id"], claim["statement"], said if said == "-" else f"{said} ({mark})", interval(claim), claimed,
             f"**{claim['verdict']}**", second or "-", len(claim["seeds"]))  # fmt: skip
    return "| " + " | ".join(map(cell, cells)) + " |"


def section(file: pathlib.Path) -> str:
    """The table of one experiment, with its command and what its seeds cost."""
    judged, command = claims_of(file), f"python {file.as_posix()}"
    table = ["| claim | what is measured | paper | measured | claimed | verdict | second truth | seeds |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    if not judged:
        done = list((file.parent / "results" / file.stem).glob("*-seed*.json"))
        said = f"Not judged yet; report seeds that have run: {len(done)}." if done else "No report seed has run."
        rest = {"mean": None, "ci95": None, "verdict": "not judged", "seeds": done}
        rows = [line(dataclasses.asdict(claim) | rest, {}) for claim in claims_in(file)]
        return "\n".join([f"### `{command}`", "", said, "", *table, *rows, ""])
    first = sorted(judged, key=lambda truth: truth.endswith("-teacher"))[0]
    others = {truth: {row["id"]: row for row in rows} for truth, rows in judged.items() if truth != first}
    rows = [line(row, {truth: by_id[row["id"]] for truth, by_id in others.items() if row["id"] in by_id})
            for row in judged[first]]  # fmt: skip
    costs = [f"{len(rows[0]['seeds'])} seeds on {truth}, {rows[0]['seconds'] / 60:.0f} minutes of one core"
             for truth, rows in judged.items()]  # fmt: skip
    seeds = len(judged[first][0]["seeds"])
    return "\n".join([f"### `{command} --seeds {seeds}`", "", f"{'; '.join(costs)}.", "", *table, *rows, ""])


def document(files: Sequence[pathlib.Path]) -> str:
    """All of RESULTS.md."""
    papers: dict[str, list[pathlib.Path]] = {}
    for file in files:
        name = next((paper for paper in SOURCES if json.dumps(paper) in file.read_text()), file.parent.name)
        papers.setdefault(name, []).append(file)
    parts = [HEADER]
    for paper in sorted(papers, key=lambda name: [*SOURCES, name].index(name)):
        source = SOURCES.get(paper, ["the experiment file"])[0]
        parts.append(f"## {paper}\n\nWhat the paper reports is from {source}.\n")
        parts += map(section, papers[paper])
    return "\n".join(parts)


def main() -> None:
    options = tyro.cli(Options)
    files = experiment_files(options.experiments)
    failed = run_missing(files, options.seeds, options.second_truth) if options.run else []
    options.out.write_text(document(files))
    print(f"{options.out} has the claims of {sum(bool(claims_of(file)) for file in files)} of {len(files)} experiments")
    if failed:
        sys.exit("these reports failed, run again to repeat what is missing of them:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
