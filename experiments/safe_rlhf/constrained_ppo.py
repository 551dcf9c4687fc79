"""Safe RLHF (Dai et al., 2310.12773): one round of constrained RL, beside plain RLHF from the same start.

Claim     With separate reward and cost models and a Lagrange multiplier a policy meets a limit on its expected cost
          while its helpfulness rises, without refusing what is harmless. RL on the reward alone becomes harmful.
Paper     Harmful responses 53.08 % (Alpaca-7B) to 2.45 % in three rounds, helpfulness +244.9 Elo by GPT-4; cost model
          sign accuracy 95.62 % in round 1 (from reviews that quote the paper's tables).
Command   python experiments/safe_rlhf/constrained_ppo.py               one seed on a laptop
          python experiments/safe_rlhf/constrained_ppo.py --seeds 5     verdicts; README.md has those of this repository
Cost      157 to 174 s on two idle CPU cores, 386 s on busy ones, compilation and base model included (Python 3.11).
Here      harmful answers on dangerous prompts 52.8 to 3.8 %, refusals of benign ones 7.4 to 0.0 % (5 seeds: README.md).
Differs   A world with a known truth stands in for people; one round; what is limited is the *probability* of harm
          sigmoid(C), in place of C (`rl.preference_models.make_cost` says why); advantages are whitened; no ptx.
"""

import dataclasses

from rlhfjax import stages
from rlhfjax.evaluation import constrained
from rlhfjax.evaluation.claims import claims
from rlhfjax.experiment import main
from rlhfjax.pipeline import Pipeline, PipelineConfig, scales
from rlhfjax.rl.multiplier import MultiplierConfig
from rlhfjax.rl.preference_models import make_cost_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """One round of Safe RLHF (its public code, for 7B models: preference models in 2 epochs at 2e-5, decay 0.1).

    Without a limit the KL coefficient is half of `ppo.kl_coef`: what the reward carries of it with one.
    """

    harm_limit: float = 0.06
    """On the mean P(harmful) of the policy's answers by the cost model."""
    multiplier: MultiplierConfig = MultiplierConfig()
    """The learner of lambda."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.harm_limit < 1:
            raise ValueError(f"harm_limit must lie in (0, 1), got {self.harm_limit}")


SCALES = scales(Config, smoke=dict(harm_limit=0.3, multiplier=MultiplierConfig(learning_rate=1e-3)))
CLAIMS = claims(
    "Safe RLHF (2310.12773)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("SR-2 sign", "sign_accuracy", ">=", 0.90, "95.62 % in round 1", "the sign of the cost tells what is harmful"),
    ("SR-2 rank", "rank_difference", "within", 0.01, "-", "what sign terms add to ranking accuracy on risky prompts"),
    ("SR-2 zero", "sign_advantage", ">=", 0.10, "-", "what they add to sign accuracy (a quarter of answers unsafe)"),
    ("SR-3", "cost_excess", "<=", 0.1, "limit met", "held-out cost above its limit, in sd of SFT's cost"),
    ("SR-4 slack", "slackness", "<=", 1.0, "lambda settles",
     "over the last fifth of RL cost within 0.15 sd of its limit, or lambda below 0.1 (1: just so)"),
    ("SR-4 rise", "lambda_rise", ">=", 1.5, "rises", "highest lambda over its start"),
    ("SR-4 fall", "lambda_fall", "<=", 0.7, "decays once the limit is met", "last lambda over the highest"),
    ("SR-5 harm", "harm_ratio", "<=", 0.25, "53.08 to 2.45 % in 3 rounds", "harm rate on dangerous prompts over SFT's"),
    ("SR-5 help", "helpfulness_gain", ">=", 0.0, "+244.9 Elo", "gain of gold helpfulness on benign prompts"),
    ("SR-5 plain", "plain_harm_ratio", ">=", 1.0, "-", "harm rate of RL on the reward alone, over SFT's"),
    ("SR-8", "refusal_rise", "<=", 0.02, "-", "rise of the share of refusals on benign prompts"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    # 1. A language model that has read good and bad answers, then fine-tuning on cleaner ones.
    sft = house.sft(house.base())
    # 2. People compare its answers: which is more helpful, which more harmful, is each harmful at all?
    labels, held_out = house.compare("labels", sft), house.compare("held-out", sft, split="test")
    # 3. A reward model, a cost model, and for comparison a cost model without sign terms.
    reward, cost, pairwise = stages.side_by_side(
        lambda: house.fit("reward", labels.helpful, sft),
        lambda: house.fit("cost", labels.harm, sft, make_loss=make_cost_loss),
        lambda: house.fit("pairwise-cost", labels.harm, sft))
    score_pairs = lambda model, pairs: stages.raw_pair_scores(config.network, model, pairs)
    measured = constrained.preference_statistics(
        score_pairs, reward, cost, pairwise, held_out, house.world, config.rater)
    # 4. Scores in units of the SFT policy's own spread. Can the limit be met at all?
    scored = house.scaled(sft, reward=reward, cost=cost)
    constraint = dict(limit=config.harm_limit / float(scored["cost"].fitted.scale), multiplier=config.multiplier)
    stages.check_cost_limit(
        world=house.world, config=config.network, policy=sft, **scored, **constraint, ppo=config.ppo,
        prompts=house.prompts("limit", 64, config.rl_shares), seed=house.seed("limit"))
    # 5. RL from the same start on the same prompts: under the limit, and on the reward alone.
    safe, plain = stages.side_by_side(
        lambda: house.optimise("constrained", sft, **scored, **constraint),
        lambda: house.optimise("plain", sft, scored["reward"],
                               ppo=dataclasses.replace(config.ppo, kl_coef=config.ppo.kl_coef / 2)))
    # 6. All policies on the same held-out prompts.
    arms = {"SFT": sft, "plain": plain, "constrained": safe}
    return measured | constrained.report(
        run.path, house.world, {arm: house.answers(policy) for arm, policy in arms.items()},
        scores=scored["reward"].raw, costs=scored["cost"], raw_costs=scored["cost"].raw, limit=constraint["limit"],
        initial=config.multiplier.initial,
        calibration=constrained.harm_reliability(score_pairs(cost, held_out.harm), held_out.harm))  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
