"""SPO (Swamy et al., 2401.04056) on text: win rates among sibling answers, against a reward model, as rewards for PPO.

Claim     Self-play needs no reward model: it reaches what the true reward reaches, loses less to noise in the labels,
          and where preferences are cyclic its average policy is hard to beat while a reward model picks one side.
Paper     As sample-efficient as a reward model or more on transitive preferences, robust to stochastic and
          intransitive ones (abstract; continuous control there, no table recovered).
Command   python experiments/spo/text.py               one seed on a laptop
          python experiments/spo/text.py --seeds 5     verdicts
Cost      about 17 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   Language models in place of MuJoCo; the queue of rivals is the siblings of an answer; the reward model is
          never started anew. All arms: one start, one PPO, the same prompts, and as many labels.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.laws import first_crossing
from rlhfjax.experiment import main
from rlhfjax.feedback.self_play import MANNERS, Population
from rlhfjax.io.run import read_metrics
from rlhfjax.losses import exploitability
from rlhfjax.pipeline import Pipeline, PipelineConfig, scales
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.stages import RLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """Three regimes of preferences over benign answers."""

    num_samples: int = 8
    """Sibling answers to each prompt; 28 labels per prompt."""
    noises: tuple[float, ...] = (0.0, 0.15, 0.3)
    """Shares of flipped labels."""
    margins: tuple[float, float, float] = (0.6, 0.3, 0.3)
    """Of careful over stylish, stylish over plain, plain over careful answers; the minimax winner is their rotation."""
    rl: RLConfig = RLConfig(num_iterations=120)
    """Every arm."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.01)
    """One RL update. The KL penalty shifts the equilibrium of the cyclic game a little towards the start."""
    rl_shares: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    """Benign prompts alone."""


SCALES = scales(Config, smoke=dict(noises=(0.0, 0.3)))
CLAIMS = claims(
    "SPO (2401.04056)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("SP-1 reach", "share_of_oracle", ">=", 0.95, "-", "gain in r* of self-play over that of RL on r* itself"),
    ("SP-1 speed", "speed_up", ">=", 1.0, "more sample-efficient", "labels the reward model needs, over self-play's"),
    ("SP-2", "noise_advantage", ">=", 0.0, "robust to noise", "loss of gain by noise, reward model minus self-play"),
    ("SP-4 self-play", "self_play_margin", "<=", 0.5, "minimax winner", "exploitability / least margin, self-play"),
    ("SP-4 reward", "reward_margin", ">=", 0.5, "need not find it", "exploitability / least margin, reward model"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    sft = house.sft(house.base())
    noisy = {flip: Population(flip=flip) for flip in config.noises}
    cyclic = Population(margins=config.margins)
    jobs = {"oracle": ("oracle", noisy[config.noises[0]])}
    for method in ("self-play", "reward model"):
        jobs |= {f"{method} {flip:g}": (method, people) for flip, people in noisy.items()}
        jobs[f"{method} cyclic"] = (method, cyclic)
    prompts = house.prompts("rl", 4_096, config.rl_shares)
    train = lambda name, method, people: house.stage(
        name, stages.train_by_preferences, "policy", world=house.world, start=sft, people=people, method=method,
        num_samples=config.num_samples, ppo=config.ppo, optimisation=config.rl, prompts=prompts, seed=house.seed("rl"))
    stages.side_by_side(*(lambda name=name, job=job: train(name, *job) for name, job in jobs.items()))
    curves = {name: read_metrics(run.path / "metrics.jsonl", name) for name in jobs}
    helpful = {name: curve["gold_helpfulness"] for name, curve in curves.items()}
    last = slice(-max(1, config.rl.num_iterations // 10), None)
    gain = {name: float(np.mean(values[last]) - helpful["oracle"][0]) for name, values in helpful.items()}
    clean, noise = config.noises[0], config.noises[1:]
    loss = lambda method: np.mean([gain[f"{method} {clean:g}"] - gain[f"{method} {flip:g}"] for flip in noise])
    aim = helpful["oracle"][0] + 0.9 * gain["oracle"]
    arrival = lambda name: first_crossing(helpful[name], aim)
    # The average policy of the second half, as a mixture of manners.
    half = slice(config.rl.num_iterations // 2, None)
    mix = {method: np.array([curves[f"{method} cyclic"][manner][half].mean() for manner in MANNERS])
           for method in ("self-play", "reward model")}
    beaten = {method: float(exploitability(jnp.asarray(cyclic.payoffs), jnp.asarray(shares))) / min(config.margins)
              for method, shares in mix.items()}
    draw(run.path / "figures", helpful, curves)
    return {
        "share_of_oracle": gain[f"self-play {clean:g}"] / gain["oracle"],
        "speed_up": arrival(f"reward model {clean:g}") / arrival(f"self-play {clean:g}"),
        "noise_advantage": loss("reward model") - loss("self-play"),
        "self_play_margin": beaten["self-play"],
        "reward_margin": beaten["reward model"],
        **{f"{name} gain": value for name, value in gain.items()},
        **{f"{method} {manner}": share for method, shares in mix.items() for manner, share in zip(MANNERS, shares)}}


def draw(folder, helpful, curves) -> None:
    shown = {name: values for name, values in helpful.items() if "cyclic" not in name and "0.15" not in name}
    figures.save(figures.lines(np.arange(len(helpful["oracle"])), shown, "iteration", "gold helpfulness r*"),
                 folder / "helpfulness.png")
    for method in ("self-play", "reward model"):
        curve = curves[f"{method} cyclic"]
        figures.save(figures.lines(curve["step"], {manner: curve[manner] for manner in MANNERS}, "iteration",
                                   f"share of answers, {method}"), folder / f"cyclic {method}.png")  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
