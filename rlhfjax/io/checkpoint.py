"""Checkpoints of a learner: Orbax writes and reads them, and what comes back is what was saved, or an error."""

import contextlib
import hashlib
import json
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhfjax.io.launch import Preempted

_BEGINNING = threading.Lock()  # two saves that begin at once, in two threads, get into each other's way inside Orbax


class Checkpoints:
    """The saved states of one learner, in one directory.

        with Checkpoints(path, identity=config_hash(config)) as checkpoints:
            step, state, history = checkpoints.restore(state) or (0, state, [])
            ...
            checkpoints.save(step, state, history)

    With several processes all of them see the same directory and make the same calls in the same order.

    Args:
        path: the directory, made if need be. Only one job may have it open: what a killed one left half written is
            removed.
        identity: names what is being learned (a hash of configuration and code); stored with every checkpoint.
        keep: how many of the latest steps stay.
        keep_every: steps that this divides stay as well.
    Raises:
        ValueError: the directory holds another identity, or its latest checkpoint is damaged.
    """

    def __init__(self, path: str | os.PathLike, *, identity: str, keep: int = 2, keep_every: int | None = None):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep and keep_every must be at least 1, got {keep} and {keep_every}")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True)
        path = os.fspath(path)
        self._manager = ocp.CheckpointManager(path if "://" in path else os.path.abspath(path), options=options)
        self._path, self._identity = self._manager.directory, identity
        if (latest := self.latest()) is not None:
            self._read_description(latest)

    def latest(self) -> int | None:
        """The latest step, once it is wholly written; None where nothing was saved."""
        step = self._manager.latest_step()
        with self._saving(step):
            self._manager.wait_until_finished()
        return step

    def save(self, step: int, state: Any, extra: Any = None) -> None:
        """Begin to write a checkpoint. Once this returns, `state` may be donated; the files follow.

        Args:
            step: larger than every step saved before.
            state: a pytree of jax.Arrays, which with several processes lie across all of them.
            extra: what else a learner resumes with, its history of metrics say, as JSON: tuples become lists.
        Raises:
            ValueError: the step is not larger than the latest.
            TypeError: a leaf is none that could be restored, or `extra` is not JSON.
            RuntimeError: this or the previous checkpoint could not be written; those before it are intact.
        """
        latest = self.latest()
        if step < 0 or (latest is not None and step <= latest):
            raise ValueError(f"step {step} cannot be saved in {self._path}, whose latest is {latest}: steps count from "
                             "0 and only grow")  # fmt: skip
        leaves, _ = _named(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array) or (jax.process_count() > 1 and leaf.is_fully_addressable):
                raise TypeError(f"{name} ({type(leaf).__name__}) is no jax.Array that lies across all processes, so it "
                                "could not be restored: make the state in one jit, as mesh.create does")  # fmt: skip
        fingerprints = _fingerprints(leaves)
        kinds = {name: [_kind(leaf), fingerprints[name]] for name, leaf in leaves.items()}
        description = json.loads(json.dumps({"identity": self._identity, "leaves": kinds, "extra": extra}))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            description=ocp.args.JsonSave({"content": description, "sha256": _sha256(description)}),
        )
        with self._saving(step), _BEGINNING:
            self._manager.save(step, args=items, force=True)  # unforced, Orbax's policies may skip a step silently

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, Any] | None:
        """`(step, state, extra)` as they were saved, at the latest step or the given one; None if nothing was saved.

        Args:
            like: what the state looks like here: a pytree of jax.Arrays, or of ShapeDtypeStructs with shardings. The
                state comes back in its structure and on its devices, wherever it was saved from.
            step: one of those that are still kept.
        Raises:
            ValueError: there is no such step; it is of another identity or model; or it is damaged.
            TypeError: a leaf of `like` does not say where it lies.
        """
        latest = self.latest()
        if step is None and (step := latest) is None:
            return None
        if step not in self._manager.all_steps():
            raise ValueError(f"{self._path} has no step {step}, only {self._manager.all_steps()}")
        description = self._read_description(step)
        stored, (leaves, structure) = description["leaves"], _named(like)
        for name, leaf in leaves.items():
            if getattr(leaf, "sharding", None) is None:
                raise TypeError(f"{name} ({type(leaf).__name__}) does not say where to restore it: pass jax.Arrays, or "
                                "ShapeDtypeStructs with shardings")  # fmt: skip
        for name in sorted(stored.keys() | leaves.keys()):
            there = stored[name][0] if name in stored else "missing"
            here = _kind(leaves[name]) if name in leaves else "missing"
            if there != here:
                raise ValueError(f"{self._path / str(step)} is a checkpoint of another model: {name} is {there} there "
                                 f"and {here} here")  # fmt: skip
        with self._reading(step):
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(leaves))).state
            fingerprints = _fingerprints(state)
            if changed := [name for name in leaves if fingerprints[name] != stored[name][1]]:
                raise ValueError(f"{changed[0]} (of {len(changed)} leaves) does not hold the values that were saved")
        return step, structure.unflatten(state[name] for name in leaves), description["extra"]

    def close(self) -> None:
        """Wait for what is being written; raises RuntimeError if it could not be."""
        try:
            self.latest()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *error) -> None:
        if kind in (None, Preempted) or jax.process_count() == 1:  # other processes may not come to wait with this one
            self.close()

    def _read_description(self, step: int) -> dict[str, Any]:
        with self._reading(step):
            file = self._manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore())).description
            description = file["content"]
            if _sha256(description) != file["sha256"]:
                raise ValueError("the checksum of its description does not match")
        if description["identity"] != self._identity:
            raise ValueError(
                f"{self._path} holds checkpoints of {description['identity']}, not of {self._identity}: inputs, "
                "packages or the kind of device have changed, so start anew in another directory (--name)"
            )
        return description

    @contextlib.contextmanager
    def _saving(self, step: int | None):
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"step {step} could not be saved in {self._path}, which holds steps "
                               f"{self._manager.all_steps()}: {error!s:.300}") from error  # fmt: skip

    @contextlib.contextmanager
    def _reading(self, step: int):
        try:
            yield
        except Exception as error:
            others = [other for other in self._manager.all_steps() if other != step]
            remedy = f"resume from step {max(others)} (kept: {others})" if others else "start anew (no other is kept)"
            raise ValueError(f"{self._path / str(step)} cannot be restored: {error!s:.300}. If it is damaged, delete "
                             f"it to {remedy}") from error  # fmt: skip


def _named(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves by name, such as `state.policy.params['head']`, and the structure that they were in."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}, structure


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _sha256(obj: Any) -> str:
    return hashlib.sha256(json.dumps(obj).encode()).hexdigest()


def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, str]:
    """16 hex digits per leaf, which say whether it holds the same bits, however it is sharded.

    Made against accidents and not against forgers: one changed element always changes them, other damage goes unseen
    with a chance of about 2^-64.
    """
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in jax.device_get(_sums(leaves)).items()}


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, list[jax.Array]]:
    """Two uint32 per leaf: sums, modulo 2^32 and so in any order, of what `_mix` makes of each element and its place.

    Only elementwise work and sums: each device reads its own shards, and nothing is gathered.
    """

    def sums(leaf):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        width = min(leaf.dtype.itemsize, 4)  # bytes; an element of 8 becomes two of 4
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * width}").astype(jnp.uint32)
        place = jnp.uint32(0)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return [jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(seed))), dtype=jnp.uint32) for seed in (0, 0x9E3779B9)]

    return jax.tree.map(sums, leaves)


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: a bijection of uint32 in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
