# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A reward model on your own pairs
#
# Load a checkpoint, train it on preference pairs, and look hard at what came out: is it right, does it know how sure it
# may be, does it merely count words, and which pairs does it get most wrong?
#
# Two paths are yours to set, here or as environment variables: a file of pairs (JSON lines, CSV, Parquet; TRL's, HH's
# or PKU's columns among others, `rlhfjax/data/formats.py` has the table) and the directory of a Hugging Face checkpoint
# with its tokenizer. Nothing is fetched. The other settings suit a small model, two CPU cores and some thousand pairs.

# %%
import json
import os
import pathlib
import tempfile
import textwrap

import jax
import numpy as np
from scipy.special import expit

from rlhfjax import losses, stages
from rlhfjax.data.formats import read, split_by_prompt
from rlhfjax.data.tokenize import Lengths, load_tokenizer, preference_batch
from rlhfjax.evaluation import calibration, figures
from rlhfjax.evaluation.statistics import one_run_interval
from rlhfjax.models import huggingface
from rlhfjax.models.lora import LoraConfig, adapt, merge
from rlhfjax.models.transformer import make_scalar_model, scalar_params_from
from rlhfjax.rl.fit import adamw, batch_order, make_fit_step, take, with_frozen
from rlhfjax.rl.preference_models import make_reward_loss, make_score
from rlhfjax.types import TrainState

# %matplotlib inline
PAIRS = os.environ.get("RLHFJAX_PAIRS", "pairs.jsonl")
CHECKPOINT = pathlib.Path(os.environ.get("RLHFJAX_CHECKPOINT", "checkpoint"))
LENGTHS = Lengths(max_prompt=64, max_response=64)  # tokens: a prompt's end is kept, and a response's beginning
LORA = LoraConfig(rank=0)  # 0 trains all weights; LoraConfig(rank=16) a low-rank change, at about 10 times the rate
NUM_STEPS, STRIDE, BATCH, RATE, SEED = 120, 20, 32, 1e-3, 0

# %% [markdown]
# ## The pairs
#
# Every row is kept, or dropped with its reason, before anything is trained. Look at the last column too: a response
# that is cut is judged by its beginning, and if most are, raise `LENGTHS`. The split is by prompt, or a model could
# pass by remembering prompts, and each pair is turned round by a coin: the better one must not always come first.

# %%
records, report = read(PAIRS, seed=SEED)
train, held_out = split_by_prompt(records, 0.2, SEED)
harm = all(record.pref is None for record in records)  # then the comparisons are of harm
chat = load_tokenizer(CHECKPOINT)
pairs, unseen = (preference_batch(rows, chat, LENGTHS, harm=harm, report=report) for rows in (train, held_out))
prefs, decided = unseen.prefs, unseen.prefs != 0.5
quality = "more harmful" if harm else "better"
print(report.table())
print(f"\nwhich response is {quality}? {len(pairs)} pairs to learn from, {len(unseen)} held out")

# %% [markdown]
# ## The checkpoint
#
# Read one pair as the model does, special tokens and all. If the turns do not look as they did when the checkpoint was
# trained, give `load_tokenizer` another template.

# %%
config, trunk = huggingface.load(CHECKPOINT)
family = json.loads((CHECKPOINT / "config.json").read_text())["model_type"]
size = sum(leaf.size for leaf in jax.tree.leaves(trunk))
print(f"{family}: {size:,} parameters, {config.num_layers} layers, width {config.d_model}, {chat.vocab_size} tokens\n")
print(chat.hf.decode(pairs.prompts[0][pairs.prompt_mask[0]]))
for answer, kept in zip(pairs.responses[0], pairs.responses_mask[0]):
    print(textwrap.indent(chat.hf.decode(answer[kept]), "    | ", str))

# %% [markdown]
# ## Training
#
# A reward model is the checkpoint's trunk with a head that says one number, $r$. Bradley and Terry turn two of them
# into a probability, $P(\mathrm{first}) = \sigma(r_1 - r_2)$, and the loss is the surprise at the label. The head is
# zero at first: every pair is a coin toss and the loss is $\ln 2 \approx 0.693$. What is lower has been learned.
#
# `stages.fit_preference_model` does this with checkpoints, on any mesh; here is its loop with all of it to be seen.

# %%
model, key = adapt(make_scalar_model(config), LORA), jax.random.key(SEED)
optimizer = adamw(RATE, NUM_STEPS, weight_decay=0.1)
start = model.init(key) if LORA.rank else scalar_params_from(trunk, model, key)
state = TrainState.create(start, optimizer)
step = jax.jit(make_fit_step(with_frozen(make_reward_loss, model), optimizer))
curves = {"training batches": [], "held-out pairs": []}
for done in range(0, NUM_STEPS + 1, STRIDE):
    if done:
        rows = batch_order(SEED, done - STRIDE, STRIDE, len(pairs), BATCH)
        state, found = step(state, take(pairs, rows), trunk)
        curves["training batches"].append((done - STRIDE / 2, found["loss"], found["accuracy"]))
    scorer = stages.Scorer(make=make_score, config=config, fitted=state.params, lora=LORA, frozen=trunk)
    first, second = (scores := stages.raw_pair_scores(config, scorer, unseen)).T
    loss = losses.soft_bradley_terry_loss(first, second, prefs).mean()
    curves["held-out pairs"].append((done, loss, calibration.pair_accuracy(scores, prefs)))

# %% [markdown]
# Look for the place where the training batches go on falling and the held-out pairs do not: from there on the model
# learns these pairs by heart, and it can begin to in its second epoch. The loss often turns before the accuracy does,
# because it also pays for being sure and wrong. Training can end where it turns, but the pairs that chose that place
# can no longer say how good the model is.

# %%
print(f"an epoch is {len(pairs) // BATCH} steps")
names = "step", "loss", "accuracy"
histories = {arm: dict(zip(names, np.array(points).T)) for arm, points in curves.items()}
figures.training_curves(histories, {"loss": "loss (ln 2 = 0.693 is a coin)", "accuracy": "accuracy"}, columns=2)

# %% [markdown]
# ## How often it is right, and how often it thinks it is
#
# A model that says $\sigma(|r_1 - r_2|)$ expects to be right that often. If it expects more than it achieves it is
# overconfident, if less, timid. The interval speaks of these pairs and this one run: another seed may lie outside.

# %%
gap = scores @ [1.0, -1.0]
accuracy, expected = calibration.pair_accuracy(scores, prefs), expit(np.abs(gap))[decided].mean()
interval = one_run_interval(round(accuracy * decided.sum()), int(decided.sum()))
by_gap = calibration.accuracy_by_gap(scores, prefs)
np.testing.assert_allclose(np.average(by_gap.calibrated, weights=by_gap.count), expected, rtol=1e-6)
print(f"right on {accuracy:.1%} [{interval.low:.1%}, {interval.high:.1%}] of {decided.sum()} held-out pairs; "
      f"it expected {expected:.1%}")  # fmt: skip

# %% [markdown]
# Where the scores are far apart it should be right more often. Below the second line it is surer than it may be; where
# accuracy is flat, the size of a gap says nothing at all.

# %%
figures.lines(by_gap.gap, {"held-out pairs": by_gap.accuracy, "if it were calibrated": by_gap.calibrated},
              "distance of the scores", "accuracy")  # fmt: skip

# %% [markdown]
# The same as probabilities, bin by bin: on the diagonal, of the pairs it gives 70 %, seven in ten are so labelled. What
# is wrong is often one factor, which is fitted here on one half of the pairs and drawn on the other: below 1 the scores
# were too far apart, above 1 too close. It moves probabilities alone; who wins stays as it is.

# %%
half = np.arange(len(unseen)) % 2 == 0
factor = np.clip(calibration.calibration_slope(scores[half], prefs[half]), 0, 100)  # no error on that half: infinite
rest = {f"gaps times {by:.2f}": calibration.reliability(expit(by * gap[~half]), prefs[~half]) for by in (1, factor)}
figures.reliability_figure(rest, f"predicted P(first is {quality})")

# %% [markdown]
# ## Or does it count words?
#
# The commonest shortcut, which shows where the label goes against it: a model that is good on pairs whose longer
# response is labelled and bad on the others has learned length, and RL on it will write long (or short) answers.
# Responses that are cut count as equally long.

# %%
lengths = unseen.responses_mask.sum(-1)
longer = (lengths @ [1, -1]) * np.sign(prefs - 0.5)
print(f"correlation of score gap and length gap {calibration.length_correlation(gap, lengths @ [1, -1]):+.2f}; "
      f'"the longer is {quality}" alone is right on {calibration.pair_accuracy(lengths, prefs):.1%}')  # fmt: skip
for what, kept in (("longer", longer > 0), ("shorter", longer < 0), ("as long", decided & (longer == 0))):
    if kept.any():
        right = calibration.pair_accuracy(scores[kept], prefs[kept])
        print(f"labelled response {what:<8} {kept.sum():5d} pairs, right on {right:.1%}")

# %% [markdown]
# ## What it gets most wrong
#
# No number replaces reading these. Is the label a mistake? Does the difference lie behind the cut? Or does the model
# fall for something that RL would find as well? (The texts are what the model read.)

# %%
margin = np.where(decided, gap * np.sign(prefs - 0.5), np.inf)  # how far the labelled response is ahead
for row in np.argsort(margin)[:4]:
    labelled = int(prefs[row] < 0.5)
    parts = {"prompt": (unseen.prompts[row], unseen.prompt_mask[row])}
    for name, side in ((f"labelled {quality}", labelled), ("the other", 1 - labelled)):
        parts[f"{name}, score {scores[row, side]:+.2f}"] = unseen.responses[row, side], unseen.responses_mask[row, side]
    print(f"P(label) = {expit(margin[row]):.2f}")
    for name, (tokens, mask) in parts.items():
        text = " ".join(chat.hf.decode(tokens[mask], skip_special_tokens=True).split())
        print(textwrap.fill(f"{name}: {text}", 110, initial_indent="  ", subsequent_indent="    "))
    print()

# %% [markdown]
# ## Taking it away
#
# `AutoModelForSequenceClassification.from_pretrained` loads what is written here: low-rank changes are merged, and the
# score is read at the last token that is no pad, which must be the one that ends a response. In this library
# `huggingface.load(folder, make_scalar_model)` gives it back, and it must say what it said before. The folder is a
# temporary one: name one of your own to keep it.

# %%
folder = pathlib.Path(tempfile.mkdtemp()) / "reward-model"
huggingface.save(folder, config, merge(model, trunk, state.params), source=CHECKPOINT, tokenizer=chat.hf,
                 chat_template=chat.template, options={"pad_token_id": chat.pad_id},
                 facts={"trained on": f"{len(pairs)} pairs", "held-out accuracy": f"{accuracy:.3f}"})  # fmt: skip
_, again = huggingface.load(folder, make_scalar_model)
rescored = stages.raw_pair_scores(config, again, unseen)
np.testing.assert_allclose(rescored, scores, rtol=1e-4, atol=1e-4)
print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}\nresponses end with token {chat.end_id}")
