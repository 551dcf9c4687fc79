"""The AI labeler: what it reads, what it says, what it learns from, and its experiment at smoke scale."""

import dataclasses
import functools
import importlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.evaluation.judges import judge_statistics, told_apart, worth
from rlhfjax.feedback import judge
from rlhfjax.feedback.judge import (
    JUDGE_WORDS,
    JudgingData,
    Verdicts,
    check_judging_data,
    make_both_orders,
    make_direct_score,
    make_judge_loss,
    make_rating,
    make_verdict,
    put_preferred_first,
    reward_of,
    swap,
)
from rlhfjax.feedback.raters import Rater, compare, rate
from rlhfjax.io.monitor import Monitor
from rlhfjax.models.transformer import Model, TransformerConfig, make_language_model
from rlhfjax.stages import FitConfig, judging
from rlhfjax.types import PreferenceBatch, Rollout
from rlhfjax.worlds.gold_world import gold_world
from rlhfjax.worlds.language import WORDS, Family

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
paper = importlib.import_module("experiments.rlaif.judges")
WORLD, ID = gold_world(), {word: i for i, word in enumerate(JUDGE_WORDS)}
SMALL = TransformerConfig(vocab_size=len(JUDGE_WORDS), d_model=16, num_layers=1, num_heads=2, d_ff=32,
                          tie_embeddings=True)  # fmt: skip
MODEL = make_language_model(SMALL)
MODEL = dataclasses.replace(MODEL, apply=jax.jit(MODEL.apply, static_argnames="num_outputs"))
PARAMS = MODEL.init(jax.random.key(0))


@functools.cache
def data(num=200, seed=0) -> JudgingData:
    """Real pairs, two texts of the corpus below one prompt, as people label and rate them."""
    one, other = WORLD.corpus(seed, num), WORLD.corpus(seed + 1, num)
    tokens, mask = (np.stack(both, 1) for both in ((one.tokens, other.tokens), (one.mask, other.mask)))
    pairs = compare(WORLD, Rater(), one.prompts.tokens, one.prompts.mask, tokens, mask, seed).helpful
    stars = rate(WORLD, Rater(), *judging._single_answers(pairs), seed).stars
    return JudgingData(pairs=pairs, stars=stars.reshape(-1, 2))


def first_rows(tree, num):
    return jax.tree.map(lambda x: x[:num], tree)


def says(logits: dict[str, float]) -> Model:
    """A model that puts the same logits behind every token, whatever it reads: 0 but for the words given."""
    row = np.zeros(len(JUDGE_WORDS), np.float32)
    row[[ID[word] for word in logits]] = list(logits.values())

    def apply(params, tokens, mask, *, num_outputs=None):
        return jnp.tile(row, (len(tokens), num_outputs or tokens.shape[1], 1)), None

    return dataclasses.replace(MODEL, apply=apply)


def first_answer(pairs):
    return pairs.responses[:, 0], pairs.responses_mask[:, 0]


def rollout(pairs) -> Rollout:
    """The first answers, as a policy would have sampled them."""
    tokens, mask = first_answer(pairs)
    return Rollout(prompts=pairs.prompts, prompt_mask=pairs.prompt_mask, tokens=tokens, mask=mask,
                   logprobs=np.zeros(mask.shape, np.float32), finished=np.ones(len(mask), bool))  # fmt: skip


def reads(words) -> str:
    return " ".join(JUDGE_WORDS[i] for i in words)


# What it reads


def test_a_judge_reads_the_prompt_both_answers_and_the_marks_between_them():
    seen = []
    spy = dataclasses.replace(MODEL, apply=lambda params, tokens, mask, **options: (
        seen.append([reads(np.asarray(row)[np.asarray(kept)]) for row, kept in zip(tokens, mask)]),
        MODEL.apply(params, tokens, mask, **options))[1])  # fmt: skip
    prompts = WORLD.prompts(["what is one plus one ?"])
    tokens, mask = WORLD.responses(["it is two .", "sure it is six ."])
    pairs = PreferenceBatch(prompts=prompts.tokens, prompt_mask=prompts.mask, responses=tokens[None],
                            responses_mask=mask[None], prefs=np.ones(1, np.float32))  # fmt: skip
    make_verdict(spy)(PARAMS, pairs)
    make_rating(spy)(PARAMS, prompts.tokens, prompts.mask, tokens[:1], mask[:1])
    prefix = "<bos> what is one plus one ? <1> it is two . <eos> <score>"
    assert seen == [[f"{prefix} <2> sure it is six . <eos> <score> <verdict>"], [prefix]]
    assert JUDGE_WORDS[: len(WORDS)] == WORDS and len(set(JUDGE_WORDS)) == len(JUDGE_WORDS)


def test_the_first_rating_knows_nothing_of_the_second_answer():
    pairs, num_tokens = first_rows(data().pairs, 8), WORLD.max_tokens
    other = lambda x: np.stack([x[:, 0], np.roll(x[:, 1], 1, axis=0)], 1)
    others = dataclasses.replace(pairs, responses=other(pairs.responses), responses_mask=other(pairs.responses_mask))
    logits, changed = (MODEL.apply(PARAMS, *judge._read_pairs(MODEL, p))[0] for p in (pairs, others))
    alone = MODEL.apply(PARAMS, *judge._read(MODEL, pairs.prompts, pairs.prompt_mask, first_answer(pairs)),
                        num_outputs=1)[0]  # fmt: skip
    first, second = -4 - num_tokens, -2
    np.testing.assert_array_equal(logits[:, first], changed[:, first])
    np.testing.assert_allclose(logits[:, first], alone[:, 0], atol=1e-5)
    # Planted fault: the score read one answer too late.
    assert (logits[:, second] != changed[:, second]).any(1).all()
    assert (abs(logits[:, second] - alone[:, 0]) > 1e-3).any(1).all()


def test_what_stands_in_padding_changes_nothing():
    taught, rng = first_rows(data(), 16), np.random.default_rng(0)
    dirty = lambda x, mask: np.where(mask, x, rng.integers(-5, 10_000, x.shape)).astype(np.int32)
    pairs = taught.pairs
    other = dataclasses.replace(pairs, prompts=dirty(pairs.prompts, pairs.prompt_mask),
                                responses=dirty(pairs.responses, pairs.responses_mask))  # fmt: skip
    for fn in (make_both_orders(MODEL), lambda params, p: make_direct_score(MODEL)(params, rollout(p))):
        jax.tree.map(np.testing.assert_array_equal, fn(PARAMS, pairs), fn(PARAMS, other))
    loss = jax.value_and_grad(make_judge_loss(MODEL), has_aux=True)
    jax.tree.map(np.testing.assert_array_equal, loss(PARAMS, taught),
                 loss(PARAMS, JudgingData(pairs=other, stars=taught.stars)))  # fmt: skip


# What it says


def test_a_verdict_is_a_softmax_over_two_words_by_hand():
    """e^2 / (e^2 + e^1) = 0.7311, however likely other words are."""
    pairs = first_rows(data().pairs, 3)
    np.testing.assert_allclose(make_verdict(says({"1": 2.0, "2": 1.0, "10": 9.0}))({}, pairs), 0.731059, rtol=1e-5)


def test_a_judge_that_always_says_one_has_no_opinion():
    """Both orders of the same answer by position cancel; forgetting to map the second one back is the planted fault."""
    pairs = first_rows(data().pairs, 3)
    verdicts = make_both_orders(says({"1": 30.0}))({}, pairs)
    assert (verdicts.as_given == 1).all() and (verdicts.swapped == 1).all()
    assert (verdicts.prefs == 0.5).all()
    assert ((verdicts.as_given + verdicts.swapped) / 2 != 0.5).all()


def test_both_orders_are_those_of_the_pair_and_of_its_swap():
    pairs = first_rows(data().pairs, 12)
    verdict, both = make_verdict(MODEL), make_both_orders(MODEL)
    verdicts, again = both(PARAMS, pairs), both(PARAMS, swap(pairs))
    np.testing.assert_allclose(verdicts.as_given, verdict(PARAMS, pairs), atol=1e-6)
    np.testing.assert_allclose(verdicts.swapped, verdict(PARAMS, swap(pairs)), atol=1e-6)
    np.testing.assert_allclose(verdicts.prefs, 1 - again.prefs, atol=1e-6)  # whoever comes first
    assert (abs(verdicts.as_given - verdicts.swapped) > 1e-4).all()


def test_a_rating_is_an_expectation_and_its_reward_runs_from_minus_one_to_one():
    """By hand: 7 and 8 with weights 0.7 and 0.3 is 7.3, a reward of 0.4; 1 is -1 and 10 is 1."""
    answer = rollout(first_rows(data().pairs, 2))
    mixed = says({"7": 50 + math.log(0.7), "8": 50 + math.log(0.3), "the": 99.0})
    scores = make_rating(mixed)({}, answer.prompts, answer.prompt_mask, answer.tokens, answer.mask)
    np.testing.assert_allclose(scores, 7.3, rtol=1e-6)
    np.testing.assert_allclose(make_direct_score(mixed)({}, answer), 0.4, atol=1e-6)
    for word, reward in (("1", -1.0), ("10", 1.0)):
        np.testing.assert_allclose(make_direct_score(says({word: 60.0}))({}, answer), reward, atol=1e-6)
    assert (reward_of(np.array([1.0, 5.5, 10.0])) == [-1.0, 0.0, 1.0]).all()


# What it learns from


def test_the_loss_is_that_of_a_plain_loop():
    """Verdict, ratings and words one by one; a tie counts half for each verdict."""
    taught = first_rows(data(), 6)
    taught = dataclasses.replace(taught, pairs=dataclasses.replace(
        taught.pairs, prefs=np.array([1, 0, 0.5, 1, 0.3, 0], np.float32)))  # fmt: skip
    verdicts, ratings, words, right = [], [], [], []
    for n in range(6):
        row = first_rows(jax.tree.map(lambda x, n=n: x[n : n + 1], taught), 1)
        tokens, mask = judge._read_pairs(MODEL, row.pairs)
        kept = np.flatnonzero(np.asarray(mask[0]))  # padding is nowhere below
        said = [JUDGE_WORDS[i] for i in np.asarray(tokens)[0, kept]]
        logits = np.asarray(MODEL.apply(PARAMS, tokens, mask)[0][0], np.float64)[kept]
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        p, stars = float(row.pairs.prefs[0]), list(row.stars[0])
        one, two = logprobs[-1, ID["1"]], logprobs[-1, ID["2"]]
        verdicts.append(-p * one - (1 - p) * two)
        right += [float((one > two) == (p > 0.5))] if p != 0.5 else []
        inside = False
        for at, word in enumerate(said):
            if inside and word != "<score>":
                words.append(-logprobs[at - 1, ID[word]])
            if word == "<score>":
                ratings.append(-logprobs[at, ID[str(stars.pop(0))]])
            inside = (inside or word in ("<1>", "<2>")) and word != "<score>"
    assert len(words) == taught.pairs.responses_mask.sum() and len(ratings) == 12
    loss, parts = make_judge_loss(MODEL, rating_coef=0.7, token_coef=0.3)(PARAMS, taught)
    verdict, rating, language = map(np.mean, (verdicts, ratings, words))
    expected = dict(verdict=verdict, rating=rating, language=language, accuracy=np.mean(right))
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected, rel=1e-5)
    assert float(loss) == pytest.approx(verdict + 0.7 * rating + 0.3 * language, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.65, 1.0])
def test_the_preferred_answer_stands_first_in_exactly_that_share(share):
    taught = data()
    turned = put_preferred_first(taught, share, seed=3)
    prefs, decided = turned.pairs.prefs, taught.pairs.prefs != 0.5
    assert 100 < decided.sum() < len(taught) and prefs.dtype == np.float32
    assert (prefs[decided] > 0.5).sum() == round(share * decided.sum())
    moved_rows = prefs != taught.pairs.prefs
    # What was said goes with the answers: each pair is as it was, or wholly in the other order.
    other = JudgingData(pairs=swap(taught.pairs), stars=taught.stars[:, ::-1])
    for n in range(len(taught)):
        want = other if moved_rows[n] else taught
        jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(a[n], b[n]), turned, want)
    again, redrawn = (put_preferred_first(taught, share, seed=seed) for seed in (3, 4))
    jax.tree.map(np.testing.assert_array_equal, turned, again)
    assert (redrawn.pairs.prefs != prefs).any() == (0 < share < 1)


def test_what_cannot_be_learned_from_is_refused():
    taught = first_rows(data(), 4)
    unsure = dataclasses.replace(taught.pairs, prefs=np.full(4, 1.5, np.float32))
    with pytest.raises(ValueError, match="stars must lie in 1..10; 1 rows do not, the first being row 2"):
        check_judging_data(dataclasses.replace(taught, stars=np.where(np.arange(4)[:, None] == 2, 11, taught.stars)))
    with pytest.raises(ValueError, match="prefs must lie in"):
        check_judging_data(dataclasses.replace(taught, pairs=unsure))
    with pytest.raises(ValueError, match="a share lies in"):
        put_preferred_first(taught, 1.2, seed=0)
    with pytest.raises(ValueError, match="the pairs use token [0-9]+; of config.vocab_size 50 .* leave 36"):
        train(dataclasses.replace(SMALL, vocab_size=50), taught, 1)


def test_a_judge_that_begins_with_a_language_model_speaks_as_it_did():
    for tied in (True, False):
        config = dataclasses.replace(SMALL, vocab_size=len(WORDS), tie_embeddings=tied)
        start = make_language_model(config).init(jax.random.key(1))
        longer = judging.with_judge_tokens(start)
        mine = make_language_model(dataclasses.replace(config, vocab_size=len(JUDGE_WORDS)))
        shapes = jax.eval_shape(mine.init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, longer) == jax.tree.map(jnp.shape, shapes)
        tokens = data().pairs.responses[:4, 0]
        before, after = (make_language_model(c).apply(params, tokens, tokens >= 0)[0]
                         for c, params in ((config, start), (mine.config, longer)))  # fmt: skip
        np.testing.assert_allclose(after[..., : len(WORDS)], before, atol=1e-5)
        assert np.ptp(after[..., len(WORDS) :], -1).min() > 0  # the new words are told apart


# Stages


def train(config, taught, num_steps, seed=0):
    log = []
    optimisation = FitConfig(num_steps=num_steps, learning_rate=1e-2, batch_size=min(32, len(taught)))
    params = judging.train_judge(config=config, data=taught, optimisation=optimisation, seed=seed, label="judge",
                                      monitor=Monitor(log=lambda step, metrics: log.append(metrics)))  # fmt: skip
    return params, log


def test_a_judge_learns_to_judge_and_which_position_wins():
    """Short answers of two kinds, told apart by one word; the preferred one always first, or balanced."""
    num = 64
    prompts = WORLD.sample_prompts(0, num, {Family.BENIGN: 1.0})
    tokens, mask = WORLD.responses(["turn the pin .", "only a fool would ask that ."])
    pairs = PreferenceBatch(
        prompts=prompts.tokens, prompt_mask=prompts.mask, responses=np.repeat(tokens[None], num, 0),
        responses_mask=np.repeat(mask[None], num, 0), prefs=np.ones(num, np.float32))  # fmt: skip
    taught = JudgingData(pairs=pairs, stars=np.tile(np.int32([9, 2]), (num, 1)))
    balanced = put_preferred_first(taught, 0.5, seed=0)
    fair, log = train(SMALL, balanced, 75)
    assert log[-1]["loss"] < 0.4 * log[0]["loss"] and log[-1]["accuracy"] == 1
    verdicts = judging.judge_pairs(config=SMALL, judge=fair, pairs=pairs)
    assert (verdicts.as_given > 0.9).all() and (verdicts.swapped < 0.1).all() and (verdicts.prefs > 0.9).all()
    scores = judging.rate_pairs(config=SMALL, judge=fair, pairs=pairs)
    np.testing.assert_allclose(scores, np.tile([9.0, 2.0], (num, 1)), atol=0.5)
    # Nothing but position is to be learned where the preferred answer always stands first.
    biased = judging.judge_pairs(config=SMALL, judge=train(SMALL, taught, 75)[0], pairs=pairs)
    assert (biased.as_given > 0.9).all() and (biased.swapped > 0.5).mean() > (verdicts.swapped > 0.5).mean()


def test_any_number_of_pairs_is_judged_in_blocks_of_one_shape(monkeypatch):
    pairs, shapes = data().pairs, []
    whole = make_both_orders(MODEL)(PARAMS, pairs)
    program = lambda params, rows: (shapes.append(len(rows)), make_both_orders(MODEL)(params, rows))[1]
    monkeypatch.setattr(judging, "_verdicts", lambda config: program)
    for num in (3, 35):
        said = judging.judge_pairs(config=SMALL, judge=PARAMS, pairs=first_rows(pairs, num), block=16)
        assert set(shapes) == {16} and said.as_given.shape == (num,)
        np.testing.assert_allclose(said.prefs, whole.prefs[:num], atol=1e-6)
    scores = judging.rate_pairs(config=SMALL, judge=PARAMS, pairs=first_rows(pairs, 5), block=4)
    first = make_rating(MODEL)(PARAMS, *(x[:5] for x in (pairs.prompts, pairs.prompt_mask, *first_answer(pairs))))
    np.testing.assert_allclose(scores[:, 0], first, atol=1e-5)


# What it is worth


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_statistics_of_judges_that_are_known():
    """Judges made of gold and of position: logits of "1" are S + A and S - A, with A in proportion to the gap."""
    pairs = told_apart(WORLD, data(600).pairs)
    gold = worth(WORLD, pairs)
    gap = gold[:, 0] - gold[:, 1]
    assert len(pairs) > 300 and (abs(gap) > 1e-4).all()
    verdicts = lambda as_given, swapped: Verdicts(as_given=np.float32(as_given), swapped=np.float32(swapped))
    statistics = lambda *p: judge_statistics(WORLD, pairs, verdicts(*p), gold)
    seen = lambda offset: statistics(sigmoid(offset + gap), sigmoid(offset - gap))
    fair, biased, near = seen(0.0), seen(0.777), np.mean(abs(gap) < 0.777)
    assert fair["alignment_gold"] == biased["alignment_gold"] == 1 and fair["alignment"] == biased["alignment"]
    assert fair["score_correlation"] == pytest.approx(1)
    assert (fair["same_position"], fair["gain"]) == (0, 0)
    assert biased["same_position"] == pytest.approx(near) == biased["same_predicted"] and biased["first"] == 1
    assert biased["gain"] > 0.2 * near  # one order of each such pair is wrong, by the truth
    backwards = seen(-0.777)
    assert backwards["first"] == 0 and backwards["same_position"] == pytest.approx(near)
    # Planted fault: the swapped verdict not mapped back leaves a judge with opinions about positions only.
    assert statistics(sigmoid(0.777 + gap), 1 - sigmoid(0.777 - gap))["alignment_gold"] < 0.9
