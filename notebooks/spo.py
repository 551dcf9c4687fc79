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
# # SPO, by the files of three runs
#
# Swamy et al. (2401.04056) do without a reward model: an answer is worth the share of its rivals that it is preferred
# to, and the rivals come from the policy itself. No reward need exist. If people prefer A to B, B to C and C to A,
# there is no best answer, but there is still a best *mixture*: the minimax winner, which nothing beats on average.
#
# Three experiments look for it: in matrix games, with language models, and with a point mass that is pushed about. This
# notebook trains nothing; it reads the newest run of each, and computes the winner and who is how far from it by hand.
# The words fit runs of the default size, not smoke runs.

# %%
import json

import jax.numpy as jnp
import numpy as np
from IPython.display import Image, Markdown

from rlhfjax import losses
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import read_claims, table
from rlhfjax.evaluation.game_figures import simplex_figure
from rlhfjax.feedback.self_play import MANNERS
from rlhfjax.io.run import newest_run, read_metrics
from rlhfjax.worlds.games import cyclic_game, minimax_winner

# %matplotlib inline
runs = newest_run("spo/matrix_games"), newest_run("spo/text"), newest_run("spo/control")
config, statistics = [], []
for run in runs:
    started, found = (json.loads((run / name).read_text()) for name in ("config.json", "statistics.json"))
    config.append(started["config"])
    statistics.append({name: np.nan if value is None else value for name, value in found.items()})
    print(f"{run}, commit {started['commit']}: {' '.join(started['argv'])}")

# %% [markdown]
# ## The winner of a cycle
#
# A beats B by a margin $a$, B beats C by $b$, C beats A by $c$: win probabilities are one half plus half a margin. The
# matrix says what the row wins from the column. A mixture $p$ is unbeaten if no row wins anything from it: $Mp \le 0$.
# With three classes that is solved at sight: each class is as common as the margin *between the other two* is wide.
# $$p^* = \frac{(b, c, a)}{a + b + c}$$

# %%
a, b, c = config[0]["margins"]
game = np.array([[0, a, -c], [-a, 0, b], [c, -b, 0]])
winner = np.array([b, c, a]) / (a + b + c)
np.testing.assert_allclose(game, cyclic_game(a, b, c))
np.testing.assert_allclose(game @ winner, 0, atol=1e-12)
np.testing.assert_allclose(minimax_winner(game), winner, atol=1e-9)  # by linear programming, for any number of classes
print(f"margins {a:g}, {b:g}, {c:g}: the winner is {winner.round(4)}")

# %% [markdown]
# *Exploitability* is what the best reply wins from a mixture, the largest entry of $Mp$: 0 for the winner, and for a
# class alone the margin by which it is beaten. A reward model must put the classes in an order, so a policy that trusts
# it ends at one of them. In the triangle every point is a mixture, and the star is the winner.

# %%
for name, mixture in zip(("A", "B", "C", "a third each"), (*np.eye(3), np.full(3, 1 / 3))):
    beaten = np.max(game @ mixture)
    np.testing.assert_allclose(beaten, losses.exploitability(jnp.array(game), jnp.array(mixture)), rtol=1e-6)
    print(f"exploitability of {name:<13} {beaten:.4f}")
Image(runs[0] / "figures" / "simplex.png", width=1000)

# %% [markdown]
# What self-play plays goes round the winner; the *average* of what it has played comes to rest there. The theory
# promises a fall like $1 / \sqrt{T}$, and the dashed line shows one: in a double logarithm, a slope of -1/2.

# %%
played = read_metrics(runs[0] / "metrics.jsonl", "random games")
late = played["step"] >= config[0]["num_first_rounds"]
slope = np.polyfit(np.log(played["step"][late]), np.log(played["average"][late]), 1)[0]
print(f"random games: slope {slope:.2f} of their mean, {statistics[0]['decay_exponent']:.2f} the mean of their slopes")
Image(runs[0] / "figures" / "exploitability.png", width=760)

# %% [markdown]
# ## The same with language models
#
# Where people agree (up to noise), self-play should get as far as RL on the truth itself, the oracle.

# %%
Image(runs[1] / "figures" / "helpfulness.png", width=560)

# %% [markdown]
# Then people disagree in a circle about manners: careful beats stylish, stylish beats plain, plain beats careful. Each
# point below is a batch of answers, the thick line the running average. Rewards of self-play are win rates among
# siblings, so a manner that all siblings share earns nothing, and it pays to be what beats the fashion.

# %%
game = cyclic_game(*config[1]["margins"])
shares, paths = {}, {}
for method in ("self-play", "reward model"):
    curve = read_metrics(runs[1] / "metrics.jsonl", f"{method} cyclic")
    shares[method] = np.stack([curve[manner] for manner in MANNERS], axis=-1)
    paths[method] = shares[method], np.cumsum(shares[method], 0) / np.arange(1, len(curve["step"]) + 1)[:, None]
simplex_figure(paths, minimax_winner(game), MANNERS)

# %% [markdown]
# **By hand.** What a best reply wins from the average of the second half, over the smallest margin: a policy with one
# manner only loses at least 1. The run's own numbers must be found again in `metrics.jsonl`.

# %%
half, least = config[1]["rl"]["num_iterations"] // 2, min(config[1]["margins"])
for method, statistic in (("self-play", "self_play_margin"), ("reward model", "reward_margin")):
    mixture = shares[method][half:].mean(0)
    beaten = np.max(game @ mixture) / least
    recorded = [statistics[1][statistic], *(statistics[1][f"{method} {manner}"] for manner in MANNERS)]
    np.testing.assert_allclose([beaten, *mixture], recorded, rtol=1e-4, atol=1e-5)
    print(f"{method:<13} {dict(zip(MANNERS, mixture.round(3).tolist()))}: a best reply wins {beaten:.3f} margins, "
          f"by {MANNERS[np.argmax(game @ mixture)]} answers")  # fmt: skip

# %% [markdown]
# ## The same with a body
#
# A point mass is pushed about. Where preferences follow returns, look at how many iterations each arm needs.

# %%
Image(runs[2] / "figures" / "returns.png", width=420)

# %% [markdown]
# Where they go in a circle between the sectors in which an episode ends, the average over iterates counts again. Its
# exploitability, from the recorded shares of the sectors; the last point is the run's own statistic.

# %%
game, shown = cyclic_game(*config[2]["margins"]), {}
for arm, stage in (("reward model", "reward-model-cyclic"), ("self-play", "spo-cyclic")):
    curve = read_metrics(runs[2] / "metrics.jsonl", stage)
    shares = np.stack([curve[f"sector_{index}"] for index in range(3)], axis=-1)
    average = np.cumsum(shares, 0) / np.arange(1, len(shares) + 1)[:, None]
    shown[f"{arm}, average"] = np.max(average @ game.T, axis=1)
    shown[f"{arm}, of late"] = np.max(np.stack([figures.smooth(share) for share in shares.T], -1) @ game.T, axis=1)
np.testing.assert_allclose(np.max(game @ average[-1]), statistics[2]["cyclic_exploitability"], rtol=1e-4, atol=1e-6)
figures.lines(curve["step"], shown, "iteration", "what the best sector wins")

# %% [markdown]
# What all three amount to. Thresholds were fixed before any run that counts; a single seed is never judged.

# %%
Markdown(table(sum((read_claims(run / "claims.json") for run in runs), []), width=None))
