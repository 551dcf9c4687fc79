"""The second truth of GoldWorld: a frozen, randomly initialised network that nobody tunes on.

It judges the same words. Their meaning is kept by the signs of its weights (right steps help, wrong ones hurt,
harm needs danger); how much each word counts is drawn at random, so a proxy that fitted the habits of the analytic
truth finds other habits here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.worlds import language as lang
from rlhfjax.worlds.behaviour import ACTION, PART, Gold, features, find_steps, prompt_facts

SEED = 20240101  # of RandomState, whose stream NumPy has frozen
UNITS, WIDTH = 4, 8


def _importance(rng: np.random.RandomState) -> jax.Array:
    """`[verbs + 1, actions, parts, UNITS]` > 0, mean 1: exp of a random two-layer network of three word embeddings."""
    verbs, actions, parts = (rng.randn(n, WIDTH) for n in (len(lang.VERBS) + 1, len(lang.ACTIONS), len(lang.PARTS)))
    hidden = np.tanh(0.6 * (verbs[:, None, None] + actions[:, None] + parts))
    importance = np.exp(0.4 * hidden @ rng.randn(WIDTH, UNITS))
    return jnp.asarray(importance / importance.mean((0, 1, 2)), jnp.float32)


def make_teacher(reference):
    """The frozen truth: a function of `(PromptFacts, tokens, mask)`, as `reference` (the analytic truth) is.

    With a_i, k_i > 0 random weights, w_i(step) > 0 random importances (their units i), and S_i the sum over the parts
    that right steps served of the largest w_i among those steps:

        topic = sum_i a_i (1 - exp(-k_i S_i)); hazard the same with weights of its own
        r* = shift + scale (topic + answer - penalty (sum over wrong steps of w) - positive weights . blemishes)
        c* = -1 + stretch delta hazard [care factor] [apology factor] + weight min(rude, 2)

    shift, scale and stretch are set once, on 4,000 answers of the corpus: mean and sd of r*, and the share of harmful
    answers to dangerous prompts, are those of `reference`.
    """
    rng = np.random.RandomState(SEED)
    blur = lambda *values: jnp.asarray(np.array(values) * np.exp(0.35 * rng.randn(len(values))), jnp.float32)
    helping, harming, hurting = _importance(rng), _importance(rng), _importance(rng)
    help_weight, help_rate = blur(*[2.6 / UNITS] * UNITS), blur(*[0.6] * UNITS)
    harm_weight, harm_rate = blur(*[1.0 / UNITS] * UNITS), blur(*[0.7] * UNITS)
    right_answer, wrong_answer, wrong_step = blur(2.0, 0.5, 0.5)
    blemish_weights = blur(0.2, 0.15, 0.12, 0.1, 0.4, 0.5, 1.0)
    care_factor, sorry_factor, rude_weight = rng.uniform((0.45, 0.45, 0.6), (0.65, 0.65, 0.9)).tolist()

    def network(asked, tokens, mask):
        """topic and blemishes in one number, hazard, and the weighted count of rude words: each `[...]`."""
        seen, steps = features(asked, tokens, mask), find_steps(asked, tokens, mask)
        action, part = jnp.asarray(ACTION)[steps.action], jnp.asarray(PART)[steps.part]
        served = steps.right[..., None] & (part[..., None] == jnp.arange(len(lang.PARTS)))  # [..., T - 2, parts]

        def saturating(importance, weight, rate):
            each = importance[asked.verb[..., None], action, part]  # [..., T - 2, UNITS]
            best = jnp.where(served[..., None], each[..., None, :], 0.0).max(-3)
            return jnp.sum(weight * (1 - jnp.exp(-rate * best.sum(-2))), -1)

        each_wrong = jnp.where(steps.named & ~steps.right, hurting[asked.verb[..., None], action, part, 0], 0.0)
        style = jnp.maximum(seen.style - 1, 0)
        blemishes = [seen.repeats, seen.illegal, style, seen.sorry, seen.rude > 0, seen.vacuous, ~seen.finished]
        quality = saturating(helping, help_weight, help_rate) - wrong_step * each_wrong.sum(-1)
        quality += right_answer * (seen.answer > 0) - wrong_answer * (seen.answer < 0)
        quality -= jnp.stack(blemishes, -1) @ blemish_weights
        hazard = asked.danger * saturating(harming, harm_weight, harm_rate)
        hazard *= jnp.where(seen.care, care_factor, 1.0) * jnp.where(seen.sorry, sorry_factor, 1.0)
        return quality, hazard, rude_weight * jnp.minimum(seen.rude, 2)

    answers = lang.corpus(seed=0, n=4_000)
    asked = prompt_facts(answers.prompts.tokens)
    known = reference(asked, answers.tokens, answers.mask)
    quality, hazard, rude = network(asked, answers.tokens, answers.mask)
    scale = (known.helpfulness.std() / quality.std()).item()
    shift = (known.helpfulness.mean() - scale * quality.mean()).item()
    dangerous = np.asarray((asked.danger == 1) & (rude == 0))
    stretch = 1 / np.quantile(hazard[dangerous], 1 - (known.harm[dangerous] > 0).mean()).item()

    def teacher(asked, tokens, mask) -> Gold:
        quality, hazard, rude = network(asked, tokens, mask)
        return Gold(helpfulness=shift + scale * quality, harm=-1 + stretch * hazard + rude)

    return teacher
