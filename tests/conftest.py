"""Shared by all tests: eight CPU devices, and one persistent compile cache so that a second run compiles nothing."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # only a test that sets a mesh uses more than the first
ROOT = pathlib.Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # the environment reaches subprocess tests too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes into compiling what then runs for milliseconds. What is computed is the same to rounding.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
         "--xla_cpu_parallel_codegen_split_count=1"]  # fmt: skip
if metadata.version("jax") < "0.11":  # the one flag that newer ones do not know, and then nothing starts at all
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))


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


@pytest.fixture(scope="session")
def own(tmp_path_factory) -> pathlib.Path:
    """What a user brings: a directory with pairs.jsonl, harm.jsonl, `checkpoint`, and noisy.jsonl, where every fifth
    label is wrong and the last row is no comparison."""
    pytest.importorskip("transformers", reason="checkpoints and tokenizers need the extra hf")
    import jax
    import numpy as np

    from rlhfjax.data.tokenize import train_tokenizer
    from rlhfjax.models import huggingface
    from rlhfjax.models.transformer import TransformerConfig, make_language_model

    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    places, things = ("park", "box", "tree", "toy", "river", "cake"), ("ball", "hat", "kite", "boat", "drum", "shoe")
    told = [f"Tell me of the {a} and the {b}." for a in places for b in things]
    good, bad = (lambda i: f"A happy {things[i % 6]} smiled."), (lambda i: f"A sad {things[i % 6]} sat alone.")
    pairs = [{"prompt": text, "chosen": good(i), "rejected": bad(i)} for i, text in enumerate(told * 2)]
    harm = [{"prompt": text, "safe_response": good(i), "unsafe_response": bad(i)} for i, text in enumerate(told * 2)]
    wrong = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    noisy = [wrong[i] if i % 5 == 0 else row for i, row in enumerate(pairs)] + [pairs[0] | {"rejected": good(0)}]
    for name, rows in (("pairs", pairs), ("harm", harm), ("noisy", noisy)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in pairs for text in row.values()] * 3 + [" ".join(rng.permutation(places + things))] * 9
    chat = train_tokenizer(texts, 280, root / "tokenizer")
    config = TransformerConfig(vocab_size=280, d_model=16, num_layers=1, num_heads=2, d_ff=32)
    huggingface.save(root / "checkpoint", config, make_language_model(config).init(jax.random.key(0)),
                     tokenizer=chat.hf)  # fmt: skip
    return root
