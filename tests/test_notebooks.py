"""The notebook is its source, runs on a run's directory, and would notice a multiplier that is not the run's own."""

import ast
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import jupytext
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
SOURCE = NOTEBOOKS / "safe_rlhf.py"
PAIRED = SOURCE.with_suffix(".ipynb")


def test_the_notebook_is_its_source_without_outputs():
    source, paired = jupytext.read(SOURCE), jupytext.read(PAIRED)
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (source, paired)]
    assert cells[0] == cells[1], f"run: jupytext --to ipynb --update {SOURCE}"
    code = [cell for cell in paired.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_the_notebook_defines_nothing():
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    found = [node.lineno for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, definitions)]
    assert not found, f"lines {found}: a notebook imports the library and reads runs"


def test_the_notebook_walks_a_run(smoke_run):
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=120", str(PAIRED)]
    environment = os.environ | {"RLHFJAX_RUN": str(smoke_run)}
    result = subprocess.run(command, cwd=NOTEBOOKS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def change_lambda(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if line["stage"] == "constrained" and line["step"] == 2]
    line["lambda"] *= 1.01
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def change_limit(run):
    statistics = json.loads((run / "statistics.json").read_text())
    (run / "statistics.json").write_text(json.dumps(statistics | {"limit": 1.1 * statistics["limit"]}))


@pytest.mark.parametrize("change", [change_lambda, change_limit])
def test_planted_fault_the_recorded_multiplier_is_not_that_of_the_costs(smoke_run, tmp_path, monkeypatch, change):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    change(run)
    monkeypatch.setenv("RLHFJAX_RUN", str(run))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        runpy.run_path(str(SOURCE))


def test_without_a_run_the_notebook_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHFJAX_RUN", raising=False)
    with pytest.raises(FileNotFoundError, match=r"constrained_ppo\.py` makes one"):
        runpy.run_path(str(SOURCE))
    monkeypatch.setenv("RLHFJAX_RUN", str(tmp_path / "unfinished"))
    with pytest.raises(FileNotFoundError, match="no finished run in .*unfinished"):
        runpy.run_path(str(SOURCE))
