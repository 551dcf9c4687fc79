"""Shared by all tests: eight CPU devices, and one persistent compile cache so that a second run compiles nothing."""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # only a test that sets a mesh uses more than the first
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # the environment reaches subprocess tests too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes into compiling what then runs for milliseconds. What is computed is the same to rounding.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """An experiment's `main` catches SIGTERM to save first; a test run should just end."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> pathlib.Path:
    """The run directory of Safe RLHF at smoke scale, as its command leaves it; its cache lies beside it."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    runs = tmp_path_factory.getbasetemp().joinpath("." if alone else "..", "smoke-runs").resolve()
    runs.mkdir(exist_ok=True)
    file = pathlib.Path(__file__).parents[1] / "experiments/safe_rlhf/constrained_ppo.py"
    options = ["--scale", "smoke", "--runs", runs, "--cache", runs / "cache", "--name", "smoke"]
    with open(runs / "lock", "w") as lock:  # of several workers the first makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (runs / "made").exists():
            done = subprocess.run([sys.executable, file, *options], cwd=runs, capture_output=True, text=True,
                                  env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})  # fmt: skip
            assert done.returncode == 0, f"{file.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            (runs / "made").touch()
    return runs / "smoke"
