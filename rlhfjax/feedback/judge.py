"""The AI labeler of RLAIF: a small language model that reads a prompt and two answers and says which is better.

It has no head of its own: it is asked in words. One sequence serves every question,

    prompt <1> first answer <score> <2> second answer <score> <verdict>

and the judge goes on with "1" or "2" after `<verdict>`, and with a rating from "1" to "10" after each `<score>`; its
labels are the probabilities of these words. Attention is causal, so what stands up to the first `<score>` is the whole
prompt of direct RLAIF: one answer, one rating, and no second answer that could sway it. Slots are fixed; padding stays
where it is, masked out.

Which answer stands first sways a verdict. A judge learns that from data in which the better answer stands first more
often (`put_preferred_first`), and asking in both orders takes it out again (`Verdicts.prefs`).

Source: RLAIF (Lee et al., 2309.00267).
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.masked import masked_mean
from rlhfjax.models.transformer import Model
from rlhfjax.rl.preference_models import ScoreModel, check_pairs
from rlhfjax.types import Params, PreferenceBatch, Rollout, before_response_tokens, check_shapes, pytree
from rlhfjax.worlds.language import WORDS

NUM_SCORES = 10
# The last rows of a judge's vocabulary, whatever language stands before them: no answer can say what a judge says, and
# "10" is one token where a tokenizer may split it.
JUDGE_TOKENS = ("<1>", "<2>", "<score>", "<verdict>", *map(str, range(1, NUM_SCORES + 1)))
JUDGE_WORDS = (*WORDS, *JUDGE_TOKENS)


def _ids(model: Model, *words: str) -> np.ndarray:
    """A judge's own tokens."""
    return model.config.vocab_size - len(JUDGE_TOKENS) + np.array([JUDGE_TOKENS.index(word) for word in words])


_SCORES = tuple(map(str, range(1, NUM_SCORES + 1)))
_VERDICTS = _SCORES[:2]


@pytree
class JudgingData:
    """What a judge learns from: pairs with what people said of each pair and of each answer by itself.

    pairs: prefs `[N]` = P(first better), labels of people. stars `[N, 2]` int32 in 1..10: their ratings.
    """

    pairs: PreferenceBatch
    stars: np.ndarray

    def __len__(self) -> int:
        return len(self.pairs)


@pytree
class Verdicts:
    """P("1") of the same pairs in both orders, each `[N]` float32.

    as_given: the first answer stood first, so "1" speaks for it. swapped: it stood second, so "1" speaks against it.
    """

    as_given: jax.Array
    swapped: jax.Array

    @property
    def prefs(self) -> jax.Array:
        """P(first better) without position bias, `[N]`: (as_given + 1 - swapped) / 2.

        The verdict on the swapped pair is mapped back before the two are averaged: a judge that always says "1" ends
        at 0.5.
        """
        return (self.as_given + (1 - self.swapped)) / 2


def check_judging_data(data: JudgingData) -> None:
    """Raise for pairs that cannot be learned from (`check_pairs`), and for stars outside 1..10."""
    check_pairs(data.pairs)
    check_shapes(data, stars=(len(data), 2))
    bad = np.flatnonzero(~np.isin(data.stars, np.arange(1, NUM_SCORES + 1)).all(1))
    if bad.size:
        raise ValueError(f"stars must lie in 1..{NUM_SCORES}; {bad.size} rows do not, the first being row {bad[0]}: "
                         f"{np.asarray(data.stars)[bad[0]]}")  # fmt: skip


def swap(pairs: PreferenceBatch) -> PreferenceBatch:
    """The same pairs, and the same opinions of them, in the other order."""
    signs = None if pairs.signs is None else pairs.signs[:, ::-1]
    return dataclasses.replace(pairs, responses=pairs.responses[:, ::-1], responses_mask=pairs.responses_mask[:, ::-1],
                               prefs=1 - pairs.prefs, signs=signs)  # fmt: skip


def put_preferred_first(data: JudgingData, share: float, seed: int) -> JudgingData:
    """The same judging data with the preferred answer first in this share of the pairs, exact to rounding.

    Which pairs these are is drawn; pairs labelled a tie stay as they are. A judge taught on a share other than a half
    learns it as a prior on its verdicts: position bias that comes from the data, as it may come about in earnest.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share lies in [0, 1], got {share}")
    prefs = np.asarray(data.pairs.prefs)
    decided = np.random.default_rng([seed, 5]).permutation(np.flatnonzero(prefs != 0.5))
    wanted = prefs > 0.5
    wanted[decided] = np.arange(len(decided)) < round(share * len(decided))
    turned = wanted != (prefs > 0.5)
    other = JudgingData(pairs=swap(data.pairs), stars=data.stars[:, ::-1])
    return jax.tree.map(lambda x, y: np.where(turned.reshape(-1, *[1] * (y.ndim - 1)), x, y), other, data)


def _read(model: Model, prompts, prompt_mask, *answers) -> tuple[jax.Array, jax.Array]:
    """What the judge reads, tokens and mask `[N, S]`: up to the `<score>` behind the last of `answers` (tokens, mask);
    behind two of them `<verdict>` too."""
    chex.assert_rank([prompts, *(tokens for tokens, _ in answers)], 2)
    shape = (len(prompts), 1)
    column = lambda word: (jnp.full(shape, _ids(model, word)[0], jnp.int32), jnp.ones(shape, bool))
    parts = [(prompts, prompt_mask)]
    for name, answer in zip(("<1>", "<2>"), answers):
        parts += [column(name), answer, column("<score>")]
    parts += [column("<verdict>")] * (len(answers) == 2)
    tokens, masks = zip(*parts)
    return jnp.concatenate(tokens, 1), jnp.concatenate(masks, 1)


def _read_pairs(model: Model, pairs: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    answers = ((pairs.responses[:, k], pairs.responses_mask[:, k]) for k in (0, 1))
    return _read(model, pairs.prompts, pairs.prompt_mask, *answers)


def make_judge_loss(model: Model, *, rating_coef: float = 1.0, token_coef: float = 0.4):
    """`loss_fn(params, batch: JudgingData)` for `make_fit_step`: what people said is likely, and so are the answers.

        loss = mean_n[-p_n log P("1") - (1 - p_n) log P("2")] - rating_coef mean_{n,k} log P("stars_{n,k}")
               - token_coef mean_{n,k,t} log P(token_{n,k,t})

    with p = prefs, n over pairs, k over both answers, t over their kept tokens, P over the whole vocabulary. A verdict
    alone, one bit per sequence, hardly teaches a small model to read; the ratings of each answer do.
    """

    def loss_fn(params: Params, batch: JudgingData):
        pairs, num_tokens = batch.pairs, batch.pairs.responses.shape[-1]
        tokens, mask = _read_pairs(model, pairs)
        logits, _ = model.apply(params, tokens, mask)
        logprobs = jax.nn.log_softmax(logits)
        first, second = (logprobs[:, -1, word] for word in _ids(model, *_VERDICTS))
        ends = (-4 - num_tokens, -2)  # the two <score>
        chosen = lambda logprobs, words: jnp.take_along_axis(logprobs, words[..., None], -1)[..., 0]
        stars = jnp.asarray(_ids(model, *_SCORES))[batch.stars - 1]
        rated = chosen(jnp.stack([logprobs[:, end] for end in ends], 1), stars)
        said = jnp.stack([before_response_tokens(logprobs[:, :end], num_tokens) for end in ends], 1)
        spoken = chosen(said, jnp.where(pairs.responses_mask, pairs.responses, 0))
        parts = {
            "verdict": -jnp.mean(pairs.prefs * first + (1 - pairs.prefs) * second),
            "rating": -jnp.mean(rated),
            "language": -masked_mean(spoken, pairs.responses_mask),
        }
        right = ((first > second) == (pairs.prefs > 0.5)).astype(jnp.float32)
        accuracy = masked_mean(right, pairs.prefs != 0.5)
        total = parts["verdict"] + rating_coef * parts["rating"] + token_coef * parts["language"]
        return total, parts | {"accuracy": accuracy}

    return loss_fn


def make_verdict(model: Model) -> Callable[[Params, PreferenceBatch], jax.Array]:
    """`verdict(params, pairs) -> [N]`: P("1") of each pair as it stands, a softmax over the words "1" and "2" alone.

    Labels of `pairs` are not looked at.
    """

    def verdict(params: Params, pairs: PreferenceBatch) -> jax.Array:
        logits, _ = model.apply(params, *_read_pairs(model, pairs), num_outputs=1)
        return jax.nn.softmax(logits[:, 0, _ids(model, *_VERDICTS)])[:, 0]

    return verdict


def make_both_orders(model: Model) -> Callable[[Params, PreferenceBatch], Verdicts]:
    """`judge(params, pairs) -> Verdicts`: every pair twice, in both orders, from one forward pass of `2 N` rows."""
    verdict = make_verdict(model)

    def judge(params: Params, pairs: PreferenceBatch) -> Verdicts:
        both = jax.tree.map(lambda *x: jnp.concatenate(x), pairs, swap(pairs))
        as_given, swapped = jnp.split(verdict(params, both), 2)
        return Verdicts(as_given=as_given, swapped=swapped)

    return judge


def make_rating(model: Model):
    """`rating(params, prompts, prompt_mask, tokens, mask) -> [B]`: the expected score in [1, 10] of single answers.

        s = sum_i i P("i"),    P normalised over the ten scores

    The expectation tells answers apart that share their likeliest score.
    """

    def rating(params: Params, prompts, prompt_mask, tokens, mask) -> jax.Array:
        logits, _ = model.apply(params, *_read(model, prompts, prompt_mask, (tokens, mask)), num_outputs=1)
        return jnp.sum(jax.nn.softmax(logits[:, 0, _ids(model, *_SCORES)]) * jnp.arange(1.0, NUM_SCORES + 1), -1)

    return rating


def reward_of(scores):
    """Expected scores in [1, 10] as rewards in [-1, 1]: (s - 5.5) / 4.5."""
    return (scores - (1 + NUM_SCORES) / 2) / ((NUM_SCORES - 1) / 2)


def make_direct_score(model: Model) -> Callable[[Params, Rollout], jax.Array]:
    """`score(params, rollout) -> [B]` in [-1, 1]: direct RLAIF, where the judge stands in for a reward model."""
    rating = make_rating(model)
    return lambda params, rollout: reward_of(
        rating(params, rollout.prompts, rollout.prompt_mask, rollout.tokens, rollout.mask)
    )


def make_direct_reward(model: Model) -> Callable[[ScoreModel, Rollout], jax.Array]:
    """`reward(score_model, rollout) -> [B]`: that score in units of the starting policy's spread."""
    raw = make_direct_score(model)
    return lambda fitted, rollout: (raw(fitted.params, rollout) - fitted.shift) / fitted.scale
