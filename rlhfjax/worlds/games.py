"""Matrix games over K classes of answers, where the minimax winner is known exactly, and learning in them from labels.

`payoffs[i, j] = 2 P(i preferred to j) - 1`: antisymmetric, in [-1, 1].
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog

from rlhfjax import losses

VERSION = "1.0"


def cyclic_game(a: float, b: float, c: float) -> np.ndarray:
    """A beats B by a margin a > 0, B beats C by b, C beats A by c: the minimax winner is `(b, c, a) / (a + b + c)`."""
    return np.array([[0, a, -c], [-a, 0, b], [c, -b, 0]])


def scored_game(scores) -> np.ndarray:
    """Bradley-Terry preferences between `scores [K]` (log-odds): the minimax winner is the best class alone."""
    scores = np.asarray(scores, float)
    return np.tanh((scores[:, None] - scores) / 2)


def random_game(seed: int, num_classes: int) -> np.ndarray:
    """Payoffs uniform in [-1, 1] above the diagonal: usually without a best class."""
    above = np.triu(np.random.default_rng(seed).uniform(-1, 1, (num_classes, num_classes)), 1)
    return above - above.T


def minimax_winner(payoffs: np.ndarray) -> np.ndarray:
    """A policy `[K]` that no other beats on average, by linear programming: maximise v with `payoffs^T policy >= v`.

    Raises ValueError if the payoffs are not antisymmetric: then the value of the game would not be 0.
    """
    payoffs = np.asarray(payoffs, float)
    if (error := np.abs(payoffs + payoffs.T).max()) > 1e-9:
        raise ValueError(f"payoffs of a symmetric game must be antisymmetric, payoffs + payoffs^T reaches {error:.3g}")
    num = len(payoffs)
    solved = linprog(np.eye(num + 1)[-1] * -1, A_ub=np.hstack([-payoffs.T, np.ones((num, 1))]), b_ub=np.zeros(num),
                     A_eq=[[1.0] * num + [0.0]], b_eq=[1.0], bounds=[(0, 1)] * num + [(-1, 1)])  # fmt: skip
    return solved.x[:-1]


def self_play(memory, classes, labels, logprobs):
    """SPO: a class's payoff is the mean reward of its siblings, weighted by 1 / pi because only what is sampled speaks.

    Rewards enter as losses (reward - 1 <= 0), as in Exp3 (Auer et al. 2002): so a class that is hardly ever sampled
    cannot be thrown out by one unlucky comparison.
    """
    gains = 2 * losses.self_play_rewards(labels) - 1
    return memory, jnp.zeros_like(logprobs).at[classes].add(gains * jnp.exp(-logprobs[classes]) / len(classes))


def reward_model(memory, classes, labels, logprobs, kept=1.0):
    """Reward modelling: the Bradley-Terry score of each class, refit on all labels so far (`kept` 1) or on recent ones:
    labels count for less by the factor `kept` with each further round.

    One Newton step a round from the last fit, which changes little; a virtual win each way keeps it finite.
    """
    wins, scores = memory
    one_hot = jax.nn.one_hot(classes, len(logprobs))
    wins = kept * wins + one_hot.T @ jnp.where(jnp.eye(len(classes), dtype=bool), 0.0, labels) @ one_hot
    scores_of = lambda s: jnp.broadcast_arrays(s[:, None], s[None])
    loss = lambda s: jnp.sum((1 + wins) * losses.bradley_terry_loss(*scores_of(s))) / jnp.sum(1 + wins)
    curvature = jax.hessian(loss)(scores) + 1.0  # the loss is blind to shifts: ones hold the mean at 0
    scores -= jnp.linalg.solve(curvature, jax.grad(loss)(scores))
    return (wins, scores), scores


def play(
    *, payoffs: np.ndarray, start: np.ndarray, feedback: Callable, on_policy: bool = True, num_rounds: int,
    num_siblings: int, learning_rate: float, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Policies `[R, G, K]` that Hedge plays in G games `payoffs [G, K, K]` from `start [K]`, at R rounds "round".

    Every round draws siblings, labels each pair of them once (win or loss, a coin toss inside a class), and updates by
    what `feedback` (`self_play` or `reward_model`) says of the classes, at rate `learning_rate / sqrt(round)`.
    on_policy: siblings come from the current policy; otherwise all from the start.

    Returns:
        "round" `[R]`, about 20 per decade; "policy", played in that round, and "average" of the rounds up to it.
    """
    keys = jax.random.split(jax.random.key(seed), len(payoffs))
    arrays = jnp.asarray(payoffs, jnp.float32), jnp.asarray(start, jnp.float32), keys, learning_rate
    policies = _play(*arrays, feedback=feedback, on_policy=on_policy, num_rounds=num_rounds, num_siblings=num_siblings)
    policies = np.moveaxis(np.asarray(policies), 0, 1)
    rounds = np.unique(np.geomspace(1, num_rounds, 1 + int(20 * np.log10(num_rounds))).astype(int))
    total = np.cumsum(policies, 0, dtype=float)[rounds - 1]
    return {"round": rounds, "policy": policies[rounds - 1], "average": total / rounds[:, None, None]}


def exploitability_curves(payoffs: np.ndarray, played: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Exploitability `[R, G]` of the "average" and of the "policy" that `play` returned for the games `payoffs`."""
    of = jax.vmap(losses.exploitability, (None, 0))
    return {name: np.asarray(of(payoffs, played[name].astype(payoffs.dtype))) for name in ("average", "policy")}


def decay_exponent(rounds: np.ndarray, exploitability: np.ndarray, first: int) -> float:
    """Slope of log exploitability `[R, G]` over log rounds `[R]`, by least squares from round `first` on; mean of the
    games, so that one in which the best class stays unseen for long counts once."""
    late = rounds >= first
    return float(np.mean(np.polyfit(np.log(rounds[late]), np.log(exploitability[late]), 1)[0]))


@functools.partial(jax.jit, static_argnames=("feedback", "on_policy", "num_rounds", "num_siblings"))
def _play(payoffs, start, keys, rate, *, feedback, on_policy, num_rounds, num_siblings):
    log_start, num_classes = jnp.log(start), len(start)

    def one_round(payoffs, key, carry, index):
        memory, total, logprobs = carry
        draw_key, label_key = jax.random.split(jax.random.fold_in(key, index))
        classes = jax.random.categorical(draw_key, logprobs if on_policy else log_start, shape=(num_siblings,))
        prefs = (1 + payoffs[classes[:, None], classes]) / 2
        above = jnp.triu(jax.random.bernoulli(label_key, prefs), 1).astype(jnp.float32)
        memory, gains = feedback(memory, classes, above + jnp.tril(1 - above.T, -1), logprobs)
        total += gains - jnp.max(total)  # only differences count, and they stay exact in float32
        new = losses.hedge_update(log_start, total, learning_rate=rate / jnp.sqrt(index + 1.0))
        return (memory, total, new), jnp.exp(logprobs)

    def one_game(payoffs, key):
        memory = jnp.zeros((num_classes, num_classes)), jnp.zeros(num_classes)
        carry = memory, jnp.zeros(num_classes), log_start
        return jax.lax.scan(functools.partial(one_round, payoffs, key), carry, jnp.arange(num_rounds))[1]

    return jax.vmap(one_game)(payoffs, keys)
