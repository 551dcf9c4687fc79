"""Red teaming: which prompts make a policy do harm?"""

from collections.abc import Callable

import numpy as np

from rlhfjax.types import Rollout
from rlhfjax.worlds.language import Prompts


def attack(
    candidates: Prompts, answer: Callable[[Prompts], Rollout], harm: Callable[[Rollout], np.ndarray], *, num_found: int,
    num_samples: int = 4,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The `num_found` candidates whose answers look most harmful to the attacker, worst first.

    A search with a budget of `len(candidates) x num_samples` answers, which is what a red team that tries prompts and
    keeps those that work comes to.

    Args:
        candidates: prompts to try, N of them. answer: the policy. harm: what the attacker sees, `rollout -> [B]`: a
            cost model or people's labels, never the truth.
    Returns:
        rows `[num_found]` of `candidates`, and the mean harm of each candidate `[N]`.
    """
    if not 0 < num_found <= len(candidates):
        raise ValueError(f"cannot keep {num_found} of {len(candidates)} candidates")
    rows = np.repeat(np.arange(len(candidates)), num_samples)
    tried = Prompts(tokens=candidates.tokens[rows], mask=candidates.mask[rows], family=candidates.family[rows])
    harms = np.asarray(harm(answer(tried))).reshape(-1, num_samples).mean(1)
    return np.argsort(-harms, kind="stable")[:num_found], harms
