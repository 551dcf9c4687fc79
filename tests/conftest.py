"""Shared by all tests: CPU, and one persistent compile cache so that a second run compiles nothing."""

import os
import pathlib
import subprocess
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # the environment reaches subprocess tests too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> pathlib.Path:
    """The run directory of Safe RLHF at smoke scale, as its command leaves it; its cache lies beside it."""
    runs = tmp_path_factory.mktemp("runs")
    file = pathlib.Path(__file__).parents[1] / "experiments/safe_rlhf/constrained_ppo.py"
    options = ["--scale", "smoke", "--runs", runs, "--cache", runs / "cache", "--name", "smoke"]
    done = subprocess.run([sys.executable, file, *options], cwd=runs, capture_output=True, text=True)
    assert done.returncode == 0, f"{file.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return runs / "smoke"
