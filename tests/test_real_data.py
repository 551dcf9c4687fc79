"""The experiments on a user's checkpoint and files, by their own commands, on small ones that are written here."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhfjax.models import huggingface
from rlhfjax.models.transformer import make_scalar_model

pytest.importorskip("transformers", reason="checkpoints and tokenizers need the extra hf")
ROOT = pathlib.Path(__file__).parents[1]


def run(own: pathlib.Path, stem: str, name: str, *options) -> tuple[pathlib.Path, str]:
    """The run directory that a command leaves, and what it said."""
    command = [sys.executable, ROOT / "experiments/real_data" / f"{stem}.py", "--scale", "smoke", "--name", name,
               "--runs", own / "runs", "--cache", own / "cache", *options]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=own,
                          env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return own / "runs" / name, done.stdout


def statistics(path: pathlib.Path) -> dict[str, float]:
    return json.loads((path / "statistics.json").read_text())


def test_a_reward_model_from_scratch(own):
    path, said = run(own, "preference_models", "scratch", "--data", own / "pairs.jsonl", "--num-words", 280)
    found = statistics(path)
    assert found["pairs"] + found["held_out_pairs"] == 72 and found["held_out_pairs"] > 4
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"] and "| 72 | 72 |" in said
    assert {p.name for p in (path / "figures").iterdir()} == {"calibration.png", "gap.png"}


def test_a_cost_model_by_low_rank_from_a_checkpoint(own):
    path, _ = run(own, "preference_models", "cost", "--data", own / "harm.jsonl", "--quality", "harm", "--checkpoint",
                  own / "checkpoint", "--lora.rank", 4, "--preference.learning-rate", 0.01)  # fmt: skip
    found = statistics(path)
    assert found["sign_accuracy"] > 0.9 and found["train_accuracy"] > 0.9


def test_a_policy_from_a_checkpoint_is_exported_again(own):
    path, said = run(own, "stories", "stories", "--checkpoint", own / "checkpoint")
    assert "exported to" in said and statistics(path)["kl"] >= 0
    config, params = huggingface.load(path / "model")
    _, before = huggingface.load(own / "checkpoint")
    assert jax.tree.structure(params) == jax.tree.structure(before)
    assert max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (params, before)))) > 0
    assert len(json.loads((path / "samples.json").read_text())) == 16
    assert "KL to the original" in (path / "model" / "README.md").read_text()
    _, scalar = huggingface.load(path / "model", make_scalar_model)
    assert not np.any(scalar["head"])


@pytest.mark.parametrize(
    "stem, options, message",
    [
        ("preference_models", (), "name the files of pairs: --data FILE"),
        ("stories", (), "name a checkpoint: --checkpoint DIR"),
        ("stories", ("--scale", "pod"), "this experiment has no configuration for --scale pod; it has smoke, cpu"),
    ],
)
def test_what_is_missing_is_said(own, stem, options, message):
    with pytest.raises(AssertionError, match=message):
        run(own, stem, f"bad {stem} {len(options)}", *options)
