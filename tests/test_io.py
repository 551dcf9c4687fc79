"""The stage cache is never stale, a run directory is never shared or overwritten, a report can be continued."""

import collections
import dataclasses
import enum
import functools
import json
import math
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhfjax.io import cache, run, seeds
from rlhfjax.io.monitor import Guard, Monitor, progress
from rlhfjax.parallel.mesh import MeshConfig, make_mesh
from rlhfjax.types import PreferenceBatch, added

REPOSITORY = pathlib.Path(__file__).parents[1]


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    color: Color = Color.RED


def scale(x, factor=2.0):
    return {"y": x * factor}


def test_values_that_differ_have_different_fingerprints():
    key = jax.random.key(0)
    values = [
        None, False, True, 0, 1, 0.0, -0.0, 1.0, math.nextafter(1.0, 2.0), math.nan, "", "1", b"1", (), [], {}, set(),
        (1, 2), [1, 2], (2, 1), {1, 2}, ((1,), 2), (1, (2,)), ["a", "bc"], ["ab", "c"],
        {"a": 1}, {"a": 2}, {"b": 1}, {1: "a"}, {"a": {"b": 1}}, {"a": {}, "b": 1},
        Color.RED, Color.BLUE, Config(), Config(seed=1), Config(color=Color.BLUE), dataclasses.asdict(Config()),
        np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.zeros((1, 2)), np.array([0.0, 1e-300]),
        np.array(0.0), jnp.zeros(2, jnp.bfloat16), np.dtype("float32"), jnp.float32,
        key, jax.random.key(1), jax.random.key_data(key),
        scale, cache.fingerprint, functools.partial(scale, factor=2.0), functools.partial(scale, factor=3.0),
        functools.partial(scale, 2.0),
    ]  # fmt: skip
    names = collections.defaultdict(list)
    for value in values:
        names[cache.fingerprint(value)].append(value)
    assert [same for same in names.values() if len(same) > 1] == []


@pytest.mark.parametrize("one, other", [
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    (np.arange(6.0, dtype=np.float32).reshape(2, 3), jnp.arange(6.0).reshape(2, 3)),
    (np.arange(6).reshape(2, 3).T, np.ascontiguousarray(np.arange(6).reshape(2, 3).T)),
    ({"b", "a", "c"}, {"c", "b", "a"}),
    ({Color.RED: 1, Color.BLUE: 2, 3: (), None: 0}, {None: 0, 3: (), Color.BLUE: 2, Color.RED: 1}),
    (Config(), Config()),
])  # fmt: skip
def test_values_that_agree_have_one_fingerprint(one, other):
    assert cache.fingerprint(one) == cache.fingerprint(other)


def test_a_field_added_later_counts_only_off_its_default():
    old = dataclasses.make_dataclass("Config", [("width", int)], frozen=True)
    new = dataclasses.make_dataclass("Config", [("width", int), ("window", int | None, added(None))], frozen=True)
    plain = dataclasses.make_dataclass("Config", [("width", int), ("window", int | None, None)], frozen=True)
    prints = [cache.fingerprint(config) for config in (old(3), new(3), new(3, 7), new(3, 8), plain(3))]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_a_fingerprint_is_the_same_in_another_process():
    program = "from rlhfjax.io.cache import fingerprint; print(fingerprint({'b': {'x', 'y', 'z'}, 'a': (1.5, None)}))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=REPOSITORY, env=environment, text=True)
    assert printed.strip() == cache.fingerprint({"b": {"x", "y", "z"}, "a": (1.5, None)})


CALLS = []


def stage(x, options, monitor=None):
    """Every kind of thing a stage may return, from its inputs."""
    CALLS.append(1)
    monitor = monitor or Monitor()
    monitor.log(1, {"loss": x.sum()})
    monitor.log(2, {"loss": jnp.float32(jnp.nan)})
    return {
        "params": {"w": jnp.asarray(x, jnp.bfloat16).T, "b": jnp.zeros((0, 3)), "scalar": jnp.float32(1 / 3)},
        "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "special": np.array([math.nan, -0.0, math.inf, 1e-45], np.float32),
        "counts": [np.uint32(3), np.float64(0.1), np.bool_(True)],
        "plain": (None, True, 7, 0.1 + 0.2, math.inf, "text", options["rate"]),
        "batch": PreferenceBatch(
            prompts=np.ones((1, 2), np.int32), prompt_mask=np.ones((1, 2), bool), prefs=jnp.array([0.25]),
            responses=jnp.ones((1, 2, 3), jnp.int32), responses_mask=jnp.ones((1, 2, 3), bool),
        ),
    }  # fmt: skip


def assert_identical(one, other):
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    assert structure == other_structure
    for a, b in zip(leaves, others):
        assert type(a) is type(b)
        if hasattr(a, "dtype"):
            assert (a.dtype, a.shape) == (b.dtype, b.shape) and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        else:
            assert a == b


@pytest.fixture
def make(tmp_path):
    """A quiet cache in a fresh directory, and what it reported."""
    CALLS.clear()
    reported = []
    return lambda code="v1": cache.StageCache(tmp_path, code=code, report=reported.append), reported, tmp_path


X = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)


def test_a_result_returns_bit_for_bit(make):
    new, reported, root = make
    computed = new().run("stage", stage, x=X, options={"rate": 0.1})
    loaded = new().run("stage", stage, x=X.copy(), options={"rate": 0.1})
    assert len(CALLS) == 1
    assert_identical(computed, loaded)
    assert_identical(computed, stage(X, {"rate": 0.1}))
    assert loaded["params"]["w"].dtype == jnp.bfloat16 and isinstance(loaded["batch"], PreferenceBatch)
    assert reported[0] == "stage: computing" and reported[1].startswith("stage: from the cache")
    assert [path.suffix for path in root.iterdir()] == [".safetensors"]  # nothing half-written stays behind


def test_what_a_stage_logged_is_repeated_on_a_hit(make):
    new, _, _ = make
    said = []
    for _ in range(2):
        said.append([])
        monitor = Monitor(log=lambda step, metrics: said[-1].append((step, metrics)))
        new().run("stage", stage, x=X, options={"rate": 0.1}, monitor=monitor)
    assert len(CALLS) == 1
    assert repr(said[0]) == repr(said[1]) == repr([(1, {"loss": float(X.sum())}), (2, {"loss": math.nan})])


def test_any_change_computes_anew(make, monkeypatch):
    new, _, _ = make
    nudged = X.copy()
    nudged[1, 2] = np.nextafter(nudged[1, 2], 2)
    new().run("stage", stage, x=X, options={"rate": 0.1})
    for expected, call in enumerate((
        lambda: new().run("stage", stage, x=nudged, options={"rate": 0.1}),
        lambda: new().run("stage", stage, x=X.astype(np.float64), options={"rate": 0.1}),
        lambda: new().run("stage", stage, x=X, options={"rate": 0.2}),
        lambda: new().run("other", stage, x=X, options={"rate": 0.1}),
        lambda: new(code="v2").run("stage", stage, x=X, options={"rate": 0.1}),
    ), start=2):  # fmt: skip
        call()
        assert len(CALLS) == expected
    monkeypatch.setattr(cache, "versions", lambda: {"jax": "next"})
    new().run("stage", stage, x=X, options={"rate": 0.1})
    assert len(CALLS) == 7
    monkeypatch.setattr(cache, "device", lambda: {"backend": "tpu"})
    new().run("stage", stage, x=X, options={"rate": 0.1})
    assert len(CALLS) == 8
    with jax.default_matmul_precision("highest"):
        new().run("stage", stage, x=X, options={"rate": 0.1})
    assert len(CALLS) == 9


def test_a_run_takes_on_other_devices_what_it_has_used_and_nobody_else_does(make, tmp_path_factory):
    new, _, _ = make
    notes = tmp_path_factory.mktemp("run") / "stages.json"
    ask = lambda cache: cache.run("stage", stage, x=X, options={"rate": 0.1})["params"]["scalar"]
    own = lambda: ask(dataclasses.replace(new(), remembered=notes))
    own()
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert cache.layout() == "1x8-mesh-8-1-1"
        ask(new())
        assert len(CALLS) == 2  # another run has computed it anew
        own()
        assert len(CALLS) == 2 and json.loads(notes.read_text())["stage"].endswith("-1x8.safetensors")


def skips(monitor):
    CALLS.append(1)
    monitor.log(1, {"skipped": 1})


def test_what_left_out_steps_is_no_hit_for_a_run_that_stops_at_them(make):
    new, _, _ = make
    for nonfinite, expected in (("skip", 1), ("skip", 1), ("stop", 2)):
        new().run("fit", skips, monitor=Monitor(guard=Guard(nonfinite=nonfinite)))
        assert len(CALLS) == expected


def test_a_step_computed_anew_with_another_result_replaces_the_old_one(tmp_path):
    with run.Run(tmp_path, Config(), name="one") as one:
        for step in (1, 2, 3):
            one.log("rl", step, {"cost": step, "time/step": 0.1})
    with run.Run(tmp_path, Config(), name="one", resume=True) as one:
        one.log("rl", 2, {"cost": 2, "time/step": 0.2})  # the same: no line
        one.log("rl", 3, {"cost": 30, "time/step": 0.2})
    assert len((one.path / "metrics.jsonl").read_text().splitlines()) == 4
    assert run.read_metrics(one.path / "metrics.jsonl", "rl")["cost"].tolist() == [1, 2, 30]


def test_the_code_changes_with_any_file_that_computes(tmp_path):
    for name in ("losses/policy.py", "io/run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = cache.library_code(tmp_path)
    (tmp_path / "io/run.py").write_text("x = 2\n")
    assert cache.library_code(tmp_path) == before  # it presents
    (tmp_path / "losses/policy.py").write_text("x = 2\n")
    after = cache.library_code(tmp_path)
    assert after != before
    (tmp_path / "losses/policy.py").rename(tmp_path / "losses/ppo.py")
    assert cache.library_code(tmp_path) not in (before, after)
    assert cache.StageCache(tmp_path).code == cache.library_code()


def test_every_file_excepted_from_the_code_exists():
    assert [name for name in cache.PRESENTATION if not (cache.PACKAGE / name).is_file()] == []


def test_a_function_outside_the_library_counts_by_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for number in (1, 2):
        (tmp_path / "my_experiment.py").write_text(f"def fn():\n    return {number}\n")
        sys.modules.pop("my_experiment", None)
        prints.append(cache.fingerprint(__import__("my_experiment").fn))
    sys.modules.pop("my_experiment")
    assert prints[0] != prints[1]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_a_number(path):
    content = path.read_bytes()
    assert b"0.30000000000000004" in content
    path.write_bytes(content.replace(b"0.30000000000000004", b"0.30000000000000005"))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_the_last_bit, change_a_number, empty])
def test_a_damaged_entry_is_named_and_recomputed(make, damage):
    new, _, root = make
    first = new().run("stage", stage, x=X, options={"rate": 0.1})
    (path,) = root.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged and will be recomputed"):
        second = new().run("stage", stage, x=X, options={"rate": 0.1})
    assert len(CALLS) == 2
    assert_identical(first, second)
    new().run("stage", stage, x=X, options={"rate": 0.1})
    assert len(CALLS) == 2  # the repaired entry is used


def test_an_entry_under_a_false_name_is_not_believed(make):
    new, _, root = make
    new().run("stage", stage, x=X, options={"rate": 0.1})
    (path,) = root.iterdir()
    wanted = new().key("stage", stage, {"x": X, "options": {"rate": 0.2}})
    path.rename(root / f"stage-{wanted[:20]}-{cache.layout()}.safetensors")
    with pytest.warns(UserWarning, match="another key"):
        assert new().run("stage", stage, x=X, options={"rate": 0.2})["plain"][-1] == 0.2


def failing(x):
    raise RuntimeError("in the middle")


def returns_a_set(x):
    return {"a": [{1, 2}]}


def test_a_failed_stage_leaves_nothing(make):
    new, _, root = make
    with pytest.raises(RuntimeError, match="in the middle"):
        new().run("stage", failing, x=1)
    with pytest.raises(TypeError):
        new().run("stage", returns_a_set, x=1)
    assert list(root.iterdir()) == []


def test_without_a_root_everything_is_computed():
    CALLS.clear()
    off = cache.StageCache(None)
    for _ in range(2):
        off.run("stage", stage, x=X, options={"rate": 0.1}, monitor=Monitor())
    assert len(CALLS) == 2


def test_a_run_writes_what_was_asked_and_what_happened(tmp_path):
    with run.Run(tmp_path, Config(seed=3), stem="safe") as one:
        one.log("sft", 1, {"loss": jnp.float32(0.5), "accuracy": np.float64(0.25)})
        one.log("sft", 2, {"loss": math.nan, "accuracy": -math.inf, "length": 3})
        one.log("rl", 0, {"kl": math.nan})
        one.write_json("claims.json", [{"id": "SR-1"}])
    lines = [json.loads(line) for line in (one.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"stage": "sft", "step": 1, "loss": 0.5, "accuracy": 0.25},
        {"stage": "sft", "step": 2, "loss": None, "accuracy": None, "length": 3.0, "nonfinite": ["loss", "accuracy"]},
        {"stage": "rl", "step": 0, "kl": None, "nonfinite": ["kl"]},
    ]
    written = json.loads((one.path / "config.json").read_text())
    assert written["config"] == {"seed": 3, "rate": 0.1, "sizes": [1, 2], "color": "RED"}
    assert written["versions"]["jax"] == jax.__version__ and written["device"]["backend"] == "cpu"
    assert {"run_hash", "rlhfjax", "commit", "argv", "started"} < set(written)
    assert json.loads((one.path / "status.json").read_text())["status"] == "finished"
    assert (one.path / "figures").is_dir() and json.loads((one.path / "claims.json").read_text()) == [{"id": "SR-1"}]
    assert tensorboard_scalars(one.path / "events") == {
        ("sft/loss", 1): 0.5, ("sft/accuracy", 1): 0.25, ("sft/length", 2): 3.0
    }  # fmt: skip
    history = run.read_metrics(one.path / "metrics.jsonl", "sft")
    np.testing.assert_array_equal(history["loss"], [0.5, np.nan])
    np.testing.assert_array_equal(history["length"], [np.nan, 3.0])
    np.testing.assert_array_equal(history["step"], [1, 2])


def tensorboard_scalars(folder):
    scalars = {}
    for path in folder.iterdir():
        content, position = path.read_bytes(), 0
        while position < len(content):  # a record: length (8 bytes), checksum (4), the event, checksum (4)
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])
            scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            position += 16 + length
    return scalars


def test_names_count_up_and_leave_gaps_alone(tmp_path):
    assert run.next_name(tmp_path, "safe") == "safe-001"
    for name in ("safe-001", "safe-007", "safe-old", "safer-030"):
        (tmp_path / name).mkdir()
    assert run.next_name(tmp_path, "safe") == "safe-008"
    with run.Run(tmp_path, Config(), stem="safe") as one, run.Run(tmp_path, Config(), stem="safe") as two:
        assert (one.path.name, two.path.name) == ("safe-008", "safe-009")


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(tmp_path):
    with run.Run(tmp_path, Config(), name="a", exclude=("seed",)) as one:
        one.log("sft", 1, {"loss": 1.0})
        one.log("rl", 1, {"loss": 2.0})
    before = {path: path.read_bytes() for path in one.path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="--name.*--resume"):
        run.Run(tmp_path, Config(), name="a")
    with pytest.raises(ValueError):
        run.Run(tmp_path, Config(rate=0.2), name="a", resume=True, exclude=("seed",))
    assert {path: path.read_bytes() for path in one.path.rglob("*") if path.is_file()} == before

    with open(one.path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "rl", "ste')  # what a kill leaves
    with run.Run(tmp_path, Config(seed=9), name="a", resume=True, exclude=("seed",)) as again:
        again.log("sft", 1, {"loss": 1.0})  # replayed from the cache: already there
        again.log("rl", 2, {"loss": 3.0})
    lines = [json.loads(line) for line in (one.path / "metrics.jsonl").read_text().splitlines()]
    assert [tuple(line.values()) for line in lines] == [("sft", 1, 1.0), ("rl", 1, 2.0), ("rl", 2, 3.0)]


def test_a_directory_in_use_is_not_shared_and_is_free_after_a_kill(tmp_path):
    program = f"""
        import dataclasses, sys, time
        from rlhfjax.io.run import Run
        @dataclasses.dataclass(frozen=True)
        class Config:
            seed: int = 0
        held = Run({str(tmp_path)!r}, Config(), name="a")
        print("started", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"started\n"
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match=f"in use by process {child.pid}.*--name"):
                run.Run(tmp_path, Seed(), name="a", resume=resume)
    finally:
        child.kill()
        child.wait()
    run.Run(tmp_path, Seed(), name="a", resume=True).finish()


@dataclasses.dataclass(frozen=True)
class Seed:
    seed: int = 0


def test_how_a_run_ended_is_written(tmp_path):
    for error, expected in ((KeyboardInterrupt(), "interrupted"), (ValueError("no"), "failed: ValueError('no')")):
        with pytest.raises(type(error)), run.Run(tmp_path, Config()) as one:
            raise error
        assert json.loads((one.path / "status.json").read_text())["status"] == expected


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    run.write_json(path, {"x": np.float32(0.5), "at": pathlib.PurePosixPath("/x"), "fn": scale, "c": Color.RED})
    assert json.loads(path.read_text()) == {"x": 0.5, "at": "/x", "fn": f"{__name__}.scale", "c": "RED"}
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_json(path, {"x": math.nan})
    assert path.read_text() == before and os.listdir(tmp_path) == ["a.json"]


def test_config_hash_ignores_only_what_it_is_told_to():
    base = run.config_hash(Config(), exclude=("seed",), extra="world-1")
    assert base == run.config_hash(Config(seed=5), exclude=("seed",), extra="world-1")
    others = {
        run.config_hash(Config(rate=0.2), exclude=("seed",), extra="world-1"),
        run.config_hash(Config(), exclude=("seed",), extra="world-2"),
        run.config_hash(Config(), extra="world-1"),
        run.config_hash(Config(seed=1), extra="world-1"),
    }
    assert len(others | {base}) == 5


def test_progress_reads_as_lines_in_a_log(capsys):
    bar = progress(range(3), "PPO", unit="iterations")
    for i in bar:
        bar.set_postfix(cost=f"{i:.1f}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "\r" not in "".join(lines)
    assert lines[0].startswith("PPO: 0 of 3 iterations") and lines[-1].endswith("cost=2.0")


# An experiment file in little: it notes that it ran, fails where told to, and leaves a result.
EXPERIMENT = """
    import json, os, pathlib, sys, time
    seed, folder, mode = int(sys.argv[-1]), pathlib.Path(sys.argv[1]), sys.argv[2]
    with open(folder / "ran", "a") as file:
        file.write(f"{seed}\\n")
    print("seed", seed, "works on", len(os.sched_getaffinity(0)), "core")
    if mode == "sleep" and seed == 2:
        time.sleep(60)
    if mode == "fail" and seed == 2:
        sys.exit("seed 2 hit a wall")
    if not (mode == "silent" and seed == 2):
        result = {"world": "w", "seed": seed, "config_hash": "abc", "seconds": 1.0, "statistics": {"x": seed}}
        (folder / f"w-seed{seed}.json").write_text(json.dumps(result))
"""


@pytest.fixture
def runner(tmp_path):
    script = tmp_path / "experiment.py"
    script.write_text(textwrap.dedent(EXPERIMENT))
    said = []

    def call(mode, these=(1, 2, 3), config_hash="abc", report=said.append):
        return seeds.run_seeds([str(script), str(tmp_path), mode], these, tmp_path, world="w", config_hash=config_hash,
                               log_dir=tmp_path / "logs", workers=2, report=report)  # fmt: skip

    call.ran = lambda: collections.Counter(int(line) for line in (tmp_path / "ran").read_text().split())
    call.said, call.root = said, tmp_path
    return call


def test_only_missing_seeds_run_and_the_others_survive_a_failure(runner):
    with pytest.raises(RuntimeError, match="1 of 3 seeds failed.*2: 'exit status 1'"):
        runner("fail")
    assert runner.ran() == {1: 1, 2: 1, 3: 1}
    assert any("seed 2 failed" in line and "seed 2 hit a wall" in line for line in runner.said)
    results = runner("ok")
    assert runner.ran() == {1: 1, 2: 2, 3: 1}
    assert {seed: result["statistics"]["x"] for seed, result in results.items()} == {1: 1, 2: 2, 3: 3}
    assert "2 of 3 seeds have results already: 1, 3" in runner.said
    assert "works on 1 core" in (runner.root / "logs" / "w-seed1.log").read_text() or os.cpu_count() == 1


def test_results_of_another_config_do_not_count(runner):
    runner("ok", these=(1,))
    with pytest.raises(RuntimeError, match="left no result of this config"):
        runner("ok", these=(1,), config_hash="other")
    assert runner.ran() == {1: 2}


def test_a_seed_that_leaves_no_result_has_failed(runner):
    with pytest.raises(RuntimeError, match="left no result"):
        runner("silent")


def test_an_interrupt_stops_the_processes_and_keeps_what_is_done(runner, monkeypatch):
    started = []
    start = seeds._start
    monkeypatch.setattr(seeds, "_start", lambda *args: started.append(start(*args)) or started[-1])
    monkeypatch.setattr(seeds, "REPORT_SECONDS", 0.0)

    def interrupt_once_the_others_are_done(line):
        runner.said.append(line)
        if "2 of 3 seeds done" in line and "seed 2 works on" in line:  # it may be the last to start
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner("sleep", report=interrupt_once_the_others_are_done)
    assert {child.seed: child.process.returncode for child in started} == {1: 0, 2: -signal.SIGTERM, 3: 0}
    assert sorted(seeds.read_results(runner.root, "w", (1, 2, 3), "abc")) == [1, 3]
    assert re.search(r"2 of 3 seeds done, 0 failed, 1 running, 0 waiting; .* about 0:0\d left\n    2: seed 2 works on",
                     runner.said[-1])  # fmt: skip


def test_a_result_is_read_as_it_was_written(tmp_path):
    path = seeds.write_result(tmp_path / "results", world="w", seed=4, config_hash="abc", commit="c0ffee", seconds=1.26,
                              statistics={"x": jnp.float32(0.5)})  # fmt: skip
    assert path.name == "w-seed4.json"
    assert seeds.read_results(tmp_path / "results", "w", [3, 4], "abc") == {
        4: {"world": "w", "seed": 4, "config_hash": "abc", "commit": "c0ffee", "seconds": 1.3, "statistics": {"x": 0.5}}
    }
    with pytest.raises(ValueError, match="not JSON compliant"):
        seeds.write_result(tmp_path, world="w", seed=5, config_hash="abc", commit=None, seconds=1.0,
                           statistics={"x": math.nan})  # fmt: skip
