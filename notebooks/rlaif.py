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
# # RLAIF, by the files of two runs
#
# Lee et al. (2309.00267) let a language model say which of two answers is better, and train a policy on its word in
# place of people's. One experiment asks what such labels are worth, by the size of the judge; the other holds RL on
# them against RL on people's labels, and against asking the judge for a rating inside the loop.
#
# This notebook trains nothing. It reads what the newest run of each has left, takes the judges' bias apart and writes
# the learner's objective out for one token. The words fit runs of the default size, not smoke runs.

# %%
import json

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Image, Markdown, display

from rlhfjax import losses
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import read_claims, table
from rlhfjax.io.run import newest_run, read_metrics

# %matplotlib inline
runs = newest_run("rlaif/judges"), newest_run("rlaif/rlaif")
config, statistics = [], []
for run in runs:
    started, found = (json.loads((run / name).read_text()) for name in ("config.json", "statistics.json"))
    config.append(started["config"])
    statistics.append({name: np.nan if value is None else value for name, value in found.items()})
    print(f"{run}, commit {started['commit']}: {' '.join(started['argv'])}")

# %% [markdown]
# ## Judges
#
# A judge reads a prompt and two answers and goes on with "1" or "2". Asked again with the answers swapped, it should
# say the other word; where it does not, a *position* has won, not an answer. These judges have their bias from their
# lessons, where the preferred answer mostly stands first. Judges of balanced lessons are the control.

# %%
display(*(Image(runs[0] / "figures" / name, width=440) for name in ("alignment.png", "position.png")))

# %% [markdown]
# **By hand: what averaging is good for.** Where both orders agree, averaging them changes nothing. Where the same
# position wins twice, one order agrees with people and the other does not: asked once, the judge is right in half of
# these pairs. So all that averaging can gain comes from them,
#
# $$\mathrm{gain} = \mathrm{same} \times (\mathrm{right\ where\ torn} - \tfrac12),$$
#
# and two recorded numbers tell how well the averaged judge does exactly where position had the say.

# %%
orders, widths = ("biased", "balanced"), config[0]["widths"]
values = {name: np.array([[statistics[0][f"{order} {width} {name}"] for width in widths] for order in orders])
          for name in ("alignment", "one_order", "same_position", "gain")}  # fmt: skip
gain, same = values["alignment"] - values["one_order"], values["same_position"]
torn = 0.5 + gain / np.where(same > 0, same, np.nan)
print("lessons    width   one order   averaged   same position   right where torn")
for row, column in np.ndindex(gain.shape):
    print(f"{orders[row]:<10} {widths[column]:5d} {values['one_order'][row, column]:11.3f} "
          f"{values['alignment'][row, column]:10.3f} {same[row, column]:15.3f} {torn[row, column]:18.3f}")  # fmt: skip
np.testing.assert_allclose(gain, values["gain"], atol=1e-9)
np.testing.assert_allclose(gain[0].mean(), statistics[0]["swap_gain"], atol=1e-9)
assert np.all(np.abs(gain) <= same / 2 + 1e-9)

# %% [markdown]
# A judge that is right more often than not where it is torn gains more, the more often it is torn: hence the claim of a
# correlation, over judges of both lessons. By its definition, once more:

# %%
x, y = (part.ravel() - part.mean() for part in (same, gain))
correlation = x @ y / np.sqrt((x @ x) * (y @ y))
np.testing.assert_allclose(correlation, statistics[0]["gain_correlation"], rtol=1e-6)
shown = {f"{order} lessons": (np.sort(same[row]), gain[row, np.argsort(same[row])]) for row, order in enumerate(orders)}
print(f"correlation {correlation:.3f}")
figures.lines(None, shown, "the same position wins in both orders", "what averaging adds")

# %% [markdown]
# ## From verdicts to policies
#
# Three policies from one start: *people* has a reward model of people's labels, *ai* one of the judge's labels for the
# same pairs, and *direct* has no reward model at all: the judge rates every answer from 1 to 10 while RL goes on. Who
# wins is the world's truth, over the same held-out prompts. RL also writes longer answers or shorter ones; a regression
# on the ratio of lengths says who would win at one length.

# %%
found = statistics[1]
wins = {"people against SFT": found["people_win"], "ai against SFT": found["ai_win"],
        "ai against SFT, one length": found["ai_win_at_one_length"], "ai against people": 0.5 + found["ai_advantage"],
        "direct against SFT": found["direct_win_over_SFT"], "direct against ai": found["direct_win"]}  # fmt: skip
np.testing.assert_allclose(found["ai_win"] - found["ai_win_at_one_length"], found["ai_win_by_length"], atol=1e-9)
lines = ["| by the truth | win rate | Elo |", "|---|---|---|"]
for name, win in wins.items():
    lines.append(f"| {name} | {win:.1%} | {400 * np.log10(win / (1 - win)) if 0 < win < 1 else np.nan:+.0f} |")
display(Markdown("\n".join(lines)), Image(runs[1] / "figures" / "training.png", width=760))

# %% [markdown]
# A reward model is fitted once, to answers of the SFT policy, and the policy moves on: do model and judge still agree?
# That is `staleness`, agreement on SFT's pairs minus agreement on the trained policy's. The picture holds each arm's
# own reward against the truth: a line that goes right without going up is a reward that is being fooled.

# %%
print(f"staleness {found['staleness']:+.3f}; judge and people agree on {found['label_agreement']:.1%} of the labels")
shown = {}
for arm in ("people", "ai", "direct"):
    curve = read_metrics(runs[1] / "metrics.jsonl", arm)
    shown[arm] = figures.smooth(curve["score"]), figures.smooth(curve["gold_helpfulness"])
figures.lines(None, shown, "its own reward (sd of SFT)", "gold helpfulness r*")

# %% [markdown]
# ## The objective, for one token
#
# RLAIF maximises $(1 - b)\,r - b\,\mathrm{KL}$ with REINFORCE and a baseline. The library divides by $1 - b$, so that
# scores keep their units: a penalty of $\beta = b / (1 - b)$ per nat of $u = \ln \pi - \ln \pi_\mathrm{ref}$.
#
# Take a policy over three answers of one token. Its objective is a formula, whose slope along each logit a small step
# measures. REINFORCE knows no formula, only $-\ln\pi(y) \cdot (\mathrm{reward}(y) - \mathrm{baseline})$ of what it
# samples. Averaged over all it may sample, its gradient must be the same, *whatever the baseline is*.

# %%
b = (beta := config[1]["ppo"]["kl_coef"]) / (1 + beta)
R, ref, logits = np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.3, 0.5]), np.array([0.3, 0.1, -0.4])
near = logits + 1e-5 * np.vstack([0 * np.eye(3)[:1], np.eye(3), -np.eye(3)])
policies = np.exp(near) / np.exp(near).sum(1, keepdims=True)
policy, objective = policies[0], np.sum(policies * ((1 - b) * R - b * np.log(policies / ref)), axis=1)
slope = (objective[1:4] - objective[4:]) / 2e-5
logprobs, ref_logprobs, mask = jnp.log(policy)[:, None], jnp.log(ref)[:, None], jnp.ones((3, 1), bool)
rewards = losses.kl_shaped_rewards(jnp.array(R), logprobs, ref_logprobs, mask, kl_coef=beta)[:, 0]
np.testing.assert_allclose((1 - b) * rewards, (1 - b) * R - b * np.log(policy / ref), rtol=1e-4)
for baseline in (0.0, float(policy @ rewards)):
    each = jax.vmap(jax.grad(losses.reinforce_loss))(logprobs[:, 0], rewards - baseline)  # by the token's log-prob
    gradient = -(1 - b) * (policy * each) @ (np.eye(3) - policy)  # d ln pi(y) / d logits is 1 at y, minus pi
    np.testing.assert_allclose(gradient, slope, atol=1e-5)
    print(f"baseline {baseline:+.3f}: gradient {np.round(gradient, 4)}, slope of the objective {slope.round(4)}")

# %% [markdown]
# What both amount to. A single seed is never judged.

# %%
Markdown(table(sum((read_claims(run / "claims.json") for run in runs), []), width=None))
