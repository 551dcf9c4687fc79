"""Every experiment by its own command at smoke scale: it runs through and leaves what it promises."""

import ast
import json
import pathlib

import pytest

from rlhfjax.results import claims_in, experiment_files

ROOT = pathlib.Path(__file__).parents[1]
# Safe RLHF's one round has tests of its own. From the last on: another worker, with test_audit.py, is at the first.
FILES = [file for file in experiment_files(ROOT / "experiments") if file.stem != "constrained_ppo"][::-1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_an_experiment_runs_by_its_command(file, smoke):
    run = smoke(file.stem)
    judged = json.loads((run / "claims.json").read_text())
    assert [row["id"] for row in judged] == [claim.id for claim in claims_in(file)] and len(judged) >= 3
    assert {row["verdict"] for row in judged} == {"not judged"}
    assert len(list((run / "figures").glob("*.png"))) >= 1
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert "One seed is not judged" in run.with_name(f"{file.stem}.log").read_text()


def test_an_experiment_file_is_small_and_says_what_it_is():
    for file in experiment_files(ROOT / "experiments"):
        text = file.read_text()
        assert len(text.splitlines()) <= 150, file
        for word in ("Claim  ", "Paper  ", "Command  ", "Cost  ", "Differs  "):
            assert f"\n{word}" in ast.get_docstring(ast.parse(text)), f"{file} lacks {word.strip()}"
