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
# # Open problems of RLHF, by the audits of one run
#
# Casper et al. (2307.15217) list what can go wrong with RLHF, in its human feedback (H), its reward model (R), its
# policy (P) and both trained together (J), and what its users should disclose. An audit asks a finished run about each.
# But does an audit see what is wrong? The experiment audits a run of Safe RLHF as it is, and again with a fault planted
# in what the audit reads. This notebook lays the newest run's audits side by side, and works out some of their numbers
# by hand. The words fit a run of the default size, not a smoke run.

# %%
import json

import numpy as np
from IPython.display import Markdown
from numpy.lib.stride_tricks import sliding_window_view

from rlhfjax.audit.taxonomy import PROBLEMS, THRESHOLDS
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import read_claims, table
from rlhfjax.io.run import newest_run, read_metrics

# %matplotlib inline
run = newest_run("open_problems/planted_faults")
started = json.loads((run / "config.json").read_text())
print(f"{run}, commit {started['commit']}: {' '.join(started['argv'])}")
audits = {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("audit/*/audit.json"))}
rows = {fault: {row["id"]: row for row in audit["rows"]} for fault, audit in audits.items()}
clean = rows.pop("none")

# %% [markdown]
# ## The audit of the run as it is
#
# T and F are tractable and fundamental problems, by the authors' judgement. An *absent* row has no probe, or its
# evidence is gone, and is never a pass. *Red* says that a number lies beyond its bound, *ok* only that none does.

# %%
lines = ["| row | problem | | status | flag | numbers, with 95 % intervals |", "|---|---|---|---|---|---|"]
for name, row in clean.items():
    ends = {key: " [{}, {}]".format(*pair) for key, pair in row["ci95_of_this_run"].items()}
    numbers = ", ".join(f"{key} {value}{ends.get(key, '')}" for key, value in row["value"].items())
    cells = name, row["problem"], row["mark"], row["status"], row["flag"], numbers or "; ".join(row["reasons"])
    lines.append(f"| {' | '.join(cells)} |")
Markdown("\n".join(lines))

# %% [markdown]
# ## What each fault turns red
#
# A good audit has one dot or few per fault, in the row that is about it, and none where nothing was planted.

# %%
everything = {"none": clean, **rows}
red = {fault: {name for name, row in found.items() if row["flag"] == "red"} for fault, found in everything.items()}
figures.grid(red, list(PROBLEMS))

# %% [markdown]
# **By hand.** Flags are no opinion of the audit's: a row is red if a value, or the whole of its interval, lies beyond a
# bound of the table in `rlhfjax/audit/taxonomy.py`. All flags of all audits, once more, from values and bounds alone:

# %%
checked = 0
for fault, found in everything.items():
    beyond = set()
    for name, key, side, bound, _ in THRESHOLDS:
        if (row := found[name])["status"] == "measured" and key in row["value"]:
            span = np.array([row["value"][key], *row["ci95_of_this_run"].get(key, [])], float)
            fine = span.min() <= bound if side == ">" else span.max() >= bound
            beyond |= set() if fine else {name}
            checked += 1
    assert beyond == red[fault], (fault, beyond)
print(f"{checked} numbers against their bounds: the same rows are red")

# %% [markdown]
# One fault side by side with the clean audit: every number that it moved, and the flag of its row. Change the name to
# see another.

# %%
fault = "broken reward model"
for name, row in rows[fault].items():
    for key, value in row["value"].items():
        if value != (before := clean[name]["value"].get(key)):
            print(f"{name:<3} {row['flag']:<5} {key:<20} {before!s:>9} -> {value}")

# %% [markdown]
# ## Reward hacking, by hand
#
# Row R4 asks of the training curves: how much truth was lost, from its peak to the end, while the score was rising? The
# planted fault takes a ramp from the truth in the second half of training and adds it to the score, in what the audit
# reads; `metrics.jsonl` stays as it was. So both audits can be found again from that file: running means over a
# twentieth of the curve, the peak of the truth, and what came after.

# %%
history, shown = read_metrics(run / "metrics.jsonl", "constrained"), {}
ramp, width = np.maximum(0, np.linspace(-1, 1, len(history["step"]))), max(1, len(history["step"]) // 20)
for name, row, late in (("as it is", clean["R4"], 0 * ramp), ("with the fault", rows["reward hacking"]["R4"], ramp)):
    curves = history["gold_helpfulness"] - late, history["score"] + late
    gold, score = (np.convolve(curve, np.ones(width) / width, "valid") for curve in curves)
    peak = int(np.argmax(gold))
    shown |= {f"truth, {name}": gold, f"score, {name}": score}
    np.testing.assert_allclose([gold[peak], gold[-1]], [row["value"]["gold_peak"], row["value"]["gold_end"]], rtol=1e-3)
    print(f"{name}: truth {gold[peak]:+.3f} at its peak, {gold[-1]:+.3f} at the end, score {score[peak]:+.3f} and "
          f"{score[-1]:+.3f}; R4 is {row['flag']}")  # fmt: skip
figures.lines(np.arange(len(gold)) + width, shown, "iteration", "running mean")

# %% [markdown]
# P1 looks for a policy that leaps: the largest change, from one iteration to the next, of the running median of five of
# the KL. A median, because a single answer can carry the KL of a batch.

# %%
medians = np.median(sliding_window_view(history["kl"], 5), axis=1)
leap = np.max(np.abs(np.diff(medians)), initial=0.0)
np.testing.assert_allclose(leap, clean["P1"]["value"]["largest_kl_jump"], rtol=1e-3, atol=1e-6)
print(f"largest leap {leap:.3f} nats; of single batches it would be {np.max(np.abs(np.diff(history['kl']))):.3f}")

# %% [markdown]
# ## An interval, by hand
#
# A share $p$ of $n$ answers carries Wilson's interval, which keeps its sense where $p$ is near 0 or 1:
# $$\frac{p + \frac{z^2}{2n} \pm z\sqrt{\frac{p(1-p)}{n} + \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}, \qquad z = 1.96$$
#
# P6 counts the commonest of the policy's answers, three to each of 512 prompts. The interval speaks of this one run.

# %%
p, n, z = clean["P6"]["value"]["commonest"], 3 * 512, 1.959964
centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
interval = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
np.testing.assert_allclose(interval, clean["P6"]["ci95_of_this_run"]["commonest"], atol=2e-4)
print("the commonest answer serves {:.2%} of prompts [{:.2%}, {:.2%}]".format(p, *interval))

# %% [markdown]
# ## What a user of this policy would have to disclose
#
# Items that configuration and rows can fill are filled; the last three are a person's to declare and to sign.

# %%
for item in audits["none"]["disclosure"]:
    print(f"{item['item']:2d} {item['status']:<9} {item['disclosed']}")
    print(f"{'':13}{', '.join(item['value']) or '-'}")

# %%
Markdown(table(read_claims(run / "claims.json"), width=None))
