"""SPO (Swamy et al., 2401.04056): self-play in matrix games, beside a Bradley-Terry reward model on as many labels.

Claim     Where preferences are cyclic, the average policy of self-play is the minimax winner, which no other policy
          beats; a reward model ranks the classes, and the policy trained on it collapses to one that another beats.
Paper     Self-play with a no-regret learner converges to the minimax winner at the rate of its regret, T^-1/2 in
          general; reward models cannot represent intransitive preferences (abstract and talk; no table was read).
Command   python experiments/spo/matrix_games.py               one seed
          python experiments/spo/matrix_games.py --seeds 5     verdicts
Cost      14 to 24 s on two busy CPU cores, compilation included (Python 3.11, jax 0.10.2).
Here      README.md: what development seeds say, and the log of what was tried.
Differs   Classes of answers in place of trajectories; the learner is Hedge on sampled labels (`worlds.games.play`).
"""

import dataclasses
from functools import partial

import numpy as np

from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.figures import save
from rlhfjax.evaluation.game_figures import exploitability_figure, simplex_figure
from rlhfjax.experiment import ExperimentConfig, main, stream
from rlhfjax.worlds import games


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """Games with a known answer; both arms start alike and ask as many questions."""

    margins: tuple[float, float, float] = (0.4, 0.2, 0.1)
    """By which A beats B, B beats C and C beats A: P(A preferred to B) = (1 + 0.4) / 2."""
    scores: tuple[float, float, float] = (0.0, 0.8, -0.8)
    """Of A, B and C in the control, where preferences are Bradley-Terry."""
    start: tuple[float, float, float] = (0.80, 0.15, 0.05)
    """The first policy: skewed, so that what is sampled decides what a reward model learns."""
    num_rounds: int = 100_000
    """Of the cyclic game; the control takes a tenth."""
    num_siblings: int = 16
    """Answers per round; every pair of them is labelled once."""
    learning_rate: float = 2.0
    """Of Hedge, divided by the square root of the round."""
    kept: float = 0.9
    """Weight of a label after one more round, in the arm whose reward model sees recent labels alone."""
    num_games: int = 32
    """Random games, in which the rate of convergence is measured."""
    num_classes: int = 5
    """In each of those."""
    num_game_rounds: int = 10_000
    """In each of those."""
    num_first_rounds: int = 100
    """Of those, before the rate is measured."""

    def __post_init__(self):
        super().__post_init__()
        if not (0 < min(self.margins) and max(self.margins) < 1):
            raise ValueError(f"margins of a cycle must lie in (0, 1), got {self.margins}")
        if not (0 < min(self.start) and abs(sum(self.start) - 1) < 1e-6):
            raise ValueError(f"start must be positive and sum to 1, got {self.start}")
        if self.num_game_rounds < 10 * self.num_first_rounds:
            raise ValueError(f"a rate needs a decade of rounds: num_game_rounds {self.num_game_rounds}, "
                             f"num_first_rounds {self.num_first_rounds}")  # fmt: skip

    @property
    def label(self) -> str:
        return f"matrix_games-{games.VERSION}"


SCALES = {
    "smoke": Config(scale="smoke", num_rounds=2_000, num_games=4, num_game_rounds=1_000),
    "cpu": Config(),
}
CLAIMS = claims(
    "SPO (2401.04056)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("SP-3 mix", "winner_distance", "<=", 0.05, "converges", "L1 distance of self-play's average from the winner"),
    ("SP-3 exploit", "exploitability", "<=", 0.05, "converges", "what a best reply wins from self-play's average"),
    ("SP-4 once", "once_exploitability", ">=", 0.5, "not expressible",
     "what a best reply wins from RL on a reward model of the start's answers, over the smallest margin"),
    ("SP-4 iterated", "iterated_exploitability", ">=", 0.5, "not expressible",
     "the same of the last policy, the reward model being refit on the policy's own answers"),
    ("SP-4 average", "iterated_average_exploitability", ">=", 0.5, "may find it on average",
     "the same of that arm's average policy"),
    ("SP-4 queue", "queue_average_exploitability", ">=", 0.5, "may find it on average",
     "the same of the average policy where the reward model is refit on about the last ten rounds alone"),
    ("SP-4 transitive", "scored_exploitability", "<=", 0.05, "-",
     "the larger of what it wins from self-play and from the iterated arm where preferences are Bradley-Terry"),
    ("SP-6", "decay_exponent", "<=", -0.45, "T^-1/2",
     "slope of log exploitability of the average over log rounds (-0.5, and 0.05 for sampling)"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    seed, margin = partial(stream, config.seed), min(config.margins)
    play = partial(cache.run, fn=games.play, num_siblings=config.num_siblings, learning_rate=config.learning_rate)
    arms = {"self-play": dict(feedback=games.self_play),
            "reward model, once": dict(feedback=games.reward_model, on_policy=False),
            "reward model, iterated": dict(feedback=games.reward_model),
            "reward model, queue": dict(feedback=partial(games.reward_model, kept=config.kept))}  # fmt: skip
    curves = {}

    def learn(name, payoffs, start, num_rounds, **arm):
        played = play(name, payoffs=payoffs, start=np.array(start), num_rounds=num_rounds, seed=seed("labels"), **arm)
        each = games.exploitability_curves(payoffs, played)
        curves[name] = {"round": played["round"]} | {key: curve.mean(-1) for key, curve in each.items()}
        for index, step in enumerate(played["round"]):
            run.log(name, step, {key: curves[name][key][index] for key in each})
        return played | {"exploitability": each["average"]}

    # 1. The cycle: four arms, the same start, the same number of labels.
    cycle = games.cyclic_game(*config.margins)
    winner = games.minimax_winner(cycle)
    played = {name: learn(name, cycle[None], config.start, config.num_rounds, **arm) for name, arm in arms.items()}
    # 2. The control: a best class exists, and the same reward model finds it.
    scored = games.scored_game(config.scores)[None]
    for name in ("self-play", "reward model, iterated"):
        learn(f"{name}, control", scored, config.start, config.num_rounds // 10, **arms[name])
    # 3. The rate, in games that the seed draws.
    rows = np.stack([games.random_game(seed(f"game {i}"), config.num_classes) for i in range(config.num_games)])
    rest = (1 - config.start[0]) / (config.num_classes - 1)
    skewed = (config.start[0], *[rest] * (config.num_classes - 1))
    drawn = learn("random games", rows, skewed, config.num_game_rounds, **arms["self-play"])
    paths = {name: (p["policy"][:, 0], p["average"][:, 0]) for name, p in played.items()}
    save(simplex_figure(paths, winner), run.path / "figures/simplex.png")
    panels = {"cyclic game": {name: curves[name] for name in arms},
              f"{config.num_games} random games (mean)": {"self-play": curves["random games"]}}  # fmt: skip
    save(exploitability_figure(panels), run.path / "figures/exploitability.png")
    last = lambda name, which: float(curves[name][which][-1])
    iterated = "reward model, iterated"
    return {
        "winner_distance": float(np.abs(played["self-play"]["average"][-1, 0] - winner).sum()),
        "exploitability": last("self-play", "average"),
        "last_exploitability": last("self-play", "policy"),
        "once_exploitability": last("reward model, once", "policy") / margin,
        "once_average_exploitability": last("reward model, once", "average") / margin,
        "iterated_exploitability": last(iterated, "policy") / margin,
        "iterated_average_exploitability": last(iterated, "average") / margin,
        "queue_exploitability": last("reward model, queue", "policy") / margin,
        "queue_average_exploitability": last("reward model, queue", "average") / margin,
        "iterated_largest_share": float(played[iterated]["policy"][-1, 0].max()),
        "scored_exploitability": max(last("self-play, control", "average"), last(f"{iterated}, control", "policy")),
        "decay_exponent": games.decay_exponent(drawn["round"], drawn["exploitability"], config.num_first_rounds),
    }


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
