"""Stages cached by the content of everything that decides their result: never silently stale."""

import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import platform
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhfjax.io.launch import Preempted, barrier, broadcast, is_main, stop_requested
from rlhfjax.io.monitor import Monitor
from rlhfjax.types import telling_fields

PACKAGE = pathlib.Path(__file__).parents[1]
# These only present, judge or schedule what stages return. Everything else under rlhfjax is part of every key.
PRESENTATION = (
    "audit/__init__.py", "audit/__main__.py", "audit/probes.py", "audit/report.py", "audit/taxonomy.py",
    "evaluation/calibration.py", "evaluation/claims.py", "evaluation/constrained.py", "evaluation/figures.py",
    "evaluation/game_figures.py", "evaluation/laws.py", "evaluation/statistics.py", "evaluation/win_rate.py",
    "experiment.py", "io/launch.py", "io/run.py", "io/seeds.py", "pipeline.py", "results.py",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
JAX_OPTIONS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable"
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of every package that computes."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def device() -> dict[str, str]:
    """The kind of accelerator that results come from."""
    return {"backend": jax.default_backend(), "kind": jax.devices()[0].device_kind}


def layout() -> str:
    """Processes x devices of each, and the mesh over them: what moves a result by rounding only."""
    mesh = "-".join(str(size) for size in jax.sharding.get_mesh().shape.values())
    return f"{jax.process_count()}x{jax.local_device_count()}" + (f"-mesh-{mesh}" if mesh else "")


def library_code(package: pathlib.Path = PACKAGE) -> str:
    """SHA-256 over the path and text of every module that can change a stage's result."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name not in PRESENTATION:
            digest.update(repr((name, path.read_bytes())).encode())
    return digest.hexdigest()


def fingerprint(obj: Any) -> str:
    """SHA-256 of a value's content, as hex.

    Takes nested dicts (in any order), lists, tuples, sets and dataclasses of arrays (dtype, shape and bytes), random
    keys, strings, bytes, numbers, bools, None, dtypes, paths, enum members, classes, module-level functions and their
    `functools.partial`. A function or class counts by its name; one from outside the library also by the text of the
    file that defines it.

    Raises:
        TypeError: for anything else, naming its path. Lambdas and functions made inside functions are among them: their
            name does not say what they do, so the caller passes the configuration they were made from instead.
    """
    digest = hashlib.sha256()
    _feed(digest.update, obj, "")
    return digest.hexdigest()


def _feed(update: Callable[[bytes], None], obj: Any, path: str) -> None:
    """Feed an unambiguous encoding of `obj`: every value is preceded by its type, every container by its length."""
    text = lambda *parts: update(repr(parts).encode())
    if obj is None or type(obj) in (bool, int, float, str, bytes):
        text(type(obj).__name__, obj)
    elif isinstance(obj, np.dtype):
        text("dtype", str(obj))
    elif isinstance(obj, enum.Enum):
        text("enum", _name(type(obj)), obj.name)
    elif isinstance(obj, pathlib.PurePath):  # by name: what a file holds reaches stages as arrays
        text("path", str(obj))
    elif isinstance(obj, jax.Array) and jnp.issubdtype(obj.dtype, jax.dtypes.prng_key):
        text("key", str(jax.random.key_impl(obj)))
        _feed(update, jax.random.key_data(obj), path)
    elif isinstance(obj, np.ndarray | np.generic | jax.Array) and obj.dtype != object:
        array = np.asarray(obj)
        text("array", str(array.dtype), array.shape)
        update(np.ascontiguousarray(array).tobytes())
    elif hasattr(type(obj), "cache_key"):  # what a world says: its truth is code, or networks that it has a digest of
        text("keyed", _name(type(obj)))
        _feed(update, obj.cache_key, f"{path}.cache_key")
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = telling_fields(obj)
        text("dataclass", _name(type(obj)), len(fields))
        for field in fields:
            text(field.name)
            _feed(update, getattr(obj, field.name), f"{path}.{field.name}")
    elif isinstance(obj, Mapping):
        text("dict", len(obj))
        for key in sorted(obj, key=fingerprint):
            _feed(update, key, f"{path}[{key!r}]")
            _feed(update, obj[key], f"{path}[{key!r}]")
    elif isinstance(obj, list | tuple):
        text(_name(type(obj)), len(obj))
        for index, value in enumerate(obj):
            _feed(update, value, f"{path}[{index}]")
    elif isinstance(obj, set | frozenset):
        text("set", sorted(fingerprint(value) for value in obj))
    elif isinstance(obj, functools.partial):
        text("partial")
        _feed(update, (obj.func, obj.args, obj.keywords), path)
    elif isinstance(obj, type | types.FunctionType) and "<" not in obj.__qualname__:
        text("named", _name(obj))
        if not obj.__module__.startswith("rlhfjax.") and obj.__module__ != "builtins":
            text(pathlib.Path(inspect.getfile(obj)).read_bytes())
    else:
        raise TypeError(
            f"cannot fingerprint {path.lstrip('.') or 'the value'}: nothing in {_name(type(obj))} "
            f"{getattr(obj, '__qualname__', '')} identifies its content; pass arrays, plain values, dataclasses or "
            "module-level functions, and the configuration instead of what was made from it"
        )


def _name(obj: Any) -> str:
    return f"{obj.__module__}:{obj.__qualname__}"


_remembering = threading.Lock()  # stages may run side by side in threads


class StaleEntry(Exception):
    """A stored entry that does not hold what it should: it is recomputed."""


@dataclasses.dataclass(frozen=True)
class StageCache:
    """Results of stages under `root`, one safetensors file each; `root=None` computes everything anew.

    root: the directory, made when first needed; all processes see the same one. remembered: a run's own list of the
    entries it has used, kept in this file; a resumed run takes them again whatever devices they come from, which
    differs by rounding from what its own would compute. code: what stands for the code that computes. report: told in
    one line what was found and what is computed.
    """

    root: str | os.PathLike | None
    remembered: pathlib.Path | None = None
    code: str = dataclasses.field(default_factory=library_code)
    report: Callable[[str], None] = print

    def key(self, name: str, fn: Callable, inputs: Mapping[str, Any]) -> str:
        """SHA-256 of the stage's name, function and inputs, the code, package versions, JAX options and kind of device.

        The layout is no part of it: it stands in the file's name.
        """
        options = {option: getattr(jax.config, option, None) for option in JAX_OPTIONS}
        return fingerprint((name, fn, dict(inputs), self.code, versions(), options, device()))

    def run(self, name: str, fn: Callable, *, monitor: Monitor | None = None, **inputs) -> Any:
        """`fn(**inputs)`, or its stored result when nothing that decides it has changed.

        Args:
            name: of the stage; part of the file name.
            fn: a module-level function; returns nested dicts, lists, tuples and dataclasses of arrays and plain values.
            monitor: when given, `fn` gets one too, for this key's checkpoints. What it logs is passed on, stored, and
                repeated on a hit, so that a cached stage leaves the same metrics behind. Not part of the key.
        Returns:
            the result with the same structure, dtypes, shapes and bits, whether computed or loaded: a computed result
            is read back from its file.
        Raises:
            Preempted: SIGTERM has asked the run to end before this stage.
        """
        if stop_requested():
            raise Preempted(f"{name}: stopped before it began")
        key, history = self.key(name, fn, inputs), []

        def record(step: int, metrics: Mapping[str, Any]) -> None:
            history.append((int(step), {metric: float(value) for metric, value in metrics.items()}))
            monitor.log(*history[-1])

        if monitor is not None:
            inputs["monitor"] = dataclasses.replace(monitor, log=record, identity=key)
        if self.root is None:
            return fn(**inputs)
        path = pathlib.Path(self.root) / f"{name}-{key[:20]}-{layout()}.safetensors"
        found = broadcast(self._find(name, path, key, monitor) if is_main() else "")
        self._remember(name, found or path.name)
        if found:
            result, history, seconds = _load(path.with_name(found), key)
            self.report(f"{name}: from the cache ({seconds:.0f} s when it was computed)")
            for step, metrics in history if monitor is not None else ():
                monitor.log(step, metrics)
            return result
        self.report(f"{name}: computing")
        start = time.perf_counter()
        result = jax.block_until_ready(fn(**inputs))
        if is_main():
            _save(path, key, result, history, time.perf_counter() - start)
        barrier(path.name)
        return _load(path, key)[0]

    def _find(self, name: str, path: pathlib.Path, key: str, monitor: Monitor | None) -> str:
        """The file name of a sound entry, what the run has used before what this layout has computed; "" if none."""
        for candidate in (path.with_name(self._used().get(name, path.name)), path):
            try:
                if candidate.exists():
                    history = _load(candidate, key)[1]
                    if monitor is None or not monitor.refuses(history):
                        return candidate.name
            except (StaleEntry, SafetensorError, OSError, KeyError, ValueError, AttributeError, ImportError) as error:
                warnings.warn(f"cache entry {candidate} is damaged and will be recomputed: {error!r}", stacklevel=3)
        return ""

    def _used(self) -> dict[str, str]:
        known = self.remembered is not None and self.remembered.exists()
        return json.loads(self.remembered.read_text()) if known else {}

    def _remember(self, name: str, entry: str) -> None:
        if self.remembered is not None and is_main():
            with _remembering:
                temporary = self.remembered.with_suffix(".writing")
                temporary.write_text(json.dumps(self._used() | {name: entry}, indent=2))
                os.replace(temporary, self.remembered)


def read_stage(run: str | os.PathLike, root: str | os.PathLike, name: str) -> Any:
    """The result of stage `name` of the run at `run`, from the cache directory `root` that the run has used.

    Raises FileNotFoundError if the run has no such stage or its entry is gone, StaleEntry if the entry is damaged.
    """
    entries = json.loads((pathlib.Path(run) / "stages.json").read_text())
    if name not in entries:
        raise FileNotFoundError(f"stages.json of {run} has no stage {name!r}; it has {', '.join(entries)}")
    path = pathlib.Path(root) / entries[name]
    if not path.exists():
        raise FileNotFoundError(f"the cache has no {path.name} any more: run the experiment again, or say --cache")
    try:
        return _load(path, entries[name].removeprefix(f"{name}-")[:20])[0]
    except (SafetensorError, KeyError, ValueError) as error:
        raise StaleEntry(f"{path.name} is damaged: {error!r}") from error


def _save(path: pathlib.Path, key: str, result: Any, history: list, seconds: float) -> None:
    arrays: dict[str, np.ndarray] = {}
    structure = _encode(result, arrays, "result")
    text = json.dumps({"key": key, "seconds": seconds, "history": history, "result": structure})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=".safetensors")
    os.close(handle)
    try:
        save_file(arrays, temporary, {"stage": text, "checksum": fingerprint((text, arrays))})
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _load(path: pathlib.Path, key: str) -> tuple[Any, list, float]:
    with safe_open(path, framework="numpy") as file:
        header = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a safetensors handle is no dict
    text = header["stage"]
    if fingerprint((text, arrays)) != header["checksum"]:
        raise StaleEntry("the checksum does not match the content")
    stage = json.loads(text)
    if not stage["key"].startswith(key):
        raise StaleEntry("it belongs to another key")
    return _decode(stage["result"], arrays), stage["history"], stage["seconds"]


def _encode(obj: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """JSON for the structure of a result: `[kind, content]`; arrays go to `arrays` under their path."""
    if obj is None or type(obj) in (bool, int, float, str):
        return ["plain", obj]
    if isinstance(obj, np.ndarray | np.generic | jax.Array) and not jnp.issubdtype(obj.dtype, jax.dtypes.prng_key):
        kind = "jax" if isinstance(obj, jax.Array) else "numpy" if isinstance(obj, np.ndarray) else "scalar"
        arrays[path] = np.asarray(obj, order="C")  # safetensors writes the buffer as it lies in memory
        return [kind, path]
    if type(obj) is dict and all(type(key) is str for key in obj):
        return ["dict", {key: _encode(value, arrays, f"{path}/{key}") for key, value in obj.items()}]
    if type(obj) in (list, tuple):
        items = [_encode(value, arrays, f"{path}/{index}") for index, value in enumerate(obj)]
        return [type(obj).__name__, items]
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
        return [_name(type(obj)), {name: _encode(value, arrays, f"{path}/{name}") for name, value in fields.items()}]
    raise TypeError(
        f"a stage returned {_name(type(obj))} at {path}, which the cache cannot store: return arrays, plain values, "
        "dicts with string keys, lists, tuples or dataclasses of them"
    )


def _decode(encoded: list, arrays: dict[str, np.ndarray]) -> Any:
    kind, content = encoded
    match kind:
        case "plain":
            return content
        case "numpy":
            return arrays[content]
        case "jax":
            return jnp.asarray(arrays[content])
        case "scalar":
            return arrays[content][()]
        case "dict":
            return {key: _decode(value, arrays) for key, value in content.items()}
        case "list":
            return [_decode(value, arrays) for value in content]
        case "tuple":
            return tuple(_decode(value, arrays) for value in content)
    module, _, name = kind.partition(":")
    cls = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    return cls(**{key: _decode(value, arrays) for key, value in content.items()})
