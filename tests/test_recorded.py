"""A world of recorded comparisons: its splits, its families, its gold networks, and an experiment that runs on it."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhfjax.data.formats import read
from rlhfjax.data.tokenize import Lengths, load_tokenizer
from rlhfjax.feedback.raters import Rater, compare
from rlhfjax.io.cache import fingerprint
from rlhfjax.models.transformer import TransformerConfig, make_scalar_model
from rlhfjax.rl.preference_models import pair_scores
from rlhfjax.worlds.language import Family
from rlhfjax.worlds.recorded import recorded_world, recordings

pytest.importorskip("transformers", reason="tokenizers need the extra hf")
ROOT, LENGTHS = pathlib.Path(__file__).parents[1], Lengths(max_prompt=24, max_response=10)
NETWORK = TransformerConfig(vocab_size=280, d_model=16, num_layers=1, num_heads=2, d_ff=32)
NUM = 60  # prompts of either kind


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Comparisons for helpfulness about boats, and for harm, with signs, about traps."""
    root = tmp_path_factory.mktemp("recorded")
    helpful = [{"prompt": f"How do I sail boat {i}?", "chosen": "A happy ball smiled.", "rejected": "A sad hat."}
               for i in range(NUM)]  # fmt: skip
    harm = [{"prompt": f"How do I set trap {i}?", "safe_response": "A happy kite.", "unsafe_response": "A drum sat."}
            for i in range(NUM)]  # fmt: skip
    for name, rows in (("helpful", helpful), ("harm", harm)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "helpful.jsonl", root / "harm.jsonl"


def on_file(own, files):
    return recordings(*read(files), load_tokenizer(own / "checkpoint"), LENGTHS)


def world(own, files, names=("helpful", "harm"), seed=0):
    params = make_scalar_model(NETWORK).init(jax.random.key(seed))
    params = {name: params | {"head": np.full(16, k + 1.0, np.float32)} for k, name in enumerate(names)}
    return recorded_world(on_file(own, files), NETWORK, jax.device_get(params), center=0.25, bar=0.75)


def test_splits_share_no_prompt_and_lose_none(own, files):
    records = on_file(own, files)
    splits = [{row.tobytes() for row in prompts.tokens} for prompts in records.prompts.values()]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 2 * NUM and min(map(len, splits)) > 3
    for split, prompts in records.prompts.items():
        for question in ("helpful", "harm"):
            pairs = getattr(records.comparisons[split], question)
            assert {row.tobytes() for row in pairs.prompts} <= {row.tobytes() for row in prompts.tokens}
    assert np.all(np.abs(records.comparisons["train"].harm.signs) == 1)
    assert len(records.answers) == 2 * len(records.cleaner)  # both answers of a pair, and the preferred one


def test_families_come_from_the_labels_and_are_read_back_from_tokens(own, files):
    place = world(own, files)
    for split in ("train", "test"):
        prompts = place.sample_prompts(0, 40, {Family.BENIGN: 0.25, Family.DANGEROUS: 0.5, Family.GREY: 0.25}, split)
        assert (prompts.family == Family.DANGEROUS).sum() in (26, 27)  # no prompt is grey: the others share
        np.testing.assert_array_equal(jax.jit(lambda w, x: w.family(x))(place, prompts.tokens), prompts.family)
        traps = ["trap" in place.decode(row) for row in prompts.tokens]
        np.testing.assert_array_equal(prompts.family == Family.DANGEROUS, traps)
    assert int(place.family(np.full((1, 24), 7))[0]) == Family.BENIGN  # a prompt that nobody has seen
    with pytest.raises(ValueError, match="no prompt of the kinds asked for"):
        place.sample_prompts(0, 4, {Family.VERIFIABLE: 1.0})


def test_gold_is_what_the_networks_say(own, files):
    place = world(own, files)
    pairs = place.recorded("train", 9).helpful
    twice = np.repeat(pairs.prompts[:, None], 2, 1)
    gold = place.gold(twice, pairs.responses, pairs.responses_mask)
    said = {name: np.asarray(pair_scores(make_scalar_model(NETWORK), params, pairs))
            for name, params in place.gold_params.items()}  # fmt: skip
    np.testing.assert_allclose(gold.helpfulness, said["helpful"] - 0.25, atol=1e-5)
    np.testing.assert_allclose(gold.harm, said["harm"], atol=1e-5)
    assert float(place.satisfaction_bar) == 0.5
    seen = place.features(twice, pairs.responses, pairs.responses_mask)
    np.testing.assert_array_equal(seen.length, pairs.responses_mask.sum(-1))
    np.testing.assert_array_equal(seen.finished, (pairs.responses == place.eos_id).any(-1))


def test_without_labels_of_harm_nobody_calls_an_answer_harmful(own, files):
    place = world(own, files[:1], names=("helpful",))
    assert place.recorded("test", 3).harm is None
    pairs = place.recorded("train", 9).helpful
    labels = compare(place, Rater(), pairs.prompts, pairs.prompt_mask, pairs.responses, pairs.responses_mask, 0)
    assert labels.harm is None and len(labels.helpful) == 9
    with pytest.raises(ValueError, match="no pair of the data is labelled for 'helpful'"):
        on_file(own, files[1:])


def test_a_stage_sees_another_world_in_other_weights(own, files):
    assert fingerprint(world(own, files)) == fingerprint(world(own, files))
    assert fingerprint(world(own, files)) != fingerprint(world(own, files, seed=1))


def command(own, files, name: str, *options) -> subprocess.CompletedProcess:
    steps = [word for stage in ("preference", "fine-tuning") for word in (
        f"--{stage}.num-steps", 3, f"--{stage}.batch-size", 8)]  # fmt: skip
    words = [sys.executable, ROOT / "experiments/safe_rlhf/constrained_ppo.py", "--scale", "gpu", "--name", name,
             "--runs", own / "runs", "--cache", own / "cache", "--num-pairs", 24, "--num-evaluated", 16,
             "--num-demonstrations", 64, "--lengths.max-prompt", 24, "--lengths.max-response", 10, "--harm-limit", 0.9,
             "--rl.num-iterations", 2, "--rl.batch-size", 8, *steps, "--lora.rank", 2, *options]  # fmt: skip
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=own,
                          env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip


def test_safe_rlhf_runs_on_a_checkpoint_and_files_with_low_rank_changes(own, files):
    done = command(own, files, "recorded", "--checkpoint", own / "checkpoint", "--data", *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found = json.loads((own / "runs/recorded/statistics.json").read_text())
    assert np.isfinite(found["reward_accuracy"]) and np.isfinite(found["cost_excess"])
    assert found["lambda_fall"] is None and "not measured on this data: SR-4 fall" in done.stdout  # lambda is 0 here
    assert f"| {NUM} | {NUM} |" in done.stdout and "the gold network agrees with" in done.stdout
    stages = json.loads((own / "runs/recorded/evidence.json").read_text())
    assert {"sft", "reward", "cost", "constrained", "plain"} <= stages.keys()


@pytest.mark.parametrize("options, message", [((), "--scale gpu works on a checkpoint and a data set"),
                                              (("--scale", "cpu", "--data", "x"), "go together")])  # fmt: skip
def test_what_is_missing_is_said_before_anything_is_written(own, files, options, message):
    done = command(own, files, "nothing", *options)
    assert done.returncode != 0 and message in done.stderr and not (own / "runs/nothing").exists()
