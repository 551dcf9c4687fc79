"""The command line of an experiment, its run directory, and Safe RLHF at smoke scale by its own command."""

import contextlib
import importlib
import json
import math
import pathlib
import re
import shutil
import sys
import typing

import numpy as np
import pytest

from rlhfjax import experiment
from rlhfjax.evaluation.claims import KEYS, Claim, read_claims
from rlhfjax.experiment import ExperimentConfig
from rlhfjax.io.run import read_metrics
from rlhfjax.worlds.language import Family

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
paper = importlib.import_module("experiments.safe_rlhf.constrained_ppo")


def parse(line: str):
    return experiment._parse(paper.SCALES, line.split())


# The command line


def test_a_scale_is_where_the_other_options_start_from():
    assert parse("") == paper.SCALES["cpu"]
    smoke = parse("--scale smoke --seed 3 --multiplier.maximum 9")
    assert (smoke.scale, smoke.seed, smoke.multiplier.maximum) == ("smoke", 3, 9.0)
    assert smoke.pretraining == paper.SCALES["smoke"].pretraining != paper.SCALES["cpu"].pretraining
    assert smoke.multiplier.learning_rate == paper.SCALES["smoke"].multiplier.learning_rate
    assert parse("--seed 3 --scale=smoke --multiplier.maximum 9") == smoke


@pytest.mark.parametrize("line, words", [
    ("--learning-rat 0.1", ["learning-rat"]),
    ("--scale huge", ["--scale", "huge", "smoke"]),
    ("--scale", ["--scale"]),
    ("--truth gold", ["--truth", "gold", "teacher"]),
    ("--seed three", ["--seed", "three"]),
    ("--preference.num-steps 1.5", ["--preference.num-steps", "1.5"]),
])  # fmt: skip
def test_what_is_no_option_ends_the_program_with_its_name(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(line)
    said = capsys.readouterr()
    assert ended.value.code != 0
    assert [word for word in words if word not in said.out + said.err] == []


@pytest.mark.parametrize("line, message", [
    ("--seed -1", "seed and seeds must not be negative"),
    ("--seeds -5", "seed and seeds must not be negative"),
    ("--seeds 5 --name all", "leave out --name and --resume"),
    ("--harm-limit 1.5", "harm_limit must lie in (0, 1), got 1.5"),
    ("--rl.batch-size 130", "130 responses do not divide into 4 minibatches"),
    ("--preference.num-steps 0", "num_steps must be positive"),
    ("--ppo.clip 0", "clip must be positive"),
    ("--rater.flip 0.7", "flip must lie in"),
    ("--multiplier.initial 9", "initial multiplier 9.0 must be positive and lie in [minimum, maximum] = [0.0, 5.0]"),
])  # fmt: skip
def test_what_is_out_of_range_is_named(line, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        parse(line)
    said = f"{refused.value} {capsys.readouterr().err}"
    assert message in " ".join(said.split())  # whatever the width of the terminal


def test_options_are_left_out_in_either_spelling():
    argv = "--seeds 5 --scale smoke --seed=3 --results here --seeds-of-doubt 1 --resume".split()
    kept = experiment._without(argv, "--seeds", "--seed", "--results")
    assert kept == "--scale smoke --seeds-of-doubt 1 --resume".split()
    assert experiment._without(["--results=there", "--seeds=5"], "--seeds", "--seed", "--results") == []


def test_uses_of_randomness_share_nothing_between_names_and_neighbouring_seeds():
    names = ("base", "corpus", "labels", "held-out", "start", "rl", "test")
    streams = [experiment.stream(seed, name) for seed in (0, 1, *range(1000, 1005)) for name in names]
    assert len(set(streams)) == len(streams) and all(0 <= seed < 2**31 for seed in streams)
    assert experiment.stream(3, "rl") == experiment.stream(3, "rl")
    prompts = paper.SCALES["smoke"].world.sample_prompts
    shares = dict.fromkeys(Family, 0.25)
    one, other = (prompts(experiment.stream(seed, "rl"), 64, shares).tokens for seed in (0, 1))
    assert (one != other).any()


def test_every_scale_is_one_of_the_file():
    offered = typing.get_args(typing.get_type_hints(ExperimentConfig)["scale"])
    assert {"smoke", "cpu"} <= set(paper.SCALES) <= set(offered)
    assert all(config.scale == scale for scale, config in paper.SCALES.items())


# One seed and many, of an experiment that costs nothing

CLAIM = Claim(id="T-1", paper="-", statement="twice the seed", paper_says="-", statistic="double", threshold=1,
              direction=">=")  # fmt: skip


def double(config, run, cache):
    run.log("stage", 0, {"seed": config.seed})
    return {"double": np.float32(2 * config.seed), "half": config.seed / 2}


def start(monkeypatch, folder, line, result=double):
    monkeypatch.setattr(sys, "argv", ["toy.py", *line.split(), "--runs", str(folder / "runs"), "--cache", "None"])
    experiment.main(str(folder / "toy.py"), {"cpu": ExperimentConfig()}, result, [CLAIM])


def test_one_seed_leaves_its_statistics_and_claims_and_is_not_judged(monkeypatch, tmp_path, capsys):
    start(monkeypatch, tmp_path, "--seed 4")
    run = tmp_path / "runs/toy-001"
    assert json.loads((run / "statistics.json").read_text()) == {"double": 8.0, "half": 2.0}
    (row,) = read_claims(run / "claims.json")
    assert (row["per_seed"], row["seeds"], row["verdict"]) == ([8.0], [4], "not judged")
    assert row["world"] == "gold_world-1.0-analytic"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    shown = capsys.readouterr().out
    assert "not judged" in shown and str(run) in shown
    start(monkeypatch, tmp_path, "--seed 4")
    assert (tmp_path / "runs/toy-002/claims.json").exists()


def test_a_failed_experiment_says_so_in_its_directory_and_leaves_no_claims(monkeypatch, tmp_path):
    def fail(config, run, cache):
        raise ValueError("infeasible cost limit 0.1")

    with pytest.raises(ValueError, match="infeasible"):
        start(monkeypatch, tmp_path, "--name broken", fail)
    status = json.loads((tmp_path / "runs/broken/status.json").read_text())["status"]
    assert status.startswith("failed") and "infeasible cost limit 0.1" in status
    assert not (tmp_path / "runs/broken/claims.json").exists()


def test_a_statistic_that_is_not_finite_is_kept_as_null_unless_a_claim_needs_it(monkeypatch, tmp_path):
    start(monkeypatch, tmp_path, "--name null", lambda config, run, cache: {"double": 1.0, "slope": math.inf})
    assert json.loads((tmp_path / "runs/null/statistics.json").read_text()) == {"double": 1.0, "slope": None}
    with pytest.raises(FloatingPointError, match="T-1: double of seed 0 is nan"):
        start(monkeypatch, tmp_path, "--name nan", lambda config, run, cache: {"double": math.nan})


def test_a_claim_without_its_statistic_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(KeyError, match="T-1: seed 0 has no statistic 'double'"):
        start(monkeypatch, tmp_path, "", lambda config, run, cache: {"half": 0.0})


def test_report_seeds_run_apart_and_are_judged_together(monkeypatch, tmp_path, capsys):
    asked = {}

    def run_seeds(command, seeds, results_dir, *, world, config_hash, **rest):
        """Runs the command of every seed here, as `io.seeds.run_seeds` does in processes."""
        asked.update(command=command, seeds=list(seeds), workers=rest["workers"])
        for seed in seeds:
            start(monkeypatch, tmp_path, f"{' '.join(command[1:])} --seed {seed}")
        results = {seed: json.loads((results_dir / f"{world}-seed{seed}.json").read_text()) for seed in seeds}
        assert {result["config_hash"] for result in results.values()} == {config_hash}
        return results

    monkeypatch.setattr(experiment, "run_seeds", run_seeds)
    start(monkeypatch, tmp_path, "--seeds 3 --seed 7 --truth analytic --workers 2")
    results = tmp_path / "results/toy"
    assert (asked["seeds"], asked["workers"]) == ([1000, 1001, 1002], 2)
    assert asked["command"][0] == str(tmp_path / "toy.py") and asked["command"][-2:] == ["--results", str(results)]
    assert not {"--seeds", "--seed", "--workers"} & set(asked["command"]) and "--truth" in asked["command"]
    (row,) = read_claims(results / "gold_world-1.0-analytic-claims.json")
    assert (row["per_seed"], row["verdict"]) == ([2000.0, 2002.0, 2004.0], "supported")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        f"toy-analytic-seed{seed}-001" for seed in asked["seeds"]
    ]  # each seed in a directory that names it


# Safe RLHF at smoke scale

STAGES = {  # stage: the metrics that its lines must have
    "base": {"loss"},
    "sft": {"loss"},
    "reward": {"loss", "accuracy"},
    "cost": {"loss", "accuracy", "sign_accuracy"},
    "pairwise-cost": {"loss", "accuracy"},
    "plain": {"score", "kl", "harm_rate"},
    "constrained": {"score", "kl", "harm_rate", "cost", "cost_average", "lambda"},
}


def test_a_run_leaves_everything_it_promises(smoke_run):
    for name in ("config.json", "metrics.jsonl", "claims.json", "statistics.json", "samples.json", "status.json"):
        assert (smoke_run / name).stat().st_size > 0, name
    for name in ("multiplier", "training", "scatter", "calibration"):
        assert (smoke_run / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert [path.stat().st_size > 1000 for path in (smoke_run / "events").iterdir()] == [True]
    assert json.loads((smoke_run / "status.json").read_text())["status"] == "finished"
    config = json.loads((smoke_run / "config.json").read_text())["config"]
    assert (config["scale"], config["num_pairs"], config["ppo"]["kl_coef"]) == ("smoke", 400, 0.1)


def test_every_stage_of_a_run_reports(smoke_run):
    for stage, names in STAGES.items():
        history = read_metrics(smoke_run / "metrics.jsonl", stage)
        num_steps = paper.SCALES["smoke"].pretraining.num_steps if stage == "base" else 50
        steps = list(range(25, num_steps + 1, 25)) if "loss" in names else [1, 2, 3, 4, 5]
        assert history["step"].tolist() == steps, stage
        for name in names:
            assert np.isfinite(history[name]).all(), (stage, name)
    lines = (smoke_run / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == set(STAGES)
    first, *_, last = read_metrics(smoke_run / "metrics.jsonl", "base")["loss"]
    assert last < first


def test_the_claims_of_a_run_are_those_of_its_statistics(smoke_run):
    rows, statistics = read_claims(smoke_run / "claims.json"), json.loads((smoke_run / "statistics.json").read_text())
    assert [row["id"] for row in rows] == [claim.id for claim in paper.CLAIMS]
    for row in rows:
        assert tuple(row) == KEYS
        assert row["per_seed"] == [statistics[row["statistic"]]] and row["verdict"] == "not judged", row["id"]
    assert all(math.isfinite(value) for value in statistics.values())


def test_the_samples_of_a_run_can_be_read(smoke_run):
    samples = json.loads((smoke_run / "samples.json").read_text())
    assert len(samples) == 40
    assert all(set(sample["answers"]) == {"SFT", "plain", "constrained"} for sample in samples)
    assert {sample["kind"] for sample in samples} == {"benign", "dangerous", "grey", "verifiable"}


def again(monkeypatch, smoke_run, runs, *options):
    places = ["--runs", str(runs), "--cache", str(smoke_run.parent / "cache"), "--name", "smoke"]
    monkeypatch.setattr(sys, "argv", [paper.__file__, "--scale", "smoke", *places, *options])
    monkeypatch.setattr(experiment, "_mesh", lambda config: contextlib.nullcontext())  # one device, as the run had
    experiment.main(paper.__file__, paper.SCALES, paper.experiment, paper.CLAIMS)


def contents(run):
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_a_run_that_exists_is_not_overwritten(smoke_run, monkeypatch):
    before = contents(smoke_run)
    with pytest.raises(FileExistsError, match="smoke already holds files: choose another name .* or .*--resume"):
        again(monkeypatch, smoke_run, smoke_run.parent)
    with pytest.raises(ValueError, match=r"another config \(seed: 0 -> 1.*so it cannot be resumed"):
        again(monkeypatch, smoke_run, smoke_run.parent, "--resume", "--seed", "1")
    assert contents(smoke_run) == before


def test_a_resumed_run_takes_its_stages_from_the_cache_and_ends_the_same(smoke_run, monkeypatch, tmp_path, capsys):
    shutil.copytree(smoke_run, tmp_path / "smoke")
    for name in ("claims.json", "statistics.json", "samples.json"):
        (tmp_path / "smoke" / name).unlink()
    again(monkeypatch, smoke_run, tmp_path, "--resume")
    shown = capsys.readouterr().out
    stages = [*STAGES, "labels", "held-out"]
    assert [len(re.findall(rf"(?<![-\w]){stage}: from the cache", shown)) for stage in stages] == [1] * len(stages)
    assert "computing" not in shown
    for name in ("statistics.json", "samples.json", "metrics.jsonl"):
        assert (tmp_path / "smoke" / name).read_bytes() == (smoke_run / name).read_bytes(), name
    one, other = (read_claims(run / "claims.json") for run in (smoke_run, tmp_path / "smoke"))
    assert [row["per_seed"] for row in one] == [row["per_seed"] for row in other]
    assert len({row["config_hash"] for row in one + other}) == 1
