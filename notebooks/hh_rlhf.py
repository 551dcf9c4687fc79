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
# # HH-RLHF, by the files of three runs
#
# Bai et al. (2204.05862) trained a helpful and harmless assistant from people's comparisons, and measured much on the
# way: how preference models improve with size and data, what RL does to the reward it climbs and to one that it never
# saw, and whether fresh labels help. Three experiments put these to the test where the truth is known.
#
# This notebook trains nothing. It reads what the newest run of each has left, and works out two of the paper's laws
# by hand. The words fit runs of the default size; smoke runs are too short for them, not for the pencil.

# %%
import json

import numpy as np
from IPython.display import Image, Markdown, display

from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import read_claims, table
from rlhfjax.io.run import newest_run, read_metrics

# %matplotlib inline
runs = newest_run("hh_rlhf/scaling"), newest_run("hh_rlhf/overoptimisation"), newest_run("hh_rlhf/online")
statistics = []
for run in runs:
    started, found = (json.loads((run / name).read_text()) for name in ("config.json", "statistics.json"))
    statistics.append({name: np.nan if value is None else value for name, value in found.items()})
    print(f"{run}, commit {started['commit']}: {' '.join(started['argv'])}")

# %% [markdown]
# ## How accuracy grows
#
# Preference models of several sizes learn from sets of labels of several sizes, and are asked about pairs they never
# saw. The paper fits, with $P$ parameters and $D$ pairs, 0.72 + 0.007 ln($P$ / 1e11) + 0.015 ln($D$ / 8e4).

# %%
Image(runs[0] / "figures" / "scaling.png", width=560)

# %% [markdown]
# **By hand.** The law is linear in both logarithms, so it is one line of least squares on the accuracies that
# `statistics.json` has for every size and amount. It should give the very slopes that the run reports.

# %%
cells = [(*map(int, name.split()[1:]), value) for name, value in statistics[0].items() if name[:9] == "accuracy "]
sizes, amounts, accuracies = np.array(cells).T
design = np.stack([np.ones(len(cells)), np.log(sizes), np.log(amounts)], axis=1)
coefficients = np.linalg.lstsq(design, accuracies)[0]
rest = accuracies - design @ coefficients
r2 = 1 - np.sum(rest**2) / np.sum((accuracies - accuracies.mean()) ** 2)
reported = [statistics[0][name] for name in ("size_slope", "data_slope", "r2")]
np.testing.assert_allclose([*coefficients[1:], r2], reported, rtol=1e-6, atol=1e-9)
print("accuracy = {:.3f} + {:.4f} ln P + {:.4f} ln D".format(*coefficients), f"for {len(cells)} models, R2 {r2:.3f}")
print("twice the size adds {:+.4f}, twice the data {:+.4f}".format(*np.log(2) * coefficients[1:]))

# %% [markdown]
# What the law leaves over shows a bend, if there is one: one sign in the middle, the other at both ends.

# %%
left = {f"{size:,.0f} parameters": rest[sizes == size] for size in np.unique(sizes)}
figures.lines(np.unique(amounts), left, "labelled pairs", "accuracy minus the law", log=True)

# %% [markdown]
# A model can rank well and still be wrong about how sure it may be. First: the largest model's P(first preferred)
# against how often it is. Then the paper's warning: where *both* answers score high there is less to tell them apart
# by. A calibrated model knows that (its second line), so only what accuracy loses beyond that line is overconfidence.

# %%
display(*(Image(runs[0] / "figures" / name, width=420) for name in ("calibration.png", "upper_tail.png")))

# %% [markdown]
# ## Climbing one reward, watched by another
#
# RL climbs the score of the *train* model. The *test* model learned from other labels and rewards nobody. Here there is
# a third line, which the paper could not draw: the truth. Where the train score goes on without the other two, RL has
# begun to find answers that please one model only. (Scores are in standard deviations of the SFT policy's answers, the
# truth in its own unit: compare shapes, not heights.)

# %%
large = read_metrics(runs[1] / "metrics.jsonl", "large")
root = np.sqrt(np.maximum(figures.smooth(large["kl"]), 0))
names = {"train model": "score", "test model": "test", "gold": "gold_helpfulness"}
figures.lines(root, {name: figures.smooth(large[key]) for name, key in names.items()}, "sqrt(KL to SFT)", "score")

# %% [markdown]
# **By hand.** The paper finds reward to grow like $\sqrt{\mathrm{KL}}$ early on. Early means: until half of the largest
# gain is reached, and at least five points. Both laws pass through the origin and have one coefficient, so each is a
# single division, and Akaike's criterion, $n \ln(\mathrm{RSS} / n) + 2k$, lower being better, compares them.

# %%
gain = large["score"] - large["score"][0]
early = slice(1, max(6, 1 + int(np.argmax(gain > gain.max() / 2))))
d, gain = np.sqrt(np.maximum(large["kl"][early], 1e-6)), gain[early]
shown = {"measured": (np.sort(d), gain[np.argsort(d)])}
for law, name, x in (("sqrt", "sqrt(KL)", d), ("linear", "KL", d**2)):
    slope = x @ gain / (x @ x)
    rss = np.sum((gain - slope * x) ** 2)
    aic = len(gain) * np.log(rss / len(gain)) + 2
    print(f"gain = {slope:.3f} {name}: R2 {1 - rss / (gain @ gain):.3f}, AIC {aic:.1f}")
    np.testing.assert_allclose(aic, statistics[1][f"AIC {law}"], rtol=1e-6)
    shown[name] = np.sort(d), slope * np.sort(x)
figures.lines(None, shown, "sqrt(KL to SFT)", "gain of the train score")

# %% [markdown]
# There is a way to climb without training: write $n$ answers and hand over the one that scores best. Its KL is at most
# $\ln n - (n - 1) / n$, so both ways fit into one picture. Look at what the same score is worth in truth by either.

# %%
n = np.array([int(name.split()[2]) for name in statistics[1] if name.startswith("best of") and "gold" in name])
best = {kind: [statistics[1][f"best of {k} {kind}"] for k in n] for kind in ("proxy", "gold")}
by_choice = np.sqrt(np.log(n) - (n - 1) / n)
figures.lines(None, {
    "RL, train model": (root, figures.smooth(large["score"])), "best of n, train model": (by_choice, best["proxy"]),
    "RL, gold": (root, figures.smooth(large["gold_helpfulness"])), "best of n, gold": (by_choice, best["gold"]),
}, "sqrt(KL to SFT)", "score")  # fmt: skip

# %% [markdown]
# ## Fresh labels
#
# Two arms have equally many labels. *Static* spends all of them on answers of the SFT policy. *Online* spends half on
# answers of a policy that was trained on the other half ("first"): its labels are where RL goes. Means of r\*, the
# truth, on held-out prompts:

# %%
lines = ["| policy | all prompts | benign | checkable | dangerous |", "|---|---|---|---|---|"]
for arm in ("SFT", "first", "static", "online"):
    found = [statistics[2][f"{arm} gold_helpfulness{kind}"] for kind in ("", "_benign", "_checkable", "_dangerous")]
    lines.append(f"| {arm} | " + " | ".join(f"{value:+.2f}" for value in found) + " |")
Markdown("\n".join(lines))

# %%
wins = np.array([statistics[2][name] for name in ("online_win_rate", "static against SFT", "online against SFT")])
points = 400 * np.log10(wins / (1 - wins))  # Elo, in which the paper speaks
np.testing.assert_allclose(points[0] if np.isfinite(points[0]) else np.nan, statistics[2]["online_elo"], atol=1e-6)
print("online against static {:+.0f} Elo, static against SFT {:+.0f}, online against SFT {:+.0f}".format(*points))
Image(runs[2] / "figures" / "training.png", width=900)

# %% [markdown]
# What all three amount to. Thresholds were fixed before any run that counts; a single seed is never judged.

# %%
Markdown(table(sum((read_claims(run / "claims.json") for run in runs), []), width=None))
