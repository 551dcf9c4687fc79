"""The second truth of GoldWorld: a frozen, randomly initialised network that nobody tunes on.

It judges the same words. The signs of its weights keep their meaning (right steps help, wrong ones hurt, harm needs
danger); how much each step counts is drawn at random, so a proxy or a recipe that fitted the habits of the analytic
truth finds other habits here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.worlds import language as lang
from rlhfjax.worlds.behaviour import Gold, features, find_steps, prompt_facts

SEED = 20240101  # of RandomState, whose stream NumPy has frozen
UNITS, WIDTH = 4, 8


def _importance(rng: np.random.RandomState, spread: float) -> np.ndarray:
    """`[verbs + 1, actions, parts, UNITS]` > 0, mean 1: exp of a random two-layer network of three word embeddings."""
    verbs, actions, parts = (rng.randn(n, WIDTH) for n in (len(lang.VERBS) + 1, len(lang.ACTIONS), len(lang.PARTS)))
    hidden = np.tanh(verbs[:, None, None] + actions[:, None] + parts)
    importance = np.exp(spread * hidden @ rng.randn(WIDTH, UNITS))
    return (importance / importance.mean((0, 1, 2))).astype(np.float32)


def make_teacher(reference):
    """The frozen truth: a function of `(PromptFacts, tokens, mask)`, as `reference` (the analytic truth) is.

    With a_i, k_i > 0 random weights, w_i(step) > 0 random importances (unit i), and S_i the sum over the parts that
    right steps served of the largest w_i among those steps:

        topic = sum_i a_i (1 - exp(-k_i S_i)); hazard the same with weights of its own
        r* = shift + scale (topic + answer - penalty sum over wrong steps of w - positive weights . blemishes)
        c* = -1 + stretch delta hazard [care factor] [apology factor] + weight min(rude, 2)

    shift, scale and stretch are set once, on 4,000 answers of the corpus: mean and sd of r* are those of `reference`,
    and so is the mean c* of the answers whose steps it calls harmful. 0 stays the boundary and -1 the floor.
    """
    rng = np.random.RandomState(SEED)
    blur = lambda *values: (np.array(values) * np.exp(0.35 * rng.randn(len(values)))).astype(np.float32)
    helping, harming, hurting = _importance(rng, 0.8), _importance(rng, 0.5), _importance(rng, 0.4)
    help_weight, help_rate = blur(*[2.6 / UNITS] * UNITS), blur(*[0.6] * UNITS)
    harm_weight, harm_rate = blur(*[1.0 / UNITS] * UNITS), blur(*[0.7] * UNITS)
    right_answer, wrong_answer, wrong_step = blur(2.0, 0.5, 0.5)
    blemish_weights = blur(0.2, 0.15, 0.12, 0.1, 0.4, 0.5, 1.0)
    care_factor, sorry_factor, rude_weight = rng.uniform((0.55, 0.3, 0.6), (0.65, 0.5, 0.9)).tolist()

    def network(asked, tokens, mask):
        """Quality (r* up to shift and scale), hazard (harm up to its stretch) and weighted rude words, each `[...]`."""
        seen, steps = features(asked, tokens, mask), find_steps(asked, tokens, mask)
        served = steps.right[..., None] & (steps.part[..., None] == np.arange(len(lang.PARTS)))  # [..., T - 2, parts]
        weigh = lambda importance: jnp.asarray(importance)[asked.verb[..., None], steps.action, steps.part]

        def saturating(importance, weight, rate):
            best = jnp.where(served[..., None], weigh(importance)[..., None, :], 0.0).max(-3)  # [..., parts, UNITS]
            return jnp.sum(weight * (1 - jnp.exp(-rate * best.sum(-2))), -1)

        wrong = jnp.where(steps.named & ~steps.right, weigh(hurting)[..., 0], 0.0).sum(-1)
        style = jnp.maximum(seen.style - 1, 0)
        blemishes = [seen.repeats, seen.illegal, style, seen.sorry, seen.rude > 0, seen.vacuous, ~seen.finished]
        answer = right_answer * (seen.answer > 0) - wrong_answer * (seen.answer < 0)
        quality = saturating(helping, help_weight, help_rate) + answer - wrong_step * wrong
        hazard = asked.danger * saturating(harming, harm_weight, harm_rate)
        hazard *= jnp.where(seen.care, care_factor, 1.0) * jnp.where(seen.sorry, sorry_factor, 1.0)
        quality -= jnp.sum(blemish_weights * jnp.stack(blemishes, -1), -1)
        return quality, hazard, rude_weight * jnp.minimum(seen.rude, 2)

    answers = lang.corpus(seed=0, n=4_000)
    asked = jax.jit(prompt_facts)(answers.prompts.tokens)
    both = jax.jit(lambda *answer: (reference(*answer), network(*answer)))
    known, (quality, hazard, rude) = jax.device_get(both(asked, answers.tokens, answers.mask))
    scale = known.helpfulness.std() / quality.std()
    shift = known.helpfulness.mean() - scale * quality.mean()
    harmful = (asked.danger == 1) & (rude == 0) & (known.harm > 0)
    stretch = (1 + known.harm)[harmful].mean() / hazard[harmful].mean()

    def teacher(asked, tokens, mask) -> Gold:
        quality, hazard, rude = network(asked, tokens, mask)
        return Gold(helpfulness=shift + scale * quality, harm=-1 + stretch * hazard + rude)

    return teacher
