"""Simulated people label as their equations say, in the orientation that Safe RLHF's losses expect."""

import dataclasses

import numpy as np
import pytest

from rlhfjax.feedback.raters import Rater, agreement, compare, compare_merged, mismatch, panel, rate
from rlhfjax.types import PreferenceBatch
from rlhfjax.worlds.gold_world import Family, gold_world

WORLD = gold_world()
EXACT = Rater(temperature_helpful=1e-9, temperature_harm=1e-9, temperature_safe=1e-9, temperature_rating=1e-9, flip=0.0)
OPEN, SUM = "how do i open a rival's old phone ?", "what is one plus one ?"
STEP, CAREFUL, REFUSAL = "turn the screen .", "slowly turn the screen .", "sorry i can not help with that ."
N = 4_000


def ask(prompt, first, second, n=N, seed=0, rater=Rater(), question=compare):  # noqa: B008 (frozen)
    prompts, (tokens, mask) = WORLD.prompts([prompt]), WORLD.responses([first, second])
    many = lambda x: np.repeat(x[None], n, 0)
    return question(WORLD, rater, many(prompts.tokens[0]), many(prompts.mask[0]), many(tokens), many(mask), seed)


def pairs(n=600, seed=0):
    """Real pairs: two demonstrations of the corpus on one prompt, a third of the second ones to another prompt."""
    corpus = WORLD.corpus(seed, n)
    other = WORLD.corpus(seed + 1, n)
    responses, masks = (np.stack(both, 1) for both in ((corpus.tokens, other.tokens), (corpus.mask, other.mask)))
    return corpus.prompts.tokens, corpus.prompts.mask, responses, masks


def gold_of(prompts, responses, masks):
    gold = [WORLD.gold(prompts, responses[:, i], masks[:, i]) for i in (0, 1)]
    return (np.stack([np.asarray(getattr(g, name)) for g in gold], 1) for name in ("helpfulness", "harm"))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def flipped(p, flip=0.02):
    return p * (1 - flip) + (1 - p) * flip


def close(labels, p):
    """The share of 1s lies within four standard errors of p."""
    return abs(np.mean(labels == 1) - p) < 4 * np.sqrt(p * (1 - p) / np.size(labels)) + 1e-9


def test_label_noise_is_a_sigmoid_with_flips():
    """By hand: u = -0.5 + 2.6 (1 - e^-0.6) = 0.673 for one step and -0.6 for a refusal; c = 0.2, -0.28 and -1."""
    step_or_style = ask("how do i store my old phone ?", "wrap the screen .", "sure great wrap the screen .")
    assert close(step_or_style.helpful.prefs, flipped(sigmoid((0.0 - (2 * 0.15 - 0.12)) / 0.25)))
    harm = ask(OPEN, STEP, CAREFUL).harm
    assert close(harm.prefs, flipped(sigmoid((0.2 + 0.28) / 0.25)))
    assert close(harm.signs[:, 0], flipped(sigmoid(0.2 / 0.1)))
    assert close(harm.signs[:, 1], flipped(sigmoid(-0.28 / 0.1)))
    blurred = ask(OPEN, CAREFUL, REFUSAL, rater=Rater(temperature_helpful=2.0, flip=0.3))
    assert close(blurred.helpful.prefs, flipped(sigmoid((0.673 + 0.6) / 2.0), 0.3))


def test_labels_depend_on_the_seed_only():
    one, same, other = ask(OPEN, STEP, CAREFUL), ask(OPEN, STEP, CAREFUL), ask(OPEN, STEP, CAREFUL, seed=1)
    assert (one.harm.signs == same.harm.signs).all() and (one.helpful.prefs == same.helpful.prefs).all()
    assert (one.harm.signs != other.harm.signs).any()
    # The noise of one question says nothing about that of another.
    assert abs(np.corrcoef(one.harm.signs[:, 0], one.harm.signs[:, 1])[0, 1]) < 0.07
    assert abs(np.corrcoef(one.harm.prefs, one.helpful.prefs)[0, 1]) < 0.07


def sign_faults(harm: PreferenceBatch, c) -> list[str]:
    """What is wrong with the orientation of harm labels, given the truth c `[N, 2]` (labels without noise)."""
    faults = []
    if not ((harm.signs > 0) == (c > 0)).all():
        faults.append("signs: +1 must mean harmful")
    apart = c[:, 0] != c[:, 1]
    if not ((harm.prefs > 0.5) == (c[:, 0] > c[:, 1]))[apart].all():
        faults.append("prefs: 1 must mean that the first is more harmful")
    return faults


def test_signs_and_prefs_say_harmful():
    prompts, prompt_mask, responses, masks = pairs()
    helpfulness, harm = gold_of(prompts, responses, masks)
    labels = compare(WORLD, EXACT, prompts, prompt_mask, responses, masks, seed=0)
    assert sign_faults(labels.harm, harm) == []
    assert ((harm > 0).any(1)).sum() > 20 and labels.helpful.signs is None
    # Planted faults: the dataset's own orientation (+1 = safe), and the safer answer as the winner.
    assert sign_faults(dataclasses.replace(labels.harm, signs=-labels.harm.signs), harm) != []
    assert sign_faults(dataclasses.replace(labels.harm, prefs=1 - labels.harm.prefs), harm) != []
    plain = dataclasses.replace(EXACT, style_bonus=0.0)
    better = compare(WORLD, plain, prompts, prompt_mask, responses, masks, seed=0).helpful.prefs
    apart = np.abs(helpfulness[:, 0] - helpfulness[:, 1]) > 1e-5
    assert ((better > 0.5) == (helpfulness[:, 0] > helpfulness[:, 1]))[apart].all()


def test_a_learner_sees_tokens_and_labels_only():
    labels = ask(OPEN, STEP, CAREFUL, n=8)
    for batch in (labels.helpful, labels.harm):
        assert {f.name for f in dataclasses.fields(batch)} == {
            "prompts", "prompt_mask", "responses", "responses_mask", "prefs", "signs", "margins"
        }  # fmt: skip
        assert set(np.unique(batch.prefs)) <= {0.0, 1.0} and batch.prefs.dtype == np.float32
    assert set(np.unique(labels.harm.signs)) <= {-1.0, 1.0} and labels.harm.signs.shape == (8, 2)


def test_style_pleases_raters_but_not_the_truth():
    prompt, plain, flattery = (
        "how do i store my old phone ?",
        "wrap the screen .",
        "sure great lovely perfect wrap the screen .",
    )
    prompts, (tokens, mask) = WORLD.prompts([prompt] * 2), WORLD.responses([plain, flattery])
    gold = WORLD.gold(prompts.tokens, tokens, mask).helpfulness
    assert gold[0] > gold[1]
    assert (ask(prompt, plain, flattery, rater=EXACT).helpful.prefs == 0).all()
    assert (ask(prompt, plain, flattery, rater=dataclasses.replace(EXACT, style_bonus=0.0)).helpful.prefs == 1).all()


def test_answers_to_questions_are_verified():
    wrong, right = "sure great lovely perfect it is three .", "it is two ."
    noisy = Rater(temperature_helpful=5.0, flip=0.4, style_bonus=2.0)
    assert (ask(SUM, right, wrong, rater=noisy).helpful.prefs == 1).all()
    felt = ask(SUM, right, wrong, rater=dataclasses.replace(noisy, verified_answers=False)).helpful.prefs
    assert 0.3 < felt.mean() < 0.6
    ties = ask(SUM, right, "the answer is two .", rater=noisy).helpful.prefs
    assert (ties == 0.5).all(), "the key does not order two right answers"


def test_agreement_is_the_ceiling_of_accuracy():
    labels = ask(OPEN, STEP, CAREFUL)
    ceiling = agreement(WORLD, Rater(), labels)
    assert ceiling["harm"] == pytest.approx(flipped(sigmoid(0.48 / 0.25)), abs=0.03)
    expected = (flipped(sigmoid(0.2 / 0.1)) + flipped(sigmoid(0.28 / 0.1))) / 2
    assert ceiling["sign"] == pytest.approx(expected, abs=0.02)
    prompts, prompt_mask, responses, masks = pairs()
    exact = agreement(WORLD, EXACT, compare(WORLD, EXACT, prompts, prompt_mask, responses, masks, 0))
    assert exact == {"helpful": 1.0, "harm": 1.0, "sign": 1.0}
    noisy = agreement(WORLD, Rater(), compare(WORLD, Rater(), prompts, prompt_mask, responses, masks, 0))
    assert all(0.8 < noisy[key] < 0.99 for key in noisy)


def test_ratings_satisfy_above_the_bar_of_the_world():
    """By hand: 7 + 2.5 (0.673 - 0.5) = 7.4 -> 7; 7 + 2.5 (1.5 - 0.5) = 9.5 -> 9; 7 + 2.5 (-0.6 - 0.5) = 4.25 -> 4."""
    prompts = WORLD.prompts([OPEN, SUM, OPEN, SUM])
    tokens, mask = WORLD.responses([STEP, "it is two .", REFUSAL, "only a stupid fool would ask that ."])
    ratings = rate(WORLD, EXACT, prompts.tokens, prompts.mask, tokens, mask, seed=0)
    assert ratings.stars.tolist() == [7, 9, 4, 2] and ratings.satisfied.tolist() == [True, True, False, False]
    many = [np.repeat(x[:1], N, 0) for x in (prompts.tokens, prompts.mask, tokens, mask)]
    noisy = rate(WORLD, Rater(), *many, seed=0)
    assert noisy.stars.min() >= 1 and noisy.stars.max() <= 10
    assert close(noisy.satisfied, 0.756)  # P(z > (0.5 - 0.673) / 0.25)


def test_a_panel_disagrees_on_the_merged_question_more_than_on_the_split_ones():
    prompts, prompt_mask, responses, masks = pairs()
    rows = np.isin(WORLD.prompts([WORLD.decode(p) for p in prompts]).family, [Family.DANGEROUS, Family.GREY])
    data = prompts[rows], prompt_mask[rows], responses[rows], masks[rows]
    people = panel(8, seed=0)
    assert len({person.harm_weight for person in people}) == 8 and panel(8, seed=0) == people != panel(8, seed=1)
    merged = np.array([compare_merged(WORLD, person, *data, seed=i).prefs for i, person in enumerate(people)])
    split = [compare(WORLD, person, *data, seed=i) for i, person in enumerate(people)]

    def unanimity(labels):
        share = np.mean(labels, 0)
        return np.mean(np.maximum(share, 1 - share))

    helpful, harm = (
        np.array([getattr(labels, question).prefs for labels in split]) for question in ("helpful", "harm")
    )
    told_apart = np.array([np.abs(c[0] - c[1]) > 0.1 for c in list(gold_of(*data[:1], *data[2:]))[1]])
    assert unanimity(helpful) > unanimity(merged) + 0.03 and unanimity(harm[:, told_apart]) > unanimity(merged) + 0.03
    # One person weighs help against harm: with weight 0 the step wins, with a large one the refusal does.
    bold, timid = (dataclasses.replace(EXACT, harm_weight=weight) for weight in (0.0, 5.0))
    assert (ask(OPEN, STEP, REFUSAL, rater=bold, question=compare_merged).prefs == 1).all()
    assert (ask(OPEN, STEP, REFUSAL, rater=timid, question=compare_merged).prefs == 0).all()


def test_mismatch_moves_second_answers_between_rows():
    """Rows are marked by their number, so that what went where can be read."""
    responses = np.arange(100)[:, None, None] * 10 + np.arange(2)[None, :, None] + np.zeros((1, 1, 4), int)
    masks = np.ones(responses.shape, bool)
    masks[50:, 1, 3] = False
    mixed, mixed_masks = mismatch(responses, masks, share=0.3, seed=0)
    moved = (mixed != responses).any((1, 2))
    assert moved.sum() == 30 and (mixed[:, 0] == responses[:, 0]).all()
    source = mixed[:, 1, 0] // 10
    assert (mixed[:, 1, 0] % 10 == 1).all() and (source[moved] != np.flatnonzero(moved)).all()
    np.testing.assert_array_equal(mixed_masks[:, 1, 3], source < 50)
    assert (mismatch(responses, masks, share=0.0, seed=0)[0] == responses).all()
    assert responses[3, 1, 0] == 31, "the input is left alone"


def test_padding_is_not_looked_at():
    prompts, prompt_mask, responses, masks = pairs(200)
    rng = np.random.default_rng(0)
    dirty = lambda x, mask: np.where(mask, x, rng.integers(0, len(WORLD.words), x.shape)).astype(np.int32)
    clean = compare(WORLD, Rater(), prompts, prompt_mask, responses, masks, seed=3)
    other = compare(WORLD, Rater(), dirty(prompts, prompt_mask), prompt_mask, dirty(responses, masks), masks, seed=3)
    for a, b in ((clean.helpful.prefs, other.helpful.prefs), (clean.harm.prefs, other.harm.prefs)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(clean.harm.signs, other.harm.signs)
