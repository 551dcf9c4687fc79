"""HH-RLHF (Bai et al., 2204.05862): an online iteration against a static data set of the same size.

Claim     With equally many labels, half of them for answers of a policy that was trained on the other half, preference
          model and policy come out better than with labels for answers of the SFT policy alone.
Paper     44k base comparisons against 15k base + 15k rejection sampling + 15k online: the latter's policy is preferred
          (full text, no interval).
Command   python experiments/hh_rlhf/online.py               one seed on a laptop
          python experiments/hh_rlhf/online.py --seeds 5     verdicts
Cost      about 9 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   Networks of 0.19 M parameters, one iteration, no rejection sampling stage; judged by the world's truth.
"""

import dataclasses

import jax
import numpy as np

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.calibration import pair_accuracy
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.gold_metrics import gold_values
from rlhfjax.evaluation.win_rate import elo, win_rate
from rlhfjax.experiment import main
from rlhfjax.io.run import read_metrics
from rlhfjax.pipeline import Pipeline, PipelineConfig, scales
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.stages import FitConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """Two arms with one budget of labels, and the policy that the online arm collects its second half from."""

    num_pairs: int = 4_000
    """Labelled pairs of each arm."""
    preference: FitConfig = FitConfig(num_steps=500, learning_rate=1e-3, weight_decay=0.05)
    """Preference models, four passes over those pairs."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.02)
    """One RL update, the same in all arms."""


SCALES = scales(Config)
CLAIMS = claims(
    "HH-RLHF (2204.05862)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("HH-9", "online_win_rate", ">=", 0.5, "preferred", "gold win rate of the online policy against the static one"),
    ("HH-9 gain", "online_gain", ">=", 0.0, "-", "gold helpfulness of the online policy minus that of the static one"),
    ("HH-9 tail", "online_tail_gain", ">=", 0.0, "-", "accuracy on answers of the trained policy, online minus static"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house, half = Pipeline(config, run, cache), config.num_pairs // 2
    sft = house.sft(house.base())
    first = house.compare("labels", sft, num=half).helpful
    # 1. What half of the labels can do: the policy whose answers the online arm has labelled.
    reward = house.scaled(sft, "scale-first", reward=house.fit("reward-first", first, sft))["reward"]
    early = house.optimise("first", sft, reward)
    # 2. The other half: more answers of the SFT policy, or answers of that policy.
    more = {"static": house.compare("labels-static", sft, num=half).helpful,
            "online": house.compare("labels-online", early, num=half).helpful}
    pools = {arm: jax.tree.map(lambda *x: np.concatenate(x), first, second) for arm, second in more.items()}
    models = dict(zip(pools, stages.side_by_side(*(
        lambda arm=arm, pairs=pairs: house.fit(f"reward-{arm}", pairs, sft) for arm, pairs in pools.items()))))
    scored = house.scaled(sft, **models)
    # 3. RL from the start, with either preference model.
    policies = dict(zip(pools, stages.side_by_side(*(
        lambda arm=arm: house.optimise(arm, sft, scored[arm]) for arm in pools))))
    answers = {arm: house.answers(policy) for arm, policy in {"SFT": sft, "first": early, **policies}.items()}
    worth = {arm: np.asarray(house.world.gold(r.prompts, r.tokens, r.mask).helpfulness) for arm, r in answers.items()}
    # 4. Does either model still know good from bad among the answers of its own time?
    held_out = {"start": house.compare("held-out", sft, split="test").helpful,
                "tail": house.compare("held-out-online", early, split="test").helpful}
    accuracy = {f"{arm} {kind} accuracy": pair_accuracy(stages.raw_pair_scores(config.network, models[arm], pairs),
                                                        pairs.prefs)
                for arm in pools for kind, pairs in held_out.items()}
    curves = {arm: read_metrics(run.path / "metrics.jsonl", arm) for arm in policies}
    figures.save(figures.training_curves(curves, {
        "score": "reward (sd of SFT)", "gold_helpfulness": "gold helpfulness r*", "kl": "KL to SFT (nats per answer)"}),
        run.path / "figures/training.png")
    wins = win_rate(worth["online"], worth["static"])
    return accuracy | {
        "online_win_rate": wins,
        "online_elo": elo(wins),
        "online_gain": float(np.mean(worth["online"] - worth["static"])),
        "online_tail_gain": accuracy["online tail accuracy"] - accuracy["static tail accuracy"],
        **{f"{arm} against SFT": win_rate(worth[arm], worth["SFT"]) for arm in policies},
        **{f"{arm} {name}": value for arm, rollout in answers.items()
           for name, value in gold_values(house.world, rollout).items()}}  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
