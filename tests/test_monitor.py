"""The loop of every stage that learns: stopped anywhere it ends as if it had not been, and nothing bad goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import stages
from rlhfjax.io import launch, monitor
from rlhfjax.io.launch import Preempted
from rlhfjax.io.monitor import Guard, Monitor
from rlhfjax.parallel.mesh import create, jit_step, place_rows
from rlhfjax.rl.fit import make_fit_step
from rlhfjax.stages import FitConfig
from rlhfjax.types import TrainState

DATA = {"x": np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)}


class Rows(dict):
    """Host data with a number of rows, as `fit` takes it."""

    def __len__(self):
        return len(self["x"])


def loss_fn(params, batch):
    error = batch["x"] @ params["w"] - jnp.sum(batch["x"] ** 2, -1)
    return jnp.mean(error**2), {}


class Interrupt(Exception):
    """Planted."""


def learn(tmp_path, *, stop_at=None, every=25, num_steps=150, rate=0.05, **guard):
    """A fit that fails behind step `stop_at`, if that is said; its parameters and what it logged."""
    log = []

    def record(step, metrics):
        log.append((step, {name: value for name, value in metrics.items() if not name.startswith("time/")}))
        if step == stop_at:
            raise Interrupt

    watched = Monitor(log=record, directory=tmp_path and tmp_path / "checkpoints", identity="fit",
                      guard=Guard(checkpoint_every=every, **guard))  # fmt: skip
    config = FitConfig(num_steps=num_steps, batch_size=8, learning_rate=rate)
    data = jax.tree_util.tree_map(lambda x: x, Rows(DATA))
    params = stages.fit(loss_fn, {"w": np.ones(4, np.float32)}, data, config, seed=3, monitor=watched, label="fit")
    return params, log


@pytest.fixture(autouse=True)
def rows_are_a_tree():
    """`Rows` passes through jax.tree as a dict does."""
    try:
        jax.tree_util.register_pytree_with_keys(
            Rows, lambda d: ([(jax.tree_util.DictKey("x"), d["x"])], None), lambda _, leaves: Rows(x=leaves[0])
        )
    except ValueError:
        pass  # registered by an earlier test


@pytest.mark.parametrize("stop_at, every", [(25, 25), (100, 50), (150, 1000)])
def test_a_stage_that_was_stopped_ends_bitwise_as_if_it_had_not_been(tmp_path, stop_at, every):
    whole, whole_log = learn(None)
    with pytest.raises(Interrupt):
        learn(tmp_path, stop_at=stop_at, every=every)
    resumed, resumed_log = learn(tmp_path, every=every)
    np.testing.assert_array_equal(resumed["w"], whole["w"])
    assert resumed_log == whole_log  # what led to the checkpoint is logged again


def test_a_finished_stage_computes_nothing_anew(tmp_path, monkeypatch):
    whole, whole_log = learn(tmp_path)
    monkeypatch.setattr(stages, "place_rows", None, raising=False)
    monkeypatch.setattr(stages.mesh, "place_rows", None)  # any step would fail
    again, again_log = learn(tmp_path)
    np.testing.assert_array_equal(again["w"], whole["w"])
    assert again_log == whole_log


def test_the_latest_checkpoints_and_every_so_many_stay(tmp_path):
    learn(tmp_path, every=25, keep=2, keep_every=50)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [50, 100, 125, 150]


def test_a_request_to_stop_is_answered_at_the_next_step_with_a_checkpoint(tmp_path, monkeypatch):
    asked = iter([False, False, True])
    monkeypatch.setattr(monitor, "stop_requested", lambda: next(asked))
    with pytest.raises(Preempted, match="fit: stopped at step 50 of 150"):
        learn(tmp_path, every=1000)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["50"]
    monkeypatch.setattr(monitor, "stop_requested", lambda: False)
    np.testing.assert_array_equal(learn(tmp_path)[0]["w"], learn(None)[0]["w"])


def test_sigterm_is_such_a_request():
    launch.initialize(launch.Hosts())
    try:
        assert not launch.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert launch.stop_requested()
    finally:
        launch._terminated = False


# Steps that are not finite


def test_a_step_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(Interrupt):
        learn(tmp_path, stop_at=75)
    bad = {"x": DATA["x"] * np.float32(1e30)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA, "x", bad["x"])
        message = r"^fit: loss.* not finite \(between steps 50 and 75; last good checkpoint: step 50 in "
        with pytest.raises(FloatingPointError, match=message + re.escape(str(tmp_path / "checkpoints"))):
            learn(tmp_path)


def planted_loss(params, batch):
    """Its gradient, or its value alone, is not finite for the rows that say so."""
    bad = jnp.sum(jnp.where(batch["bad"] == 1, jnp.inf, 0.0)) * jnp.sum(params["w"])
    value = jnp.sum(jnp.where(batch["bad"] == 2, jnp.nan, 0.0))
    return jnp.mean((params["w"] - batch["x"]) ** 2) + bad + jax.lax.stop_gradient(value), {}


@pytest.mark.parametrize("kind", [1, 2], ids=["gradient", "loss"])
def test_planted_fault_a_bad_batch_is_left_out_and_counted_and_nothing_else_changes(kind):
    optimizer, x = optax.adam(0.1), np.arange(12, dtype=np.float32).reshape(6, 2)
    step = jax.jit(make_fit_step(planted_loss, optimizer))
    fresh = lambda: TrainState.create({"w": jnp.zeros(2)}, optimizer)
    bad = np.zeros((6, 2), np.int32)
    without, metrics = step(fresh(), {"x": x[[0, 1, 3, 4, 5]], "bad": bad[:5]})
    assert metrics["skipped"] == 0
    bad[2, 1] = kind
    state, metrics = step(fresh(), {"x": x, "bad": bad})
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state, without)  # the step counters of state and Adam among them


def test_skipping_leaves_out_scores_that_are_not_finite_and_goes_on():
    log = []

    def step(state, first, clock):
        if first == 1:
            raise FloatingPointError("scores is not finite in 1 rows, the first being row 3")
        return state + 1, {"score": jnp.float32(first)}

    watched = Monitor(log=lambda at, metrics: log.append((at, metrics["skipped"] if at == 2 else metrics["score"])),
                      guard=Guard(nonfinite="skip"))  # fmt: skip
    assert watched.train(step, 0, 3, label="rl") == 2
    assert log == [(1, 0.0), (2, 1.0), (3, 2.0)]
    with pytest.raises(FloatingPointError, match=r"^rl: scores .* row 3 \(between steps 1 and 2; no good checkpoint\)"):
        Monitor().train(step, 0, 3, label="rl")


def test_a_stage_that_left_out_steps_does_not_go_on_in_a_run_that_stops_at_them(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA, "x", DATA["x"] * np.float32(1e30))
        learn(tmp_path, nonfinite="skip")
    with pytest.raises(FloatingPointError, match="has left out steps that were not finite: go on with"):
        learn(tmp_path)


def test_debug_nans_finds_the_operation_and_the_state_is_still_there():
    with jax.debug_nans(True):
        state = create(lambda: TrainState.create({"w": jnp.zeros(2)}, optax.sgd(0.1)), axes={})
        step = jit_step(make_fit_step(planted_loss, optax.sgd(0.1)), state, None)
        batch = {"x": np.ones((1, 2), np.float32), "bad": np.zeros((1, 2), np.int32)}
        state, _ = step(state, place_rows(batch, axis=1))
        with pytest.raises(FloatingPointError, match="nan"):
            step(state, place_rows({**batch, "bad": batch["bad"] + 2}, axis=1))
        assert not state.params["w"].is_deleted()


# What a stage says of itself


def test_metrics_tell_phases_throughput_and_compilations():
    log = []

    def step(state, first, clock):
        with clock("rollout"):
            jax.block_until_ready(jax.jit(lambda x: x * (first + 2))(jnp.ones(3)))  # a program of its own each time
        return state, {}

    Monitor(log=lambda at, metrics: log.append(metrics)).train(step, None, 6, stride=2, label="toy")
    assert [set(metrics) for metrics in log] == [
        {"time/rollout", "time/step", "time/steps_per_second", "time/compilations"}
    ] * 3
    for metrics in log:
        assert 0 < metrics["time/rollout"] <= metrics["time/step"]
        assert metrics["time/steps_per_second"] == pytest.approx(2 / metrics["time/step"])
    compiled = [metrics["time/compilations"] for metrics in log]
    assert compiled[0] < compiled[1] < compiled[2]


def test_all_steps_of_a_stage_share_one_program(tmp_path):
    said = []
    watched = Monitor(log=lambda at, metrics: said.append(metrics["time/compilations"]))
    rows, config = Rows(DATA), FitConfig(num_steps=100, batch_size=8)
    stages.fit(loss_fn, {"w": np.ones(4, np.float32)}, rows, config, seed=0, monitor=watched, label="fit")
    assert len(said) == 4 and len(set(said)) == 1


def test_a_step_hides_no_transfer(monkeypatch):
    """From its second step on a fit moves to the devices only what it says it moves."""
    train = Monitor.train

    def guarded(self, step, state, *args, **kwargs):
        def under_guard(state, first, clock):
            with jax.transfer_guard("disallow" if first else "allow"):
                return step(state, first, clock)

        return train(self, under_guard, state, *args, **kwargs)

    monkeypatch.setattr(Monitor, "train", guarded)
    whole, _ = learn(None)
    assert np.isfinite(whole["w"]).all()
    with pytest.raises(Exception, match="Disallowed host-to-device"):
        Monitor().train(lambda state, first, clock: (jnp.sin(np.float32(first)), {}), 0, 2, label="planted")


def test_the_watchdog_ends_a_process_that_hangs_and_says_where():
    code = """
        import time
        from rlhfjax.io.monitor import Guard, Monitor
        def hanging_step(state, first, clock):
            time.sleep(60 if first == 2 else 0)
            return state, {}
        Monitor(guard=Guard(watchdog_seconds=1.0)).train(hanging_step, None, 5, label="rl")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "rl: nothing has happened for 1 s after step 2" in done.stderr
    assert "in hanging_step" in done.stderr  # the traceback


def test_what_is_logged_with_a_checkpoint_is_json(tmp_path):
    learn(tmp_path)
    (described,) = (tmp_path / "checkpoints" / "150").rglob("description/metadata")
    assert json.loads(described.read_text())["content"]["extra"][-1][0] == 150
