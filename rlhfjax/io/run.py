"""A run's directory: what was asked (config.json), what happened (metrics.jsonl, TensorBoard), how it ended."""

import contextlib
import dataclasses
import datetime
import enum
import fcntl
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

import rlhfjax
from rlhfjax.io.cache import PACKAGE, device, fingerprint, layout, library_code, versions
from rlhfjax.io.launch import broadcast, is_main
from rlhfjax.io.monitor import Guard, Monitor
from rlhfjax.types import telling_fields


def config_hash(config: Any, *, exclude: tuple[str, ...] = (), extra: Any = None) -> str:
    """16 hex digits that name a config dataclass without its `exclude` fields (the seed, say), and whatever `extra`
    decides the result besides (a world's version and constants, say)."""
    fields = {field.name: getattr(config, field.name) for field in telling_fields(config)}
    if unknown := set(exclude) - {field.name for field in dataclasses.fields(config)}:
        raise ValueError(f"{type(config).__name__} has no field {sorted(unknown)} to leave out of its hash")
    return fingerprint(({name: value for name, value in fields.items() if name not in exclude}, extra))[:16]


def commit() -> str | None:
    """The git commit this library was imported from, with `-dirty` if files have changed since; None outside git."""
    git = lambda *args: subprocess.run(["git", "-C", PACKAGE, *args], capture_output=True, text=True, check=True).stdout
    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie inside somebody else's repository
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def to_json(obj: Any) -> Any:
    """A config as JSON shows it: dataclasses as dicts, arrays and tuples as lists, names for functions and enums."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_json(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): to_json(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [to_json(value) for value in obj]
    if isinstance(obj, enum.Enum):
        return obj.name
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):
        return to_json(obj.tolist())
    return f"{obj.__module__}.{obj.__qualname__}" if hasattr(obj, "__qualname__") else obj


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as JSON in one step: a reader sees the old file or the new one, never half of either.

    Of many processes the first writes.

    Raises:
        ValueError: for NaN and infinities, which JSON does not have.
    """
    path = pathlib.Path(path)
    text = json.dumps(to_json(obj), indent=2, allow_nan=False) + "\n"
    if not is_main():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}: what it held before stays", str(path)) from error


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds. Raises ValueError, with its path, if it is damaged."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore or delete it") from error


def next_name(root: str | os.PathLike, stem: str) -> str:
    """The first of `stem-001`, `stem-002`, ... behind all that exist under `root`."""
    taken = [path.name.removeprefix(f"{stem}-") for path in pathlib.Path(root).glob(f"{stem}-*")]
    return f"{stem}-{max((int(tail) for tail in taken if tail.isdecimal()), default=0) + 1:03d}"


class Run:
    """A run directory, held by this process from creation to `finish`. Of many processes the first holds and writes it;
    the others know its path.

        with Run("runs", config, stem="safe_rlhf") as run:
            run.log("sft", step, {"loss": loss})
            run.write_json("claims.json", rows)

    Args:
        root: the directory of all runs.
        config: the resolved config dataclass, written to config.json beside versions, commit, device and command.
        stem: names the run `stem-001`, `stem-002`, ... when no name is given.
        name: names it so.
        resume: continue the run of that name. Steps that are already in metrics.jsonl are not written again unless
            they differ (computed anew on other devices), so a stage repeated from the cache leaves one line per step.
        exclude: config fields that may differ on resuming (how it is started, not what it computes).
        guard: what watches over its stages, if not the defaults.
    Raises:
        FileExistsError: the directory holds a run and `resume` is False.
        FileNotFoundError: there is no run to resume.
        BlockingIOError: another live process holds the directory.
        ValueError: resuming with another config, which the message lists, or with other library code: what is in
            metrics.jsonl would no longer be what the stages compute.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        config: Any,
        *,
        stem: str = "run",
        name: str | None = None,
        resume: bool = False,
        exclude: tuple[str, ...] = (),
        guard: Guard | None = None,
    ):
        if resume and name is None:
            raise ValueError("say which run to resume: --name NAME --resume")
        root, self._guard = pathlib.Path(root), guard or Guard()
        if not is_main():
            self.path = root / broadcast("")
            return
        self.path = root / name if name else _make_next(root, stem)
        if resume and not (self.path / "config.json").exists():
            raise FileNotFoundError(f"{self.path} holds no run to resume: start it without --resume")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        self._start = time.time()
        self._mutex = threading.Lock()  # stages may run side by side in threads
        digest = config_hash(config, exclude=exclude, extra=library_code())
        try:
            _check_free(self.path, resume, to_json(config), exclude, digest)
            self._logged = _read_logged(self.path / "metrics.jsonl")
        except (FileExistsError, ValueError):
            self._lock.close()
            raise
        if not resume:
            self.write_json("config.json", {
                "config": config, "run_hash": digest, "rlhfjax": rlhfjax.__version__, "versions": versions(),
                "commit": commit(), "device": device() | {"layout": layout()}, "argv": sys.argv, "started": _now(),
            })  # fmt: skip
        self._metrics = open(self.path / "metrics.jsonl", "a", buffering=1)
        self._events = SummaryWriter(str(self.path / "events"))
        (self.path / "figures").mkdir(exist_ok=True)
        self.write_json("status.json", {"status": "running", "pid": os.getpid(), "since": _now()})
        broadcast(self.path.name)

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append `{"stage", "step", **metrics}` to metrics.jsonl and write the same to TensorBoard.

        A NaN or infinity becomes null and its name is listed under "nonfinite". May be called from several threads.
        """
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not is_main():
            return
        line = {"stage": stage, "step": int(step)} | {n: v if math.isfinite(v) else None for n, v in values.items()}
        with self._mutex:
            if self._logged.get((stage, int(step))) != _untimed(line):
                self._logged[stage, int(step)] = _untimed(line)
                self._metrics.write(json.dumps(line | ({"nonfinite": bad} if bad else {})) + "\n")
                for name in values.keys() - bad:
                    self._events.add_scalar(f"{stage}/{name}", values[name], int(step))

    def monitor(self, stage: str) -> Monitor:
        """For a stage that learns: its metrics and checkpoints go here."""
        directory = self.path / "checkpoints" / stage
        return Monitor(log=functools.partial(self.log, stage), directory=directory, guard=self._guard)

    def write_json(self, name: str, obj: Any) -> pathlib.Path:
        write_json(self.path / name, obj)
        return self.path / name

    def finish(self, status: str = "finished") -> None:
        """Write how the run ended and let go of the directory."""
        if not is_main():
            return
        ending = {"status": status, "seconds": round(time.time() - self._start, 1), "ended": _now()}
        with contextlib.ExitStack() as last_first:  # each of them, even on a full disk
            last_first.callback(self._lock.close)
            last_first.callback(self.write_json, "status.json", ending)
            last_first.callback(self._metrics.close)
            last_first.callback(self._events.close)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        stopped = {None: "finished", KeyboardInterrupt: "interrupted", SystemExit: "preempted"}
        ending = stopped.get(kind, f"failed: {error!r}")
        self.finish(ending)


def read_metrics(path: str | os.PathLike, stage: str) -> dict[str, np.ndarray]:
    """One stage of a metrics.jsonl as a history: `{"step": [N], metric: [N]}` float64, NaN where a step lacks it.

    The last line of a step counts. Of many processes, which all must ask, the first reads.
    """
    path = pathlib.Path(path)
    lines = _parse(path, broadcast(path.read_text() if is_main() else ""))
    steps = {line["step"]: line for line in lines if line["stage"] == stage}
    lines = [steps[step] for step in sorted(steps)]
    names = dict.fromkeys(name for line in lines for name in line if name not in ("stage", "nonfinite"))
    if not lines:
        raise ValueError(f"{path} has no stage {stage!r}")
    return {name: np.array([line.get(name) for line in lines], float) for name in names}


def newest_run(experiment: str) -> pathlib.Path:
    """The newest finished run of an experiment, such as "hh_rlhf/online", whatever its name: in the directory that the
    environment variable RLHFJAX_RUNS names, else in runs/ here or beside. Raises FileNotFoundError if there is none."""
    named, stem = os.environ.get("RLHFJAX_RUNS"), pathlib.PurePath(experiment).name
    found = [file for place in ([named] if named else ["runs", "../runs"])
             for file in pathlib.Path(place).glob("*/claims.json")
             if pathlib.PurePath(read_json(file.with_name("config.json"))["argv"][0]).stem == stem]  # fmt: skip
    if not found:
        raise FileNotFoundError(
            f"no finished run of {stem} in {named or 'runs/'}: `python experiments/{experiment}.py` makes one in some "
            "minutes, with `--scale smoke` in one; or set RLHFJAX_RUNS to the directory that holds its run"
        )
    return max(found, key=os.path.getmtime).parent


def _make_next(root: pathlib.Path, stem: str) -> pathlib.Path:
    while True:
        try:
            path = root / next_name(root, stem)
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # another process took that name in between
            continue


def _lock(path: pathlib.Path):
    """An open file that holds the directory; the kernel lets go when the process ends, however it ends."""
    file = open(path / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise BlockingIOError(f"{path} is in use by process {holder}: choose another name with --name") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _check_free(path: pathlib.Path, resume: bool, config: Mapping, exclude: tuple[str, ...], digest: str) -> None:
    """A new run finds nothing but its lock; a resumed one finds its own config."""
    if not resume:
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise FileExistsError(
                f"{path} already holds files: choose another name with --name, or continue its run with --resume"
            )
        return
    stored = read_json(path / "config.json")
    if not isinstance(stored, dict) or not {"run_hash", "config"} <= stored.keys():
        raise ValueError(f"{path / 'config.json'} was not written by a run: start anew with another --name")
    if stored["run_hash"] == digest:
        return
    old, new = stored["config"], config
    names = [name for name in {**old, **new} if name not in exclude and old.get(name) != new.get(name)]
    changed = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names]
    raise ValueError(
        f"{path} was started with another config ({'; '.join(changed) or 'same values, other code'}), so it cannot be "
        "resumed: choose another name with --name"
    )


def _read_logged(path: pathlib.Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What is already written of every (stage, step). A last line cut off by a kill is removed."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {(line["stage"], line["step"]): _untimed(line) for line in _parse(path, whole)}


def _untimed(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "nonfinite" and not name.startswith("time/")}


def _parse(path: pathlib.Path, text: str) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            _ = lines[-1]["stage"], int(lines[-1]["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error!r}): delete that line") from error
    return lines


def _scalar(name: str, value: Any) -> float:
    if name in ("stage", "step", "nonfinite"):
        raise ValueError(f"a metric cannot be called {name!r}: the line has a field of that name")
    if np.ndim(value) or isinstance(value, str | bytes):
        raise TypeError(f"metric {name} must be one number, got {type(value).__name__} of shape {np.shape(value)}")
    return float(value)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
