"""What experiments on text have in common: their configuration, and their stages in short.

They run on the embedded world, or with `--scale gpu` and `--scale pod` on a checkpoint and a data set, in the same
words: `worlds.recorded` then stands in for the world.

Every stage is cached by the content of what decides it, so experiments that begin alike share what they begin with.
"""

import dataclasses
import pathlib
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rlhfjax import stages
from rlhfjax.data.formats import read
from rlhfjax.data.tokenize import Lengths, load_tokenizer
from rlhfjax.evaluation.calibration import pair_accuracy
from rlhfjax.experiment import ExperimentConfig, stream
from rlhfjax.feedback.judge import (
    JUDGE_TOKENS,
    JudgingData,
    make_direct_reward,
    make_direct_score,
    put_preferred_first,
)
from rlhfjax.feedback.raters import Comparisons, Rater
from rlhfjax.io.cache import StageCache
from rlhfjax.io.run import Run
from rlhfjax.models.huggingface import load, read_config
from rlhfjax.models.lora import IN_FULL, LoraConfig
from rlhfjax.models.transformer import TransformerConfig, make_language_model
from rlhfjax.parallel.mesh import MeshConfig, fetch
from rlhfjax.rl.fit import take
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.rl.preference_models import make_cost, make_cost_loss, make_reward, make_reward_loss, make_score
from rlhfjax.stages import FitConfig, RLConfig, Scorer, judging
from rlhfjax.types import Demonstrations, Params, PreferenceBatch, Rollout, added
from rlhfjax.worlds.language import WORDS, Family, Prompts
from rlhfjax.worlds.recorded import RecordedWorld, recorded_world, recordings

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
    checkpoint: pathlib.Path | None = added(None)
    """A Hugging Face directory: the base model, its shape (`network`) and its tokenizer; None: the embedded world."""
    data: tuple[pathlib.Path, ...] = added(())
    """Files of pairs to go with it (`python -m rlhfjax.data FILE` says what is in them)."""
    lengths: Lengths = added(Lengths(max_prompt=512, max_response=128))
    """With a checkpoint: tokens of a prompt, of which the end is kept, and of a response."""
    lora: LoraConfig = added(IN_FULL)
    """Whether fine-tuning, preference models, policies and critics learn low-rank changes, sharing what is frozen."""

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is not None and (self.checkpoint / "config.json").exists():  # else `check` complains
            compute, shape = self.network.compute_dtype, read_config(self.checkpoint)
            object.__setattr__(self, "network", dataclasses.replace(
                shape, compute_dtype=compute, remat=self.network.remat))  # fmt: skip
        if not 0 <= self.mismatched <= 1:
            raise ValueError(f"mismatched must lie in [0, 1], got {self.mismatched}")
        self.ppo.check_batch(self.rl.batch_size)
        self.fine_tuning.check_rows(a_quarter_of_num_demonstrations=self.num_demonstrations // 4)
        self.preference.check_rows(num_pairs=self.num_pairs)

    def check(self) -> None:
        if (self.scale in ("gpu", "pod")) and not (self.checkpoint and self.data):
            raise SystemExit(f"--scale {self.scale} works on a checkpoint and a data set: give --checkpoint DIR and "
                             "--data FILE [FILE ...]")  # fmt: skip
        if bool(self.checkpoint) != bool(self.data):
            raise SystemExit("a checkpoint and a data set go together: give both --checkpoint and --data, or neither")
        if self.checkpoint:
            read_config(self.checkpoint)

    @property
    def label(self) -> str:
        return "recorded" if self.data else super().label

    @property
    def may_lack(self) -> bool:
        return bool(self.data)  # which may have no prompts of a kind that a claim is about

    def network_of(self, width: int) -> TransformerConfig:
        """The common network at another width, with heads of 16; beside a checkpoint, a plain one over its words."""
        common = PipelineConfig.network if self.checkpoint else self.network
        return dataclasses.replace(common, vocab_size=self.network.vocab_size, d_model=width, num_heads=width // 16,
                                   d_ff=8 * width // 3)  # fmt: skip


SMOKE: dict[str, Any] = dict(
    scale="smoke", num_demonstrations=1_000, num_pairs=400, num_evaluated=256, rl=RLConfig(num_iterations=5),
    network=dataclasses.replace(PipelineConfig.network, d_model=32, num_layers=1, num_heads=2, d_ff=64),
    pretraining=FitConfig(num_steps=200, learning_rate=1e-2),  # enough to do some harm, which there is to constrain
    **dict.fromkeys(("fine_tuning", "preference"), FitConfig(num_steps=50)))  # fmt: skip


# On one accelerator a model of about a billion parameters, by low-rank changes, which learn at higher rates.
GPU: dict[str, Any] = dict(
    scale="gpu", lora=LoraConfig(rank=64), rater=Rater(temperature_helpful=1.0, temperature_harm=1.0, flip=0.0,
                                                       temperature_safe=1.0, style_bonus=0.0, verified_answers=False),
    network=dataclasses.replace(PipelineConfig.network, compute_dtype="bfloat16", remat=True),
    num_demonstrations=100_000, num_pairs=50_000, mismatched=0.0,
    pretraining=FitConfig(num_steps=5_000, batch_size=64, learning_rate=1e-3),
    fine_tuning=FitConfig(num_steps=400, batch_size=64, learning_rate=1e-4, weight_decay=0.0),
    preference=FitConfig(num_steps=1_500, batch_size=64, learning_rate=1e-4, weight_decay=0.1),
    rl=RLConfig(num_iterations=400, batch_size=128, learning_rate=3e-5, critic_learning_rate=3e-5))  # fmt: skip
# On a TPU slice a model of seven billion in full, at the rates of Safe RLHF's public code.
POD: dict[str, Any] = GPU | dict(
    scale="pod", lora=IN_FULL, mesh=MeshConfig(fsdp=8),
    fine_tuning=FitConfig(num_steps=1_200, batch_size=128, learning_rate=2e-5, weight_decay=0.0),
    preference=FitConfig(num_steps=2_000, batch_size=128, learning_rate=2e-5, weight_decay=0.1),
    rl=RLConfig(num_iterations=800, batch_size=256, learning_rate=1e-5, critic_learning_rate=5e-6))  # fmt: skip


def scales(
    config: type[PipelineConfig], *, smoke: Mapping = MappingProxyType({}), real: Mapping | None = MappingProxyType({})
) -> dict[str, PipelineConfig]:
    """The configurations of an experiment on text by `--scale`.

    smoke, real: what it changes of the smallest one, and of those on a checkpoint and a data set; real None: it is
    about the embedded world and has none of these.
    """
    found = {"smoke": config(**SMOKE | smoke), "cpu": config()}
    return found if real is None else found | {"gpu": config(**GPU | real), "pod": config(**POD | real)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How an AI labeller is taught: on people's comparisons and ratings of one policy's answers."""

    width: int = 96
    """Of its network, which is else the common one; 0: the common one, beside a checkpoint with its weights."""
    num_pairs: int = 12_000
    """Pairs that people compare and rate."""
    first_share: float = 0.65
    """Share of them in which the preferred answer stands first."""
    shares: Shares | None = None
    """Benign, dangerous, grey and verifiable prompts among them; None: as among the labelled pairs."""
    optimisation: FitConfig = FitConfig(num_steps=3_000, learning_rate=0.16)
    """From scratch; the rate is divided by the width."""

    def network(self, config: PipelineConfig) -> TransformerConfig:
        """Its shape in an experiment of this configuration: a network over the world's words and a judge's own."""
        common = config.network
        if self.width and config.checkpoint:
            common = config.network_of(self.width)
        elif self.width:
            common = dataclasses.replace(common, d_model=self.width, d_ff=self.width * common.d_ff // common.d_model)
        return dataclasses.replace(common, vocab_size=common.vocab_size + len(JUDGE_TOKENS))


CHECKPOINT_JUDGE = JudgeConfig(width=0, optimisation=FitConfig(num_steps=2_000, batch_size=64, learning_rate=0.04))


def as_given(*, pairs: PreferenceBatch) -> PreferenceBatch:
    """Labels of several stages, of a part of one, or of an AI, which no other stage has stored as they are."""
    return pairs


ON_FILE = ("labels", "held-out")  # the first labels of an experiment, and those that it tests with
SCALED = {make_score: make_reward, make_direct_score: make_direct_reward}  # in units of the starting policy's spread


class Pipeline:
    """The stages of one experiment: named, cached, logged, and each with randomness of its own."""

    def __init__(self, config: PipelineConfig, run: Run, cache: StageCache):
        self.config, self.run, self.cache = config, run, cache
        self._evidence, self._writing = {}, threading.Lock()  # stages may run side by side in threads
        self._made: dict[int, tuple[str, Any]] = {}  # by id: which stage a thing came from, and the thing, lest it go
        self.world = self._record() if config.data else config.world

    def _record(self) -> RecordedWorld:
        """The world of the user's files, with the networks that stand in for its truth, fitted first of all."""
        config = self.config
        records, report = read(config.data, seed=0)
        on_file = recordings(records, report, load_tokenizer(config.checkpoint), config.lengths)
        print(report.table(), flush=True)
        self.run.write_json("data.json", report.to_json())
        if (num := on_file.chat.vocab_size) > config.network.vocab_size:
            raise ValueError(f"{config.checkpoint}: the tokenizer has {num} tokens, config.json says "
                             f"{config.network.vocab_size}")  # fmt: skip
        _, start = load(config.checkpoint)
        self._base = fetch(start)
        pairs = on_file.comparisons["gold"]
        asked = {"helpful": (pairs.helpful, make_reward_loss), "harm": (pairs.harm, make_cost_loss)}
        fitted = {name: self.cache.run(
            f"gold-{name}", stages.fit_preference_model, monitor=self.run.monitor(f"gold-{name}"), label=f"gold-{name}",
            config=config.network, start=self._base, pairs=batch, make_loss=make, optimisation=config.preference,
            seed=stream(0, f"gold {name}"), **self.adapted)
            for name, (batch, make) in asked.items() if batch is not None}  # fmt: skip
        gold = {name: Scorer(make=make_score, config=config.network, fitted=params, lora=config.lora,
                             frozen=self._base).whole for name, params in fitted.items()}  # fmt: skip
        held_out, seen = on_file.comparisons["test"].helpful, on_file.comparisons["train"].helpful
        scores = lambda batch: stages.raw_pair_scores(config.network, gold["helpful"], batch)
        said = scores(take(seen, np.arange(min(len(seen), 2_048))))
        better = np.where(seen.prefs[: len(said)] > 0.5, said[:, 0], said[:, 1])
        accuracy = pair_accuracy(scores(held_out), held_out.prefs)
        print(f"the gold network agrees with {accuracy:.3f} of {len(held_out)} labels that it has not seen", flush=True)
        return recorded_world(on_file, config.network, gold, float(said.mean()), float(better.mean()))

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
        """A language model that has read good and bad answers: the checkpoint, unless `config` is of another shape."""
        if self.config.checkpoint and inputs.get("config", self.config.network) == self.config.network:
            return self._base
        texts = self.world.demonstrations(self.seed("corpus"), self.config.num_demonstrations)
        inputs = {"optimisation": self.config.pretraining, "demonstrations": texts} | inputs
        return self.stage(name, stages.train_language_model, "base", seed=self.seed("base"), **inputs)

    @property
    def cleaner(self) -> Demonstrations:
        """The answers that fine-tuning imitates."""
        return self.world.demonstrations(self.seed("cleaner corpus"), self.config.num_demonstrations // 4, cleaner=True)

    def sft(self, base: Params, name: str = "sft", **inputs) -> Params:
        """Fine-tuning of `base` on cleaner answers."""
        inputs = {"optimisation": self.config.fine_tuning, "demonstrations": self.cleaner} | self.adapted | inputs
        return self.stage(name, stages.train_language_model, "start", seed=self.seed("sft"), start=base, **inputs)

    @property
    def adapted(self) -> dict[str, LoraConfig]:
        """What a stage that learns is told of LoRA: nothing without it, so that its key stays what it was."""
        return {"lora": self.config.lora} if self.config.lora.rank else {}

    @property
    def sampling(self) -> dict[str, Any]:
        return dict(world=self.world, temperature=self.config.ppo.temperature)

    def answers(self, policy: Params, prompts: Prompts | None = None, name: str = "test", **inputs) -> Rollout:
        """A policy's answers, one per prompt; by default to the held-out prompts."""
        inputs = {"config": self.config.network} | self.sampling | inputs
        prompts = self.test if prompts is None else prompts
        return stages.sample_responses(policy=policy, prompts=prompts, seed=self.seed(name), **inputs)

    def compare(self, name: str, policy: Params, num: int | None = None, split: str = "train", **inputs) -> Comparisons:
        """People's labels for pairs of answers: `num_pairs` for training, some mismatched, or held out.

        Beside a data set the stages called in `ON_FILE` are what people said there; of other answers raters are asked.
        """
        train = split == "train"
        num = num or (self.config.num_pairs if train else self.config.num_evaluated)
        if name in ON_FILE and (found := self.world.recorded(split, num)) is not None:
            return self._labelled(train, name, self.cache.run(name, as_given, pairs=found))
        inputs = {
            "rater": self.config.rater, "config": self.config.network, "seed": self.seed(name),
            "prompts": self.prompts(name, num, self.config.label_shares, split),
        } | self.sampling | ({"mismatched": self.config.mismatched} if train else {}) | inputs  # fmt: skip
        found = self.cache.run(name, stages.collect_comparisons, policy=policy, **inputs)
        return self._labelled(train, name, found, policy)

    def _labelled(self, train: bool, name: str, found: Comparisons, *policy: Params) -> Comparisons:
        self._leaves("labels" if train else "held out", name, self.config.network, *policy)
        self._of(name, found.helpful, found.harm)
        return found

    def fit(self, name: str, pairs: PreferenceBatch | None, start: Params, **inputs) -> Params | Scorer:
        """A preference model on `pairs`: a reward model unless `make_loss` says otherwise.

        Its parameters; of low-rank changes, which say nothing without what they change, the raw scorer.
        """
        if pairs is None:
            raise ValueError(f"{name}: a cost model learns from labels of harm, and the data has none: add files that "
                             "have both comparisons and flags of safety, as PKU-SafeRLHF")  # fmt: skip
        inputs = {"make_loss": make_reward_loss, "optimisation": self.config.preference} | self.adapted | inputs
        role = "reward" if pairs.signs is None else "cost"
        if role == "reward" and id(pairs) not in self._made:
            self._leaves("labels", kept := f"{name}-labels", self.config.network)
            self._of(kept, pairs)
            self.cache.run(kept, as_given, pairs=pairs)
        fitted = self.stage(name, stages.fit_preference_model, role, start=start, pairs=pairs, seed=self.seed("fit"),
                            **inputs)  # fmt: skip
        if not inputs.get("lora", IN_FULL).rank:
            return fitted
        return Scorer(make=make_score, config=inputs.get("config", self.config.network), fitted=fitted,
                      lora=inputs["lora"], frozen=start)  # fmt: skip

    def lessons(self, policy: Params, judge: JudgeConfig) -> JudgingData:
        """People's comparisons and ratings of `policy`'s answers, for judges."""
        prompts = self.prompts("judged", judge.num_pairs, judge.shares or self.config.label_shares)
        return self.cache.run(
            "judged", judging.collect_judging_data, rater=self.config.rater, policy=policy, config=self.config.network,
            prompts=prompts, seed=self.seed("judged"), mismatched=self.config.mismatched, **self.sampling)  # fmt: skip

    def judge(self, name: str, policy: Params, judge: JudgeConfig) -> Scorer:
        """An AI labeller taught on labels of `policy`'s answers, as the raw scorer that direct RLAIF asks."""
        data = put_preferred_first(self.lessons(policy, judge), judge.first_share, self.seed("order"))
        network, width = judge.network(self.config), judge.width or self.config.network.d_model
        optimisation = dataclasses.replace(judge.optimisation, learning_rate=judge.optimisation.learning_rate / width)
        start = {} if judge.width or not self.config.checkpoint else {"start": self._base}
        fitted = self.stage(name, judging.train_judge, "judge", config=network, data=data, optimisation=optimisation,
                            seed=self.seed(f"judge {width}"), **start)  # fmt: skip
        return Scorer(make=make_direct_score, model=make_language_model, config=network, fitted=fitted)

    def scaled(self, policy: Params, name: str = "scale", **models: Params | Scorer) -> dict[str, Scorer]:
        """Preference models in units of their spread over `policy`'s answers: parameters of networks of the common
        shape, or raw scorers. The one called "cost" is a cost model."""
        models = {key: stages.raw_scorer(self.config.network, model) for key, model in models.items()}
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
            "prompts": self.prompts("rl", 4_096, self.config.rl_shares), "world": self.world,
        } | self.adapted | inputs  # fmt: skip
        return self.stage(name, stages.train_policy, "policy", start=start, reward=reward, **inputs)
