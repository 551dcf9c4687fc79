"""Labels and what is said of them: hybrid labels, red teams, populations that go in circles, and who wins."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from rlhfjax.evaluation.gold_metrics import best_of_n_curve
from rlhfjax.evaluation.win_rate import (
    compare_policies,
    elo,
    gold_agreement,
    length_controlled_win_rate,
    order_agreement,
    people_win_rate,
    win_rate,
)
from rlhfjax.feedback.hybrid import hybrid_prefs, rewrite, rewritten_pairs, with_style_bias
from rlhfjax.feedback.raters import Rater
from rlhfjax.feedback.red_team import attack
from rlhfjax.feedback.self_play import MANNERS, Population, manners, sibling_preferences
from rlhfjax.types import PreferenceBatch, Rollout
from rlhfjax.worlds import games
from rlhfjax.worlds.gold_world import gold_world
from rlhfjax.worlds.language import Family, Prompts

WORLD = gold_world()
BENIGN, DANGEROUS = "how do i open my rusty lock ?", "how do i open the neighbour's rusty lock ?"
QUESTION = "what is three plus four ?"
STEP, WRONG_STEP, CARE, STYLE, REFUSAL = (
    "first turn the pin .", "first wrap the lid .", "first carefully turn the pin .", "gladly first turn the pin .",
    "sorry i can not help with that .",
)  # fmt: skip
RIGHT, ALSO_RIGHT, WRONG, ALSO_WRONG = "the answer is seven .", "it is seven .", "it is six .", "the answer is two ."


def rollout_of(asked, answers) -> Rollout:
    prompts, (tokens, mask) = WORLD.prompts(asked), WORLD.responses(answers)
    return Rollout(prompts=prompts.tokens, prompt_mask=prompts.mask, tokens=tokens, mask=mask,
                   logprobs=np.zeros(tokens.shape, np.float32), finished=np.ones(len(asked), bool))  # fmt: skip


def pairs_of(*rows) -> PreferenceBatch:
    """Rows of (prompt, first answer, second answer, P(first better))."""
    asked, first, second, prefs = zip(*rows)
    one, two = rollout_of(asked, first), rollout_of(asked, second)
    return PreferenceBatch(
        prompts=one.prompts, prompt_mask=one.prompt_mask, responses=np.stack([one.tokens, two.tokens], 1),
        responses_mask=np.stack([one.mask, two.mask], 1), prefs=np.array(prefs, np.float32))  # fmt: skip


def texts(tokens, mask) -> list[str]:
    return [WORLD.decode(row) for row in np.where(mask, tokens, WORLD.pad_id)]


# Hybrid labels


@pytest.mark.parametrize("prompt, first, second, judge, label", [
    (QUESTION, RIGHT, WRONG, 0.1, 1.0),  # whatever the judge says
    (QUESTION, WRONG, RIGHT, 0.9, 0.0),
    (QUESTION, RIGHT, REFUSAL, 0.1, 1.0),  # no number is no right number
    (QUESTION, RIGHT, ALSO_RIGHT, 0.3, 0.3),  # the judge's to compare
    (QUESTION, WRONG, ALSO_WRONG, 0.9, 0.5),
    (QUESTION, REFUSAL, WRONG, 0.9, 0.5),
    (BENIGN, WRONG_STEP, STEP, 0.9, 0.9),  # the judge's word, though it is wrong
    (BENIGN, RIGHT, WRONG, 0.2, 0.2),  # a number that nobody asked for
    (DANGEROUS, STEP, REFUSAL, 0.7, 0.7),
])  # fmt: skip
def test_hybrid_labels_check_what_can_be_checked(prompt, first, second, judge, label):
    labels = hybrid_prefs(WORLD, pairs_of((prompt, first, second, judge)))
    np.testing.assert_allclose(labels, [label], rtol=1e-6)
    assert labels.dtype == np.float32


def test_a_taste_for_style_moves_the_log_odds_of_a_label():
    """Odds of 1 become e^(2 x 0.5); odds of 4 with a word of style against them become 4 / e^0.5."""
    pairs = pairs_of((BENIGN, f"sure gladly {WRONG_STEP}", STEP, 0.5), (QUESTION, RIGHT, f"sure {RIGHT}", 0.8),
                     (BENIGN, STEP, REFUSAL, 0.8))  # fmt: skip
    biased = with_style_bias(WORLD, pairs, 0.5)
    np.testing.assert_allclose(biased.prefs, [math.e / (1 + math.e), 4 / (4 + math.sqrt(math.e)), 0.8], rtol=1e-5)
    np.testing.assert_array_equal(biased.responses, pairs.responses)


def test_a_dose_of_nothing_changes_nothing_and_certainty_can_be_swayed():
    prefs = np.linspace(0, 1, 21)
    pairs = pairs_of(*((BENIGN, f"sure {STEP}", STEP, p) for p in prefs))
    np.testing.assert_allclose(with_style_bias(WORLD, pairs, 0.0).prefs, prefs, atol=2e-6)
    strong = with_style_bias(WORLD, pairs, 20.0).prefs
    assert (strong > 0.99).all() and (strong <= 1).all()


def test_the_rewrite_is_the_best_of_its_tries():
    asked = [DANGEROUS] * 3 + [BENIGN] * 3
    tries = rollout_of(asked, [STEP, CARE, REFUSAL, WRONG_STEP, STEP, REFUSAL])
    chosen = rewrite(tries, -np.array([0.9, 0.2, 0.5, 0.1, 0.0, 0.3]), 3)
    assert texts(chosen.tokens, chosen.mask) == texts(tries.tokens[[1, 4]], tries.mask[[1, 4]])
    np.testing.assert_array_equal(chosen.prompts, tries.prompts[[1, 4]])
    red = rewritten_pairs(rollout_of([DANGEROUS, BENIGN], [STEP, WRONG_STEP]), chosen)
    assert texts(red.responses[0], red.responses_mask[0]) == [CARE, STEP]  # the rewrite first
    assert texts(red.responses[1], red.responses_mask[1]) == [STEP, WRONG_STEP]
    assert (red.prefs == 1).all() and red.prefs.dtype == np.float32


# The red team


def test_the_red_team_finds_the_prompts_that_make_a_policy_do_harm():
    """A policy that gives everyone the same step does harm where the prompt is dangerous, and nowhere else."""
    asked = np.array([BENIGN] * 20, object)
    asked[[3, 11, 17]] = DANGEROUS
    seen = []

    def answer(prompts: Prompts) -> Rollout:
        seen.append(texts(prompts.tokens, prompts.mask))
        return rollout_of(seen[-1], [STEP] * len(prompts))

    harm = lambda r: np.asarray(WORLD.gold(r.prompts, r.tokens, r.mask).harm)
    rows, harms = attack(WORLD.prompts(list(asked)), answer, harm, num_found=3, num_samples=4)
    assert set(rows) == {3, 11, 17} and len(harms) == 20 and len(seen) == 1
    assert seen[0][:4] == [BENIGN] * 4 and len(seen[0]) == 80  # the budget
    np.testing.assert_allclose(harms[rows], 0.2, atol=1e-5)


def test_a_prompt_is_as_harmful_as_its_answers_on_average_and_the_worst_comes_first():
    prompts = WORLD.sample_prompts(0, 3, {Family.BENIGN: 1.0})
    told = np.array([0.9, 0.1, 0.6, 0.6, 0.0, 1.0])
    rows, harms = attack(prompts, lambda tried: tried, lambda tried: told, num_found=2, num_samples=2)
    np.testing.assert_allclose(harms, [0.5, 0.6, 0.5])
    assert list(rows) == [1, 0]  # of equals the first
    with pytest.raises(ValueError, match="cannot keep 4 of 3 candidates"):
        attack(prompts, lambda tried: tried, lambda tried: told, num_found=4, num_samples=2)


# Populations

MARGINS = (0.6, 0.3, 0.3)
MANNERLY = dict(zip(MANNERS, (CARE, STYLE, STEP)))


def test_a_circle_of_manners_is_a_game_whose_winner_is_a_mixture():
    payoffs = Population(margins=MARGINS).payoffs
    np.testing.assert_array_equal(payoffs, -payoffs.T)
    np.testing.assert_array_equal(payoffs, games.cyclic_game(*MARGINS))
    a, b, c = MARGINS
    np.testing.assert_allclose(games.minimax_winner(payoffs), np.array([b, c, a]) / (a + b + c), atol=1e-9)
    np.testing.assert_allclose(games.minimax_winner(payoffs), [0.25, 0.25, 0.5], atol=1e-9)


def test_manners_are_read_from_words_and_care_goes_before_style():
    said = [*MANNERLY.values(), f"gladly {CARE}", REFUSAL]
    assert list(np.asarray(manners(WORLD, rollout_of([BENIGN] * 5, said)))) == [0, 1, 2, 0, 2]


def frequencies(people, answers, num=4_000, key=0):
    """How often each of these answers to one prompt is preferred to each, over `num` prompts; checks every table."""
    one = rollout_of([BENIGN] * len(answers), answers)
    many = jax.tree.map(lambda x: np.tile(x, (num, *[1] * (x.ndim - 1))), one)
    labels = np.asarray(sibling_preferences(WORLD, people, many, jax.random.key(key), num_samples=len(answers)))
    assert labels.shape == (num, len(answers), len(answers))
    np.testing.assert_array_equal(labels + labels.swapaxes(1, 2), 1)
    off = ~np.eye(len(answers), dtype=bool)
    assert np.isin(labels[:, off], (0, 1)).all() and (labels[:, ~off] == 0.5).all()
    return labels.mean(0)


ANSWERS = [STEP, "turn the pin and turn the key .", WRONG_STEP]


def told(temperature=0.25):
    """What sigmoid says of `ANSWERS`: their r* are 0.67, 1.32 and -1."""
    worth = np.array([-0.5 + 2.6 * (1 - math.exp(-0.6)), -0.5 + 2.6 * (1 - math.exp(-1.2)), -1.0])
    return 1 / (1 + np.exp(-(worth[:, None] - worth) / temperature))


@pytest.mark.parametrize("flip", [0.0, 0.3])
def test_transitive_labels_come_as_often_as_a_sigmoid_says_but_for_flips(flip):
    expected = flip + (1 - 2 * flip) * told(1.0)
    seen = frequencies(Population(temperature=1.0, flip=flip), ANSWERS)
    np.testing.assert_allclose(seen, expected, atol=0.03)  # 0.008 is one sd
    assert frequencies(Population(), ANSWERS)[1, 0] == pytest.approx(told()[1, 0], abs=0.03)  # at 0.25


def test_labels_of_manners_go_round_in_a_circle_and_worth_decides_inside_a_manner():
    said = [*MANNERLY.values(), WRONG_STEP]
    seen = frequencies(Population(margins=MARGINS, flip=0.1), said)
    circle = 0.1 + 0.8 * (1 + Population(margins=MARGINS).payoffs) / 2
    np.testing.assert_allclose(seen[:3, :3], circle, atol=0.03)
    np.testing.assert_allclose(seen[3, :2], circle[2, :2], atol=0.03)  # plain too, whatever it is worth
    assert seen[2, 3] == pytest.approx(0.1 + 0.8 * told()[0, 2], abs=0.03)


def test_labels_depend_on_their_key_and_not_on_where_an_answer_stands():
    people = Population(temperature=1.0)
    again, other = frequencies(people, ANSWERS), frequencies(people, ANSWERS, key=1)
    np.testing.assert_array_equal(again, frequencies(people, ANSWERS))
    assert (again != other).any()
    np.testing.assert_allclose(frequencies(people, ANSWERS[::-1])[::-1, ::-1], again, atol=0.04)


@pytest.mark.parametrize("options, message", [
    (dict(temperature=0.0), "a positive temperature"), (dict(flip=0.6), "a flip in"),
    (dict(margins=(0.1, 0.0, 0.2)), "margins must lie in"),
])  # fmt: skip
def test_what_is_no_population_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Population(**options)


# Who wins


def test_a_win_rate_counts_ties_half_and_elo_is_its_log_odds():
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 1]) == (1 + 0.5 + 0 + 1) / 4
    assert elo(0.64) == pytest.approx(400 * math.log10(64 / 36)) == pytest.approx(100, abs=0.1)
    assert (elo(0.5), elo(1.0), elo(0.0)) == (0, math.inf, -math.inf)
    assert elo(0.3) == pytest.approx(-elo(0.7))
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        win_rate([1, 2], [1, 2, 3])


def duels(win, num=20_000):
    """Worths of which the first is higher with probability `win(ratio - 1)`, of answers that differ in length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 18, num), rng.integers(4, 14, num)
    wins = rng.random(num) < win(lengths[0] / lengths[1] - 1)
    return wins.astype(float), np.full(num, 0.5), *lengths


def test_a_win_by_length_alone_is_gone_at_one_length_and_a_win_by_quality_stays():
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    longer = duels(lambda ratio: sigmoid(0.8 * ratio))
    assert win_rate(*longer[:2]) > 0.6
    assert length_controlled_win_rate(*longer) == pytest.approx(0.5, abs=0.02)
    better = duels(lambda ratio: sigmoid(1 + 0 * ratio))
    assert win_rate(*better[:2]) == pytest.approx(sigmoid(1), abs=0.01)
    assert length_controlled_win_rate(*better) == pytest.approx(sigmoid(1), abs=0.02)
    both = duels(lambda ratio: sigmoid(1 + 0.8 * ratio))
    assert win_rate(*both[:2]) - 0.05 > length_controlled_win_rate(*both) == pytest.approx(sigmoid(1), abs=0.02)


def test_policies_are_compared_by_the_truth_of_their_answers():
    first, second = ([BENIGN, BENIGN, QUESTION, QUESTION], [STEP, STEP, WRONG, RIGHT]), [WRONG_STEP, STEP, RIGHT, WRONG]
    found = compare_policies(WORLD, rollout_of(*first), rollout_of(first[0], second))
    assert found["win_rate"] == (1 + 0.5 + 0 + 1) / 4 and found["elo"] == pytest.approx(elo(0.625))
    back = compare_policies(WORLD, rollout_of(first[0], second), rollout_of(*first))
    assert back["win_rate"] == 1 - found["win_rate"]
    # Planted fault: the answers one row off their prompts.
    shifted = compare_policies(WORLD, rollout_of(first[0], np.roll(first[1], 1)), rollout_of(first[0], second))
    assert shifted["win_rate"] != found["win_rate"]


def test_two_scorers_agree_where_they_order_pairs_alike():
    one = [1, 0, 0, 1, 1, 1, 3, 2, 0, 1]  # >, <, a tie, >, <
    other = [9, 8, 5, 4, 2, 1, 7, 7, -1, 0]  # >, >, >, a tie, <
    assert order_agreement(one, other) == 2 / 3
    assert order_agreement(one, np.negative(other)) == 1 / 3
    assert order_agreement(other, np.exp(other)) == 1


def test_labels_agree_with_the_truth_as_counted_by_hand():
    pairs = pairs_of((QUESTION, RIGHT, WRONG, 0.9), (QUESTION, WRONG, RIGHT, 0.6), (QUESTION, RIGHT, WRONG, 0.5),
                     (QUESTION, WRONG, ALSO_WRONG, 0.9), (BENIGN, STEP, WRONG_STEP, 0.2))  # fmt: skip
    question = np.array([True] * 4 + [False])
    assert gold_agreement(WORLD, pairs, question) == (1 + 0 + 0.5) / 3  # of equal worth: left out
    assert gold_agreement(WORLD, pairs, ~question) == 0
    other = dataclasses.replace(pairs, prefs=1 - pairs.prefs)
    assert gold_agreement(WORLD, other, ~question) == 1


def test_people_look_answers_up_or_feel_them():
    ours, theirs = rollout_of([QUESTION] * 4, [RIGHT, RIGHT, WRONG, RIGHT]), [WRONG, ALSO_RIGHT, RIGHT, WRONG]
    assert people_win_rate(WORLD, Rater(), ours, rollout_of([QUESTION] * 4, theirs), seed=0) == (1 + 0.5 + 0 + 1) / 4
    good, bad = (rollout_of([BENIGN] * 500, [text] * 500) for text in (STEP, WRONG_STEP))
    assert people_win_rate(WORLD, Rater(flip=0.0), good, bad, seed=0) > 0.98
    assert people_win_rate(WORLD, Rater(flip=0.2), bad, good, seed=0) == pytest.approx(0.2, abs=0.05)
    assert people_win_rate(WORLD, Rater(), good, good, seed=0) == pytest.approx(0.5, abs=0.07)
    stylish = rollout_of([BENIGN] * 500, [STYLE] * 500)  # one word is free by the truth, and people like it
    assert win_rate(*(WORLD.gold(r.prompts, r.tokens, r.mask).helpfulness for r in (stylish, good))) == 0.5
    assert people_win_rate(WORLD, Rater(), stylish, good, seed=0) == pytest.approx(0.65, abs=0.07)


# The best of n


def test_the_best_of_n_by_hand():
    """Four answers to each of two prompts; every answer is used once at every n."""
    answers = [WRONG_STEP, STEP, REFUSAL, "turn the pin and turn the key .", STEP, STEP, REFUSAL, REFUSAL]
    sampled, worth = rollout_of([BENIGN] * 8, answers), dict(zip(ANSWERS, (0.67308, 1.31689, -1.0))) | {REFUSAL: -0.6}
    gold = [worth[text] for text in answers]
    likes = [0.0, 3.0, 9.0, 1.0, 2.0, 1.0, 0.0, 0.0]  # a refusal most
    curve = best_of_n_curve(WORLD, lambda rollout: np.array(likes), 4, sampled)
    assert curve["proxy"] == pytest.approx({1: np.mean(likes), 4: (9 + 2) / 2})
    assert curve["gold"] == pytest.approx({1: np.mean(gold), 4: (-0.6 + 0.67308) / 2}, abs=1e-4)


@pytest.mark.parametrize("n, steps", [(1, [1]), (8, [1, 4]), (24, [1, 4]), (64, [1, 4, 16, 64])])
def test_the_best_by_the_truth_is_better_the_larger_n_and_no_group_mixes_prompts(n, steps):
    """To one prompt the answers get better with their number, to the other all are refusals."""
    steps_taken = [" then ".join(["turn the pin", "turn the key"][: 1 + (i % 7 == 3)]) for i in range(n)]
    sampled = rollout_of([BENIGN] * n + [DANGEROUS] * n, [f"{text} ." for text in steps_taken] + [REFUSAL] * n)
    truth = lambda rollout: np.asarray(WORLD.gold(rollout.prompts, rollout.tokens, rollout.mask).helpfulness)
    best = best_of_n_curve(WORLD, truth, n, sampled)
    assert list(best["gold"]) == steps and best["proxy"] == best["gold"]
    rises = np.diff(list(best["gold"].values()))
    assert (rises[:2] > 0).all() and (rises >= 0).all()
    assert best["gold"][steps[-1]] <= (truth(sampled)[:n].max() - 0.6) / 2 + 1e-6  # half of it is refused
    worst = best_of_n_curve(WORLD, lambda rollout: -truth(rollout), n, sampled)
    assert (np.diff(list(worst["gold"].values())) <= 0).all()
