"""Several processes, one on each host, as one program: how they find each other, agree, stop and end.

The same file is started on every host. Without another process everything here is plain and touches no device.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

SHUTDOWN_SECONDS = 10  # between the first and the last process's exit; all have met just before
_terminated = False  # SIGTERM has reached this process


class Preempted(Exception):
    """SIGTERM has asked the run to end, and what was in progress is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Where the processes of one program are. On a TPU slice and in a SLURM step JAX finds them: say nothing."""

    coordinator: str | None = None
    """host:port of process 0, with a port that is free there; the same on every process."""
    num_processes: int | None = None
    """How many processes are started."""
    process_id: int | None = None
    """Which of them this is, from 0; process 0 logs, writes and draws."""
    heartbeat_seconds: int = 20
    """All end when one has been silent this long. A thread of its own keeps the beat, however busy the process is."""

    def __post_init__(self):
        given = (self.coordinator, self.num_processes, self.process_id)
        if given.count(None) not in (0, 3):
            raise ValueError("give hosts.coordinator, hosts.num_processes and hosts.process_id together or not at all, "
                             f"got {', '.join(map(str, given))}")  # fmt: skip
        if self.heartbeat_seconds < 1:
            raise ValueError(f"hosts.heartbeat_seconds must be at least 1, got {self.heartbeat_seconds}")
        if self.coordinator is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"hosts.coordinator must be host:port, such as 10.0.0.1:1234, got {self.coordinator!r}")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"hosts.process_id must be from 0 to hosts.num_processes - 1, got {self.process_id} of "
                             f"{self.num_processes}")  # fmt: skip


def initialize(hosts: Hosts) -> None:
    """Join the other processes, if there are any, and catch SIGTERM. For the main thread, before any device is touched.

    Raises whatever `jax.distributed.initialize` does when the others do not come within five minutes.
    """
    limits = {"heartbeat_timeout_seconds": hosts.heartbeat_seconds, "shutdown_timeout_seconds": SHUTDOWN_SECONDS}
    if hosts.coordinator is not None:
        jax.distributed.initialize(hosts.coordinator, hosts.num_processes, hosts.process_id, **limits)
    elif _in_a_cluster():
        jax.distributed.initialize(**limits)
    # In place of XLA's handler, which has the processes agree on a call's number: Orbax makes such calls too, with
    # numbers of its own, and a stop gets lost.
    signal.signal(signal.SIGTERM, _on_sigterm)
    barrier("start")  # while all are here: on a CPU those who talk for the first time must come within 30 s


def _in_a_cluster() -> bool:
    """Whether JAX can find the other processes, rather than raise because there is nothing to find."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # 1 in a batch script and a shell, where nobody else comes
        return True
    if "tpu" not in (jax.config.jax_platforms or ""):  # JAX puts it there on a TPU host, unless JAX_PLATFORMS is set
        return False
    workers = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if workers is None:
        return "TPU_SKIP_MDS_QUERY" not in os.environ  # the metadata server knows them
    return "," in workers or int(os.environ.get("MEGASCALE_NUM_SLICES", 1)) > 1


def _on_sigterm(number, frame) -> None:
    global _terminated
    _terminated = True


def is_main() -> bool:
    """Whether this is process 0, the only one that logs, writes and draws."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast(text: str) -> str:
    """Process 0's `text`, on every process."""
    if not jax.distributed.is_initialized():
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = np.resize(data, 1 << size.bit_length())  # few lengths, so few programs to compile
    return bytes(multihost_utils.broadcast_one_to_all(padded)[:size]).decode()


def barrier(name: str) -> None:
    """Wait until every process has come here. Raises AssertionError if one of them waits under another name."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(name)


def stop_requested() -> bool:
    """Whether SIGTERM has reached any process: the same answer to the same call on all, so all must ask as often."""
    if not jax.distributed.is_initialized():
        return _terminated
    return bool(np.any(multihost_utils.process_allgather(np.bool_(_terminated))))


@contextlib.contextmanager
def ending_together():
    """Around the whole program: with other processes, this one does not leave without them.

    An error (Ctrl-C too) prints its traceback and ends this process at once, since an ordinary exit would wait for the
    others while they wait for it; they notice within `Hosts.heartbeat_seconds`. A process that is done, or calls
    `sys.exit(0)`, waits until all are.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            _fail()
        raise
    finally:
        barrier("end")  # process 0 may still be drawing


def _fail() -> None:
    try:
        who = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
        print(f"{who}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:
        os._exit(1)
