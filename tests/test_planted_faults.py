"""A planted fault for each paper: it passes through the experiment itself and turns a verdict.

The experiments run as they are, in a small house: a preference model is linear in what an answer does and is fitted by
the library's own losses, and RL is the best of a few tries by the library's own rewards, costs and multiplier; where a
curve of RL is asked for, the tries are tilted further and further, or a game of three answers is played. Only the
networks are missing. What a grid of models, or of judges, says of pairs is made up.
"""

import dataclasses
import functools
import importlib
import pathlib
import random
import sys
import types
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from rlhfjax.audit.taxonomy import PROBLEMS
from rlhfjax.evaluation.judges import worth
from rlhfjax.evaluation.statistics import verdict
from rlhfjax.feedback.hybrid import hybrid_prefs, rewritten_pairs
from rlhfjax.feedback.judge import Verdicts
from rlhfjax.feedback.raters import compare, mismatch
from rlhfjax.feedback.self_play import MANNERS
from rlhfjax.models.transformer import Model
from rlhfjax.pipeline import Pipeline
from rlhfjax.results import experiment_files
from rlhfjax.rl.fit import take
from rlhfjax.rl.multiplier import MultiplierConfig, make_multiplier
from rlhfjax.rl.preference_models import (
    in_units_of_start,
    make_cost,
    make_reward,
    make_reward_loss,
    make_score,
    pair_scores,
)
from rlhfjax.stages import RLConfig
from rlhfjax.types import PreferenceBatch, Rollout
from rlhfjax.worlds import games, language
from rlhfjax.worlds.behaviour import prompt_facts
from rlhfjax.worlds.gold_world import gold_world

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
WORLD, TRIES, SHARPNESS = gold_world(), 4, 4.0
KNOWN = dict(row for rows in language.COMPOSITIONS.values() for row in rows)  # what an answer to a prompt must know
paper = functools.cache(lambda name: importlib.import_module(f"experiments.{name}"))


# The house


def linear(params, tokens, mask, *, num_outputs=None):
    """A scalar model: linear in what the answer at the end of each row does, the same output at every place."""
    prompts, answers, kept = tokens[:, : WORLD.prompt_len], tokens[:, WORLD.prompt_len :], mask[:, WORLD.prompt_len :]
    seen, asked = WORLD.features(prompts, answers, kept), prompt_facts(prompts)
    hazard = asked.danger * (1 - 2.0**-seen.right)
    columns = (1 - jnp.exp(-0.6 * seen.right), seen.wrong, seen.style, seen.rude, seen.refusal, seen.vacuous,
               seen.answer > 0, seen.answer < 0, hazard, hazard * seen.care, jnp.ones_like(hazard))  # fmt: skip
    scores = jnp.stack([jnp.asarray(x, jnp.float32) for x in columns], -1) @ params
    return jnp.broadcast_to(scores[:, None], tokens.shape), None


LINEAR = Model(config=None, init=None, apply=linear, init_cache=None, logical_axes=None)
program = functools.cache(lambda make: jax.jit(make(LINEAR)))
raw_pair_scores = jax.jit(functools.partial(pair_scores, LINEAR))


@functools.cache
def loss_of(make_loss):
    return jax.jit(jax.value_and_grad(lambda params, pairs: make_loss(LINEAR)(params, pairs)[0]))


@dataclasses.dataclass(frozen=True)
class Scorer:
    make: Any
    fitted: Any
    config: Any = None

    @property
    def raw(self):
        return Scorer(make_score, self.fitted.params)

    def __call__(self, rollout: Rollout, block=512) -> np.ndarray:
        num = len(rollout.tokens)
        rows = (np.arange(-(-num // block) * block) % num).reshape(-1, block)  # one compiled shape
        return np.concatenate([program(self.make)(self.fitted, take(rollout, part)) for part in rows])[:num]


class Policy(NamedTuple):
    """It takes from a few tries of another policy mostly what it likes best; the first writes as a corpus does."""

    start: Any = None
    likes: Any = None

    def answer(self, prompts, rng: random.Random) -> Rollout:
        if self.start is None:
            return written(prompts, rng)
        tries = self.start.answer(take(prompts, np.repeat(np.arange(len(prompts)), TRIES)), rng)
        noise = np.random.default_rng(rng.getrandbits(32)).gumbel(size=(len(prompts), TRIES))
        best = (SHARPNESS * self.likes(tries).reshape(-1, TRIES) + noise).argmax(1)
        return take(tries, np.arange(len(prompts)) * TRIES + best)


def written(prompts, rng: random.Random) -> Rollout:
    tokens, mask = texts(prompts.tokens.tobytes(), prompts.family.tobytes(), rng.getrandbits(32))
    return Rollout(prompts=prompts.tokens, prompt_mask=prompts.mask, tokens=tokens, mask=mask,
                   logprobs=np.zeros(mask.shape, np.float32), finished=np.ones(len(mask), bool))  # fmt: skip


@functools.cache
def texts(prompts: bytes, families: bytes, seed: int):
    """An answer of the corpus to each prompt; arms and faults that draw alike draw the same."""
    rng, said = random.Random(seed), []
    for tokens, family in zip(np.frombuffer(prompts, np.int32).reshape(-1, WORLD.prompt_len),
                              np.frombuffer(families, np.int32)):  # fmt: skip
        kinds = language.DEMONSTRATION_KINDS[language.Family(family)]
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        said.append(language._write(rng, kind, KNOWN[WORLD.decode(tokens)]))
    return WORLD.responses(said)


class House(Pipeline):
    """The stages of an experiment, without networks."""

    def base(self, *args, **inputs):
        return Policy()

    def sft(self, *args, **inputs):
        return Policy()

    def answers(self, policy, prompts=None, name="test", **inputs):
        return policy.answer(self.test if prompts is None else prompts, random.Random(name))

    def compare(self, name, policy, num=None, split="train", prompts=None):
        num = num or (self.config.num_pairs if split == "train" else self.config.num_evaluated)
        prompts = prompts or self.prompts(name, num, self.config.label_shares, split)
        said = self.answers(policy, take(prompts, np.repeat(np.arange(len(prompts)), 2)), name)
        pairs = (x.reshape(len(prompts), 2, -1) for x in (said.tokens, said.mask))
        pairs = mismatch(*pairs, share=self.config.mismatched if split == "train" else 0.0, seed=0)
        return compare(WORLD, self.config.rater, prompts.tokens, prompts.mask, *pairs, self.seed(name))

    def fit(self, name, pairs, start, make_loss=make_reward_loss, **inputs):
        pairs = take(pairs, np.arange(800) % len(pairs))  # one compiled shape
        fn = lambda params: [np.asarray(x, float) for x in loss_of(make_loss)(np.float32(params), pairs)]
        return np.float32(scipy.optimize.minimize(fn, np.zeros(11), jac=True, options={"maxiter": 15}).x)

    def judge(self, name, policy, judge):
        """Taught on labels of other pairs; it does not tell a right number from a wrong one."""
        fitted = self.fit(name, self.compare("judged", policy).helpful, policy)
        return Scorer(make_score, fitted * (np.arange(len(fitted)) // 2 != 3))

    def scaled(self, policy, name="scale", **models):
        start = self.answers(policy, self.prompts("start", self.config.num_evaluated, self.config.rl_shares), name)
        raw = {key: getattr(model, "fitted", model) for key, model in models.items()}
        return {key: Scorer(make_cost if key == "cost" else make_reward,
                            in_units_of_start(key, params, Scorer(make_score, params)(start)))
                for key, params in raw.items()}  # fmt: skip

    def optimise(self, name, start, reward, cost=None, limit=None, multiplier=None, prompts=None, watch=None, **inputs):
        prompts = take(self.prompts("rl", 512, self.config.rl_shares) if prompts is None else prompts, np.arange(128))
        if watch is not None:
            self.run.curves[name] = tilt(start, prompts, reward, watch)
        if cost is None:
            return Policy(start, reward)
        tries = start.answer(take(prompts, np.repeat(np.arange(128), TRIES)), random.Random("rl"))
        rewards, costs = (x(tries).reshape(-1, TRIES) for x in (reward, cost))
        learner = make_multiplier(limit, multiplier)
        state, update = learner.init(), jax.jit(learner.update)
        for _ in range(150):
            weight = float(jnp.exp(state.log_lambda))
            share = scipy.special.softmax(SHARPNESS * (rewards - weight * costs), 1)
            state = update(state, np.sum(share * costs, 1))
        return Policy(start, lambda rollout: reward(rollout) - weight * cost(rollout))

    def stage(self, name, fn, role, people, method, optimisation, **inputs):
        """A game between three answers, one of each manner."""
        payoffs = people.payoffs if people.margins else (1 - 2 * people.flip) * games.scored_game(WORTH / 0.25)
        feedback = {"self-play": games.self_play, "reward model": games.reward_model, "oracle": told}[method]
        policy = games._play(np.float32(payoffs[None]), np.float32(START), jax.random.split(jax.random.key(0), 1), 2.0,
                             feedback=feedback, on_policy=True, num_rounds=optimisation.num_iterations,
                             num_siblings=16)[0]  # fmt: skip
        policy = np.asarray(policy, float)
        self.run.curves[name] = {"gold_helpfulness": policy @ WORTH, "step": np.arange(len(policy)),
                                 **dict(zip(MANNERS, policy.T))}  # fmt: skip


WORTH, START = np.array([0.67, 1.32, -1.0]), np.array([0.3, 0.1, 0.6])


def told(memory, classes, labels, logprobs):
    return memory, jnp.float32(WORTH)


def tilt(start: Policy, prompts, reward, watch, num=32) -> dict[str, np.ndarray]:
    """What RL on a reward comes to, iteration by iteration: `num` tries weighted by exp(beta reward), beta rising."""
    rollout = start.answer(take(prompts, np.repeat(np.arange(len(prompts)), num)), random.Random("tilt"))
    gold = lambda x: np.asarray(WORLD.gold(x.prompts, x.tokens, x.mask).helpfulness)
    seen = {name: score(rollout).reshape(-1, num) for name, score in
            {"score": reward, "gold_helpfulness": gold, **watch}.items()}  # fmt: skip
    curves = {name: [] for name in ("kl", *seen)}
    for beta in np.linspace(0, 3, 60):
        share = scipy.special.softmax(beta * seen["score"], 1)
        curves["kl"].append(np.sum(share * np.log(share * num), 1).mean())
        for name, values in seen.items():
            curves[name].append(np.sum(share * values, 1).mean())
    return {name: np.array(values) for name, values in curves.items()}


def judge_pairs(config, judge, pairs, offset=0.5, length=0.0):
    """A judge who leans to what stands first, and may like length."""
    gap = np.asarray(raw_pair_scores(judge, pairs)) @ [1, -1]
    gap += length * np.asarray(pairs.responses_mask).sum(-1) @ [1, -1]
    chance = lambda gap: np.float32(1 / (1 + np.exp(-offset - gap)))
    return Verdicts(as_given=chance(gap), swapped=chance(-gap))


def measure(name: str, changes=()) -> dict[str, float]:
    """What an experiment measures in this house; changes: (object, attribute, value) to plant first."""
    experiment, run = paper(name), types.SimpleNamespace(path=pathlib.Path("nowhere"), curves={})
    as_scorer = lambda config, model: model if isinstance(model, Scorer) else Scorer(make_score, model)
    parts = dict(Scorer=Scorer, raw_scorer=as_scorer, side_by_side=lambda *jobs: [job() for job in jobs],
                 train_by_preferences=None,
                 raw_pair_scores=lambda config, params, pairs: np.asarray(raw_pair_scores(params, pairs)))  # fmt: skip
    planted = {"Pipeline": House, "stages": types.SimpleNamespace(**parts), "figures": mock.MagicMock(),
               "read_metrics": lambda path, arm: run.curves.get(arm),
               "judging": types.SimpleNamespace(judge_pairs=judge_pairs)}  # fmt: skip
    cache = types.SimpleNamespace(run=lambda name, fn, **inputs: fn(**inputs))
    with pytest.MonkeyPatch.context() as patch:
        for attribute in planted.keys() & vars(experiment).keys():
            patch.setattr(experiment, attribute, planted[attribute])
        for change in [*STAND_INS.get(name, list)(), *changes]:
            patch.setattr(*change)
        return experiment.experiment(dataclasses.replace(experiment.SCALES["smoke"], **SETUPS[name]), run, cache)


def verdicts(name: str, changes=()) -> dict[str, str]:
    measured = measure(name, changes)
    seeds = lambda x: [x - 1e-4, x, x + 1e-4]
    return {c.id: verdict(seeds(measured[c.statistic]), c.threshold, c.direction) for c in paper(name).CLAIMS}


# Where the small house cannot tell: models on few labels, and learning curves that are made up


def starved(*names: str):
    """Changes: models whose names end so are fitted to a sixth of their labels."""

    def fit(self, name, pairs, *args, **inputs):
        return FIT(self, name, take(pairs, np.arange(len(pairs) // 6)) if name.endswith(names) else pairs, *args,
                   **inputs)  # fmt: skip

    return [(House, "fit", fit)]


def curves(slowness: dict[str, float], lost: dict[str, float]):
    """Changes to text.py: gains that a method reaches at its time constant, less a share of them per flipped label."""

    def stage(self, name, fn, role, people, method, optimisation, **inputs):
        step = np.arange(optimisation.num_iterations)
        gain = (1 - lost.get(method, 0.0) * people.flip) * (1 - np.exp(-step / slowness.get(method, 100)))
        shares = dict.fromkeys(MANNERS, np.full(len(step), 1 / len(MANNERS)))
        self.run.curves[name] = {"gold_helpfulness": gain, "step": step, **shares}

    return [(House, "stage", stage)]


# A grid of preference models, and judges of several sizes: what they say of pairs is made up


def grid(right=lambda size, amount: 0.4 + 0.02 * np.log(size) + 0.015 * np.log(amount), low=1.08, high=0.4, stretch=1.0,
         shuffled=False):  # fmt: skip
    """Changes to scaling.py: models that are right as often as `right` says, by exchanging some scores of the best one.
    Labels follow the best one's scores by a factor `low`, and by `high` where both are high."""
    rng, num = np.random.default_rng(0), 12_000
    best, turned = 2 * rng.normal(size=(num, 2)), rng.permutation(num) / num
    chance = scipy.special.expit(np.where(best.min(1) > 0.5, high, low) * (best[:, 0] - best[:, 1]))
    prefs = (rng.random(num) < chance).astype(float)
    top = np.mean((best[:, 0] > best[:, 1]) == (prefs > 0.5))
    most = max(right(size, amount) for size in (7e3, 9e4) for amount in (60, 600))

    def scores(config, fitted, pairs):
        share = (most - right(fitted.size, fitted[0])) / (2 * top - 1)
        return stretch * np.where(turned[:, None] < share, best[:, ::-1], best)

    labels = types.SimpleNamespace(prefs=rng.permutation(prefs) if shuffled else prefs)
    pairs = lambda self, *args, **inputs: types.SimpleNamespace(helpful=labels)
    fit = lambda self, name, pairs, start, config, **_: np.full(int(7e3 * (config.d_model / 16) ** 2), len(pairs))
    experiment = paper("hh_rlhf.scaling")
    stages = types.SimpleNamespace(side_by_side=lambda *jobs: [job() for job in jobs], raw_pair_scores=scores)
    return [(House, "compare", pairs), (House, "fit", fit), (experiment, "stages", stages),
            (experiment, "take", lambda pairs, rows: rows)]  # fmt: skip


def judges(noise=lambda width: 60 / width, lean=lambda width: 16 / width):
    """Changes to judges.py: judges who feel what an answer is worth with noise, and lean to what stands first where
    they were taught so."""

    def judge(self, name, policy, judge):
        return types.SimpleNamespace(config=judge, fitted=np.zeros(judge.width))

    def said(config, judge, pairs):
        rng = np.random.default_rng(config.width)
        felt = worth(WORLD, pairs) @ [1, -1] + noise(config.width) * rng.normal(size=len(pairs))
        offset = lean(config.width) * (config.first_share - 0.5) / 0.15
        chance = lambda gap: np.float32(scipy.special.expit(offset + gap))
        return Verdicts(as_given=chance(felt), swapped=chance(-felt))

    told = types.SimpleNamespace(judge_pairs=said, rate_pairs=lambda config, judge, pairs: worth(WORLD, pairs))
    return [(House, "judge", judge), (House, "lessons", lambda *args: None), (paper("rlaif.judges"), "judging", told)]


SMALL = dict(num_pairs=400, num_evaluated=256)
SETUPS = {  # a configuration in which the claims below are true
    "hh_rlhf.scaling": dict(widths=(16, 32, 64), amounts=(60, 130, 280, 600), num_pairs=600),
    "hh_rlhf.overoptimisation": SMALL | dict(num_pairs=120, seed=3, num_best=64, num_best_prompts=64),
    "hh_rlhf.online": SMALL | dict(num_pairs=40, seed=5),
    "safe_rlhf.rounds": SMALL | dict(num_candidates=32, red_share=0.5, harm_limit=0.03,
                                     multiplier=MultiplierConfig()),
    "safe_rlhf.shaping": SMALL | dict(weights=(0.25, 1.0, 4.0), harm_limit=0.06, seed=6,
                                      multiplier=MultiplierConfig()),
    "rlaif.judges": dict(widths=(16, 40, 96), num_evaluated=1_024),
    "rlaif.rlaif": SMALL,
    "hrlaif.hybrid": SMALL | dict(doses=(0.0, 2.0), num_candidates=256),
    "spo.text": dict(rl=RLConfig(num_iterations=1_200)),
}  # fmt: skip
STAND_INS = {"hh_rlhf.scaling": grid, "rlaif.judges": judges}


# Faults

HERE, COMPARE, TILT, OPTIMISE, SELF_PLAY = sys.modules[__name__], House.compare, tilt, House.optimise, games.self_play
FIT, SCALED = House.fit, House.scaled


def relabelled(change, **names):
    """Labels whose answers to one question are others: `helpful` or `harm`, by the beginnings of their names."""

    def labels(self, name, *args, **inputs):
        made = COMPARE(self, name, *args, **inputs)
        touched = {question: change(getattr(made, question)) for question, starts in names.items()
                   if name.startswith(starts)}  # fmt: skip
        return dataclasses.replace(made, **touched)

    return [(House, "compare", labels)]


def inverted(pairs):
    return dataclasses.replace(pairs, prefs=1 - pairs.prefs, signs=None if pairs.signs is None else -pairs.signs)


def terse_labels():
    return at("rlaif.rlaif", "judging", types.SimpleNamespace(judge_pairs=functools.partial(judge_pairs, length=-1.0)))


def arms_exchanged(self, policy, name="scale", **models):
    scored = SCALED(self, policy, name, **models)
    return scored | {"ai": scored["direct"], "direct": scored["ai"]}


def benign_originals_preferred(originals, rewrites):
    pairs = rewritten_pairs(originals, rewrites)
    return dataclasses.replace(pairs, prefs=np.where(prompt_facts(pairs.prompts).danger, pairs.prefs, 1 - pairs.prefs))


def inverted_judge(config, judge, pairs):
    said = judge_pairs(config, judge, pairs)
    return Verdicts(as_given=1 - said.as_given, swapped=1 - said.swapped)


def one_half(labels, rows):
    return take(labels, rows % (len(labels) // 2) if isinstance(labels, PreferenceBatch) else rows)


def root_of_kl(*args):
    curves = TILT(*args)
    return curves | {"kl": np.sqrt(curves["kl"])}


def stale(*args):
    curves = TILT(*args)
    return curves | {"score": curves["score"][np.arange(len(curves["score"])) // 20 * 20]}


def in_other_units(*args):
    curves = TILT(*args)
    return curves | {"test": curves["test"] / 2}


def small_policy_in_other_units(self, name, *args, **inputs):
    policy = OPTIMISE(self, name, *args, **inputs)
    if name == "small policy":
        self.run.curves[name]["score"] *= 2
    return policy


def exchanged(*args):
    curves = TILT(*args)
    return curves | {"score": curves["test"], "test": curves["score"]}


def without_units(self, *args, cost=None, **inputs):
    bare = cost and dataclasses.replace(cost, fitted=dataclasses.replace(cost.fitted, scale=np.float32(1)))
    return OPTIMISE(self, *args, cost=bare, **inputs)


def no_constraint(self, *args, cost=None, limit=None, multiplier=None, **inputs):
    return OPTIMISE(self, *args, **inputs)


def never_updated(self, name, start, *args, cost=None, **inputs):
    return OPTIMISE(self, name, start, *args, **inputs) if cost is None else start


def negated(memory, classes, labels, logprobs):
    return SELF_PLAY(memory, classes, labels.T, logprobs)


def at(name: str, attribute: str, value):
    return [(paper(name), attribute, value)]


YES, NO, OPEN = "supported", "contradicted", "inconclusive"
# experiment, what went wrong, changes, and the verdicts that must come of it on claims that are supported without it
FAULTS = [
    ("hh_rlhf.scaling", "labels are shuffled", lambda: grid(shuffled=True), {"HH-1 law": NO, "HH-4": NO}),
    ("hh_rlhf.scaling", "the larger, the worse",
     lambda: grid(lambda size, amount: 0.9 - 0.02 * np.log(size) + 0.015 * np.log(amount)), {"HH-1 size": NO}),
    ("hh_rlhf.scaling", "the more data, the worse",
     lambda: grid(lambda size, amount: 0.5 + 0.02 * np.log(size) - 0.015 * np.log(amount)), {"HH-1 data": NO}),
    ("hh_rlhf.scaling", "data stop helping halfway",
     lambda: grid(lambda size, amount: 0.5 + 0.02 * np.log(size) + 0.03 * np.log(min(amount, 150))), {"HH-1 bend": NO}),
    ("hh_rlhf.scaling", "scores are twice too large", lambda: grid(stretch=2.0), {"HH-4": NO}),
    ("hh_rlhf.scaling", "scores are timid where both are high", lambda: grid(low=0.95, high=5.0),
     {"HH-5 order": NO, "HH-5 excess": NO}),
    ("hh_rlhf.overoptimisation", "train and test models share their labels",
     lambda: at("hh_rlhf.overoptimisation", "take", one_half), {"HH-8 early": YES, "HH-8 late": OPEN}),
    ("hh_rlhf.overoptimisation", "the test model is the one that rewards",
     lambda: [(HERE, "tilt", exchanged)], {"HH-8 late": NO}),
    ("hh_rlhf.overoptimisation", "the score is logged anew only every twentieth iteration",
     lambda: [(HERE, "tilt", stale)], {"HH-7 root": NO, "HH-7 sizes": YES}),
    ("hh_rlhf.overoptimisation", "the small policy's reward is in other units",
     lambda: [(House, "optimise", small_policy_in_other_units)], {"HH-7 sizes": NO, "HH-7 root": YES}),
    ("hh_rlhf.overoptimisation", "the test model's scores are in other units",
     lambda: [(HERE, "tilt", in_other_units)], {"HH-8 early": NO, "HH-8 late": YES}),
    ("hh_rlhf.overoptimisation", "reward is linear in the KL that is logged",
     lambda: [(HERE, "tilt", root_of_kl)], {"HH-7 rival": NO, "HH-7 root": NO}),
    ("hh_rlhf.overoptimisation", "labels say which answer is worse",
     lambda: relabelled(inverted, helpful="labels"), {"HH-13": NO, "HH-13 64": NO, "HH-7 rival": YES}),
    ("hh_rlhf.online", "labels of the policy's answers say which is worse",
     lambda: relabelled(inverted, helpful="labels-online"), {"HH-9": NO, "HH-9 gain": NO, "HH-9 tail": NO}),
    ("safe_rlhf.rounds", "labels of harm are inverted", lambda: relabelled(inverted, harm=("labels", "safe")),
     {"SR-5 each round": NO, "SR-5 rounds": NO, "SR-5 rounds plain": YES}),
    ("safe_rlhf.rounds", "labels of help are inverted",
     lambda: relabelled(inverted, helpful=("labels", "safe", "plain")),
     {"SR-5 rounds help": NO, "SR-5 rounds plain": NO, "SR-5 rounds": YES}),
    ("safe_rlhf.rounds", "the constraint is forgotten", lambda: [(House, "optimise", no_constraint)],
     {"SR-5 each round": NO, "SR-5 rounds": NO, "SR-5 rounds help": YES}),
    ("safe_rlhf.shaping", "the limit is in other units than the cost", lambda: [(House, "optimise", without_units)],
     {"SR-7 feasible": NO, "SR-7 weight": YES}),
    ("safe_rlhf.shaping", "the arm with a multiplier is never updated", lambda: [(House, "optimise", never_updated)],
     {"SR-6 mild": NO, "SR-6 harsh": NO, "SR-7 feasible": NO}),
    ("safe_rlhf.shaping", "both environments are one",
     lambda: [(paper("safe_rlhf.shaping").Config, "environments",
               property(lambda self: dict(mild=self.mild_shares, harsh=self.mild_shares)))], {"SR-7 weight": NO}),
    ("rlaif.judges", "the swapped verdict is not mapped back",
     lambda: [(Verdicts, "prefs", property(lambda self: (self.as_given + self.swapped) / 2))], {"RA-4 gain": NO}),
    ("rlaif.judges", "one order alone is read",
     lambda: [(Verdicts, "prefs", property(lambda self: self.as_given))], {"RA-4 gain": NO, "RA-4 bias": NO}),
    ("rlaif.judges", "the larger a judge, the noisier", lambda: judges(noise=lambda width: width / 10),
     {"RA-3 align": NO}),
    ("rlaif.judges", "the larger a judge, the more it leans", lambda: judges(lean=lambda width: width / 50),
     {"RA-3 bias": NO, "RA-3 align": YES}),
    ("rlaif.rlaif", "the judge says which answer is worse",
     lambda: at("rlaif.rlaif", "judging", types.SimpleNamespace(judge_pairs=inverted_judge)),
     {"RA-1 AI": NO, "RA-1 equal": NO, "RA-2 AI": NO, "RA-1 people": YES}),
    ("rlaif.rlaif", "the judge's labels, but not its ratings, shy from length", lambda: terse_labels(),
     {"RA-1 equal": NO, "RA-2 shrinks": NO, "RA-1 AI": YES, "RA-2 AI": YES}),
    ("rlaif.rlaif", "people say which answer is worse", lambda: relabelled(inverted, helpful="labels"),
     {"RA-1 people": NO, "RA-1 AI": YES}),
    ("hrlaif.hybrid", "nothing is checked",
     lambda: at("hrlaif.hybrid", "hybrid_prefs", lambda world, pairs: pairs.prefs),
     {"HR-3 checked": NO, "HR-3 rest": YES, "HR-2 beats": OPEN}),
    ("hrlaif.hybrid", "the judge is asked for the opposite where nothing can be checked",
     lambda: at("hrlaif.hybrid", "hybrid_prefs", lambda world, pairs: np.where(
         prompt_facts(pairs.prompts).question, hybrid_prefs(world, pairs), 1 - pairs.prefs)), {"HR-3 rest": NO}),
    ("hrlaif.hybrid", "every dose is none",
     lambda: at("hrlaif.hybrid", "with_style_bias", lambda world, pairs, weight: pairs), {"HR-1 dose": OPEN}),
    ("hrlaif.hybrid", "originals are preferred to their rewrites",
     lambda: at("hrlaif.hybrid", "rewritten_pairs", lambda originals, rewrites: rewritten_pairs(rewrites, originals)),
     {"HR-5 harm": NO, "HR-5 help": NO}),
    ("hrlaif.hybrid", "originals of benign prompts are preferred to their rewrites",
     lambda: at("hrlaif.hybrid", "rewritten_pairs", benign_originals_preferred), {"HR-5 help": NO, "HR-5 harm": YES}),
    ("hrlaif.hybrid", "the judge says which answer is worse",
     lambda: at("hrlaif.hybrid", "judging", types.SimpleNamespace(judge_pairs=inverted_judge)),
     {"HR-1 wins": NO, "HR-2 restores": NO, "HR-2 wins": NO, "HR-1 falls": YES}),
    ("hrlaif.hybrid", "the judge knows the truth, and has no taste for style",
     lambda: at("hrlaif.hybrid", "with_style_bias", lambda world, pairs, weight: dataclasses.replace(
         pairs, prefs=np.float32(worth(world, pairs) @ [1, -1] > 0))), {"HR-1 falls": NO, "HR-1 wins": YES}),
    ("spo.text", "self-play rewards who loses", lambda: [(games, "self_play", negated)], {"SP-1 reach": NO}),
    ("spo.text", "the reward model's arm is self-play too", lambda: [(games, "reward_model", games.self_play)],
     {"SP-4 reward": NO, "SP-4 self-play": YES}),
    ("spo.text", "self-play's arm is a reward model too", lambda: [(games, "self_play", games.reward_model)],
     {"SP-4 self-play": NO, "SP-4 reward": YES}),
]  # fmt: skip
sound = functools.cache(verdicts)


@pytest.mark.parametrize("name, what, changes, expected", FAULTS, ids=[f"{name}: {what}" for name, what, *_ in FAULTS])
def test_a_planted_fault_turns_its_verdicts(name, what, changes, expected):
    assert {claim: sound(name)[claim] for claim in expected} == dict.fromkeys(expected, YES)
    found = verdicts(name, changes())
    assert {claim: found[claim] for claim in expected} == expected
    assert set(expected.values()) != {YES}


SLOW, LOST = {"self-play": 100.0, "reward model": 150.0}, {"self-play": 0.2, "reward model": 0.4}
turned = lambda values: dict(zip(values, reversed(values.values())))
# experiment, claims, and the changes that make them true, then false
PAIRS = [
    ("hh_rlhf.overoptimisation", "HH-8 size", lambda: starved("small"), lambda: starved("large")),
    ("rlaif.rlaif", "RA-6 direct", terse_labels, lambda: [*terse_labels(), (House, "scaled", arms_exchanged)]),
    ("rlaif.rlaif", "RA-6 stale", terse_labels, list),  # then the reward model is the judge's own
    ("spo.text", "SP-1 speed", lambda: curves(SLOW, LOST), lambda: curves(turned(SLOW), LOST)),
    ("spo.text", "SP-2", lambda: curves(SLOW, LOST), lambda: curves(SLOW, turned(LOST))),
]


@pytest.mark.parametrize("name, claim, sound, faulty", PAIRS, ids=[claim for _, claim, *_ in PAIRS])
def test_a_claim_follows_what_is_planted(name, claim, sound, faulty):
    assert [verdicts(name, changes())[claim] for changes in (sound, faulty)] == [YES, NO]


def audits(unmeasured=(), missed=(), others=(), alarms=()) -> dict[str, str]:
    """Verdicts on audits' rows as `planted_faults` makes them, one per fault, with something wrong."""
    faults = paper("open_problems.planted_faults")

    def rows(fault, red):
        status = lambda row: "absent" if fault == "none" and row in unmeasured else "measured"
        return [{"id": row, "status": status(row), "flag": "red" if row in red else "ok"} for row in PROBLEMS]

    seen = {fault: {row, *others} - {"", *missed} for fault, (_, row) in faults.FAULTS.items() if fault != "none"}
    counts = faults.counted({fault: rows(fault, red) for fault, red in {"none": {*alarms}, **seen}.items()})
    return {c.id: verdict([counts[c.statistic]] * 3, c.threshold, c.direction) for c in faults.CLAIMS}


@pytest.mark.parametrize("claim, wrong", [
    ("CA-1", dict(unmeasured=["H4"])), ("CA-2 seen", dict(missed=["P6"])), ("CA-3", dict(alarms=["P1"])),
    ("CA-2 others", dict(others=["H2", "H4", "H6", "P2"])),
])  # fmt: skip
def test_what_is_wrong_with_an_audit_turns_its_claim(claim, wrong):
    assert set(audits().values()) == {YES} and audits(unmeasured=["H9"])["CA-1"] == YES  # which has no probe
    assert {name for name, found in audits(**wrong).items() if found == NO} == {claim}


def test_every_experiment_on_the_embedded_world_has_a_fault():
    files = [file for file in experiment_files(ROOT / "experiments") if "PipelineConfig" in file.read_text()]
    elsewhere = {"safe_rlhf.constrained_ppo", "open_problems.planted_faults"}  # test_constrained.py, audits
    assert {f"{file.parent.name}.{file.stem}" for file in files} == elsewhere | set(SETUPS)
    assert set(SETUPS) == {name for name, *_ in FAULTS}
