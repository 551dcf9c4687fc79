"""HH-RLHF (Bai et al., 2204.05862): RL against one preference model, watched by another that it never saw.

Claim     Reward grows with the root of the KL divergence, alike for policies of two sizes. A test model fitted on other
          labels agrees at first and falls behind later, less so for larger preference models. The best of n answers
          is better the larger n.
Paper     Reward about linear in sqrt(KL), curves parallel over policy sizes; at 52B train and test models part after
          about 150k samples; larger preference models are more robust; best-of-k Elo rises up to k = 64 (full text).
Command   python experiments/hh_rlhf/overoptimisation.py               one seed on a laptop
          python experiments/hh_rlhf/overoptimisation.py --seeds 5     verdicts
Cost      about 9 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   Networks of 24 k to 0.19 M parameters in a world with a known truth, whose gold curve is the third line.
"""

import dataclasses

import numpy as np

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.gold_metrics import best_of_n_curve
from rlhfjax.evaluation.laws import at_one_kl, early_kl_laws
from rlhfjax.experiment import main
from rlhfjax.io.run import read_metrics
from rlhfjax.pipeline import Pipeline, PipelineConfig, scales
from rlhfjax.rl.fit import take
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.stages import FitConfig, RLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """Two halves of the labels, two sizes of preference models, two sizes of policies."""

    small: int = 32
    """Width of the small preference models and of the small policy; the large ones have the network's."""
    num_pairs: int = 6_000
    """Labelled pairs, half for the models that reward and half for those that test."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.001)
    """The paper's KL coefficient, nearly inert."""
    preference: FitConfig = FitConfig(num_steps=600, learning_rate=1e-3, weight_decay=0.05)
    """Preference models, six passes over their pairs."""
    rl: RLConfig = RLConfig(num_iterations=200, learning_rate=1e-4)
    """Slow, so that the early part of the curve has many points."""
    num_best: int = 64
    """Answers per prompt for best-of-n."""
    num_best_prompts: int = 256
    """Prompts for best-of-n."""


SCALES = scales(Config,
                smoke=dict(rl=RLConfig(num_iterations=12), num_best=8, num_best_prompts=32),
                real=dict(small=256))  # fmt: skip
CLAIMS = claims(
    "HH-RLHF (2204.05862)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("HH-7 root", "root_r2", ">=", 0.9, "about linear in sqrt(KL)", "R2 of reward on sqrt(KL), to half of the gain"),
    ("HH-7 rival", "root_beats_linear", ">=", 0.0, "-", "AIC of reward linear in KL, minus that of sqrt(KL)"),
    ("HH-7 sizes", "slope_variation", "<=", 0.25, "parallel", "sd over mean of that slope, two policy sizes"),
    ("HH-8 early", "early_gap", "within", 0.1, "agree early", "train minus test score in the first third, in sd"),
    ("HH-8 late", "late_gap", ">=", 0.0, "test falls behind", "train minus test score in the last tenth, in sd"),
    ("HH-8 size", "gap_by_size", ">=", 0.0, "larger is better", "gap of small models minus gap of large, at one KL"),
    ("HH-13", "best_of_n_step", ">=", 0.0, "Elo rises with k", "least rise of gold help as n goes 1, 4, 16"),
    ("HH-13 64", "best_of_n_last", ">=", 0.0, "to k = 64", "rise of gold help from n = 16 to 64"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house, small = Pipeline(config, run, cache), config.network_of(config.small)
    starts = {"large": (config.network, house.sft(house.base())),
              "small": (small, house.sft(house.base("base-small", config=small), "sft-small", config=small))}
    policy = starts["large"][1]
    labels = house.compare("labels", policy, num=config.num_pairs).helpful
    halves = np.split(np.arange(len(labels)), 2)
    # Train and test models share neither prompts, nor answers, nor the noise of their labels.
    fits = [(f"{use}-{size}", half, size) for use, half in zip(("train", "test"), halves) for size in starts]
    models = stages.side_by_side(*(
        lambda name=name, half=half, size=size: house.fit(name, take(labels, half), starts[size][1],
                                                          config=starts[size][0])
        for name, half, size in fits))
    scored = house.scaled(policy, **{
        name: stages.raw_scorer(starts[size][0], model)
        for (name, _, size), model in zip(fits, models)})
    arms = {"large": ("large", "large"), "small policy": ("small", "large"), "small models": ("large", "small")}
    stages.side_by_side(*(
        lambda arm=arm, who=who, by=by: house.optimise(
            arm, starts[who][1], scored[f"train-{by}"], config=starts[who][0], watch={"test": scored[f"test-{by}"]})
        for arm, (who, by) in arms.items()))
    curves = {arm: read_metrics(run.path / "metrics.jsonl", arm) for arm in arms}
    root = {arm: early_kl_laws(curves[arm]["kl"], curves[arm]["score"]) for arm in ("large", "small policy")}
    slopes = np.array([laws["sqrt"].coefficients[0] for laws in root.values()])
    gaps = {arm: curve["score"] - curve["test"] for arm, curve in curves.items()}
    third, tenth = slice(0, len(gaps["large"]) // 3), slice(-max(1, len(gaps["large"]) // 10), None)
    best = best_of_n_curve(house.world, scored["train-large"], config.num_best, house.answers(
        policy, take(house.test, np.repeat(np.arange(config.num_best_prompts), config.num_best)), "best of n"))
    rises = np.diff(list(best["gold"].values()))
    draw(run.path / "figures", curves, best)
    return {
        "root_r2": root["large"]["sqrt"].r2,
        "root_beats_linear": root["large"]["linear"].aic - root["large"]["sqrt"].aic,
        "slope_variation": float(np.std(slopes, ddof=1) / np.mean(slopes)),
        "early_gap": float(np.mean(gaps["large"][third])),
        "late_gap": float(np.mean(gaps["large"][tenth])),
        "gap_by_size": np.subtract(*at_one_kl(*((curves[arm]["kl"], gaps[arm]) for arm in ("small models", "large")))),
        "best_of_n_step": float(np.min(rises[:2])),
        "best_of_n_last": float(rises[-1]),
        **{f"AIC {law}": fit.aic for law, fit in root["large"].items()},
        **{f"best of {n} {kind}": value for kind, values in best.items() for n, value in values.items()},
        **{f"{arm} final {name}": float(np.mean(curve[name][tenth])) for arm, curve in curves.items()
           for name in ("score", "test", "gold_helpfulness", "kl")}}  # fmt: skip


def draw(folder, curves, best) -> None:
    curves = {arm: {name: figures.smooth(values) for name, values in curve.items()} for arm, curve in curves.items()}
    large = curves["large"]
    shown = {"train model": large["score"], "test model": large["test"], "gold": large["gold_helpfulness"]}
    figures.save(figures.lines(np.sqrt(large["kl"]), shown, "sqrt(KL to SFT)", "score (sd of SFT; gold: r*)"),
                 folder / "overoptimisation.png")
    parallel = {arm: (np.sqrt(curves[arm]["kl"]), curves[arm]["score"]) for arm in ("large", "small policy")}
    figures.save(figures.lines(None, parallel, "sqrt(KL to SFT)", "train score (sd of SFT)"), folder / "sizes.png")
    n = list(best["gold"])
    figures.save(figures.lines(n, {name: list(values.values()) for name, values in best.items()}, "n", "best of n",
                               log=True), folder / "best_of_n.png")  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
