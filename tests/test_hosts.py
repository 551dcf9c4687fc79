"""The whole Safe RLHF experiment, by its own command, on real processes: alone, together, stopped, killed and resumed.

What it learns here means nothing; it goes through every stage and both arms of RL.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures

import pytest

FILE = pathlib.Path(__file__).parents[1] / "experiments/safe_rlhf/constrained_ppo.py"
# As `python FILE`. On a CPU every process has compile cache keys of its own, and only process 0 fills that cache: the
# others would compile everything in every run. Keys without the devices, which are the same here, let them share.
SHARING = """
import runpy, sys
from jax._src import cache_key
cache_key._hash_accelerator_config = lambda *args: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUICK = """--fine-tuning.num-steps 25
    --preference.num-steps 25 --num-pairs 128 --rl.num-iterations 4 --harm-limit 0.45 --mesh.fsdp 2""".split()
DEVICES = 8  # of one process, or of two together
LAYOUTS = [(1, DEVICES), (1, DEVICES // 2), (2, DEVICES // 2), (DEVICES // 2, 1)]  # processes x devices of each
RL = ("constrained", "plain")
FITS = ("base", "sft", "reward", "cost", "pairwise-cost")
SECONDS = 400  # until a run that has not ended is killed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Job:
    """The experiment on `num` processes of `devices` each. Its run directory, its cache and what the processes say lie
    in `folder`. Nothing is left of it behind its `with` block."""

    def __init__(self, folder: pathlib.Path, num: int, devices: int, *options: str):
        self.folder, self.run = folder, folder / "run"
        places = ["--runs", folder, "--cache", folder / "cache", "--name", "run"]
        command = [FILE, "--scale", "smoke", *places, *options]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        hosts = [[]]
        if num > 1:
            together = ["--hosts.coordinator", f"127.0.0.1:{free_port()}", "--hosts.num-processes", str(num)]
            hosts = [[*together, "--hosts.process-id", str(index)] for index in range(num)]
            command = ["-c", SHARING, *command]
            environment["JAX_SHARE_BINARY_BETWEEN_HOSTS"] = "1"  # process 0 compiles for all
        with contextlib.ExitStack() as files:
            log = lambda index, name: files.enter_context(open(folder / f"{name}.{index}", "w"))
            self.processes = [
                subprocess.Popen([sys.executable, *command, *host], env=environment, stdout=log(index, "out"),
                                 stderr=log(index, "err"))
                for index, host in enumerate(hosts)
            ]  # fmt: skip

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, index: int, where: str = "out") -> str:
        return (self.folder / f"{where}.{index}").read_text()

    def wait_for(self, stage: str, step: int) -> None:
        """Until that step is logged, with every process alive."""
        self._poll(lambda: (stage, step) in metrics(self.run))
        assert [process.poll() for process in self.processes] == [None] * len(self.processes), self._errors()

    def end(self, *statuses: int) -> str:
        """What process 0 has said, once all have ended with these exit statuses (0 unless said)."""
        self._poll(lambda: None not in [process.poll() for process in self.processes])
        wanted = list(statuses) or [0] * len(self.processes)
        assert [process.returncode for process in self.processes] == wanted, self._errors()
        return self.said(0)

    def _poll(self, come) -> None:
        deadline = time.monotonic() + SECONDS
        while not come():
            assert time.monotonic() < deadline, self._errors()
            ended = [process.poll() is not None for process in self.processes]
            if all(ended) and not come():
                raise AssertionError(self._errors())
            time.sleep(0.01)

    def _errors(self) -> str:
        return "\n".join(self.said(index, "err")[-3000:] for index in range(len(self.processes)))


def metrics(run: pathlib.Path) -> dict[tuple[str, int], dict]:
    """What has been logged without the times, by stage and step, each of which must be there once."""
    file, found = run / "metrics.jsonl", {}
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n"):  # the last may be half written
            values = json.loads(line)
            key = values.pop("stage"), values.pop("step")
            assert key not in found, f"{file} has {key} twice"
            found[key] = {name: value for name, value in values.items() if not name.startswith("time/")}
    return found


def statistics(run: pathlib.Path) -> dict:
    return json.loads((run / "statistics.json").read_text())


def fingerprints(run: pathlib.Path, stage: str) -> dict:
    """What the only checkpoint of a stage says of its leaves, and its step."""
    (step,) = (run / "checkpoints" / stage).iterdir()
    content = json.loads((step / "description/metadata").read_text())["content"]
    return {"step": step.name} | content["leaves"]


def before_rl(run: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """`folder` with a cache that holds what the stages before RL have left in the one beside `run`."""
    shutil.copytree(run.parent / "cache", folder / "cache", ignore=shutil.ignore_patterns(*[f"{arm}-*" for arm in RL]))
    return folder


def assert_same(one: pathlib.Path, other: pathlib.Path) -> None:
    """Two runs have ended with the same bits."""
    assert metrics(one) == metrics(other)
    for name in ("statistics.json", "samples.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for arm in RL:
        assert fingerprints(one, arm) == fingerprints(other, arm)


def assert_close(one: dict, other: dict, tolerance: float = 5e-3) -> None:
    """Relative, and absolute for what is close to 0; rounding may turn one of the 800 pairs of an accuracy."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance), name


# One process


def test_a_run_that_was_killed_or_stopped_ends_bitwise_as_if_nothing_had_happened(smoke_run, tmp_path):
    def interrupt(number: signal.Signals, every: str) -> pathlib.Path:
        folder = before_rl(smoke_run, tmp_path / number.name)
        with Job(folder, 1, 1, "--guard.checkpoint-every", every) as job:
            job.wait_for("constrained", 2)
            job.processes[0].send_signal(number)
            said = job.end(-signal.SIGKILL if number == signal.SIGKILL else 0)
        assert ("go on with the same options and --name run --resume" in said) == (number == signal.SIGTERM)
        with Job(folder, 1, 1, "--resume") as job:
            assert "constrained" in re.findall("(.*): computing", job.end())
            return job.run

    with futures.ThreadPoolExecutor() as pool:
        runs = list(pool.map(interrupt, (signal.SIGKILL, signal.SIGTERM), ("1", "1000")))
    for run in runs:
        assert_same(run, smoke_run)


# Several processes


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[int, Job]:
    """Runs that nothing disturbs, by their number of processes."""
    folders = {num: tmp_path_factory.mktemp(f"finished-on-{num}") for num in (1, 2)}
    with Job(folders[1], 1, DEVICES, *QUICK) as one, Job(folders[2], 2, DEVICES // 2, *QUICK) as two:
        one.end()
        two.end()
        return {1: one, 2: two}


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory) -> Job:
    """A run on two processes whose second one is sent SIGTERM within the constrained arm."""
    folder = before_rl(finished[2].run, tmp_path_factory.mktemp("stopped"))
    with Job(folder, 2, DEVICES // 2, *QUICK, "--guard.checkpoint-every", "1000") as job:
        job.wait_for("constrained", 1)
        job.processes[1].terminate()
        job.end()
        return job


@pytest.fixture(scope="module")
def resumed(stopped, tmp_path_factory) -> dict[tuple[int, int], Job]:
    """That run, gone on from there on each of LAYOUTS."""

    def resume(layout: tuple[int, int]) -> Job:
        folder = tmp_path_factory.mktemp("resumed-on-{}-{}".format(*layout))
        for name in ("run", "cache"):
            shutil.copytree(stopped.folder / name, folder / name)
        with Job(folder, *layout, *QUICK, "--resume") as job:
            job.end()
            return job

    with futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(LAYOUTS, pool.map(resume, LAYOUTS)))


def test_two_processes_compute_what_one_with_all_their_devices_does(finished):
    for num, job in finished.items():
        device = json.loads((job.run / "config.json").read_text())["device"]
        assert device["layout"] == f"{num}x{DEVICES // num}-mesh-{DEVICES // 2}-2-1"
    one, two = (metrics(job.run) for job in finished.values())
    assert {stage for stage, _ in one} == {*FITS, *RL} and one.keys() == two.keys()
    for stage, step in one:
        # Rounding moves them by 1e-5 at most. It could also turn one sampled token into another, which happened nowhere
        # here; but every iteration of RL is a new chance, and what follows would be changed by it.
        assert_close(one[stage, step], two[stage, step], 5e-3 if stage in FITS or step == 1 else 0.05)
    assert_close(*(statistics(job.run) for job in finished.values()), 0.05)


def test_process_0_alone_speaks_and_writes(finished):
    job = finished[2]
    assert "writing" in job.said(0) and "One seed is not judged" in job.said(0)
    gloo = set("Gloo Rank is connected to peer ranks Expected number of".split())  # says so in pieces, from its threads
    assert set(re.findall("[A-Za-z]+", job.said(1))) <= gloo, job.said(1)
    assert "elapsed" in job.said(0, "err") and "elapsed" not in job.said(1, "err")
    assert {path.name for path in job.folder.iterdir() if path.is_dir()} == {"run", "cache"}
    assert len(list((job.run / "events").iterdir())) == 1


def test_sigterm_to_the_second_process_saves_one_step_of_both_and_says_how_to_go_on(stopped):
    assert json.loads((stopped.run / "status.json").read_text())["status"] == "preempted"
    step = max(step for stage, step in metrics(stopped.run) if stage == "constrained")
    assert 1 <= step < 4 and fingerprints(stopped.run, "constrained")["step"] == str(step)
    assert stopped.said(0).splitlines()[-1] == (
        f"constrained: stopped at step {step} of 4; go on with the same options and --name run --resume"
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "{} x {}".format(*layout))
def test_what_two_processes_have_saved_goes_on_anywhere(stopped, resumed, finished, layout):
    job, (here, there) = resumed[layout], (metrics(run.run) for run in (resumed[layout], finished[2]))
    assert re.findall("(.*): computing", job.said(0)) == list(RL)
    assert here.keys() == there.keys()
    following = "constrained", int(fingerprints(stopped.run, "constrained")["step"]) + 1
    assert_close(here[following], there[following])


def test_on_as_many_processes_it_goes_on_bitwise_as_if_it_had_not_been_stopped(resumed, finished):
    assert_same(resumed[2, DEVICES // 2].run, finished[2].run)
