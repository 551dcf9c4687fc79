"""What experiments on the embedded world have in common: their configuration, and their stages in short.

Every stage is cached by the content of what decides it, so experiments that begin alike share what they begin with.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from rlhfjax import stages
from rlhfjax.experiment import ExperimentConfig, stream
from rlhfjax.feedback.judge import (
    JUDGE_WORDS,
    JudgingData,
    make_direct_reward,
    make_direct_score,
    put_preferred_first,
)
from rlhfjax.feedback.raters import Comparisons, Rater
from rlhfjax.io.cache import StageCache
from rlhfjax.io.run import Run
from rlhfjax.models.transformer import TransformerConfig, make_language_model
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.rl.preference_models import make_cost, make_reward, make_reward_loss, make_score
from rlhfjax.stages import FitConfig, RLConfig, Scorer, judging
from rlhfjax.types import Demonstrations, Params, PreferenceBatch, Rollout
from rlhfjax.worlds.language import DEMONSTRATION_KINDS, WORDS, Family, Prompts

Shares = tuple[float, float, float, float]  # benign, dangerous, grey and verifiable prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig(ExperimentConfig):
    """From nothing to a fine-tuned policy, its labels, preference models and RL, on the embedded world."""

    network: TransformerConfig = TransformerConfig(
        vocab_size=len(WORDS), d_model=96, num_layers=2, num_heads=4, d_ff=256, mlp="plain", activation="gelu",
        tie_embeddings=True)  # fmt: skip
    """Shape of all networks (policy, reference, preference models, critics) unless said: 0.19 M parameters."""
    rater: Rater = Rater()
    """The simulated people."""
    num_demonstrations: int = 14_000
    """Answers that the base model reads; fine-tuning imitates a quarter as many, cleaner ones."""
    num_pairs: int = 12_000
    """Labelled pairs for the preference models."""
    mismatched: float = 0.3
    """Share of those pairs whose second answer belongs to another prompt."""
    label_shares: Shares = (0.30, 0.35, 0.15, 0.20)
    """Benign, dangerous, grey and verifiable prompts among those labelled."""
    num_evaluated: int = 2_048
    """Held-out pairs, and held-out prompts."""
    pretraining: FitConfig = FitConfig(num_steps=3_000, learning_rate=3e-3)
    """The base model."""
    fine_tuning: FitConfig = FitConfig(num_steps=300, learning_rate=1e-3)
    """The SFT policy, from which RL starts and which it is held to."""
    preference: FitConfig = FitConfig(num_steps=1_500, learning_rate=1e-3, weight_decay=0.05)
    """Preference models."""
    rl: RLConfig = RLConfig(num_iterations=200)
    """Every arm."""
    rl_shares: Shares = (0.40, 0.25, 0.10, 0.25)
    """The kinds of prompts in RL and in its evaluation."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.1)
    """One RL update."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.mismatched <= 1:
            raise ValueError(f"mismatched must lie in [0, 1], got {self.mismatched}")
        self.ppo.check_batch(self.rl.batch_size)
        self.fine_tuning.check_rows(a_quarter_of_num_demonstrations=self.num_demonstrations // 4)
        self.preference.check_rows(num_pairs=self.num_pairs)

    def network_of(self, width: int) -> TransformerConfig:
        """The network at another width, with heads of 16."""
        return dataclasses.replace(self.network, d_model=width, num_heads=width // 16, d_ff=8 * width // 3)


SMOKE: dict[str, Any] = dict(
    scale="smoke", num_demonstrations=1_000, num_pairs=400, num_evaluated=256, rl=RLConfig(num_iterations=5),
    network=dataclasses.replace(PipelineConfig.network, d_model=32, num_layers=1, num_heads=2, d_ff=64),
    pretraining=FitConfig(num_steps=200, learning_rate=1e-2),  # enough to do some harm, which there is to constrain
    **dict.fromkeys(("fine_tuning", "preference"), FitConfig(num_steps=50)))  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How an AI labeller is taught: on people's comparisons and ratings of one policy's answers."""

    width: int = 96
    """Of its network, which is else the common one."""
    num_pairs: int = 12_000
    """Pairs that people compare and rate."""
    first_share: float = 0.65
    """Share of them in which the preferred answer stands first."""
    shares: Shares | None = None
    """Benign, dangerous, grey and verifiable prompts among them; None: as among the labelled pairs."""
    optimisation: FitConfig = FitConfig(num_steps=3_000, learning_rate=0.16)
    """From scratch; the rate is divided by the width."""

    def network(self, common: TransformerConfig) -> TransformerConfig:
        size = dict(d_model=self.width, d_ff=self.width * common.d_ff // common.d_model)
        return dataclasses.replace(common, vocab_size=len(JUDGE_WORDS), **size)


def as_given(*, pairs: PreferenceBatch) -> PreferenceBatch:
    """Labels of several stages, of a part of one, or of an AI, which no other stage has stored as they are."""
    return pairs


SCALED = {make_score: make_reward, make_direct_score: make_direct_reward}  # in units of the starting policy's spread


class Pipeline:
    """The stages of one experiment: named, cached, logged, and each with randomness of its own."""

    def __init__(self, config: PipelineConfig, run: Run, cache: StageCache):
        self.config, self.run, self.cache, self.world = config, run, cache, config.world
        self._evidence, self._writing = {}, threading.Lock()  # stages may run side by side in threads
        self._made: dict[int, tuple[str, Any]] = {}  # by id: which stage a thing came from, and the thing, lest it go

    def _leaves(self, role: str, name: str, config: TransformerConfig, *inputs: Any) -> None:
        """Note in evidence.json, for an audit, a stage's role, the shape of its network, and the stages behind it."""
        parts = [x.fitted if isinstance(x, Scorer) else x for x in inputs]
        parts += [x for part in parts if isinstance(part, dict) for x in part.values()]  # of a scorer that has several
        origin = [self._made[id(x)][0] for x in parts if id(x) in self._made]
        with self._writing:
            self._evidence[name] = {"role": role, "config": config, "from": origin}
            self.run.write_json("evidence.json", self._evidence)

    def _of(self, name: str, *results: Any) -> None:
        self._made |= {id(result): (name, result) for result in results}

    def seed(self, name: str) -> int:
        """The seed of one use of randomness."""
        return stream(self.config.seed, name)

    def stage(self, name: str, fn: Callable, role: str, **inputs) -> Any:
        """A stage that learns: monitored, its role noted, with the network of all unless `config` says another."""
        inputs = {"config": self.config.network} | inputs
        self._leaves(role, name, inputs["config"], *(inputs.get(key) for key in ("start", "pairs", "reward", "cost")))
        result = self.cache.run(name, fn, monitor=self.run.monitor(name), label=name, **inputs)
        self._of(name, result)
        return result

    def prompts(self, name: str, num: int, shares: Shares, split: str = "train") -> Prompts:
        return self.world.sample_prompts(self.seed(name), num, dict(zip(Family, shares)), split)

    @property
    def test(self) -> Prompts:
        """Held-out prompts, the same for every seed."""
        shares = dict(zip(Family, self.config.rl_shares))
        return self.world.sample_prompts(1, self.config.num_evaluated, shares, "test")

    def base(self, name: str = "base", **inputs) -> Params:
        """A language model that has read good and bad answers."""
        texts = self.world.corpus(self.seed("corpus"), self.config.num_demonstrations).demonstrations
        inputs = {"optimisation": self.config.pretraining, "demonstrations": texts} | inputs
        return self.stage(name, stages.train_language_model, "base", seed=self.seed("base"), **inputs)

    @property
    def cleaner(self) -> Demonstrations:
        """The answers that fine-tuning imitates."""
        num = self.config.num_demonstrations // 4
        return self.world.corpus(self.seed("cleaner corpus"), num, kinds=DEMONSTRATION_KINDS).demonstrations

    def sft(self, base: Params, name: str = "sft", **inputs) -> Params:
        """Fine-tuning of `base` on cleaner answers."""
        inputs = {"optimisation": self.config.fine_tuning, "demonstrations": self.cleaner} | inputs
        return self.stage(name, stages.train_language_model, "start", seed=self.seed("sft"), start=base, **inputs)

    @property
    def sampling(self) -> dict[str, Any]:
        return dict(truth=self.config.truth, temperature=self.config.ppo.temperature)

    def answers(self, policy: Params, prompts: Prompts | None = None, name: str = "test", **inputs) -> Rollout:
        """A policy's answers, one per prompt; by default to the held-out prompts."""
        inputs = {"config": self.config.network} | self.sampling | inputs
        prompts = self.test if prompts is None else prompts
        return stages.sample_responses(policy=policy, prompts=prompts, seed=self.seed(name), **inputs)

    def compare(self, name: str, policy: Params, num: int | None = None, split: str = "train", **inputs) -> Comparisons:
        """People's labels for pairs of answers: `num_pairs` for training, some mismatched, or held out."""
        train = split == "train"
        num = num or (self.config.num_pairs if train else self.config.num_evaluated)
        inputs = {
            "rater": self.config.rater, "config": self.config.network, "seed": self.seed(name),
            "prompts": self.prompts(name, num, self.config.label_shares, split),
        } | self.sampling | ({"mismatched": self.config.mismatched} if train else {}) | inputs  # fmt: skip
        self._leaves("labels" if train else "held out", name, inputs["config"], policy)
        found = self.cache.run(name, stages.collect_comparisons, policy=policy, **inputs)
        self._of(name, found.helpful, found.harm)
        return found

    def fit(self, name: str, pairs: PreferenceBatch, start: Params, **inputs) -> Params:
        """A preference model on `pairs`: a reward model unless `make_loss` says otherwise."""
        inputs = {"make_loss": make_reward_loss, "optimisation": self.config.preference} | inputs
        role = "reward" if pairs.signs is None else "cost"
        if role == "reward" and id(pairs) not in self._made:
            self._leaves("labels", kept := f"{name}-labels", self.config.network)
            self._of(kept, pairs)
            self.cache.run(kept, as_given, pairs=pairs)
        return self.stage(
            name, stages.fit_preference_model, role, start=start, pairs=pairs, seed=self.seed("fit"), **inputs
        )

    def lessons(self, policy: Params, judge: JudgeConfig) -> JudgingData:
        """People's comparisons and ratings of `policy`'s answers, for judges."""
        prompts = self.prompts("judged", judge.num_pairs, judge.shares or self.config.label_shares)
        return self.cache.run(
            "judged", judging.collect_judging_data, rater=self.config.rater, policy=policy, config=self.config.network,
            prompts=prompts, seed=self.seed("judged"), mismatched=self.config.mismatched, **self.sampling)  # fmt: skip

    def judge(self, name: str, policy: Params, judge: JudgeConfig) -> Scorer:
        """An AI labeller taught on labels of `policy`'s answers, as the raw scorer that direct RLAIF asks."""
        data = put_preferred_first(self.lessons(policy, judge), judge.first_share, self.seed("order"))
        network, rate = judge.network(self.config.network), judge.optimisation.learning_rate / judge.width
        optimisation = dataclasses.replace(judge.optimisation, learning_rate=rate)
        fitted = self.stage(name, judging.train_judge, "judge", config=network, data=data, optimisation=optimisation,
                            seed=self.seed(f"judge {judge.width}"))  # fmt: skip
        return Scorer(make=make_direct_score, model=make_language_model, config=network, fitted=fitted)

    def scaled(self, policy: Params, name: str = "scale", **models: Params | Scorer) -> dict[str, Scorer]:
        """Preference models in units of their spread over `policy`'s answers: parameters of networks of the common
        shape, or raw scorers. The one called "cost" is a cost model."""
        raw = lambda fitted: Scorer(make=make_score, config=self.config.network, fitted=fitted)
        models = {key: model if isinstance(model, Scorer) else raw(model) for key, model in models.items()}
        prompts = self.prompts("start", self.config.num_evaluated, self.config.rl_shares)
        fitted = self.cache.run(name, stages.scale_scores, config=self.config.network, policy=policy, models=models,
                                prompts=prompts, seed=self.seed("start"), **self.sampling)  # fmt: skip
        for key, model in models.items():
            if id(model.fitted) in self._made:
                self._of(self._made[id(model.fitted)][0], fitted[key])
        make = lambda key: make_cost if key == "cost" else SCALED[models[key].make]
        return {key: dataclasses.replace(models[key], make=make(key), fitted=fitted[key]) for key in models}

    def optimise(self, name: str, start: Params, reward: Scorer, **inputs) -> Params:
        """RL on a reward from `start`, on training prompts that are the same for every arm."""
        inputs = {
            "ppo": self.config.ppo, "optimisation": self.config.rl, "seed": self.seed("rl"), "ptx": self.cleaner,
            "prompts": self.prompts("rl", 4_096, self.config.rl_shares), "truth": self.config.truth,
        } | inputs  # fmt: skip
        return self.stage(name, stages.train_policy, "policy", start=start, reward=reward, **inputs)
