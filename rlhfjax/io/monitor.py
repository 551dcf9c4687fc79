"""The loop of every stage that learns: it reports, saves, resumes, and stops before harm is done."""

import contextlib
import dataclasses
import faulthandler
import functools
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import tqdm

from rlhfjax.io.checkpoint import Checkpoints
from rlhfjax.io.launch import Preempted, is_main, stop_requested

Log = Callable[[int, Mapping[str, float]], None]

given_up = threading.Event()  # set while stages side by side are to end because one of them has failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """What watches over a run. None of it changes what a healthy run computes."""

    checkpoint_every: int = 50
    """Steps (in RL: iterations) between two checkpoints of a stage in progress; its end is always saved."""
    keep: int = 1
    """Latest checkpoints to keep of each stage."""
    keep_every: int | None = None
    """Keep those of every so many steps besides."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss, gradient or score that is not finite does: stop the run, or leave the step out and count it."""
    watchdog_seconds: float = 1800.0
    """A step (with its compilation) that takes longer ends the process with the traceback of every thread."""

    def __post_init__(self):
        for field in ("checkpoint_every", "keep", "keep_every", "watchdog_seconds"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"guard.{field} must be positive and finite, got {value}")
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"guard.nonfinite must be stop or skip, got {self.nonfinite!r}")


class Clock(dict[str, float]):
    """Seconds that the phases of one step took: `with clock("rollout"): ...` adds "time/rollout"."""

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[f"time/{phase}"] = self.get(f"time/{phase}", 0.0) + time.perf_counter() - start


Step = Callable[[Any, int, Clock], tuple[Any, Mapping[str, Any]]]  # (state, first step, clock) -> (state, metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monitor:
    """A stage's link to its run: metrics go out, saved states and requests to stop come in.

    log: receives `(steps done, metrics)`. directory: of the stage's checkpoints; None keeps none. identity: what those
    checkpoints must be of (the stage's cache key).
    """

    log: Log = lambda step, metrics: None
    directory: pathlib.Path | None = None
    identity: str = ""
    guard: Guard = Guard()

    def train(
        self, step: Step, state: Any, num_steps: int, *, label: str, stride: int = 1, unit: str = "steps",
        shown: Sequence[str] = ("loss",),
    ) -> Any:  # fmt: skip
        """`state, metrics = step(state, first, clock)` for first = 0, stride, 2 stride, ... up to `num_steps`.

        With a directory, a stage that was stopped goes on from its last checkpoint and logs again what led there, so
        `step` must be a pure function of the state and of `first`. Metrics are logged as floats, with the seconds of
        each phase, steps per second and the number of programs compiled so far under "time/".

        Raises:
            Preempted: SIGTERM has asked the run to end; its state is saved.
            FloatingPointError: a step was not finite (unless `guard.nonfinite` is "skip": it is left out and counted).
            InterruptedError: a stage beside this one has failed.
        """
        with contextlib.ExitStack() as stack:
            watchdog = stack.enter_context(Watchdog(label, self.guard.watchdog_seconds))
            saved = None
            if self.directory is not None:
                options = dict(identity=self.identity, keep=self.guard.keep, keep_every=self.guard.keep_every)
                saved = stack.enter_context(Checkpoints(self.directory, **options))
            done, state, history = (saved and saved.restore(state)) or (0, state, [])
            if self.refuses(history):
                raise FloatingPointError(f"{label}: {self.directory} has left out steps that were not finite: go on "
                                         "with --guard.nonfinite skip, or start anew with another --name")  # fmt: skip
            for at, metrics in history:
                self.log(at, metrics)
            save = lambda: saved and saved.latest() != done and saved.save(done, state, history)
            compilations()
            bar = progress(range(done, num_steps, stride), label, unit=f"x {stride} {unit}" if stride > 1 else unit)
            for first in bar:
                if stop_requested():
                    save()
                    _ = saved and saved.latest()  # is wholly written
                    raise Preempted(f"{label}: stopped at step {done} of {num_steps}")
                if given_up.is_set():
                    raise InterruptedError("a stage beside this one has failed or was interrupted")
                done = min(first + stride, num_steps)
                clock = Clock()
                with clock("step"):
                    state, metrics = self._guarded(step, state, first, done, clock, saved, label)
                rate = {"time/steps_per_second": (done - first) / clock["time/step"]}
                metrics |= clock | rate | {"time/compilations": compilations()}
                history.append((done, metrics))
                self.log(done, metrics)
                watchdog.beat(done)
                bar.set_postfix({key: f"{metrics[key]:.3f}" for key in shown if key in metrics})
                every = self.guard.checkpoint_every
                if done // every > first // every or done == num_steps:
                    save()
        return state

    def refuses(self, history: Sequence[tuple[int, Mapping[str, float]]]) -> bool:
        """Whether this history left out steps, in a run that is to stop at such a step."""
        return self.guard.nonfinite == "stop" and any(metrics.get("skipped") for _, metrics in history)

    def _guarded(self, step: Step, state, first: int, done: int, clock: Clock, saved, label: str):
        """One step and its metrics as floats; a step that is not finite stops the run, or counts."""
        try:
            new, metrics = step(state, first, clock)
            metrics = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
            left_out, what = metrics.get("skipped", 0.0), "loss or gradient is not finite"
        except FloatingPointError as error:  # before the state was given on
            new, metrics, left_out, what = state, {"skipped": float(done - first)}, done - first, str(error)
        if left_out and self.guard.nonfinite == "stop":
            last = saved.latest() if saved else None
            good = "no good checkpoint" if last is None else f"last good checkpoint: step {last} in {self.directory}"
            raise FloatingPointError(f"{label}: {what} (between steps {first} and {done}; {good}): lower the learning "
                                     "rate, or leave such steps out with --guard.nonfinite skip")  # fmt: skip
        return new, metrics


class Watchdog:
    """Ends the process, with the traceback of every thread, when nothing has beaten for `seconds`."""

    def __init__(self, label: str, seconds: float):
        self._label, self._seconds, self._done = label, seconds, 0
        self._beaten, self._closed = threading.Event(), False

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._closed = True
        self._beaten.set()
        self._thread.join()

    def beat(self, done: int) -> None:
        self._done = done
        self._beaten.set()

    def _watch(self) -> None:
        while not self._closed:
            if not self._beaten.wait(self._seconds):
                print(f"{self._label}: nothing has happened for {self._seconds:g} s after step {self._done}; ending "
                      "(--guard.watchdog-seconds sets this limit)", file=sys.stderr)  # fmt: skip
                faulthandler.dump_traceback(sys.__stderr__)
                os._exit(1)
            self._beaten.clear()


@functools.cache
def _compiled() -> list[int]:
    count = [0]

    def listen(event: str, seconds: float, **details) -> None:
        count[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    return count


def compilations() -> int:
    """Programs that this process has compiled (or read from the compile cache) since this was first asked."""
    return _compiled()[0]


class _Lines:
    """A stream for tqdm that is no terminal: a line for each refresh instead of a carriage return."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.replace("\r", "").rstrip():
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


class progress(tqdm.tqdm):
    """tqdm that also reads well in a log: a bar on a terminal, a line every ten seconds elsewhere; process 0's only."""

    def __init__(self, iterable: Iterable, desc: str, total: int | None = None, unit: str = "steps"):
        terminal = sys.stderr.isatty()
        style = {} if terminal else {
            "file": _Lines(sys.stderr),
            "mininterval": 10.0,
            "position": 0,
            "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} elapsed, {remaining} left{postfix}",
        }  # fmt: skip
        super().__init__(iterable, desc, total, unit=unit, dynamic_ncols=terminal, disable=not is_main(), **style)

    def set_postfix(self, ordered_dict=None, refresh: bool = False, **values) -> None:
        """Show `values` behind the bar, from its next refresh on."""
        super().set_postfix(ordered_dict, refresh, **values)
