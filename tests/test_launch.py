"""Real processes that are one program, and what a process does about them before there are any."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import pytest
import tyro

from rlhfjax.io import launch
from rlhfjax.io.launch import Hosts

# One of two processes, with two devices each. In step 3 something happens to the process `who`.
PROGRAM = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rlhfjax.io import launch

port, me, who, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
launch.SHUTDOWN_SECONDS = 5
hosts = launch.Hosts(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=me, heartbeat_seconds=6)
launch.initialize(hosts)
with launch.ending_together():
    assert launch.is_main() == (me == 0)
    for text in ("", "grüße", "x" * 300):
        assert launch.broadcast(text if me == 0 else "another") == text
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(lambda x: x + x.sum() % 7, out_shardings=split)
    x = jax.make_array_from_callback((4,), split, lambda index: np.ones(1, np.float32))
    for number in range(1000):
        if launch.stop_requested():
            assert launch.stop_requested()
            print(f"stopped before step {number}", flush=True)
            if me == 0 and who == 0:
                time.sleep(launch.SHUTDOWN_SECONDS + 2)
            print("saved", flush=True)
            sys.exit(0)
        x = jax.block_until_ready(step(x))
        if number == 3 and me == who:
            if what == "ValueError":
                raise ValueError("planted")
            os.kill(os.getpid(), signal.Signals[what])
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(program: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def both(who: int, what: str) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of both processes; left alone by the other, one would wait for five minutes."""
    port = free_port()
    processes = [start(PROGRAM, port, me, who, what) for me in (0, 1)]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_to_one_process_stops_both_before_the_same_step_and_the_first_out_waits_for_the_last(who):
    ended = both(who, "SIGTERM")
    assert [status for status, _, _ in ended] == [0, 0], ended
    stops = [re.findall(r"stopped before step (\d+)\nsaved", output) for _, output, _ in ended]
    assert stops[0] == stops[1] and len(stops[0]) == 1, ended


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_in_one_process_ends_both_and_says_whose_it_was(who):
    ended = both(who, "ValueError")
    assert 0 not in [status for status, _, _ in ended], ended
    assert f"process {who} of 2 on {socket.gethostname()}:\nTraceback" in ended[who][2]
    assert ended[who][2].rstrip().endswith("ValueError: planted")
    assert "planted" not in ended[1 - who][2]


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_ends_the_other(who):
    ended = both(who, "SIGKILL")
    assert ended[who][0] == -signal.SIGKILL
    assert ended[1 - who][0] not in (0, -signal.SIGKILL), ended


def test_a_process_alone_touches_no_device_and_is_stopped_by_sigterm():
    alone = start("""
import os, signal, sys
from rlhfjax.io import launch
launch.initialize(launch.Hosts())
with launch.ending_together():
    launch.barrier("alone")
    assert launch.is_main() and launch.broadcast("text") == "text" and not launch.stop_requested()
    # JAX refuses this once a device has been touched
    launch.initialize(launch.Hosts(coordinator=f"127.0.0.1:{sys.argv[1]}", num_processes=1, process_id=0))
assert not launch.stop_requested()
os.kill(os.getpid(), signal.SIGTERM)
assert launch.stop_requested() and launch.stop_requested()
print("stopped")
""", free_port())  # fmt: skip
    output, errors = alone.communicate(timeout=100)
    assert alone.returncode == 0 and output.endswith("stopped\n"), errors


@pytest.fixture
def joined(monkeypatch) -> list:
    """The calls of `jax.distributed.initialize`, in an environment without any cluster."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    return calls


LIMITS = {"heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": launch.SHUTDOWN_SECONDS}


def test_given_addresses_are_passed_on_wherever_the_process_runs(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    hosts = tyro.cli(Hosts, args="--coordinator h:1 --num-processes 4 --process-id 3 --heartbeat-seconds 60".split())
    launch.initialize(hosts)
    assert joined == [(("h:1", 4, 3), LIMITS | {"heartbeat_timeout_seconds": 60})]


@pytest.mark.parametrize(
    "platforms, environment, found",
    [
        (None, {}, False),
        ("cpu", {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, False),  # a batch script, outside srun
        ("cpu", {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),  # salloc's shell
        ("cpu", {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ("tpu,cpu", {}, True),  # a TPU VM: JAX asks the metadata server
        ("tpu,cpu", {"TPU_SKIP_MDS_QUERY": "1"}, False),
        ("tpu,cpu", {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ("tpu,cpu", {"TPU_PROCESS_ADDRESSES": "local"}, False),  # a notebook's TPU
        ("tpu", {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, True),
        ("tpu", {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ("cpu", {"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # JAX_PLATFORMS=cpu on a TPU slice
    ],
)
def test_processes_are_joined_only_where_jax_can_find_them(joined, monkeypatch, platforms, environment, found):
    monkeypatch.setattr(type(jax.config), "jax_platforms", platforms)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch.initialize(Hosts())
    assert joined == ([((), LIMITS)] if found else [])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"coordinator": None}, "together or not at all, got None, 4, 0"),
        ({"num_processes": None}, "together or not at all, got h:1, None, 0"),
        ({"process_id": None}, "together or not at all, got h:1, 4, None"),
        ({"coordinator": "10.0.0.1"}, "must be host:port, such as 10.0.0.1:1234, got '10.0.0.1'"),
        ({"coordinator": ":1234"}, "must be host:port"),
        ({"coordinator": "h:port"}, "must be host:port"),
        ({"coordinator": "h:65536"}, "must be host:port"),
        ({"process_id": 4}, "from 0 to hosts.num_processes - 1, got 4 of 4"),
        ({"process_id": -1}, "got -1 of 4"),
        ({"num_processes": 0}, "got 0 of 0"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds must be at least 1, got 0"),
    ],
)
def test_addresses_that_cannot_be_meant_are_refused(options, message):
    good = Hosts(coordinator="h:1", num_processes=4, process_id=0)
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(good, **options)
