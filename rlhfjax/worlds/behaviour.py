"""What an answer does, read from its tokens by tables: the facts that both truths of GoldWorld judge.

Everything here is jittable, with leading dimensions free. Tables are indexed by token; padding reads as nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.types import pytree
from rlhfjax.worlds import language as lang


@pytree
class Gold:
    """The truth about answers: not a bare array, so that no loss can take it for a reward.

    helpfulness `[...]` float32: r*, higher is better. harm `[...]` float32: c*, harmful above 0.
    """

    helpfulness: jax.Array
    harm: jax.Array


@pytree
class ResponseFeatures:
    """Behaviour of answers, each `[...]`; counts are int32, the others bool unless said.

    right: parts of the object that a right step served; wrong: steps of another verb or object; repeats: steps on a
    part that an earlier step named. answer: +1 / -1 where the first number said is the right / a wrong answer to a
    question, else 0. vacuous: neither a step, nor an answer, nor a refusal. refusal: says sorry and gives no step.
    illegal: pairs of neighbouring words that no sentence of the language has. length: tokens, EOS included.
    """

    right: jax.Array
    wrong: jax.Array
    repeats: jax.Array
    answer: jax.Array
    style: jax.Array
    rude: jax.Array
    illegal: jax.Array
    length: jax.Array
    care: jax.Array
    sorry: jax.Array
    refusal: jax.Array
    vacuous: jax.Array
    finished: jax.Array


@pytree
class PromptFacts:
    """What a prompt asks, each `[...]`: verb and thing are row numbers of the tables (the last row: none named).

    danger in [0, 1] float32; question: asks for a number; number: the right one.
    """

    verb: jax.Array
    thing: jax.Array
    danger: jax.Array
    question: jax.Array
    number: jax.Array


@pytree
class Steps:
    """Where the steps of answers are, each `[..., T - 2]`, at the position of the action word.

    action, part: tokens of the step's words. named: a step stands here. right: it belongs to the prompt's verb and
    object. first: no earlier step of the answer names this part.
    """

    action: jax.Array
    part: jax.Array
    named: jax.Array
    right: jax.Array
    first: jax.Array


def _ids(words) -> list[int]:
    return [lang.WORD_ID[word] for word in words]


def _flags(words) -> np.ndarray:
    return np.isin(np.arange(len(lang.WORDS)), _ids(words))


def _index(words) -> np.ndarray:
    """`[V]`: the rank of each word in `words`, -1 for the others."""
    table = np.full(len(lang.WORDS), -1, np.int32)
    table[_ids(words)] = np.arange(len(words))
    return table


def _legal_neighbours() -> np.ndarray:
    """`[V, V]` bool: may the second word follow the first? BOS stands for the start of an answer."""
    classes = {"start": [lang.BOS], "end": [lang.EOS], "stop": ["."], "the": ["the"], "style": lang.STYLE}
    classes |= {"opener": lang.OPENER, "connector": lang.CONNECTORS, "care": lang.CARE}
    classes |= {"action": lang.ACTIONS, "part": lang.PARTS}
    beginnings = "style opener care action"
    follows = {"start": beginnings, "style": beginnings, "opener": "care action", "connector": "care action"}
    follows |= {"care": "action", "action": "the", "the": "part", "part": "connector stop", "stop": "end"}
    legal = np.zeros((len(lang.WORDS), len(lang.WORDS)), bool)
    for name, others in follows.items():
        for other in others.split():
            legal[np.ix_(_ids(classes[name]), _ids(classes[other]))] = True
    answers = [form.format(number=number) for form in lang.ANSWERS for number in lang.NUMBERS]
    for sentence in (*lang.REFUSALS, *lang.FILLERS, *lang.INSULTS, *answers):
        words = sentence.split()
        legal[_ids(words[:-1]), _ids(words[1:])] = True
        legal[_ids([lang.BOS, *lang.STYLE]), _ids(words[:1])] = True
    return legal


LEGAL = _legal_neighbours()
VERB, THING = _index(tuple(lang.VERBS)), _index(tuple(lang.OBJECTS))
ACTION, PART, NUMBER = _index(lang.ACTIONS), _index(lang.PARTS), _index(lang.NUMBERS)
IS_STYLE, IS_CARE, IS_RUDE, IS_SORRY = map(_flags, (lang.STYLE, lang.CARE, lang.RUDE, ("sorry",)))
THE = lang.WORD_ID["the"]
# The last row serves prompts that name no verb or no object: no step is right for them.
ACTION_OF_VERB = np.stack([*map(_flags, lang.VERBS.values()), np.zeros(len(lang.WORDS), bool)])
PART_OF_THING = np.stack([*map(_flags, lang.OBJECTS.values()), np.zeros(len(lang.WORDS), bool)])
IS_ACCESS, IS_REACTION = _flags(lang.ACCESS), _flags(lang.REACTION)
IS_PRIVATE, IS_VOLATILE = _flags(lang.PRIVATE), _flags(lang.VOLATILE)
OWNERSHIP = np.zeros(len(lang.WORDS), np.float32)
OWNERSHIP[_ids(owner.split()[-1] for owner in lang.OWNERS)] = list(lang.OWNERS.values())
AMOUNT = np.zeros(len(lang.WORDS), np.float32)
AMOUNT[_ids(lang.ADJECTIVES)] = list(lang.ADJECTIVES.values())
OPERATOR = _index(lang.OPERATORS)


def _look_up(table: np.ndarray, tokens) -> jax.Array:
    return jnp.asarray(table)[tokens]


def _named(table: np.ndarray, tokens, none: int) -> jax.Array:
    """The index of the word of this class in each row, `none` where there is no such word."""
    index = _look_up(table, tokens).max(-1)
    return jnp.where(index < 0, none, index)


def prompt_facts(prompts) -> PromptFacts:
    """Read prompts `[..., P]`, left padded with PAD.

    danger = max(ownership of a private thing to be accessed, amount of a volatile thing to react): a product of words.
    """
    has = lambda table: _look_up(table, prompts).any(-1)
    amount = lambda table: _look_up(table, prompts).max(-1)
    access = jnp.where(has(IS_ACCESS) & has(IS_PRIVATE), amount(OWNERSHIP), 0.0)
    reaction = jnp.where(has(IS_REACTION) & has(IS_VOLATILE), amount(AMOUNT), 0.0)
    numbers = _look_up(NUMBER, prompts)
    first = jnp.argmax(numbers >= 0, -1)
    last = numbers.shape[-1] - 1 - jnp.argmax(numbers[..., ::-1] >= 0, -1)
    i, j = (jnp.take_along_axis(numbers, at[..., None], -1)[..., 0] for at in (first, last))
    operator = _named(OPERATOR, prompts, 0)
    number = jnp.choose(operator, [i + j, i - j, jnp.maximum(i, j), jnp.minimum(i, j)], mode="clip")
    return PromptFacts(
        verb=_named(VERB, prompts, len(lang.VERBS)),
        thing=_named(THING, prompts, len(lang.OBJECTS)),
        danger=jnp.maximum(access, reaction),
        question=has(OPERATOR >= 0),
        number=number,
    )


def find_steps(asked: PromptFacts, tokens, mask) -> Steps:
    """The steps `ACTION the PART` of answers `[..., T]`."""
    tokens = jnp.where(mask, tokens, lang.PAD_ID)
    action, the, part = tokens[..., :-2], tokens[..., 1:-1], tokens[..., 2:]
    index = jnp.where(_look_up(ACTION, action) >= 0, _look_up(PART, part), -1)
    index = jnp.where(the == THE, index, -1)
    named = index >= 0
    right_action = jnp.asarray(ACTION_OF_VERB)[asked.verb[..., None], action]
    right_part = jnp.asarray(PART_OF_THING)[asked.thing[..., None], part]
    earlier = jnp.tri(index.shape[-1], k=-1, dtype=bool)
    again = (index[..., :, None] == index[..., None, :]) & earlier
    return Steps(action=action, part=part, named=named, right=named & right_action & right_part,
                 first=named & ~again.any(-1))  # fmt: skip


def features(asked: PromptFacts, tokens, mask) -> ResponseFeatures:
    """Describe the answers `tokens [..., T]` (`mask` keeps EOS) to what the prompts asked."""
    tokens = jnp.where(mask, tokens, lang.PAD_ID)
    steps = find_steps(asked, tokens, mask)
    count = lambda flags: flags.sum(-1, dtype=jnp.int32)
    parts = jnp.where(steps.right, _look_up(PART, steps.part), -1)
    served = (parts[..., None] == jnp.arange(len(lang.PARTS))).any(-2)

    said = _look_up(NUMBER, tokens)
    spoken = jnp.take_along_axis(said, jnp.argmax(said >= 0, -1)[..., None], -1)[..., 0]
    verdict = jnp.where(spoken == asked.number, 1, -1)
    answer = jnp.where(asked.question & (spoken >= 0), verdict, 0)

    before = jnp.concatenate([jnp.full_like(tokens[..., :1], lang.BOS_ID), tokens[..., :-1]], -1)
    stepless, sorry = ~steps.named.any(-1), _look_up(IS_SORRY, tokens).any(-1)
    return ResponseFeatures(
        right=count(served),
        wrong=count(steps.named & ~steps.right),
        repeats=count(steps.named & ~steps.first),
        answer=answer,
        style=count(_look_up(IS_STYLE, tokens)),
        rude=count(_look_up(IS_RUDE, tokens)),
        illegal=count(~jnp.asarray(LEGAL)[before, tokens] & mask),
        length=count(mask),
        care=_look_up(IS_CARE, tokens).any(-1),
        sorry=sorry,
        refusal=sorry & stepless,
        vacuous=stepless & ~sorry & (answer == 0),
        finished=(tokens == lang.EOS_ID).any(-1),
    )
