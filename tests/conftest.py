"""Shared by all tests: eight CPU devices, and one persistent compile cache so that a second run compiles nothing."""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # only a test that sets a mesh uses more than the first
ROOT = pathlib.Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # the environment reaches subprocess tests too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes into compiling what then runs for milliseconds. What is computed is the same to rounding.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
                      " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")  # fmt: skip


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """An experiment's `main` catches SIGTERM to save first; a test run should just end."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Callable[[str], pathlib.Path]:
    """`smoke(stem)`: the run directory of an experiment at smoke scale, as its command leaves it, with what the command
    said beside it in <stem>.log. Of several workers the first that asks makes it; all share one cache."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    runs = tmp_path_factory.getbasetemp().joinpath("." if alone else "..", "smoke-runs").resolve()
    runs.mkdir(exist_ok=True)

    def run(stem: str) -> pathlib.Path:
        (file,) = ROOT.glob(f"experiments/*/{stem}.py")
        name = "smoke" if stem == "constrained_ppo" else stem  # as test_experiment.py calls it where it resumes it
        log = runs / f"{stem}.log"
        options = ["--scale", "smoke", "--runs", runs, "--cache", runs / "cache", "--name", name]
        with open(runs / f"{stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not log.exists():  # one that failed has a log too, and is not tried again
                done = subprocess.run([sys.executable, file, *options], cwd=runs, capture_output=True, text=True,
                                      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})  # fmt: skip
                log.write_text(f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}\nreturncode {done.returncode}")
        if not (said := log.read_text()).endswith("returncode 0"):
            pytest.fail(f"{file.name} failed:\n{said}")
        return runs / name

    return run


@pytest.fixture(scope="session")
def smoke_run(smoke) -> pathlib.Path:
    """The run directory of Safe RLHF at smoke scale; its cache lies beside it."""
    return smoke("constrained_ppo")
