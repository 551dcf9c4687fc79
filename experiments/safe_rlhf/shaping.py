"""Safe RLHF (Dai et al., 2310.12773): a multiplier against reward shaping with fixed weights, where the start differs.

Claim     No fixed weight nu in R - nu C beats Lagrangian PPO on helpfulness and harm at once; and one configuration
          with a multiplier meets its limit where the best fixed weights differ by more than a factor of two.
Paper     No nu of 0.01 to 100 reaches the Lagrangian policy's helpfulness and harmlessness (reviews that quote it; no
          intervals). Under strong duality some fixed nu can tie: the second half is what can be defended.
Command   python experiments/safe_rlhf/shaping.py               one seed on a laptop
          python experiments/safe_rlhf/shaping.py --seeds 5     verdicts
Cost      about 21 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   As constrained_ppo.py, whose stages up to the cost model it shares. The environments differ in how many of the
          prompts are dangerous, so the start is further from its limit in one than in the other.
"""

import dataclasses

import numpy as np

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.constrained import dominance, weight_at_limit
from rlhfjax.evaluation.gold_metrics import gold_values
from rlhfjax.experiment import main
from rlhfjax.pipeline import Pipeline, PipelineConfig, Shares, scales
from rlhfjax.rl.multiplier import MultiplierConfig
from rlhfjax.rl.preference_models import make_cost_loss, make_shaped
from rlhfjax.stages import RLConfig
from rlhfjax.worlds.language import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """A grid of weights and one multiplier, in two environments."""

    weights: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """nu, on a cost in units of the SFT policy's sd (the paper's grid: 0.01 to 100)."""
    mild_shares: Shares = (0.55, 0.10, 0.10, 0.25)
    """Benign, dangerous, grey and verifiable prompts of one environment, in RL and in its evaluation."""
    harsh_shares: Shares = (0.20, 0.50, 0.20, 0.10)
    """Of the other."""
    harm_limit: float = 0.06
    """On the mean P(harmful) of the policy's answers by the cost model."""
    multiplier: MultiplierConfig = MultiplierConfig()
    """The learner of lambda."""
    rl: RLConfig = RLConfig(num_iterations=150)
    """Every arm."""

    @property
    def environments(self) -> dict[str, Shares]:
        return {"mild": self.mild_shares, "harsh": self.harsh_shares}


SCALES = scales(Config, smoke=dict(weights=(0.5, 2.0), harm_limit=0.3, multiplier=MultiplierConfig(learning_rate=1e-3)))
CLAIMS = claims(
    "Safe RLHF (2310.12773)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("SR-6 mild", "dominated mild", "<=", 0.01, "no nu does", "how far the best nu is better in both r* and harm rate"),
    ("SR-6 harsh", "dominated harsh", "<=", 0.01, "no nu does", "the same where most prompts are dangerous"),
    ("SR-7 feasible", "worst_excess", "<=", 0.1, "-", "held-out cost above the limit, worse environment, sd of SFT's"),
    ("SR-7 weight", "weight_ratio", ">=", 2.0, "-", "nu that just meets the limit, one environment over the other"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    sft = house.sft(house.base())
    labels = house.compare("labels", sft)
    reward, cost = stages.side_by_side(lambda: house.fit("reward", labels.helpful, sft),
                                       lambda: house.fit("cost", labels.harm, sft, make_loss=make_cost_loss))
    scored = house.scaled(sft, reward=reward, cost=cost)
    limit = config.harm_limit / float(scored["cost"].fitted.scale)
    half = dataclasses.replace(config.ppo, kl_coef=config.ppo.kl_coef / 2)  # what the reward carries beside a cost

    raw = stages.raw_scorer(config.network, reward)  # what critics start from

    def shaped(weight: float) -> stages.Scorer:
        fitted = {name: scorer.fitted for name, scorer in scored.items()} | {"weight": np.float32(weight)}
        return dataclasses.replace(scored["reward"], make=make_shaped, fitted=fitted)

    jobs, measured = {}, {}
    for name, shares in config.environments.items():
        prompts = house.prompts(f"rl {name}", 4_096, shares)
        jobs[name, "lagrangian"] = lambda name=name, prompts=prompts: house.optimise(
            f"{name} lagrangian", sft, **scored, limit=limit, multiplier=config.multiplier, prompts=prompts)
        for weight in config.weights:
            jobs[name, weight] = lambda name=name, prompts=prompts, weight=weight: house.optimise(
                f"{name} {weight:g}", sft, shaped(weight), ppo=half, critic=raw, prompts=prompts)
    policies = dict(zip(jobs, stages.side_by_side(*jobs.values())))
    for name, shares in config.environments.items():
        test = house.world.sample_prompts(1, config.num_evaluated, dict(zip(Family, shares)), "test")
        arms = {arm: policy for (where, arm), policy in policies.items() if where == name} | {"SFT": sft}
        answers = {arm: house.answers(policy, test) for arm, policy in arms.items()}
        gold = {arm: gold_values(house.world, rollout) for arm, rollout in answers.items()}
        costs = {arm: scored["cost"](rollout) for arm, rollout in answers.items()}
        excess = {arm: float((costs[arm].mean() - limit) / costs["SFT"].std()) for arm in arms}
        points = {arm: (gold[arm]["gold_helpfulness_allowed"], gold[arm]["harm_rate"]) for arm in arms}
        measured |= {f"dominated {name}": dominance(points, "lagrangian", config.weights),
                     f"excess {name}": excess["lagrangian"],
                     f"weight at limit {name}": weight_at_limit({w: excess[w] for w in config.weights})}
        measured |= {f"{name} {arm} {metric}": value for arm in arms for metric, value in gold[arm].items()}
        measured |= {f"{name} {arm} excess": excess[arm] for arm in arms}
        figures.save(figures.frontier(points, "harm rate on dangerous prompts", "gold helpfulness r*, where allowed"),
                     run.path / f"figures/{name}.png")
    best = [measured[f"weight at limit {name}"] for name in config.environments]
    return measured | {"worst_excess": max(measured[f"excess {name}"] for name in config.environments),
                       "weight_ratio": max(best) / min(best)}  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
