"""Does it fit? Asked before arrays are made and before a compiled step first runs, and answered with numbers."""

import math
import os
import pathlib
from typing import Any

import jax

GIB = 2**30


def bytes_per_device(tree: Any) -> int:
    """Bytes that the arrays of `tree` (or shapes, with their shardings) take on one device."""
    shape = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory() -> int:
    """Bytes that one device may use; on a CPU, its share of the machine's memory or of the container's limit."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total // jax.local_device_count()


def check_memory(what: str, **parts: int) -> None:
    """Raise MemoryError, with the bytes of each of `parts`, if together they exceed what one device has.

    What already lies on the devices counts too.
    """
    parts["already there"] = bytes_per_device(jax.live_arrays())
    have = device_memory()
    if sum(parts.values()) > have:
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        raise MemoryError(
            f"{what} needs {sum(parts.values()) / GIB:.2f} GiB on each device ({listed}), which has {have / GIB:.2f}: "
            "split over more devices (mesh.fsdp, mesh.tensor), or take a smaller batch, more pieces "
            "(ppo.num_accumulation), remat or a smaller network"
        )
