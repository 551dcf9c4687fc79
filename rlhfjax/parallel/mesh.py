"""The one mesh, and the one table that says which axis of an array lies across which of its axes.

A mesh has three axes: `data` and `fsdp` split the rows of a batch; `fsdp` also splits every parameter and moment along
the model's width; `tensor` splits heads, MLP and vocabulary. Models name the axes of their parameters
(`Model.logical_axes`), the rules below send those names to mesh axes, and everything a learner holds follows.

The mesh is JAX's own ambient one (`jax.set_mesh(make_mesh(MeshConfig(fsdp=2)))`). Without one, every function here
leaves arrays where they are, so that the same code runs on one device.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhfjax.parallel.memory import bytes_per_device, check_memory

AXES = ("data", "fsdp", "tensor")
TRAIN_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "positions": None,
}
# A decoding step reads all parameters for one token per row: gathering them along fsdp each time would dominate it.
DECODE_RULES = {**TRAIN_RULES, "embed": None}


_COMPILING = threading.Lock()  # stages side by side often need one program: the second finds it in the compile cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices stand along each axis of the mesh."""

    data: int = 0
    """Copies of the model, each on rows of its own; 0: as many as the devices allow."""
    fsdp: int = 1
    """Devices among which parameters, moments and rows are split."""
    tensor: int = 1
    """Devices among which heads, MLP and vocabulary are split."""

    def __post_init__(self):
        if self.data < 0 or self.fsdp < 1 or self.tensor < 1:
            raise ValueError(f"mesh axes must be positive (data may be 0: the rest), got {dataclasses.asdict(self)}")


def make_mesh(config: MeshConfig, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all `devices`; raises ValueError unless it takes every one of them."""
    devices = list(jax.devices() if devices is None else devices)
    inner = config.fsdp * config.tensor
    shape = (config.data or max(1, len(devices) // inner), config.fsdp, config.tensor)
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape))
        raise ValueError(f"a mesh of {sizes} takes {math.prod(shape)} devices, there are {len(devices)}: choose axes "
                         f"whose product is {len(devices)}")  # fmt: skip
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _spec(what: str, shape: tuple[int, ...], axes: tuple[str | None, ...], rules: Mapping, mesh) -> PartitionSpec:
    """The mesh axes of an array of this shape; raises where a dimension does not divide."""
    if len(shape) != len(axes):
        raise ValueError(f"{what} has shape {shape} for the axes {axes}: one name per dimension")
    if unknown := set(axes) - set(rules) - {None}:
        raise ValueError(f"{what}: no rule for the axes {sorted(unknown)}; the rules know {', '.join(rules)}")
    spec = [None if axis is None else rules[axis] for axis in axes]
    for size, axis, target in zip(shape, axes, spec):
        names = (target,) if isinstance(target, str) else target or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(
                f"{what}: {size} ({axis}) does not divide over the mesh axes {' x '.join(names)} = {parts}: make it a "
                f"multiple of {parts}, or choose another mesh"
            )
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None, what: str = "an array") -> jax.Array:
    """`x` laid out by the training rules, inside a jit; one logical axis name, or None, per dimension.

    Raises:
        ValueError: a dimension that does not divide, which XLA would replicate in silence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, _spec(what, x.shape, axes, TRAIN_RULES, mesh))


def constrain_rows(tree: Any) -> Any:
    """Every array of `tree` split by rows (its first axis), inside a jit."""
    return jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1), what="rows of a batch"), tree)


def shardings(tree: Any, axes: Any, rules: Mapping = TRAIN_RULES) -> Any:
    """Where each array of `tree` lies, as a tree of NamedSharding; None (anywhere) without a mesh.

    Args:
        tree: arrays or their shapes: parameters, a TrainState, or several learners in one state.
        axes: nested dicts with a tuple of axis names per parameter, as `Model.logical_axes` gives; for several
            learners one such tree under each field's name. A leaf follows the parameter whose path runs through its
            own, in order and to its end: `opt_state/1/mu/head` follows `head`. Scalars are on every device.
    Raises:
        ValueError: a leaf that no parameter matches, or a dimension that does not divide.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None
    named, _ = jax.tree.flatten_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    known = sorted(((_names(path), value) for path, value in named), key=lambda item: -len(item[0]))

    def sharding(path, leaf):
        names, what = _names(path), "/".join(_names(path))
        found = next((a for parameter, a in known if parameter[-1] == names[-1] and _runs_through(parameter, names)),
                     None if leaf.ndim else ())  # fmt: skip
        if found is None:
            raise ValueError(f"{what} {leaf.shape} matches no parameter with logical axes, so nothing says how it is "
                             "sharded: name its axes in the model's logical_axes")  # fmt: skip
        return NamedSharding(mesh, _spec(what, leaf.shape, found if leaf.ndim else (), rules, mesh))

    return jax.tree.map_with_path(sharding, tree)


def _names(path) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _runs_through(parameter: list[str], names: list[str]) -> bool:
    rest = iter(names)
    return all(name in rest for name in parameter)


def replicated() -> NamedSharding | None:
    """On every device; None without a mesh."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, PartitionSpec())


def create(fn: Callable, *args, axes: Any, rules: Mapping = TRAIN_RULES) -> Any:
    """`fn(*args)`, computed straight into its shardings: no device ever holds the whole of it.

    Raises MemoryError, before anything is computed, if its share does not fit a device.
    """
    shapes = jax.eval_shape(fn, *args)
    layout = shardings(shapes, axes, rules)
    placed = shapes if layout is None else jax.tree.map(lambda x, s: x.update(sharding=s), shapes, layout)
    check_memory("the state of this stage", parameters=bytes_per_device(placed))
    return jax.jit(fn, out_shardings=layout)(*args)


def jit_step(step: Callable, state: Any, axes: Any, what: str = "the step") -> Callable:
    """`step(state, ...) -> (state, metrics)` compiled once for each shape of its arguments: the state's buffers are
    donated and it comes back where it lay, metrics are on every device.

    Under `jax_debug_nans`, which repeats a bad step operation by operation, nothing is donated. Raises MemoryError,
    before the first step runs, if it does not fit.
    """
    layout = (shardings(state, axes), replicated())
    if jax.config.jax_debug_nans or jax.config.jax_debug_infs:
        return jax.jit(step, out_shardings=layout)
    jitted, compiled = jax.jit(step, donate_argnums=0, out_shardings=layout), {}

    def call(state, *args, **kwargs):
        shapes = tuple(map(jnp.shape, jax.tree.leaves((args, kwargs))))
        if shapes not in compiled:
            with _COMPILING:
                program = jitted.lower(state, *args, **kwargs).compile()
            memory = program.memory_analysis()
            new = memory.output_size_in_bytes - memory.alias_size_in_bytes
            check_memory(what, results=new, temporaries=memory.temp_size_in_bytes)
            compiled[shapes] = program
        return compiled[shapes](state, *args, **kwargs)

    return call


def place(tree: Any, axes: Any, rules: Mapping = TRAIN_RULES) -> Any:
    """Host arrays (the same on every process) on the devices of the mesh, by their logical axes."""
    return jax.device_put(tree, shardings(tree, axes, rules))


def padded(num_rows: int) -> int:
    """The next number of rows, from `num_rows` on, that divides over data and fsdp."""
    shape = jax.sharding.get_abstract_mesh().shape  # inside a jit too
    parts = math.prod(shape.get(axis, 1) for axis in TRAIN_RULES["batch"])
    return -(-num_rows // parts) * parts


def place_rows(tree: Any, axis: int = 0) -> Any:
    """Host arrays (the same on every process) on the devices, rows (their axis `axis`) split over data and fsdp."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    lead = (None,) * axis + ("batch",)
    spec = lambda x: _spec("rows of a batch", x.shape, (*lead, *[None] * (x.ndim - axis - 1)), TRAIN_RULES, mesh)
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)


def fetch(tree: Any) -> Any:
    """Arrays of any layout as NumPy arrays, whole on every process."""
    whole = lambda x: np.asarray(x) if x.is_fully_addressable or x.is_fully_replicated else _gather(x)
    return jax.tree.map(lambda x: whole(x) if isinstance(x, jax.Array) else np.asarray(x), tree)


def _gather(x: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
