"""What people, or a population that cannot agree, prefer among several answers to one prompt."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.types import Rollout
from rlhfjax.worlds.gold_world import GoldWorld

MANNERS = ("careful", "stylish", "plain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """How comparisons between answers come out.

    With margins None, P(i preferred) = sigmoid((r*_i - r*_j) / temperature): transitive. With margins (a, b, c) that
    holds between answers of one manner only; else manner decides, in a circle: careful answers (a word of care) win
    from stylish ones (a word of style, none of care) with probability (1 + a) / 2, stylish from plain with (1 + b) / 2,
    plain from careful with (1 + c) / 2. Whatever a label says is then flipped with probability `flip`.
    """

    temperature: float = 0.25
    flip: float = 0.0
    margins: tuple[float, float, float] | None = None

    def __post_init__(self):
        if not 0 < self.temperature < float("inf") or not 0 <= self.flip <= 0.5:
            raise ValueError(f"need a positive temperature and a flip in [0, 0.5], got {self.temperature}, {self.flip}")
        if self.margins is not None and not all(0 < margin <= 1 for margin in self.margins):
            raise ValueError(f"margins must lie in (0, 1], got {self.margins}")

    @property
    def payoffs(self) -> np.ndarray:
        """`[3, 3]`: what a manner (of `MANNERS`) wins from another, in [-1, 1]."""
        a, b, c = self.margins
        wins = np.array([[0, a, 0], [0, 0, b], [c, 0, 0]])
        return wins - wins.T


def manners(world: GoldWorld, rollout: Rollout) -> jax.Array:
    """The index in `MANNERS` of every answer, `[B]`."""
    seen = world.features(rollout.prompts, rollout.tokens, rollout.mask)
    return jnp.where(seen.care, 0, jnp.where(seen.style > 0, 1, 2))


@partial(jax.jit, static_argnums=1, static_argnames="num_samples")
def sibling_preferences(
    world: GoldWorld, people: Population, rollout: Rollout, key: jax.Array, *, num_samples: int
) -> jax.Array:
    """One label for every pair among the `num_samples` answers to each prompt: `[B / K, K, K]`, `prefs[i, j]` 1 where i
    is preferred to j, else 0, and 1/2 on the diagonal. K (K - 1) / 2 queries per prompt."""
    worth = world.gold(rollout.prompts, rollout.tokens, rollout.mask).helpfulness.reshape(-1, num_samples)
    probability = jax.nn.sigmoid((worth[:, :, None] - worth[:, None]) / people.temperature)
    if people.margins is not None:
        manner = manners(world, rollout).reshape(-1, num_samples)
        first, second = manner[:, :, None], manner[:, None]
        probability = jnp.where(first == second, probability, (1 + jnp.asarray(people.payoffs)[first, second]) / 2)
    probability = people.flip + (1 - 2 * people.flip) * probability
    upper = jnp.triu(jnp.ones((num_samples, num_samples), bool), 1)
    wins = jnp.where(upper, jax.random.bernoulli(key, probability), 0.0)
    lower = jnp.where(upper, 1 - wins, 0.0).swapaxes(1, 2)
    return wins + lower + 0.5 * jnp.eye(num_samples)
