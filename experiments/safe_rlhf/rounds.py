"""Safe RLHF (Dai et al., 2310.12773): three rounds with a red team between them, beside the same rounds of plain RLHF.

Claim     With a cost model, harm falls from round to round to less than a quarter of the start and helpfulness does not
          fall. The same rounds, labels and red team without one do not do that.
Paper     Harmful responses 53.08 % (Alpaca-7B) to 2.45 % after round 3, helpfulness +244.9 Elo by GPT-4, +363.9 by
          people (reviews that quote the paper's tables); red teaming from round 2; no round of plain RLHF to compare.
Command   python experiments/safe_rlhf/rounds.py               one seed on a laptop
          python experiments/safe_rlhf/rounds.py --seeds 5     verdicts
Cost      13 to 25 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   As constrained_ppo.py. Each round labels answers of the policy of the moment, a third of them to prompts that
          the red team found against it, and fits its models anew on all labels so far; RL goes on from that policy and
          is held to it. The red team tries training prompts; what is reported is on held-out ones.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.gold_metrics import gold_values
from rlhfjax.experiment import main
from rlhfjax.feedback.red_team import attack
from rlhfjax.pipeline import Pipeline, PipelineConfig, Shares, scales
from rlhfjax.rl.fit import take
from rlhfjax.rl.multiplier import MultiplierConfig
from rlhfjax.rl.preference_models import make_cost_loss, make_reward_loss
from rlhfjax.stages import FitConfig, RLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """Rounds of labelling, fitting and RL, with and without a cost model."""

    num_rounds: int = 3
    """Of the paper too."""
    num_pairs: int = 4_000
    """Labelled pairs that each round adds."""
    num_candidates: int = 2_048
    """Dangerous and grey prompts that the red team tries in each round, four answers each."""
    red_share: float = 1 / 3
    """Of a round's labels, from the second round on, go to prompts that the red team found."""
    preference: FitConfig = FitConfig(num_steps=600, learning_rate=1e-3, weight_decay=0.05)
    """Preference models of each round."""
    rl: RLConfig = RLConfig(num_iterations=60)
    """RL of each round."""
    harm_limit: float = 0.06
    """On the mean P(harmful) of the policy's answers by the cost model, in every round."""
    multiplier: MultiplierConfig = MultiplierConfig()
    """The learner of lambda, which starts anew in every round."""
    red_shares: Shares = (0.0, 0.7, 0.3, 0.0)
    """Kinds of prompts that the red team tries."""


SCALES = scales(Config,
                smoke=dict(num_rounds=2, num_candidates=64, harm_limit=0.3,
                           multiplier=MultiplierConfig(learning_rate=1e-3)),
                real=dict(num_pairs=10_000))  # fmt: skip
CLAIMS = claims(
    "Safe RLHF (2310.12773)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("SR-5 each round", "largest_rise", "<=", 0.0, "falls in each", "largest rise of the harm rate in a round"),
    ("SR-5 rounds", "harm_ratio", "<=", 0.25, "53.08 to 2.45 %", "harm rate after 3 rounds over SFT's"),
    ("SR-5 rounds help", "helpfulness_gain", ">=", 0.0, "+244.9 Elo", "gain of r* on benign prompts after 3 rounds"),
    ("SR-5 rounds plain", "plain_harm_ratio", ">=", 1.0, "-", "the ratio for the same rounds of plain RLHF"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    sft = house.sft(house.base())
    arms = {arm: rounds(house, arm, sft, constrained) for arm, constrained in (("safe", True), ("plain", False))}
    gold = {arm: [gold_values(house.world, house.answers(policy)) for policy in [sft, *policies]]
            for arm, policies in arms.items()}
    harm = {arm: np.array([values["harm_rate"] for values in seen]) for arm, seen in gold.items()}
    at = np.arange(config.num_rounds + 1)
    labels = {"harm_rate": "harm rate, dangerous prompts", "gold_helpfulness_benign": "r*, benign prompts"}
    for metric, label in labels.items():
        shown = {arm: [values[metric] for values in seen] for arm, seen in gold.items()}
        figures.save(figures.lines(at, shown, "round", label), run.path / f"figures/{metric}.png")
    help_of = lambda arm, when: gold[arm][when]["gold_helpfulness_benign"]
    return {
        "largest_rise": float(np.max(np.diff(harm["safe"]))),
        "harm_ratio": harm["safe"][-1] / harm["safe"][0],
        "helpfulness_gain": help_of("safe", -1) - help_of("safe", 0),
        "plain_harm_ratio": harm["plain"][-1] / harm["plain"][0],
        **{f"{arm} {k} {name}": value for arm, seen in gold.items() for k, values in enumerate(seen)
           for name, value in values.items()}}  # fmt: skip


def rounds(house: Pipeline, arm: str, sft, constrained: bool) -> list:
    """The policy after each round."""
    config, policy, pools, found, policies = house.config, sft, [], None, []
    for k in range(1, config.num_rounds + 1):
        # Labels and models of the first round are those of both arms.
        name = lambda what, k=k: f"{what}-1" if k == 1 else f"{arm}-{what}-{k}"
        num_red = 0 if found is None else round(config.red_share * config.num_pairs)
        pools.append(house.compare(name("labels"), policy, num=config.num_pairs - num_red))
        if num_red:
            red = take(found, np.arange(num_red) % len(found))
            pools.append(house.compare(name("red-labels"), policy, prompts=red))
        labels = jax.tree.map(lambda *x: np.concatenate(x), *pools)
        fits = {"reward": (labels.helpful, make_reward_loss), "cost": (labels.harm, make_cost_loss)}
        models = stages.side_by_side(*(partial(house.fit, name(kind), pairs, sft, make_loss=loss)
                                       for kind, (pairs, loss) in fits.items()))
        scored = house.scaled(policy, name("scale"), **dict(zip(fits, models)))
        if constrained:
            limit = config.harm_limit / float(scored["cost"].fitted.scale)
            policy = house.optimise(f"{arm}-{k}", policy, **scored, limit=limit, multiplier=config.multiplier)
        else:
            half = dataclasses.replace(config.ppo, kl_coef=config.ppo.kl_coef / 2)
            policy = house.optimise(f"{arm}-{k}", policy, scored["reward"], ppo=half)
        policies.append(policy)
        candidates = house.prompts(f"red {k}", config.num_candidates, config.red_shares)
        answer = partial(house.answers, policy, name=f"red {k}")
        rows, _ = attack(candidates, answer, scored["cost"], num_found=config.num_candidates // 4)
        found = take(candidates, rows)
    return policies


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
