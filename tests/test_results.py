"""RESULTS.md: what it says of made-up claims, what `--run` would run, and that the committed one is not stale."""

import ast
import dataclasses
import importlib
import json
import pathlib
import subprocess
import types

import pytest

from rlhfjax import results
from rlhfjax.evaluation.claims import claims, judge, read_claims, write_claims
from rlhfjax.experiment import PLACES
from rlhfjax.io.run import config_hash

ROOT = pathlib.Path(__file__).parents[1]
TRUTHS = ("teacher", "analytic")  # the last is that of worlds without a truth
PAPER = "SPO (2401.04056)"
CLAIMS = claims(
    PAPER,
    ("SP-1", "reach", ">=", 0.9, "a | b", "share of |gain| reached"),
    ("SP-2", "loss", "<=", 0.25, "-", "what noise costs"),
)
SEEDS = {1000: dict(reach=0.95, loss=0.3), 1001: dict(reach=0.97, loss=0.1), 1002: dict(reach=0.96, loss=0.5)}
EXPERIMENT = f'''"""An experiment."""
CLAIMS = claims(
    "{PAPER}",
    ("SP-1", "reach", ">=", 0.9, "a | b", "share of |gain| reached"),
    ("SP-2", "loss", "<=", 0.25, "-", "what noise costs"),
)
'''


@pytest.fixture
def root(tmp_path, monkeypatch) -> pathlib.Path:
    """A directory with an experiment of the embedded world, one of another world, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"spo/text.py": EXPERIMENT + "Config(PipelineConfig)", "spo/games.py": EXPERIMENT,
                       "spo/helpers.py": "def draw(): ...", "made_up/other.py": "CLAIMS = claims('made up')"}.items():
        pathlib.Path("experiments", name).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path("experiments", name).write_text(text)
    return pathlib.Path("experiments")


def judged(truth="analytic", seeds=SEEDS, seconds=300.0):
    return judge(CLAIMS, seeds, world=f"gold_world-1.0-{truth}", config_hash="0", commit=None, seconds=seconds)


def leave(file: pathlib.Path, truth: str, rows) -> None:
    folder = file.parent / "results" / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    write_claims(folder / f"gold_world-1.0-{truth}-claims.json", rows)


def test_experiments_are_the_files_that_name_claims(root):
    assert results.experiment_files(root) == [root / "made_up/other.py", root / "spo/games.py", root / "spo/text.py"]
    with pytest.raises(FileNotFoundError, match="no experiment in .*nowhere: run this where `experiments` lies"):
        results.experiment_files(pathlib.Path("nowhere"))


def test_claims_are_found_by_truth(root):
    file = root / "spo/text.py"
    assert results.claims_of(file) == {}
    leave(file, "analytic", judged())
    leave(file, "teacher", judged("teacher"))
    assert results.claims_of(file) == {
        "gold_world-1.0-analytic": judged(), "gold_world-1.0-teacher": judged("teacher")}  # fmt: skip


def test_a_line_by_hand():
    """0.95, 0.97, 0.96: mean 0.96, sd 0.01, t = 4.303 of two degrees of freedom, so 0.96 -+ 0.0248."""
    first, second = judged()
    assert results.line(first, {}) == (
        r"| SP-1 | share of \|gain\| reached | a \| b (abstract) "
        "| 0.96 [0.935, 0.985] | >= 0.9 | **supported** | - | 3 |"
    )
    elsewhere = judged("teacher", {seed: dict(reach=0.5 + seed / 1e5, loss=0.0) for seed in SEEDS})
    assert results.line(first, {"teacher": elsewhere[0]}).endswith(
        "| **supported** | 0.51 [0.51, 0.51], contradicted | 3 |")  # fmt: skip
    assert "**inconclusive** | 0 [0, 0], supported |" in results.line(second, {"teacher": elsewhere[1]})


def test_one_seed_has_no_interval_and_is_not_judged():
    (first, _) = judged(seeds={0: SEEDS[1000]})
    assert "| 0.95 | >= 0.9 | **not judged** | - | 1 |" in results.line(first, {})


def test_a_section_has_the_command_the_costs_and_the_analytic_truth_first(root):
    file = root / "spo/text.py"
    assert results.section(file).startswith("### `python experiments/spo/text.py`\n\nNo report seed has run.\n\n|")
    (seeds := file.parent / "results" / file.stem).mkdir(parents=True)
    (seeds / "gold_world-seed1000.json").write_text("{}")
    *_, said, _, _, _, first, second = results.section(file).splitlines()
    assert said == "Not judged yet; report seeds that have run: 1."
    assert first == r"| SP-1 | share of \|gain\| reached | a \| b (abstract) | - | >= 0.9 | **not judged** | - | 1 |"
    assert second == "| SP-2 | what noise costs | - | - | <= 0.25 | **not judged** | - | 1 |"
    leave(file, "teacher", judged("teacher", {seed: SEEDS[seed] for seed in (1000, 1001)}, 60.0)[:1])
    leave(file, "analytic", judged())
    head, _, costs, _, _, _, *rows = results.section(file).splitlines()
    assert head == "### `python experiments/spo/text.py --seeds 3`"
    assert costs == ("3 seeds on gold_world-1.0-analytic, 5 minutes of one core; "
                     "2 seeds on gold_world-1.0-teacher, 1 minutes of one core.")  # fmt: skip
    (one, other) = judged()
    teacher = judged("teacher", {seed: SEEDS[seed] for seed in (1000, 1001)})[0]
    assert rows == [results.line(one, {"teacher": teacher}), results.line(other, {})]  # which was not judged there


def test_a_document_groups_experiments_by_paper(root):
    leave(root / "spo/games.py", "analytic", judged())
    text = results.document(results.experiment_files(root))
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# Results", f"## {PAPER}", "### `python experiments/spo/games.py --seeds 3`",
                        "### `python experiments/spo/text.py`", "## made_up",
                        "### `python experiments/made_up/other.py`"]  # fmt: skip
    assert f"What the paper reports is from {results.SOURCES[PAPER][0]}." in text
    assert "What the paper reports is from the experiment file." in text


@pytest.mark.parametrize("name, mark", [("SP-1", "abstract"), ("SP-3 control", "abstract"), ("SP-3 mix", "talk"),
                                        ("SP-6", "derived here from its theory")])  # fmt: skip
def test_a_claim_says_where_its_number_is_from_and_nothing_where_there_is_none(name, mark):
    rest = dict(zip(("mean", "ci95", "verdict", "seeds"), (None, None, "not judged", ())))
    row = dataclasses.asdict(CLAIMS[0]) | rest | {"id": name, "paper_says": "T"}
    assert f"| T ({mark}) |" in results.line(row, {})
    assert mark not in results.line(row | {"paper_says": "-"}, {})


def test_a_table_keeps_its_columns_whatever_a_cell_holds(root):
    leave(root / "spo/games.py", "analytic", judged())
    rows = [line for line in results.section(root / "spo/games.py").splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {9} and len(rows) == 4


def commands(monkeypatch, fails=lambda command: False):
    ran = []

    def run(command):
        ran.append(command[1:])
        return types.SimpleNamespace(returncode=int(fails(command)))

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_what_is_missing_is_run_on_both_truths_where_there_are_two(root, monkeypatch, capsys):
    ran, files = commands(monkeypatch), results.experiment_files(root)
    assert results.run_missing(files, seeds=5, second_truth=3) == []
    first = [[str(file), "--seeds", "5"] for file in files]
    assert ran == [*first, ["experiments/spo/text.py", "--truth", "teacher", "--seeds", "3"]]
    assert "3 of 4 reports after 0 min; now experiments/spo/text.py --truth teacher" in capsys.readouterr().out
    ran.clear()
    results.run_missing(files, seeds=4, second_truth=0)
    assert [command[-1] for command in ran] == ["4"] * 3


def test_a_report_that_fails_stops_no_other_and_is_named(root, monkeypatch):
    ran = commands(monkeypatch, fails=lambda command: "experiments/spo/games.py" in command)
    assert results.run_missing(results.experiment_files(root), 5, 3) == ["experiments/spo/games.py --seeds 5"]
    assert len(ran) == 4
    monkeypatch.setattr("sys.argv", ["results", "--run"])
    with pytest.raises(SystemExit, match="these reports failed, .*\nexperiments/spo/games.py --seeds 5"):
        results.main()
    assert pathlib.Path("RESULTS.md").read_text() == results.document(results.experiment_files(root))


def test_without_run_nothing_is_run(root, monkeypatch, capsys):
    ran = commands(monkeypatch)
    leave(root / "spo/text.py", "analytic", judged())
    monkeypatch.setattr("sys.argv", ["results", "--out", "there.md"])
    results.main()
    assert not ran and "there.md has the claims of 1 of 3 experiments" in capsys.readouterr().out
    assert "**supported**" in pathlib.Path("there.md").read_text()


# The repository's own


def test_the_committed_results_follow_from_the_committed_claims(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = results.experiment_files(pathlib.Path("experiments"))
    assert pathlib.Path("RESULTS.md").read_text() == results.document(files), "run python -m rlhfjax.results"


def test_every_experiment_names_a_paper_whose_source_is_known():
    files = results.experiment_files(ROOT / "experiments")
    assert all(any(f'"{paper}"' in file.read_text() for paper in results.SOURCES) for file in files)


def test_no_experiment_imports_another():
    for file in (ROOT / "experiments").rglob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module if not node.level else "experiments")
        others = {"experiments", *(path.stem for path in file.parent.glob("*.py"))}
        assert not others & {name.partition(".")[0] for name in imported}, file


FOLDERS = sorted(path for path in ROOT.glob("experiments/*/results/*")
                 if path.is_dir() and path.name != "side_by_side")  # which are audits: test_audit.py  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_committed_results_are_of_the_config_in_the_file_and_lack_no_statistic(folder):
    """And committed verdicts follow from the committed seeds."""
    experiment = importlib.import_module(f"experiments.{folder.parent.parent.name}.{folder.name}")
    written = experiment.SCALES["cpu"]
    by_label = {config.label: config for config in (dataclasses.replace(written, truth=truth) for truth in TRUTHS)}
    named = {claim.statistic for claim in experiment.CLAIMS}
    for path in (paths := sorted(folder.glob("*-seed*.json"))):
        stored = json.loads(path.read_text())
        assert set(stored) == {"world", "seed", "config_hash", "commit", "seconds", "statistics"}, path
        config = by_label[stored["world"]]
        assert path.name == f"{config.label}-seed{stored['seed']}.json"
        version = (config.world.version, tuple(experiment.CLAIMS))
        digest = config_hash(config, exclude=("seed", "seeds", *PLACES), extra=version)
        assert stored["config_hash"] == digest, f"{path} was measured with other numbers or claims: repeat its report"
        assert named <= set(stored["statistics"]), path
    assert paths
    for report in folder.glob("*-claims.json"):
        rows, label = read_claims(report), report.name.removesuffix("-claims.json")
        seeds = {seed: json.loads((folder / f"{label}-seed{seed}.json").read_text()) for seed in rows[0]["seeds"]}
        context = {key: rows[0][key] for key in ("world", "config_hash", "commit", "seconds")}
        measured = {seed: stored["statistics"] for seed, stored in seeds.items()}
        for row, again in zip(rows, judge(experiment.CLAIMS, measured, **context), strict=True):
            computed = {key: pytest.approx(again.pop(key), rel=1e-12) for key in ("mean", "ci95")}  # sums round anew
            assert row == again | computed, report
