"""A notebook is its source, walks the runs of its paper's experiments (one, a user's own files), and would notice a
number that is not theirs."""

import ast
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tempfile

import jupytext
import pytest

from rlhfjax.io.run import newest_run
from rlhfjax.models import huggingface

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
OWN = NOTEBOOKS / "real_data.py"
PAPERS = [source for source in SOURCES if source != OWN]
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
each_paper = pytest.mark.parametrize("source", PAPERS, ids=lambda source: source.stem)


def experiments(source: pathlib.Path) -> list[str]:
    """What a notebook reads, such as "hh_rlhf/online"."""
    return re.findall(r'newest_run\("(.+?)"\)', source.read_text())


@each_notebook
def test_a_notebook_is_its_source_without_outputs(source):
    notebooks = [jupytext.read(path) for path in (source, source.with_suffix(".ipynb"))]
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in notebooks]
    assert cells[0] == cells[1], f"run: jupytext --to ipynb --update {source}"
    code = [cell for cell in notebooks[1].cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@each_notebook
def test_a_notebook_defines_nothing_but_reads(source):
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    found = [node.lineno for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, definitions)]
    assert not found, f"lines {found}: a notebook imports the library and reads what there is"
    assert all((NOTEBOOKS.parent / "experiments" / f"{name}.py").exists() for name in experiments(source))
    assert experiments(source) or source == OWN


def walk(sources: list[pathlib.Path], environment: dict) -> None:
    """Run notebooks in one process, which names the one that fails."""
    notebooks = [source.with_suffix(".ipynb") for source in sources]
    command = [sys.executable, "-m", "pytest", "-n0", "--nbmake", "--nbmake-timeout=120", *notebooks]
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    result = subprocess.run(command, cwd=NOTEBOOKS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(notebooks)} passed" in result.stdout


def test_notebooks_walk_runs_and_a_users_files(smoke, own, tmp_path):
    (runs,) = {smoke(name.split("/")[1]).parent for source in SOURCES for name in experiments(source)}
    walk(SOURCES, {"RLHFJAX_RUNS": runs, "RLHFJAX_PAIRS": own / "noisy.jsonl", "RLHFJAX_CHECKPOINT": own / "checkpoint",
                   "TMPDIR": tmp_path})  # fmt: skip


FAULTS = [  # notebook, experiment, file, keys that lead to a recorded number
    ("hh_rlhf", "scaling", "statistics.json", ["data_slope"]),
    ("hh_rlhf", "overoptimisation", "metrics.jsonl", ["large", 3, "score"]),
    ("hrlaif", "hybrid", "statistics.json", ["hybrid satisfaction"]),
    ("open_problems", "planted_faults", "metrics.jsonl", ["constrained", 5, "gold_helpfulness"]),
    ("open_problems", "planted_faults", "audit/none/audit.json", ["rows", "P6", "value", "commonest"]),
    ("rlaif", "judges", "statistics.json", ["biased 8 one_order"]),
    ("safe_rlhf", "constrained_ppo", "metrics.jsonl", ["constrained", 2, "lambda"]),
    ("safe_rlhf", "constrained_ppo", "statistics.json", ["limit"]),
    ("spo", "text", "metrics.jsonl", ["self-play cyclic", 5, "careful"]),
    ("spo", "control", "statistics.json", ["cyclic_exploitability"]),
]


def change(path: pathlib.Path, keys: list) -> None:
    """Change the number that `keys` lead to: of a line (stage, step), of a row by its id, or of an object."""
    text = path.read_text()
    whole = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    at = whole
    if path.suffix == ".jsonl":
        (at,) = [line for line in whole if [line["stage"], line["step"]] == keys[:2]]
        keys = keys[2:]
    for key in keys[:-1]:
        at = next(row for row in at if row["id"] == key) if isinstance(at, list) else at[key]
    at[keys[-1]] = 0.9 * at[keys[-1]] - 0.01
    path.write_text("\n".join(map(json.dumps, whole)) if path.suffix == ".jsonl" else json.dumps(whole))


@pytest.mark.parametrize("notebook, stem, file, keys", FAULTS)
def test_planted_fault_a_number_that_is_not_the_runs(smoke, tmp_path, monkeypatch, notebook, stem, file, keys):
    source = NOTEBOOKS / f"{notebook}.py"
    for name in experiments(source):
        run = smoke(name.split("/")[1])
        shutil.copytree(run, tmp_path / name.split("/")[1], ignore=shutil.ignore_patterns("checkpoints", "events"))
    monkeypatch.setenv("RLHFJAX_RUNS", str(tmp_path))
    change(tmp_path / stem / file, keys)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        runpy.run_path(str(source))


def test_planted_fault_an_export_that_says_something_else(own, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHFJAX_PAIRS", str(own / "harm.jsonl"))
    monkeypatch.setenv("RLHFJAX_CHECKPOINT", str(own / "checkpoint"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save = huggingface.save
    scaled = lambda params: params | {"head": 1.01 * params["head"]}
    monkeypatch.setattr(huggingface, "save", lambda path, config, p, **more: save(path, config, scaled(p), **more))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        runpy.run_path(str(OWN))


def test_without_files_the_notebook_says_which(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHFJAX_PAIRS", raising=False)
    with pytest.raises(FileNotFoundError, match="pairs.jsonl does not exist"):
        runpy.run_path(str(OWN))


@each_paper
def test_without_a_run_a_notebook_says_how_to_make_one(source, tmp_path, monkeypatch):
    first = experiments(source)[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHFJAX_RUNS", raising=False)
    with pytest.raises(FileNotFoundError, match=rf"experiments/{first}\.py` makes one"):
        runpy.run_path(str(source))


def test_only_a_finished_run_of_the_experiment_is_taken(tmp_path, monkeypatch):
    for name, file in (("online-001", "online"), ("mine", "online"), ("online-002", "online"), ("other", "text")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"argv": [f"experiments/x/{file}.py", "--seed", "1"]}))
        if name != "online-002":
            (tmp_path / name / "claims.json").write_text("[]")
    os.utime(tmp_path / "online-001" / "claims.json", (1, 1))
    monkeypatch.setenv("RLHFJAX_RUNS", str(tmp_path))
    assert newest_run("hh_rlhf/online") == tmp_path / "mine"
    with pytest.raises(FileNotFoundError, match=f"no finished run of scaling in {tmp_path}"):
        newest_run("hh_rlhf/scaling")
