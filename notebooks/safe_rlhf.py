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
# # One run of Safe RLHF, by its files
#
# Safe RLHF (Dai et al., 2310.12773) trains a language model to be more helpful while its expected harm stays under a
# limit. How much helpfulness a bit less harm is worth is not chosen by hand: it is a Lagrange multiplier λ, a price
# that rises while the policy is too harmful and falls while it is safer than it has to be.
#
# This notebook trains nothing. It reads the directory that one run left behind, shows what was asked, what came out
# and how λ got there, and then **recomputes every value of λ with a pencil**, from nothing but the recorded costs.
# The words between the figures fit a run of the default size; a smoke run is too short for them, not for the pencil.

# %%
import json
import math

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown

from rlhfjax import losses
from rlhfjax.evaluation.claims import read_claims, table
from rlhfjax.evaluation.figures import COST, GIVEN, INK, REWARD
from rlhfjax.evaluation.gold_metrics import as_text
from rlhfjax.io.run import newest_run, read_metrics

run = newest_run("safe_rlhf/constrained_ppo")
print("reading", run)

# %% [markdown]
# ## What was asked
#
# `config.json` has the resolved configuration, beside versions, commit and command line. Three parts of it matter here:
# how PPO updates the policy, for how long, and how λ moves. The limit is on the probability that an answer is harmful,
# in the eyes of the cost model.

# %%
started = json.loads((run / "config.json").read_text())
config = started["config"]
print(f"{' '.join(started['argv'])}\nscale {config['scale']}, truth {config['truth']}, seed {config['seed']}, "
      f"commit {started['commit']}, {started['device']['kind']}")  # fmt: skip
print(f"\nlimit on the mean P(harmful): {config['harm_limit']:g}")
for part in ("ppo", "rl", "multiplier"):
    print(f"\n{part}:", ", ".join(f"{name} {value}" for name, value in config[part].items()))

# %% [markdown]
# ## Before and after, in words
#
# `samples.json` has the answers of three policies to the same prompts: **SFT**, from which RL started, **plain**, after
# RL on the reward alone, and **constrained**, after Safe RLHF. In front of each answer stands the truth of this small
# world, which no learner saw: helpfulness r\*, then harm c\*. Above 0 an answer is harmful.
#
# On a dangerous prompt the very words that help are the ones that harm. There look for the difference between an
# answer that is careful and one that refuses: only the first is what the paper promises.

# %%
samples = json.loads((run / "samples.json").read_text())
for kind in ("benign", "dangerous", "grey", "verifiable"):
    print(as_text([sample for sample in samples if sample["kind"] == kind][:2]), end="\n\n")

# %% [markdown]
# ## What the preference models know
#
# People, here simulated ones, compared answers by two questions: which is more helpful, which is more harmful? They
# also said of each answer whether it is harmful at all. A cost model learns from both: the comparisons order its
# scores, and the second label puts their zero where harm begins, so that σ(C) is a probability. That zero is what makes
# "stay under a limit" a sentence with a meaning: the last column has a cost model that learnt from comparisons alone
# (as the reward model does, whose zero nobody needs). Labels are noisy, so nobody reaches 100 %: *ceiling* is how often
# a label agrees with what its rater felt.

# %%
statistics = json.loads((run / "statistics.json").read_text())
share = {name: f"{value:.1%}" for name, value in statistics.items()}
Markdown(f"""
| of held-out answers | ceiling | with signs | comparisons only |
|---|---|---|---|
| which is more helpful? | {share["ceiling_helpful"]} | | {share["reward_accuracy"]} |
| which is more harmful? | {share["ceiling_harm"]} | {share["cost_rank_accuracy"]} | {share["pairwise_rank_accuracy"]} |
| is it harmful at all? | {share["ceiling_sign"]} | {share["sign_accuracy"]} | {share["pairwise_sign_accuracy"]} |
""")

# %%
Image(run / "figures" / "calibration.png", width=380)

# %% [markdown]
# ## A policy under a limit
#
# λ in the upper panel answers to the cost in the lower one. It rises for as long as the cost is above its limit (red),
# and gives way slowly once there is slack.

# %%
Image(run / "figures" / "multiplier.png", width=620)

# %% [markdown]
# The same prompts, the same start, with the limit and without it. Watch the harm rate on dangerous prompts against
# the safe help there, and the refusals on benign ones, where refusing is no virtue.

# %%
Image(run / "figures" / "training.png", width=900)

# %% [markdown]
# Where the answers went, after the paper's own figure: every point is an answer, as its two models see it. RL on the
# reward alone climbs, and drifts to the right; Safe RLHF climbs on the left of the line.

# %%
Image(run / "figures" / "scatter.png", width=1000)

# %% [markdown]
# What it amounts to. Thresholds were fixed before any run that counts; a single seed shows how a claim is measured and
# is never judged.

# %%
Markdown(table(read_claims(run / "claims.json"), width=None))

# %% [markdown]
# ## The dual, by hand
#
# The problem is to maximise E[R] subject to E[C] ≤ limit. Its Lagrangian is E[R] − λ (E[C] − limit). The policy
# climbs it; λ descends it, which is *ascent* on the excess cost. Safe RLHF takes that step on ln λ, so that λ stays
# positive whatever happens:
#
# $$\ln\lambda \leftarrow \ln\lambda + \alpha\,\lambda\,(\bar C - \mathrm{limit}), \qquad \lambda \le \lambda_{\max}$$
#
# once per batch of answers. $\bar C$ is a moving average of the batches' mean costs, *without* the KL penalty: the
# limit is on what the cost model says.
#
# One change of units. RL sees costs as P(harmful) divided by its standard deviation over the SFT policy's answers, so
# that rewards and costs speak equally loud. The limit is divided by the same number; `statistics.json` has the result.

# %%
history = read_metrics(run / "metrics.jsonl", "constrained")
asked, limit = config["multiplier"], statistics["limit"]
print(f"P(harmful) <= {config['harm_limit']:g} is a cost of at most {limit:.4f}: "
      f"one unit of cost is {config['harm_limit'] / limit:.4f} in probability")  # fmt: skip

average, log_lambda, averages, log_lambdas = 0.0, math.log(asked["initial"]), [], []
for count, cost in enumerate(history["cost"]):
    average += max(1 - asked["average_decay"], 1 / (count + 1)) * (cost - average)
    log_lambda += asked["learning_rate"] * math.exp(log_lambda) * (average - limit)
    log_lambda = min(log_lambda, math.log(asked["maximum"]))
    averages.append(average)
    log_lambdas.append(log_lambda)

# %% [markdown]
# That is the whole algorithm of the dual, in plain Python and float64. The run did it in JAX with optax, in float32,
# amid six networks. Do they agree, at every step?

# %%
recorded = np.log(history["lambda"])
np.testing.assert_allclose(averages, history["cost_average"], rtol=1e-4)
np.testing.assert_allclose(log_lambdas, recorded, rtol=1e-5, atol=1e-4)
print(f"{len(recorded)} steps, largest difference of ln lambda {np.abs(log_lambdas - recorded).max():.1e}\n")

print("step     cost  average   excess   lambda by hand   recorded")
for step in sorted({0, 1, 2, int(np.argmax(recorded)), len(recorded) - 1} & set(range(len(recorded)))):
    print(f"{step:4d} {history['cost'][step]:8.4f} {averages[step]:8.4f} {averages[step] - limit:+8.4f} "
          f"{math.exp(log_lambdas[step]):16.6g} {history['lambda'][step]:10.6g}")  # fmt: skip

# %% [markdown]
# ### What λ remembers
#
# In small steps $d\ln\lambda = \alpha\lambda\,(\bar C - \mathrm{limit})\,dt$ is the same as
# $d(1/\lambda) = \alpha\,(\mathrm{limit} - \bar C)\,dt$: **1/λ adds up the slack of the whole run.** Harm early on is
# large and slack later is small, and each unit of the one takes a unit of the other to undo: that is why the curve
# above climbs fast and comes down slowly, and why a λ that nobody needs fades like 1 / time, never to zero.

# %%
steps = np.diff(log_lambdas, prepend=math.log(asked["initial"]))
summed = 1 / asked["initial"] - asked["learning_rate"] * np.sum(np.array(averages) - limit)
print(f"1/lambda at the end {1 / history['lambda'][-1]:.4g}, by the sum {summed:.4g} "
      f"(good for small steps that meet no bound; the largest here was {np.abs(steps).max():.3g})")  # fmt: skip

# %% [markdown]
# ### Complementary slackness
#
# Where the dual has settled, λ (E[C] − limit) = 0: either the limit binds and λ is what it costs, or the policy is
# under it of its own accord and λ fades. The claim SR-4 allows a gap of 0.15 sd of the SFT policy's cost, or λ up to
# 0.1, over the last fifth of the run, and is a number below 1 where one of the two holds.

# %%
last = slice(-max(1, len(recorded) // 5), None)
gap, price = np.mean(history["cost"][last]) - limit, np.mean(history["lambda"][last])
print(f"last fifth: cost - limit = {gap:+.4f}, lambda = {price:.4f}, their product {price * gap:+.4f}\n"
      f"SR-4 slack: {min(abs(gap) / 0.15, price / 0.1):.3f} by hand, with an sd of 1 by the choice of units; "
      f"{statistics['slackness']:.3f} with the sd on held-out prompts")  # fmt: skip

# %% [markdown]
# ### λ moves the trade-off, never the leash
#
# A penalty on u = ln π − ln π_ref, token by token, holds the policy to the SFT policy. Safe RLHF takes half of it from
# the reward, adds half to the cost, and divides the mixture by 1 + λ:
#
# $$\frac{(R - \frac\beta2 u) - \lambda\,(C + \frac\beta2 u)}{1 + \lambda} =
#   \frac{R - \lambda C}{1 + \lambda} - \frac\beta2 u$$
#
# The penalty weighs β/2 at every λ. All of it on the reward would weigh β / (1 + λ): the leash would loosen just when λ
# pulls hardest. (Whitening the advantages, which comes after the mixing, scales all terms alike.) By the library's own
# functions, for one token with u = 1 and nothing to win or lose:

# %%
beta, no_score = config["ppo"]["kl_coef"], np.zeros(())
rewards, costs = losses.kl_shaped_rewards_and_costs(
    no_score, no_score, np.ones(1), np.zeros(1), np.ones(1, bool), kl_coef=beta
)
print("lambda   weight of R   weight of C   of the penalty   were it on R alone")
for lam in sorted({0.1, 1.0, asked["maximum"], float(history["lambda"].max())}):
    even = -losses.mixed_advantages(rewards, costs, np.log([lam]))[0]
    on_reward = -losses.mixed_advantages(2 * rewards, 0 * costs, np.log([lam]))[0]
    print(f"{lam:6.2f} {1 / (1 + lam):13.3f} {lam / (1 + lam):13.3f} {even:16.4f} {on_reward:20.4f}")
    assert math.isclose(even, beta / 2, rel_tol=1e-5)

# %% [markdown]
# ## Where λ settles, and when it cannot
#
# A prompt with three possible answers is small enough for the whole truth. Fix λ, let the policy learn until it stops,
# and it is a closed formula, `tempered_policy`:
#
# $$\pi_\lambda \propto \pi_\mathrm{ref}\,\exp\frac{R - \lambda C}{(1 + \lambda)\,k}, \qquad k = \beta / 2$$
#
# So the expected cost is a known function of λ, and λ settles where that function crosses the limit. Even an infinite λ
# does not silence the reference, so there is a floor, `reachable_cost`, and a limit below the floor is *infeasible*.
#
# The dual ascent of above now runs against this policy twice, with a limit that can be met and one that cannot.

# %%
answers = ("refuse", "help carefully", "help recklessly")
R, C, ref_logprobs, kl_coef = np.array([-1.0, 0.5, 2.0]), np.array([0.0, 0.3, 2.5]), np.log([0.2, 0.3, 0.5]), 1.0
floor = float(losses.reachable_cost(C, ref_logprobs, kl_coef=kl_coef))
grid = np.geomspace(0.01, 100, 1000)
expected_cost = losses.tempered_policy(R, C, ref_logprobs, log_lambda=np.log(grid)[:, None], kl_coef=kl_coef) @ C

feasible, infeasible, paths = 0.5, 0.1, {}
for bandit_limit in (feasible, infeasible):
    ln_lambda, paths[bandit_limit] = 0.0, [1.0]
    for _ in range(150):
        policy = losses.tempered_policy(R, C, ref_logprobs, log_lambda=ln_lambda, kl_coef=kl_coef)
        ln_lambda = min(ln_lambda + 0.1 * math.exp(ln_lambda) * float(policy @ C - bandit_limit), math.log(5))
        paths[bandit_limit].append(math.exp(ln_lambda))

settled, crossing = paths[feasible][-1], np.interp(feasible, expected_cost[::-1], grid[::-1])
np.testing.assert_allclose(settled, crossing, rtol=1e-2)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
left.semilogx(grid, expected_cost, color=COST)
left.axhline(feasible, color=GIVEN, ls="--")
left.axhspan(0, floor, color=GIVEN, alpha=0.2, lw=0)
left.plot(crossing, feasible, "o", color=INK)
left.annotate(f"λ* = {crossing:.2f}", (crossing, feasible), (6, 6), textcoords="offset points", color=INK)
left.text(0.011, feasible + 0.04, f"limit {feasible}", color=GIVEN)
left.text(0.011, floor / 2, f"out of reach: below {floor:.2f}", color=GIVEN, va="center")
left.set(xlabel="λ", ylabel="expected cost of the settled policy", ylim=(0, None))
right.plot(paths[feasible], color=REWARD, label=f"limit {feasible}")
right.plot(paths[infeasible], color=COST, label=f"limit {infeasible}, infeasible")
right.axhline(crossing, color=GIVEN, ls="--")
right.set(xlabel="step of the dual", ylabel="λ", ylim=(0, 5.4))
right.legend(frameon=False, labelcolor="linecolor", loc="center right")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# At λ\* the policy has nothing left to gain: what it is trained on, the mixed advantage with its penalty, is the same
# for every answer. And note what the limit buys: not refusals so much as careful help in place of the reckless kind.

# %%
policy = losses.tempered_policy(R, C, ref_logprobs, log_lambda=math.log(crossing), kl_coef=kl_coef)
left_to_gain = losses.mixed_advantages(R, C, math.log(crossing)) - kl_coef / 2 * (np.log(policy) - ref_logprobs)
np.testing.assert_allclose(left_to_gain, left_to_gain.mean(), atol=1e-5)
for answer, before, after, advantage in zip(answers, np.exp(ref_logprobs), policy, left_to_gain):
    print(f"{answer:<16} {before:.2f} -> {after:.2f}, mixed advantage with its penalty {advantage:.4f}")

# %% [markdown]
# The infeasible limit shows itself in training as λ at its upper bound with the cost still above the limit: a run that
# has drowned its reward for nothing. The floor is known before the first step, so the experiment asks first
# (`stages.check_cost_limit`, where a few answers to each of some prompts stand for the arms) and says:

# %%
try:
    losses.check_limit(infeasible, floor)
except ValueError as error:
    print(error)
