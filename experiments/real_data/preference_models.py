"""Reward and cost models on a user's preference files: from scratch, or from a checkpoint.

Paper     HH-RLHF (2204.05862) sections 3.1 to 3.3 for what is measured; Safe RLHF (2310.12773) for the cost model.
Command   python experiments/real_data/preference_models.py --data HH/harmless-base/test.jsonl.gz
          python experiments/real_data/preference_models.py --data PKU.jsonl.gz --quality harm
          python experiments/real_data/preference_models.py --data FILES --checkpoint DIR [--lora.rank 16]
Measured  Held-out accuracy with its interval, calibration, accuracy by score gap, correlation with length; a split by
          prompt. README.md has figures of public files.
"""

import dataclasses
import pathlib
from functools import partial
from typing import Literal

import numpy as np
from scipy.special import expit

from rlhfjax import stages
from rlhfjax.data.formats import read, split_by_prompt
from rlhfjax.data.tokenize import Lengths, demonstrations, load_tokenizer, preference_batch, train_tokenizer
from rlhfjax.evaluation import calibration, figures
from rlhfjax.evaluation.statistics import one_run_interval
from rlhfjax.experiment import ExperimentConfig, main, stream
from rlhfjax.models import huggingface
from rlhfjax.models.lora import IN_FULL, LoraConfig
from rlhfjax.models.transformer import TransformerConfig, make_language_model
from rlhfjax.parallel.mesh import fetch
from rlhfjax.rl.fit import take
from rlhfjax.rl.preference_models import make_cost_loss, make_reward_loss, make_score
from rlhfjax.stages import FitConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """A preference model on files of pairs, split by prompt; its language model first, if there is no checkpoint."""

    data: tuple[pathlib.Path, ...] = ()
    """Files of pairs (`python -m rlhfjax.data FILE` says what is in them)."""
    quality: Literal["helpful", "harm"] = "helpful"
    """Which comparison to learn: of helpfulness ("chosen"), or of harm, with signs where there are any."""
    strict: bool = False
    """Fail where a row of the data has to be dropped."""
    checkpoint: pathlib.Path | None = None
    """A Hugging Face directory to start from; None: from scratch."""
    num_words: int = 2_048
    """Tokens of the tokenizer that is trained on the training prompts and responses, from scratch."""
    network: TransformerConfig = TransformerConfig(
        vocab_size=2_048, d_model=128, num_layers=2, num_heads=4, d_ff=512, tie_embeddings=True)  # fmt: skip
    """From scratch: its shape, but for the vocabulary, which is the tokenizer's."""
    lora: LoraConfig = IN_FULL
    """Whether the preference model learns low-rank changes of the checkpoint."""
    lengths: Lengths = Lengths(max_prompt=128, max_response=96)
    """Tokens of a prompt, of which the end is kept, and of a response, of which the beginning is."""
    held_out_shares: tuple[float, float] = (0.8, 0.2)
    """Of the prompts: trained on, and held out."""
    pretraining: FitConfig = FitConfig(num_steps=400, batch_size=32, learning_rate=3e-3)
    """From scratch: next-token training on the training prompts and their better responses."""
    preference: FitConfig = FitConfig(num_steps=180, batch_size=32, learning_rate=5e-4, weight_decay=0.1)
    """The preference model."""

    def __post_init__(self):
        super().__post_init__()
        if self.lora.rank and self.checkpoint is None:
            raise ValueError("lora changes a checkpoint's weights: give --checkpoint")

    def check(self) -> None:
        if not self.data:
            raise SystemExit("name the files of pairs: --data FILE [FILE ...]")
        if self.scale in ("gpu", "pod") and self.checkpoint is None:
            raise SystemExit(f"--scale {self.scale} works on a checkpoint: give --checkpoint DIR")

    @property
    def label(self) -> str:
        return "real data"


REAL = dict(lengths=Lengths(max_prompt=1_024, max_response=512),
            preference=FitConfig(num_steps=2_500, batch_size=64, learning_rate=1e-5, weight_decay=0.1))  # fmt: skip
SCALES = {
    "smoke": Config(scale="smoke", num_words=300, lengths=Lengths(max_prompt=32, max_response=16), network=
                    dataclasses.replace(Config.network, d_model=32, num_layers=1, num_heads=2, d_ff=64),
                    **dict.fromkeys(("pretraining", "preference"), FitConfig(num_steps=20, batch_size=8))),
    "cpu": Config(), "gpu": Config(scale="gpu", **REAL), "pod": Config(scale="pod", **REAL)}  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    # 1. What can be learned from, split by prompt; the report comes before any training.
    records, report = read(config.data, seed=config.seed, strict=config.strict)
    train, held_out = split_by_prompt(records, config.held_out_shares[1], config.seed)
    if config.checkpoint is None:
        texts = (text for record in train for text in (*(said for _, said in record.prompt), *record.responses))
        chat = train_tokenizer(texts, config.num_words, run.path / "tokenizer")
    else:
        chat = load_tokenizer(config.checkpoint)
    harm = config.quality == "harm"
    batch = lambda rows: preference_batch(rows, chat, config.lengths, harm=harm, report=report)
    pairs, unseen = batch(train), batch(held_out)
    print(report.table(), flush=True)
    run.write_json("data.json", report.to_json())
    # 2. A language model: the checkpoint, or one that has read the training texts.
    if config.checkpoint is None:
        network = dataclasses.replace(config.network, vocab_size=chat.vocab_size)
        better = [dataclasses.replace(r, pref=1 - r.harm_pref if harm else r.pref) for r in train]
        base = cache.run(
            "base", stages.train_language_model, monitor=run.monitor("base"), label="base", config=network,
            demonstrations=demonstrations(better, chat, config.lengths), optimisation=config.pretraining,
            seed=stream(config.seed, "base"))  # fmt: skip
    else:
        network, base = huggingface.load(config.checkpoint, make_language_model)
        base = fetch(base)
    # 3. The preference model.
    role = "cost" if pairs.signs is not None else "reward"
    fitted = cache.run(
        role, stages.fit_preference_model, monitor=run.monitor(role), label=role, config=network, start=base,
        pairs=pairs, make_loss=make_reward_loss if pairs.signs is None else make_cost_loss, lora=config.lora,
        optimisation=config.preference, seed=stream(config.seed, role))  # fmt: skip
    model = stages.Scorer(make=make_score, config=network, fitted=fitted, lora=config.lora, frozen=base)
    score = partial(stages.raw_pair_scores, network, model)
    seen = take(pairs, np.arange(min(len(pairs), len(unseen))))
    return report_of(run.path / "figures", role, score(unseen), unseen) | {
        "train_accuracy": calibration.pair_accuracy(score(seen), seen.prefs),
        "pairs": float(len(pairs)), "held_out_pairs": float(len(unseen))}  # fmt: skip


def report_of(folder: pathlib.Path, role: str, scores, unseen) -> dict[str, float]:
    """Statistics of a preference model on held-out pairs; draws its figures."""
    gap, prefs = scores @ [1, -1], np.asarray(unseen.prefs)
    length = unseen.responses_mask.sum(-1) @ [1, -1]
    accuracy = calibration.pair_accuracy(scores, prefs)
    decided = int((prefs != 0.5).sum())
    interval = one_run_interval(round(accuracy * decided), decided)
    bins = calibration.reliability(expit(gap), prefs)
    by_gap = calibration.accuracy_by_gap(scores, prefs)
    figures.save(figures.reliability_figure({role: bins}, "predicted P(first preferred)"), folder / "calibration.png")
    figures.save(figures.lines(by_gap.gap, {"held out": by_gap.accuracy, "calibrated": by_gap.calibrated},
                               "score gap", "accuracy"), folder / "gap.png")  # fmt: skip
    print(f"{role} model: {accuracy:.3f} [{interval.low:.3f}, {interval.high:.3f}] of {decided} held-out pairs, by the "
          "interval of this one run")  # fmt: skip
    found = {
        "accuracy": accuracy, "accuracy_low": interval.low, "accuracy_high": interval.high,
        "calibration_error": bins.error, "calibration_slope": calibration.calibration_slope(scores, prefs),
        "length_correlation": calibration.length_correlation(gap, length),
        "longer_is_labelled_better": float(np.mean((length > 0) == (prefs > 0.5))),
        **{f"accuracy at gap {g:.2f}": float(a) for g, a in zip(by_gap.gap, by_gap.accuracy)}}  # fmt: skip
    signs = {} if unseen.signs is None else {"sign_accuracy": calibration.sign_accuracy(scores, unseen.signs)}
    return found | signs


if __name__ == "__main__":
    main(__file__, SCALES, experiment, claims=())
