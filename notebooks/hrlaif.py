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
# # HRLAIF, by the files of one run
#
# Li et al. (2403.08309) saw RL on an AI's labels win more comparisons and satisfy people *less* often: the judge liked
# how answers sounded and missed that they were wrong. Their hybrid labels check first what can be checked, and ask the
# judge only then; a red team and rewritten answers see to harmlessness.
#
# The experiment gives a judge a taste for style, in several doses, and trains a policy on its labels with and without
# the check. This notebook trains nothing. It reads what the newest run has left, works out its main numbers again, and
# labels a few answers by hand. The words fit a run of the default size; a smoke run is too short for them.

# %%
import dataclasses
import json

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import read_claims, table
from rlhfjax.feedback.hybrid import hybrid_prefs, with_style_bias
from rlhfjax.io.run import newest_run, read_metrics
from rlhfjax.types import PreferenceBatch
from rlhfjax.worlds.gold_world import gold_world

# %matplotlib inline
run = newest_run("hrlaif/hybrid")
started, found = (json.loads((run / name).read_text()) for name in ("config.json", "statistics.json"))
config, statistics = started["config"], {name: np.nan if value is None else value for name, value in found.items()}
doses = config["doses"]
basic, plain = f"basic {doses[-1]:g}", f"basic {doses[0]:g}"
print(f"{run}, commit {started['commit']}: {' '.join(started['argv'])}")
print(f"a word of style adds to the judge's log-odds: {', '.join(f'{dose:g}' for dose in doses)}")

# %% [markdown]
# ## What a hybrid label is
#
# Four pairs, in each of which a judge would say 60 % for the first answer. Its taste for style enters the log-odds,
# $\mathrm{logit}\,p + w\,(s_1 - s_2)$ for $s$ words of style. The check then looks at questions only. A right answer
# beats a wrong one whatever the judge says; two right ones are the judge's to compare; two wrong ones are a tie.

# %%
world, asked = gold_world(config["truth"]), "what is three plus four ?"
pairs = [
    (asked, "the answer is seven .", "sure great the answer is six ."),
    (asked, "the answer is seven .", "sure great the answer is seven ."),
    (asked, "the answer is five .", "sure great the answer is six ."),
    ("how do i open my rusty lock ?", "first turn the pin .", "sure great first turn the pin ."),
]
both = [world.responses([pair[i] for pair in pairs]) for i in (1, 2)]
prompts = world.prompts([pair[0] for pair in pairs])
judged = PreferenceBatch(
    prompts=prompts.tokens, prompt_mask=prompts.mask, responses=np.stack([tokens for tokens, _ in both], 1),
    responses_mask=np.stack([mask for _, mask in both], 1), prefs=np.full(len(pairs), 0.6, np.float32))  # fmt: skip
biased = with_style_bias(world, judged, doses[-1])
labels = hybrid_prefs(world, dataclasses.replace(judged, prefs=biased.prefs))

by_hand = 1 / (1 + np.exp(-(np.log(0.6 / 0.4) + doses[-1] * (0 - 2))))
np.testing.assert_allclose(biased.prefs, by_hand, rtol=1e-5)
np.testing.assert_allclose(labels, [1.0, by_hand, 0.5, by_hand], rtol=1e-5)
print("P(first better): judge -> with its taste -> checked")
for (prompt, first, second), before, taste, label in zip(pairs, judged.prefs, biased.prefs, labels):
    print(f"{before:.2f} -> {taste:.2f} -> {label:.2f}   {prompt}  {first}  |  {second}")

# %% [markdown]
# ## What RL makes of such labels
#
# A reward model and a policy for each arm, from one start: *basic* labels at every dose, *hybrid* ones at the largest
# dose, and *harmless*, which adds pairs that prefer a harmless rewrite. Curves are means over each batch.

# %%
curves = {arm: read_metrics(run / "metrics.jsonl", arm) for arm in (plain, basic, "hybrid", "harmless")}
figures.training_curves(curves, {
    "score": "its own reward (sd of SFT)", "satisfaction": "satisfaction", "satisfaction_checkable": "on questions",
    "style_words": "words of style per answer", "wrong_steps": "wrong steps per answer", "kl": "KL to SFT (nats)",
})  # fmt: skip

# %% [markdown]
# An answer *satisfies* if its true worth is above a bar, an absolute matter; it *wins* if simulated people, who like a
# word of style a little, prefer it to the SFT policy's. The two can part, and that is the paper's point. On held-out
# prompts, by kind; only on questions is there a key to check with:

# %%
arms = ["SFT", *(name.removesuffix(" win") for name in statistics if name.endswith(" win"))]
kinds = {"satisfaction": "all prompts", "satisfaction_benign": "benign", "satisfaction_checkable": "questions"}
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
for index, (kind, label) in enumerate(kinds.items()):
    heights = [statistics[f"{arm} {kind}"] for arm in arms]
    axis.bar(np.arange(len(arms)) + 0.27 * (index - 1), heights, 0.25, color=figures.ARMS[index], label=label)
axis.set_xticks(range(len(arms)), arms)
axis.legend(frameon=False, labelcolor="linecolor", ncols=3, loc="upper left", bbox_to_anchor=(0, 1.15))
figures.finish(axis, "share of answers that satisfy")
plt.show()

# %%
names = ("satisfaction", "satisfaction_checkable", "harm_rate", "style_words")
lines = ["| arm | people prefer it to SFT | satisfaction | on questions | harm, dangerous prompts | words of style |",
         "|---|---|---|---|---|---|"]  # fmt: skip
for arm in arms:
    win = f"{statistics[f'{arm} win']:.1%}" if arm != "SFT" else ""
    lines.append(f"| {arm} | {win} | " + " | ".join(f"{statistics[f'{arm} {name}']:.3f}" for name in names) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# ## The dose, by hand
#
# If the taste for style is to blame, more of it should do more harm to satisfaction. All arms share prompts, pairs and
# start, so differences are what counts: from SFT, from the judge without that taste, and from hybrid to basic labels.

# %%
satisfied = {arm: statistics[f"{arm} satisfaction"] for arm in arms}
for name, value in {
    "basic_satisfaction": satisfied[basic] - satisfied["SFT"],
    "hybrid_satisfaction": satisfied["hybrid"] - satisfied["SFT"],
    "hybrid_over_basic": satisfied["hybrid"] - satisfied[basic],
    "dose_response": satisfied[basic] - satisfied[plain],
    "harm_change": statistics["harmless harm_rate"] - statistics[f"{basic} harm_rate"],
}.items():
    np.testing.assert_allclose(value, statistics[name], atol=1e-9)
    print(f"{name:<20} {value:+.4f}")
figures.lines(doses, {
    "satisfaction minus SFT's": [satisfied[f"basic {dose:g}"] - satisfied["SFT"] for dose in doses],
    "people's win rate minus 1/2": [statistics[f"basic {dose:g} win"] - 0.5 for dose in doses],
}, "log-odds for a word of style", "basic RLAIF")  # fmt: skip

# %% [markdown]
# What it amounts to. Thresholds were fixed before any run that counts; a single seed is never judged.

# %%
Markdown(table(read_claims(run / "claims.json"), width=None))
