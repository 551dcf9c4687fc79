"""SPO (Swamy et al., 2401.04056): self-play over a queue of trajectories in continuous control, beside a reward model.

Claim     Where preferences follow a reward, SPO gets as far as RL on that reward, from no more samples than a reward
          model needs; where they are cyclic, its average over iterates is hard to exploit.
Paper     More sample-efficient than reward models with preferences from returns; robust to intransitive, stochastic
          and non-Markovian ones (abstract; no table was read).
Command   python experiments/spo/control.py               one seed
          python experiments/spo/control.py --seeds 5     verdicts
Cost      48 s on two CPU cores, compilation included, 38 s for a further seed (Python 3.11, jax 0.10.2).
Here      README.md: five report seeds, and the log of what was tried.
Differs   A point mass in place of MuJoCo; PPO in place of SAC; cyclic preferences between the sectors of the plane
          where episodes end; the reward model is refit on exactly the queries that self-play asks.
"""

import dataclasses
from functools import partial

import numpy as np

from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.figures import save, training_curves
from rlhfjax.evaluation.game_figures import gain_statistics, sector_paths, simplex_figure
from rlhfjax.experiment import ExperimentConfig, main, stream
from rlhfjax.io.run import read_metrics
from rlhfjax.losses import exploitability
from rlhfjax.rl.control import ControlConfig, reward_model, self_play, true_rewards
from rlhfjax.stages import side_by_side
from rlhfjax.worlds import control, games


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """Two regimes of preferences; arms share the start, the RL and the number of queries."""

    ppo: ControlConfig = ControlConfig()
    """Every arm, where preferences follow returns."""
    queue_size: int = 16
    """Rivals that every new episode is compared with: the latest before it (10 in SPO, as recalled)."""
    num_iterations: int = 150
    """Where preferences follow returns."""
    num_reward_steps: int = 20
    """Gradient steps on the queries of an iteration, of the arm with a reward model."""
    reward_learning_rate: float = 1e-3
    """Of the reward model."""
    margins: tuple[float, float, float] = (0.8, 0.4, 0.2)
    """By which sector A beats B, B beats C and C beats A: P(A preferred to B) = (1 + 0.8) / 2."""
    sector_shares: tuple[float, float, float] = (0.40, 0.35, 0.25)
    """Of the full circle, of A, B and C."""
    wind: float = 2.0
    """Where preferences are cyclic: without gusts the policy soon ends in one sector always and learns no more."""
    cyclic_ppo: ControlConfig = ControlConfig(learning_rate=1e-2, b2=0.9999, whiten_advantages=False)
    """Every arm, where preferences are cyclic: steps as long as what there is to win, as no-regret learning asks."""
    num_cyclic_iterations: int = 400
    """Where preferences are cyclic."""

    def __post_init__(self):
        super().__post_init__()
        if not (0 < min(self.margins) and max(self.margins) < 1):
            raise ValueError(f"margins of a cycle must lie in (0, 1), got {self.margins}")

    @property
    def label(self) -> str:
        return f"point_mass-{control.VERSION}"


SCALES = {
    "smoke": Config(scale="smoke", num_iterations=12, num_cyclic_iterations=12, num_reward_steps=2),
    "cpu": Config(),
}
CLAIMS = claims(
    "SPO (2401.04056)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("SP-1 control", "share_of_oracle", ">=", 0.95, "-",
     "gain of the true return from the start to the last tenth of iterations, over that of RL on the true reward"),
    ("SP-1 samples", "samples_ratio", "<=", 1.0, "more sample-efficient",
     "episodes until 90 % of the oracle's gain, over those of the arm with a reward model"),
    ("SP-3 control", "cyclic_exploitability", "<=", 0.05, "robust",
     "what a best reply wins from SPO's average over iterates, where preferences are cyclic"),
    ("SP-4 control", "cyclic_reward_model_exploitability", ">=", 0.5, "not expressible",
     "the same of the arm with a reward model, over the smallest margin"),
    ("SP-4 last", "cyclic_reward_model_last_exploitability", ">=", 0.5, "not expressible",
     "the same of that arm's last tenth of iterations"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    seed = partial(stream, config.seed)
    fitted = dict(num_hidden=config.ppo.num_hidden, num_steps=config.num_reward_steps,
                  learning_rate=config.reward_learning_rate)  # fmt: skip

    def learn(feedbacks, suffix, **inputs):
        """The metrics of one arm per feedback, trained side by side."""
        names = [name + suffix for name in feedbacks]
        stage = partial(cache.run, fn=control.train, seed=seed("rl"), **inputs)
        side_by_side(*(partial(stage, name, feedback=feedback, label=name, monitor=run.monitor(name))
                       for name, feedback in zip(names, feedbacks.values())))  # fmt: skip
        return [read_metrics(run.path / "metrics.jsonl", name) for name in names]

    # 1. Preferences follow returns, without noise: RL on the reward that decides them, self-play, and a reward model.
    ask = dict(prefer=control.max_reward, queue_size=config.queue_size)
    feedbacks = {"oracle": true_rewards, "spo": partial(self_play, **ask),
                 "reward-model": partial(reward_model, **ask, **fitted)}  # fmt: skip
    histories = learn(feedbacks, "", environment=control.point_mass, config=config.ppo,
                      num_iterations=config.num_iterations)
    returns = dict(zip(("oracle", "SPO", "reward model"), histories))
    # 2. Preferences are cyclic between the sectors in which episodes end.
    game, shares = games.cyclic_game(*config.margins), config.sector_shares
    ask["prefer"] = partial(control.cyclic, payoffs=game.astype(np.float32), shares=shares)
    feedbacks = {"spo": partial(self_play, **ask), "reward-model": partial(reward_model, **ask, **fitted)}
    histories = learn(feedbacks, "-cyclic", environment=partial(control.point_mass, wind=config.wind),
                      config=config.cyclic_ppo, num_iterations=config.num_cyclic_iterations,
                      observe=partial(control.sector_shares, shares=shares))  # fmt: skip
    cyclic = dict(zip(("SPO", "reward model"), histories))
    figure = training_curves(returns, {"return": "return (minus the mean distance)"}, columns=1)
    save(figure, run.path / "figures/returns.png")
    paths = {arm: sector_paths(history) for arm, history in cyclic.items()}
    save(simplex_figure(paths, games.minimax_winner(game)), run.path / "figures/sectors.png")
    wins = lambda shares: float(exploitability(game, shares))
    (latest, average), (model_latest, model_average) = paths["SPO"], paths["reward model"]
    return gain_statistics({arm: history["return"] for arm, history in returns.items()}) | {
        "cyclic_exploitability": wins(average[-1]),
        "cyclic_last_exploitability": wins(latest[-1]),
        "cyclic_reward_model_exploitability": wins(model_average[-1]) / min(config.margins),
        "cyclic_reward_model_last_exploitability": wins(model_latest[-1]) / min(config.margins),
        "cyclic_exploitability_difference": wins(average[-1]) - wins(model_average[-1]),
        "queries": float(sum(returns["SPO"]["queries"]) + sum(cyclic["SPO"]["queries"])),
        "reward_model_queries": float(sum(returns["reward model"]["queries"]) + sum(cyclic["reward model"]["queries"])),
    }


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
