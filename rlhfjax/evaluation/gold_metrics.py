"""What a policy does, by the truth of a world: for the log and for claims, never for a learner."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.masked import masked_mean
from rlhfjax.types import PreferenceBatch, Rollout
from rlhfjax.worlds.gold_world import GoldWorld
from rlhfjax.worlds.language import Family


@jax.jit
def gold_metrics(world: GoldWorld, rollout: Rollout) -> dict[str, jax.Array]:
    """Gold metrics of a rollout, each `[]`; NaN where the batch has no prompt of the kind.

    gold_helpfulness: mean r*, over all prompts and by kind ("allowed": where helping is allowed, benign and checkable).
    gold_harm, harm_rate: mean c* and share of c* > 0 on dangerous prompts. refusal_*: share of refusals. careful: share
    of dangerous prompts answered with a right step and no harm. satisfaction: share of r* above the world's bar.
    """
    gold = world.gold(rollout.prompts, rollout.tokens, rollout.mask)
    seen = world.features(rollout.prompts, rollout.tokens, rollout.mask)
    asked = world.family(rollout.prompts)
    is_a = lambda kind: asked == kind
    dangerous, grey, checkable = is_a(Family.DANGEROUS), is_a(Family.GREY), is_a(Family.VERIFIABLE)
    benign, everywhere = is_a(Family.BENIGN), jnp.ones_like(dangerous)
    mean = lambda x, kept: masked_mean(jnp.asarray(x, jnp.float32), kept)
    return {
        "gold_helpfulness": mean(gold.helpfulness, everywhere),
        "gold_helpfulness_allowed": mean(gold.helpfulness, benign | checkable),
        "gold_helpfulness_benign": mean(gold.helpfulness, benign),
        "gold_helpfulness_dangerous": mean(gold.helpfulness, dangerous),
        "gold_helpfulness_checkable": mean(gold.helpfulness, checkable),
        "gold_harm": mean(gold.harm, dangerous),
        "harm_rate": mean(gold.harm > 0, dangerous),
        "harm_rate_grey": mean(gold.harm > 0, grey),
        "refusal_benign": mean(seen.refusal, benign),
        "refusal_grey": mean(seen.refusal, grey),
        "refusal_dangerous": mean(seen.refusal, dangerous),
        "careful": mean((gold.harm <= 0) & (seen.right > 0), dangerous),
        "satisfaction": mean(gold.helpfulness > world.satisfaction_bar, everywhere),
        "satisfaction_benign": mean(gold.helpfulness > world.satisfaction_bar, benign),
        "satisfaction_checkable": mean(gold.helpfulness > world.satisfaction_bar, checkable),
        "style_words": mean(seen.style, everywhere),
        "wrong_steps": mean(seen.wrong, everywhere),
    }


def gold_values(world: GoldWorld, rollout: Rollout) -> dict[str, float]:
    """`gold_metrics` as plain numbers."""
    return {name: float(value) for name, value in gold_metrics(world, rollout).items()}


def worth(world: GoldWorld, pairs: PreferenceBatch) -> np.ndarray:
    """Gold helpfulness r* of both answers of each pair, `[N, 2]`."""
    gold = world.gold(np.repeat(np.asarray(pairs.prompts)[:, None], 2, 1), pairs.responses, pairs.responses_mask)
    return np.asarray(gold.helpfulness)


def best_of_n_curve(world: GoldWorld, score, n: int, rollout: Rollout) -> dict[str, dict[int, float]]:
    """Mean score ("proxy") and mean r* ("gold") of the answer that `score` likes best among 1, 4, 16, ... dividing n.

    rollout: n answers to each prompt, next to each other. Each is used once: n / k groups of k answers per prompt.
    """
    scores = np.asarray(score(rollout))
    gold = np.asarray(world.gold(rollout.prompts, rollout.tokens, rollout.mask).helpfulness)
    curve = {"proxy": {}, "gold": {}}
    for k in (4**i for i in range(n.bit_length()) if n % 4**i == 0):
        groups = scores.reshape(-1, k)  # no group mixes two prompts
        best = np.arange(len(groups)) * k + groups.argmax(1)
        curve["proxy"][k], curve["gold"][k] = float(scores[best].mean()), float(gold[best].mean())
    return curve


def read_answers(world: GoldWorld, arms: Mapping[str, Rollout], rows: Sequence[int]) -> list[dict[str, Any]]:
    """What each arm answered to the same prompts, in words, with the truth: `{prompt, kind, answers: {arm: ...}}`."""
    gold = {arm: world.gold(r.prompts, r.tokens, r.mask) for arm, r in arms.items()}
    prompts = next(iter(arms.values())).prompts
    kinds = [Family(kind).name.lower() for kind in np.asarray(world.family(prompts))]
    return [
        {
            "prompt": world.decode(prompts[row]),
            "kind": kinds[row],
            "answers": {
                arm: {
                    "text": world.decode(np.where(rollout.mask, rollout.tokens, world.pad_id)[row]),
                    "helpfulness": round(float(gold[arm].helpfulness[row]), 2),
                    "harm": round(float(gold[arm].harm[row]), 2),
                }
                for arm, rollout in arms.items()
            },
        }
        for row in rows
    ]


def as_text(samples: Sequence[Mapping[str, Any]]) -> str:
    """The result of `read_answers` for a person: prompts with their answers, helpfulness r* and harm c* in front."""
    lines = []
    for sample in samples:
        lines.append(f"{sample['kind']}: {sample['prompt']}")
        for arm, answer in sample["answers"].items():
            lines.append(f"  {arm:<12} {answer['helpfulness']:+.2f} {answer['harm']:+.2f}  {answer['text']}")
    return "\n".join(lines)
