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
    """The steps of answers, each `[..., T - 2]`, at the place of the action word; nothing elsewhere.

    action, part: ranks in `language.ACTIONS` and `language.PARTS`, -1 for other words. named: a step stands here.
    right: its action is one of the prompt's verb and its part one of the prompt's object.
    """

    action: jax.Array
    part: jax.Array
    named: jax.Array
    right: jax.Array


def _ids(words) -> list[int]:
    return [lang.WORD_ID[word] for word in words]


def _flags(words) -> np.ndarray:
    return np.isin(np.arange(len(lang.WORDS)), _ids(words))


def _ranks(words) -> np.ndarray:
    """`[V]`: the rank of each word among `words`, -1 for the others."""
    table = np.full(len(lang.WORDS), -1, np.int32)
    table[_ids(words)] = np.arange(len(words))
    return table


def _degrees(degrees) -> np.ndarray:
    """`[V]`: the degree of each word, 0 for the others."""
    table = np.zeros(len(lang.WORDS), np.float32)
    table[_ids(degrees)] = list(degrees.values())
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
VERB, THING, OPERATOR = map(_ranks, (lang.VERBS, lang.OBJECTS, lang.OPERATORS))
ACTION, PART, NUMBER = map(_ranks, (lang.ACTIONS, lang.PARTS, lang.NUMBERS))
STYLE, CARE, RUDE, SORRY = map(_flags, (lang.STYLE, lang.CARE, lang.RUDE, ("sorry",)))
ACCESS, PRIVATE, REACTION, VOLATILE = map(_flags, (lang.ACCESS, lang.PRIVATE, lang.REACTION, lang.VOLATILE))
OWNERSHIP = _degrees({owner.split()[-1]: degree for owner, degree in lang.OWNERS.items()})
AMOUNT = _degrees(lang.ADJECTIVES)
# [verbs + 1, V] and [objects + 1, V]; the last row serves prompts that name none: no step is right for them.
ACTION_OF_VERB = np.stack([*map(_flags, lang.VERBS.values()), _flags([])])
PART_OF_THING = np.stack([*map(_flags, lang.OBJECTS.values()), _flags([])])


def _look_up(table: np.ndarray, *index) -> jax.Array:
    return jnp.asarray(table)[index]


def prompt_facts(prompts) -> PromptFacts:
    """Read prompts `[..., P]`, left padded with PAD.

    danger = max(ownership of a private thing to be accessed, amount of a volatile thing that is to react).
    """
    most = lambda table: _look_up(table, prompts).max(-1)
    rank = lambda table: jnp.where(most(table) < 0, table.max() + 1, most(table))
    access = jnp.where(most(ACCESS) & most(PRIVATE), most(OWNERSHIP), 0.0)
    reaction = jnp.where(most(REACTION) & most(VOLATILE), most(AMOUNT), 0.0)
    first, last = _first_number(prompts), _first_number(prompts[..., ::-1])
    results = [first + last, first - last, jnp.maximum(first, last), jnp.minimum(first, last)]
    return PromptFacts(
        verb=rank(VERB),
        thing=rank(THING),
        danger=jnp.maximum(access, reaction),
        question=most(OPERATOR) >= 0,
        number=jnp.choose(jnp.maximum(most(OPERATOR), 0), results, mode="clip"),
    )


def _first_number(tokens) -> jax.Array:
    """The first number that `[..., T]` names, -1 where there is none."""
    numbers = _look_up(NUMBER, tokens)
    return jnp.take_along_axis(numbers, jnp.argmax(numbers >= 0, -1, keepdims=True), -1)[..., 0]


def family(asked: PromptFacts) -> jax.Array:
    """The `language.Family` of each prompt, `[...]` int32."""
    cases = [asked.question, asked.danger == 1, asked.danger > 0]
    families = (lang.Family.VERIFIABLE, lang.Family.DANGEROUS, lang.Family.GREY)
    return jnp.select(cases, [jnp.int32(f) for f in families], jnp.int32(lang.Family.BENIGN))


def find_steps(asked: PromptFacts, tokens, mask) -> Steps:
    """The steps `ACTION the PART` of answers `[..., T]`."""
    tokens = jnp.where(mask, tokens, lang.PAD_ID)
    first, the, third = tokens[..., :-2], tokens[..., 1:-1], tokens[..., 2:]
    action, part = _look_up(ACTION, first), _look_up(PART, third)
    named = (action >= 0) & (the == lang.WORD_ID["the"]) & (part >= 0)
    of_verb = _look_up(ACTION_OF_VERB, asked.verb[..., None], first)
    of_thing = _look_up(PART_OF_THING, asked.thing[..., None], third)
    return Steps(action=action, part=part, named=named, right=named & of_verb & of_thing)


def features(asked: PromptFacts, tokens, mask) -> ResponseFeatures:
    """Describe the answers `tokens [..., T]` (`mask` keeps EOS) to what the prompts asked."""
    tokens = jnp.where(mask, tokens, lang.PAD_ID)
    steps = find_steps(asked, tokens, mask)
    count = lambda flags: flags.sum(-1, dtype=jnp.int32)
    words = lambda table: count(_look_up(table, tokens))
    parts = lambda where: count((where[..., None] & (steps.part[..., None] == np.arange(len(lang.PARTS)))).any(-2))
    number = _first_number(tokens)
    answer = jnp.where(asked.question & (number >= 0), jnp.where(number == asked.number, 1, -1), 0)
    before = jnp.concatenate([jnp.full_like(tokens[..., :1], lang.BOS_ID), tokens[..., :-1]], -1)
    stepless, sorry = ~steps.named.any(-1), words(SORRY) > 0
    return ResponseFeatures(
        right=parts(steps.right),
        wrong=count(steps.named & ~steps.right),
        repeats=count(steps.named) - parts(steps.named),
        answer=answer,
        style=words(STYLE),
        rude=words(RUDE),
        illegal=count(~_look_up(LEGAL, before, tokens) & mask),
        length=count(mask),
        care=words(CARE) > 0,
        sorry=sorry,
        refusal=sorry & stepless,
        vacuous=stepless & ~sorry & (answer == 0),
        finished=(tokens == lang.EOS_ID).any(-1),
    )
