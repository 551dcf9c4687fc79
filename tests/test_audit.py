"""The audit sees what is wrong with a run, says what it cannot see, and never passes what is absent."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments.open_problems.planted_faults import FAULTS
from rlhfjax.audit.probes import PROBES, agreed, load, overoptimised
from rlhfjax.audit.report import audit, measure, side_by_side
from rlhfjax.audit.taxonomy import DISCLOSURE, PROBLEMS, THRESHOLDS
from rlhfjax.io.cache import StaleEntry, read_stage
from rlhfjax.results import experiment_files
from rlhfjax.types import Rollout

ROOT = pathlib.Path(__file__).parents[1]
SIGNED = {"signed_by": "A. Person", "10": "it may refuse what is harmless"}


def by_id(found):
    return {row["id"]: row for row in found["rows"]}


def red(found):
    return {row["id"] for row in found["rows"] if row["flag"] == "red"}


@pytest.fixture(scope="module")
def parts(smoke_run):
    """A run with nothing wrong: models that know the truth, fine-tuning as the policy, and a smooth history.

    What 5 iterations of RL make of a policy at smoke scale is rightly red.
    """
    parts = load(smoke_run)
    gold = lambda x: parts["world"].gold(x.prompts, x.tokens, x.mask)
    before, after = parts["base"], parts["start"]
    rise = np.linspace(0, 1, 40)
    return parts | {
        "reward": lambda x: 3 * np.asarray(gold(x).helpfulness), "cost": lambda x: 5 * np.asarray(gold(x).harm),
        "start": before, "policy": after, "policies": {"base": before, "constrained": after},
        "history": {"step": np.arange(40), "score": rise, "gold_helpfulness": rise, "kl": 4 * rise,
                    "clip_fraction": 0.1 * rise, "skipped": 0 * rise}}  # fmt: skip


@pytest.fixture(scope="module")
def clean(parts):
    return audit(parts, {})


def test_every_row_and_item_has_a_status(clean):
    assert list(by_id(clean)) == list(PROBLEMS) and len(PROBLEMS) == 23 and len(clean["disclosure"]) == 11
    statuses = {row["status"] for row in clean["rows"]}
    assert statuses == {"measured", "declared", "absent", "not applicable"}
    for row in clean["rows"]:
        assert (row["status"] == "measured") == (row["id"] in PROBES and row["id"] != "H1")
        assert row["reasons"] or row["value"], row
        assert row["config"] == clean["config_hash"] and row["flag"] in ("red", "ok", "none")
        assert set(row["ci95_of_this_run"]) <= set(row["value"])


def test_what_asks_the_truth_names_what_would_stand_in_for_it(clean):
    for row in clean["rows"]:
        assert row["needs_gold"] == ("truth" in row["evidence"])
        assert bool(row["proxy"]) == row["needs_gold"], row["id"]


def test_a_clean_run_raises_no_red_row(clean):
    assert not red(clean), [row["reasons"] for row in clean["rows"] if row["flag"] == "red"]


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "none"])
def test_planted_fault_turns_its_row_red_and_few_others(parts, clean, fault):
    plant, row = FAULTS[fault]
    assert by_id(clean)[row]["flag"] == "ok"
    found = red(audit({**parts, **plant(parts)}, {}))
    assert row in found and len(found) <= 3


def test_harm_that_a_cost_model_does_not_see_is_measured(parts, clean):
    seen = lambda row: [row["value"][f"harm_seen_{whose}"] for whose in ("start", "policy")]
    assert seen(by_id(clean)["R4"]) == [1.0, 1.0]
    assert seen(measure("R4", {**parts, "cost": lambda x: -parts["cost"](x)})) == [0.0, 0.0]
    assert "harm_seen_start" not in measure("R4", {**parts, "cost": None})["value"]


def test_the_command_writes_the_same_bytes_twice(smoke_run, tmp_path):
    declarations = tmp_path / "declarations.json"
    declarations.write_text(json.dumps(SIGNED))
    command = [sys.executable, "-m", "rlhfjax.audit", smoke_run, "--declarations", declarations, "--out"]
    for name, *more in (("first",), ("second", "--beside", smoke_run)):
        done = subprocess.run([*command, tmp_path / name, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["audit.json", "audit.md", "calibration.png", "training.png"]
    for name in files:
        same = tmp_path / "second" / smoke_run.name / name
        assert (tmp_path / "first" / name).read_bytes() == same.read_bytes(), name
    head, _, *rows = (text := (tmp_path / "second/beside.md").read_text()).splitlines()
    assert head == "| row | what | red if | smoke, constrained | smoke, constrained' |" and text in done.stdout
    assert len(rows) == len(THRESHOLDS) and all(len({*row.split(" | ")[-2:]}) <= 2 for row in rows)
    items = {item["item"]: item for item in json.loads((tmp_path / "first/audit.json").read_text())["disclosure"]}
    assert items[10]["value"] == {"declared": SIGNED["10"], "signed_by": SIGNED["signed_by"]}
    assert [number for number, item in items.items() if item["status"] == "absent"] == [9, 11]


def test_a_stage_that_is_gone_or_damaged_leaves_its_rows_absent_with_the_reason(smoke_run, tmp_path):
    shutil.copytree(smoke_run.parent / "cache" / "stages", tmp_path / "stages")
    entries = json.loads((smoke_run / "stages.json").read_text())
    (tmp_path / "stages" / entries["reward"]).unlink()
    labels = tmp_path / "stages" / entries["labels"]
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([labels.read_bytes()[-1] ^ 1]))
    with pytest.raises(StaleEntry, match="checksum"):
        read_stage(smoke_run, tmp_path / "stages", "labels")
    parts = load(smoke_run, tmp_path)
    rows = {name: measure(name, parts) for name in ("H1", "H2", "H3", "H7", "R5", "J2")}
    assert rows["H1"]["status"] == "declared"
    for name in ("H2", "H3", "H7", "R5", "J2"):
        assert rows[name]["status"] == "absent" and rows[name]["flag"] == "none" and not rows[name]["value"]
    assert "checksum" in rows["H2"]["reasons"][0] and entries["reward"] in rows["H7"]["reasons"][0]


STEMS = [file.stem for file in experiment_files(ROOT / "experiments")]


@pytest.mark.parametrize("stem", STEMS)
def test_every_row_of_every_experiments_run_has_a_status(smoke, stem):
    parts = load(smoke(stem))
    rows = {name: measure(name, parts) for name in PROBLEMS}
    for row in rows.values():
        assert row["status"] in ("measured", "declared", "absent", "not applicable")
        assert row["value"] or row["reasons"], row["id"]
        assert bool(row["proxy"]) == row["needs_gold"] or row["status"] == "absent", row["id"]
    measured = {name for name, row in rows.items() if row["status"] == "measured"}
    if stem in ("control", "matrix_games"):
        assert measured == ({"P1"} if stem == "control" else set()) and "another world" in rows["H2"]["reasons"][0]
    else:  # people can be asked about held-out answers, whoever has labelled
        audited = parts["audited"]
        needed = {"H4", "H8"} | ({"P1", "P2", "P6"} if audited["policy"] else set())
        needed |= {"H3", "R1"} if audited["reward"] else set()
        needed |= {"R3", "J1"} if audited["reward"] and audited["policy"] else set()
        assert needed <= measured, needed - measured


@pytest.mark.parametrize("stem, chosen, expected", [
    ("constrained_ppo", [], "sft labels held-out reward cost constrained"),
    ("constrained_ppo", ["plain"], "sft labels held-out reward None plain"),
    ("overoptimisation", [], "sft-small train-large-labels None train-large None small policy"),
    ("overoptimisation", ["small models"], "sft train-small-labels None train-small None small models"),
    ("online", [], "sft reward-static-labels held-out reward-static None static"),
    ("rlaif", ["ai"], "sft reward-ai-labels held-out reward-ai None ai"),
    ("rlaif", ["direct"], "sft labels held-out None None direct"),
])  # fmt: skip
def test_a_policy_is_audited_with_what_it_was_trained_on(smoke, stem, chosen, expected):
    audited = load(smoke(stem), chosen=chosen)["audited"]
    roles = ("start", "labels", "held out", "reward", "cost", "policy")
    assert " ".join(str(audited[role]) for role in roles) == expected


def test_labels_of_an_ai_are_audited_but_nobody_is_asked_for_more_of_them(smoke):
    parts, people = (load(smoke("rlaif"), chosen=[arm]) for arm in ("ai", "people"))
    assert (parts["labels"].prefs != people["labels"].prefs).mean() > 0.5  # they are not certain
    rows = {name: measure(name, parts) for name in ("H3", "J2", "J1")}
    assert rows["H3"]["status"] == rows["J1"]["status"] == "measured" and rows["J2"]["status"] == "absent"
    assert "reward-ai-labels are not people's alone" in rows["J2"]["reasons"][0]
    assert measure("J2", people)["status"] == "measured"


def test_what_was_not_made_is_absent_and_people_are_asked_for_held_out_labels(smoke):
    parts = load(smoke("text"))
    rows = {name: measure(name, parts) for name in ("R1", "H4", "P1", "P6")}
    assert rows["R1"]["status"] == "absent" and "no stage in the role 'reward'" in rows["R1"]["reasons"][0]
    assert rows["H4"]["needs_gold"] and rows["H4"]["value"]["consistency"] < 1  # asked twice, with other noise
    assert {rows[name]["status"] for name in ("H4", "P1", "P6")} == {"measured"}


def test_two_audits_side_by_side_show_what_is_red(parts, clean):
    faulty = {**parts, **FAULTS["broken reward model"][0](parts)}
    lines = {tuple(cells[1:3]): cells[4:] for line in side_by_side(clean, audit(faulty, {})).splitlines()[2:]
             if (cells := [cell.strip() for cell in line.split("|")])}  # fmt: skip
    sound, broken, _ = lines["R1", f"{PROBLEMS['R1'][0]}: brier"]
    assert not sound.startswith("**") and broken.startswith("**")
    assert lines["H4", f"{PROBLEMS['H4'][0]}: consistency"][0].count("[") == 1


def test_the_committed_side_by_side_follows_from_its_audits_and_is_what_the_readme_shows():
    folder = ROOT / "experiments/open_problems/results/side_by_side"
    audits = [json.loads((folder / run / "audit.json").read_text()) for run in ("safe", "broken")]
    assert side_by_side(*audits) == (folder / "beside.md").read_text()
    assert (folder / "beside.md").read_text() in (ROOT / "experiments/open_problems/README.md").read_text()


def test_a_run_that_cannot_be_audited_is_refused_with_what_to_do(smoke_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="'nothing'.*constrained"):
        load(smoke_run, chosen=["nothing"])
    run = shutil.copytree(smoke_run, tmp_path / "run")
    (run / "status.json").write_text('{"status": "preempted"}')
    done = subprocess.run([sys.executable, "-m", "rlhfjax.audit", run], capture_output=True, text=True)
    assert done.returncode == 1 and "preempted" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_chosen_stage_is_audited(smoke_run):
    assert load(smoke_run)["sources"]["policy"] == "stage constrained"
    chosen = load(smoke_run, chosen=["plain"])["sources"]
    assert chosen["policy"] == "stage plain" and "plain" in chosen["history"] and chosen["reward"] == "stage reward"


@pytest.mark.parametrize("declared", [{"10": "none"}, {"signed_by": "A. Person", "8": "fine"}])
def test_declarations_are_signed_and_of_three_items_only(parts, declared):
    with pytest.raises(ValueError, match="signed_by"):
        audit(parts, declared)


def test_a_number_that_is_none_is_red_and_no_number_in_json():
    history = {name: np.full(40, np.nan) for name in ("kl", "clip_fraction", "skipped")}
    row = measure("P1", {"history": history, "sources": {"history": "metrics.jsonl"}, "config_hash": "0"})
    assert row["flag"] == "red" and row["value"]["clip_fraction"] is None


def test_every_bound_belongs_to_a_value_and_every_disclosure_to_something(clean):
    rows = by_id(clean)
    for name, key, side, _, reason in THRESHOLDS:
        assert key in rows[name]["value"] and side in "<>" and reason
    config = {item["item"]: item["value"] for item in clean["disclosure"]}
    for number, (_, names) in enumerate(DISCLOSURE, 1):
        assert list(config[number]) == names.split()


def test_a_drop_in_worth_counts_only_while_the_score_rises(parts):
    answers = Rollout(prompts=None, prompt_mask=None, tokens=None, mask=None, logprobs=None, finished=None)
    truth = lambda _: np.array([-1.0, 1.0])
    rise = np.linspace(0, 1, 40)
    fall = np.where(rise < 0.5, rise, 1 - rise)
    history = {"gold_helpfulness": fall, "score": rise, "kl": 10 * rise}
    found = overoptimised(history, answers, answers, truth, world=None, cost=None)
    assert found["overoptimised_sd"] == pytest.approx(0.46, abs=0.02)
    assert found["kl_at_peak"] == pytest.approx(5, abs=0.3)
    assert overoptimised({**history, "score": -rise}, answers, answers, truth, None, None)["overoptimised_sd"] == 0


def test_agreement_leaves_ties_out():
    np.testing.assert_array_equal(agreed(np.array([1.0, -1, 0, 2, -3]), np.array([1.0, 1, 1, 0.5, 0])), [1, 0, 1])
