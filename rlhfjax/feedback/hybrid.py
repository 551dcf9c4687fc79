"""HRLAIF's labels (2403.08309): answers that can be checked are checked, the rest is left to the judge."""

import dataclasses

import jax
import numpy as np
from scipy.special import expit, logit

from rlhfjax.types import PreferenceBatch, Rollout
from rlhfjax.worlds.gold_world import GoldWorld
from rlhfjax.worlds.language import Family


def hybrid_prefs(world: GoldWorld, pairs: PreferenceBatch) -> np.ndarray:
    """P(first better) `[N]`: on questions with a known key a correct answer beats an incorrect one whatever the judge
    says, two correct ones are the judge's to compare, and two incorrect ones are a tie; elsewhere the judge's word.

    pairs: with the judge's `prefs`. The key is what a question's own words say, not the world's truth of an answer.
    """
    twice = np.repeat(np.asarray(pairs.prompts)[:, None], 2, 1)
    correct = np.asarray(world.features(twice, pairs.responses, pairs.responses_mask).answer) > 0
    question = np.asarray(world.family(pairs.prompts)) == Family.VERIFIABLE
    checked = (1 + correct[:, 0].astype(np.float32) - correct[:, 1]) / 2
    return np.where(question & ~correct.all(1), checked, pairs.prefs).astype(np.float32)


def with_style_bias(world: GoldWorld, pairs: PreferenceBatch, weight: float) -> PreferenceBatch:
    """The same pairs as a judge with a taste for style would label them: `logit p + weight (style_1 - style_2)`.

    style: words of style in an answer. A dose to be varied; weight 0 changes nothing.
    """
    twice = np.repeat(np.asarray(pairs.prompts)[:, None], 2, 1)
    style = np.asarray(world.features(twice, pairs.responses, pairs.responses_mask).style)
    known = np.clip(np.asarray(pairs.prefs, np.float64), 1e-6, 1 - 1e-6)
    biased = expit(logit(known) + weight * (style[:, 0] - style[:, 1]))
    return dataclasses.replace(pairs, prefs=biased.astype(np.float32))


def rewritten_pairs(originals: Rollout, rewrites: Rollout) -> PreferenceBatch:
    """Pairs that prefer each rewrite to the original it replaces; rollouts of the same prompts, host arrays."""
    beside = lambda name: np.stack([np.asarray(getattr(rewrites, name)), np.asarray(getattr(originals, name))], 1)
    return PreferenceBatch(
        prompts=np.asarray(originals.prompts), prompt_mask=np.asarray(originals.prompt_mask),
        responses=beside("tokens"), responses_mask=beside("mask"),
        prefs=np.ones(len(originals.prompts), np.float32))  # fmt: skip


def rewrite(samples: Rollout, worth: np.ndarray, num_samples: int) -> Rollout:
    """The best of `num_samples` answers to each prompt, which lie next to each other, by `worth [B]`."""
    best = np.arange(0, len(worth), num_samples) + np.asarray(worth).reshape(-1, num_samples).argmax(1)
    return jax.tree.map(lambda x: np.asarray(x)[best], samples)
