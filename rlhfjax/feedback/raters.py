"""Simulated people: they know the truth of a world, and let a learner see their noisy labels only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from rlhfjax.types import PreferenceBatch, check_mask, pytree
from rlhfjax.worlds.gold_world import GoldWorld
from rlhfjax.worlds.language import Family


@dataclasses.dataclass(frozen=True)
class Rater:
    """How one person judges. With u = r* + style_bonus min(style words, max_style):

        P(first more helpful) = sigmoid((u1 - u2) / temperature_helpful)
        P(first more harmful) = sigmoid((c1 - c2) / temperature_harm)
        P(harmful)            = sigmoid(c / temperature_safe)

    and each binary label is then flipped with probability `flip`.

    verified_answers: helpfulness on checkable questions is looked up, not felt: by r*, without noise or flips; two
        answers of equal worth are a tie, labelled 0.5.
    harm_weight: the private trade-off u - harm_weight c, used where one question asks for both at once.
    temperature_rating: sd of an absolute rating, in units of r*.
    """

    temperature_helpful: float = 0.25
    temperature_harm: float = 0.25
    temperature_safe: float = 0.1
    temperature_rating: float = 0.25
    flip: float = 0.02
    style_bonus: float = 0.15
    max_style: int = 4
    verified_answers: bool = True
    harm_weight: float = 1.0

    def __post_init__(self):
        for field in ("temperature_helpful", "temperature_harm", "temperature_safe", "temperature_rating"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be positive and finite, got {getattr(self, field)}")
        if not 0 <= self.flip <= 0.5:
            raise ValueError(f"flip must lie in [0, 0.5] (above it a label means its opposite), got {self.flip}")
        for field in ("style_bonus", "max_style", "harm_weight"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be finite and not negative, got {getattr(self, field)}")


def panel(num_raters: int, seed: int, base: Rater = Rater()) -> tuple[Rater, ...]:  # noqa: B008 (frozen)
    """People around `base`: temperatures differ by a quarter, private trade-offs by a factor of about three."""
    rng = np.random.default_rng([seed, 0])
    blur = lambda value, sd: float(value * np.exp(sd * rng.standard_normal()))
    temperatures = [f.name for f in dataclasses.fields(Rater) if f.name.startswith("temperature")]
    return tuple(
        dataclasses.replace(
            base,
            harm_weight=blur(base.harm_weight, 1.1),
            **{name: blur(getattr(base, name), 0.25) for name in temperatures},
        )
        for _ in range(num_raters)
    )


@pytree
class Comparisons:
    """The same pairs under both questions: helpful (no signs) and harm (prefs and signs, + = harmful) or None."""

    helpful: PreferenceBatch
    harm: PreferenceBatch | None


@pytree
class Ratings:
    """Absolute judgements: stars `[N]` int32 in 1..10; satisfied `[N]` bool, 7 stars and more."""

    stars: np.ndarray
    satisfied: np.ndarray


@jax.jit
def _look(world: GoldWorld, prompts, prompt_mask, tokens, mask):
    """What there is to see in answers `[N, K, T]`: r*, c* and style words `[N, K]`; is it a question `[N]`."""
    prompts = jnp.where(prompt_mask, prompts, world.pad_id)
    repeated = jnp.repeat(prompts[:, None], tokens.shape[1], 1)
    gold, seen = world.gold(repeated, tokens, mask), world.features(repeated, tokens, mask)
    return gold.helpfulness, gold.harm, seen.style, world.family(prompts) == Family.VERIFIABLE


def _feel(world: GoldWorld, rater: Rater, prompts, prompt_mask, tokens, mask):
    """What the rater feels, before any noise: helpful u and harm c `[N, K]`, and verified `[N]`."""
    check_mask("prompt_mask", prompt_mask, padded="left")
    check_mask("responses_mask", mask, padded="right")
    if prompts.shape != prompt_mask.shape or tokens.shape != mask.shape or len(prompts) != len(tokens):
        raise ValueError(
            f"rows and masks must agree, got prompts {prompts.shape} with mask {prompt_mask.shape} "
            f"and responses {tokens.shape} with mask {mask.shape}"
        )
    helpfulness, harm, style, question = map(np.asarray, _look(world, prompts, prompt_mask, tokens, mask))
    verified = question & rater.verified_answers
    pleasure = np.where(verified[:, None], 0.0, rater.style_bonus * np.minimum(style, rater.max_style))
    return helpfulness + pleasure, harm, verified


def _answer(rng: np.random.Generator, margin, temperature: float, flip: float) -> np.ndarray:
    """Yes with probability sigmoid(margin / temperature), then flipped with probability `flip`: float32 1 or 0."""
    yes = rng.random(margin.shape) < scipy.special.expit(margin / temperature)
    return (yes ^ (rng.random(margin.shape) < flip)).astype(np.float32)


def _prefer(rng: np.random.Generator, rater: Rater, utility, verified) -> np.ndarray:
    """Is the first answer better? Felt, or where verified looked up: then answers of equal worth are a tie, 0.5."""
    margin = utility[:, 0] - utility[:, 1]
    felt = _answer(rng, margin, rater.temperature_helpful, rater.flip)
    return np.where(verified, (1 + np.sign(margin)) / 2, felt).astype(np.float32)


def compare(world: GoldWorld, rater: Rater, prompts, prompt_mask, responses, responses_mask, seed: int) -> Comparisons:
    """Ask which answer is more helpful, which more harmful, and whether each is harmful at all.

    Args:
        prompts, prompt_mask: `[N, P]`. responses, responses_mask: `[N, 2, T]`. seed: of the rater's noise.
    Returns:
        Two PreferenceBatches with NumPy labels. helpful.prefs: 1 where the first is more helpful, 0 where the second
        is, 0.5 for a verified tie. harm.prefs: 1 where the first is **more harmful**, else 0; harm.signs `[N, 2]`:
        +1 = harmful, -1 = harmless. harm is None in a world that cannot tell what is harmful.
    Source: Safe RLHF (2310.12773), section 3.1: decoupled annotation.
    """
    if responses.ndim != 3 or responses.shape[1] != 2:
        raise ValueError(f"responses must be pairs [N, 2, T], got {responses.shape}")
    helpful, harm, verified = _feel(world, rater, prompts, prompt_mask, responses, responses_mask)
    rng = np.random.default_rng([seed, 1])
    pairs = dict(prompts=prompts, prompt_mask=prompt_mask, responses=responses, responses_mask=responses_mask)
    better = _prefer(rng, rater, helpful, verified)
    worse = _answer(rng, harm[:, 0] - harm[:, 1], rater.temperature_harm, rater.flip)
    signs = 2 * _answer(rng, harm, rater.temperature_safe, rater.flip) - 1
    told = not np.isnan(harm).all()
    return Comparisons(helpful=PreferenceBatch(**pairs, prefs=better),
                       harm=PreferenceBatch(**pairs, prefs=worse, signs=signs) if told else None)  # fmt: skip


def compare_merged(
    world: GoldWorld, rater: Rater, prompts, prompt_mask, responses, responses_mask, seed: int
) -> PreferenceBatch:
    """One question for both qualities: the rater weighs u - harm_weight c by a trade-off that nobody else knows.

    Arguments as in `compare`; the noise is that of the helpfulness question. prefs: 1 where the first is better.
    """
    helpful, harm, verified = _feel(world, rater, prompts, prompt_mask, responses, responses_mask)
    better = _prefer(np.random.default_rng([seed, 2]), rater, helpful - rater.harm_weight * harm, verified)
    return PreferenceBatch(
        prompts=prompts, prompt_mask=prompt_mask, responses=responses, responses_mask=responses_mask, prefs=better
    )


def rate(world: GoldWorld, rater: Rater, prompts, prompt_mask, tokens, mask, seed: int) -> Ratings:
    """Absolute ratings of answers `[N, T]`: stars = floor(7 + 2.5 (u + noise - the world's satisfaction bar)) in 1..10.

    So an answer above the bar satisfies, whatever another answer would have been worth.
    """
    helpful, _, verified = _feel(world, rater, prompts, prompt_mask, tokens[:, None], mask[:, None])
    noise = rater.temperature_rating * np.random.default_rng([seed, 3]).standard_normal(len(tokens))
    felt = helpful[:, 0] + np.where(verified, 0.0, noise)
    stars = np.clip(np.floor(7 + 2.5 * (felt - world.satisfaction_bar)), 1, 10).astype(np.int32)
    return Ratings(stars=stars, satisfied=stars >= 7)


def agreement(world: GoldWorld, rater: Rater, labels: Comparisons) -> dict[str, float]:
    """Share of labels that the rater's own feelings, without noise, would have given: the ceiling of any accuracy.

    Keys: helpful, harm, sign. Pairs that the rater cannot tell apart are left out (NaN: no other). For evaluation only.
    """
    feel = lambda x: _feel(world, rater, x.prompts, x.prompt_mask, x.responses, x.responses_mask)
    (helpful, _, _), (_, harm, _) = feel(labels.helpful), feel(labels.harm)

    def share(margin, yes):
        agreed = ((margin > 0) == (yes > 0))[margin != 0]
        return float(np.mean(agreed)) if agreed.size else float("nan")

    return {
        "helpful": share(helpful[:, 0] - helpful[:, 1], labels.helpful.prefs),
        "harm": share(harm[:, 0] - harm[:, 1], labels.harm.prefs),
        "sign": share(harm, labels.harm.signs),
    }


def mismatch(responses, responses_mask, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Give a `share` of the pairs `[N, 2, T]` another pair's second answer in place of their own.

    So that off-topic answers, which a policy under pressure would find, carry labels on both questions.
    """
    if not 0 <= share <= 1 or len(responses) < 2:
        raise ValueError(f"need a share in [0, 1] and at least two pairs, got {share} and {len(responses)} pairs")
    rng = np.random.default_rng([seed, 4])
    rows = rng.permutation(len(responses))[: round(share * len(responses))]
    others = (rows + rng.integers(1, len(responses), len(rows))) % len(responses)
    responses, responses_mask = np.array(responses), np.array(responses_mask)
    responses[rows, 1], responses_mask[rows, 1] = responses[others, 1], responses_mask[others, 1]
    return responses, responses_mask
