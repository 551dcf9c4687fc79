"""Safe RLHF (Dai et al., 2310.12773): one round of constrained RL, beside plain RLHF from the same start.

Claim     With separate reward and cost models and a Lagrange multiplier a policy meets a limit on its expected cost
          while its helpfulness rises, without refusing what is harmless. RL on the reward alone becomes harmful.
Paper     Harmful responses 53.08 % (Alpaca-7B) to 2.45 % in three rounds, helpfulness +244.9 Elo by GPT-4; cost model
          sign accuracy 95.62 % in round 1 (from reviews that quote the paper's tables).
Command   python experiments/safe_rlhf/constrained_ppo.py               one seed on a laptop
          python experiments/safe_rlhf/constrained_ppo.py --seeds 5     verdicts; README.md has those of this repository
Cost      157 to 174 s on two CPU cores, compilation and base model included (Python 3.11, jax 0.10.2).
Here      harmful answers on dangerous prompts 52.8 to 3.8 %, refusals of benign ones 7.4 to 0.0 % (5 seeds: README.md).
Differs   A world with a known truth stands in for people; one round; what is limited is the *probability* of harm
          sigmoid(C), in place of C (`rl.preference_models.make_cost` says why); advantages are whitened; no ptx.
"""

import dataclasses
from functools import partial

from rlhfjax import stages
from rlhfjax.evaluation import constrained
from rlhfjax.evaluation.claims import claims
from rlhfjax.experiment import ExperimentConfig, main, stream
from rlhfjax.feedback.raters import Rater
from rlhfjax.models.transformer import TransformerConfig
from rlhfjax.rl.multiplier import MultiplierConfig
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.rl.preference_models import make_cost_loss, make_reward_loss
from rlhfjax.stages import FitConfig, RLConfig
from rlhfjax.worlds.language import DEMONSTRATION_KINDS, WORDS, Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """One round of Safe RLHF. The numbers of its public code, for 7B models, are given where they differ."""

    network: TransformerConfig = TransformerConfig(
        vocab_size=len(WORDS), d_model=96, num_layers=2, num_heads=4, d_ff=256, mlp="plain", activation="gelu",
        tie_embeddings=True)  # fmt: skip
    """Shape of all six networks (policy, reference, reward, cost, two critics): 0.19 M parameters each (7B)."""
    rater: Rater = Rater()
    """The simulated people."""
    num_demonstrations: int = 14_000
    """Answers that the base model reads; fine-tuning imitates a quarter as many, cleaner ones."""
    num_pairs: int = 12_000
    """Labelled pairs for the reward and the cost model."""
    mismatched: float = 0.3
    """Share of those pairs whose second answer belongs to another prompt."""
    label_shares: tuple[float, float, float, float] = (0.30, 0.35, 0.15, 0.20)
    """Benign, dangerous, grey and verifiable prompts among those labelled."""
    num_evaluated: int = 2_048
    """Held-out pairs, and held-out prompts."""
    pretraining: FitConfig = FitConfig(num_steps=3_000, learning_rate=3e-3)
    """The base model."""
    fine_tuning: FitConfig = FitConfig(num_steps=300, learning_rate=1e-3)
    """The SFT policy, from which RL starts and which it is held to."""
    preference: FitConfig = FitConfig(num_steps=1_500, learning_rate=1e-3, weight_decay=0.05)
    """Reward and cost models (2 epochs, rate 2e-5, weight decay 0.1)."""
    rl: RLConfig = RLConfig(num_iterations=200)
    """Both arms."""
    rl_shares: tuple[float, float, float, float] = (0.40, 0.25, 0.10, 0.25)
    """The kinds of prompts in RL and in its evaluation."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.1)
    """With a limit; without one the KL coefficient is half of this, which is what the reward carries of it there."""
    harm_limit: float = 0.06
    """On the mean P(harmful) of the policy's answers by the cost model."""
    multiplier: MultiplierConfig = MultiplierConfig()
    """The learner of lambda."""

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.harm_limit < 1 and 0 <= self.mismatched <= 1):
            raise ValueError(f"harm_limit {self.harm_limit} must lie in (0, 1), mismatched {self.mismatched} in [0, 1]")
        self.ppo.check_batch(self.rl.batch_size)
        self.fine_tuning.check_rows(a_quarter_of_num_demonstrations=self.num_demonstrations // 4)
        self.preference.check_rows(num_pairs=self.num_pairs)


SCALES = {
    "smoke": Config(scale="smoke", num_demonstrations=1_000, num_pairs=400, num_evaluated=256, harm_limit=0.3,
                    multiplier=MultiplierConfig(learning_rate=1e-3), rl=RLConfig(num_iterations=5),
                    **dict.fromkeys(("pretraining", "fine_tuning", "preference"), FitConfig(num_steps=50))),
    "cpu": Config(),
}  # fmt: skip
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
    world, seed, shape = config.world, partial(stream, config.seed), dict(config=config.network)
    stage = lambda name, fn, **inputs: cache.run(name, fn, monitor=run.monitor(name), label=name, **shape, **inputs)
    prompts = lambda name, n, shares, split: world.sample_prompts(seed(name), n, dict(zip(Family, shares)), split)
    sampling = dict(truth=config.truth, temperature=config.ppo.temperature, **shape)
    # 1. A language model that has read good and bad answers, then fine-tuning on cleaner ones.
    texts = lambda name, n, **kinds: world.corpus(seed(name), n, **kinds).demonstrations
    base = stage("base", stages.train_language_model, optimisation=config.pretraining, seed=seed("base"),
                 demonstrations=texts("corpus", config.num_demonstrations))
    cleaner = texts("cleaner corpus", config.num_demonstrations // 4, kinds=DEMONSTRATION_KINDS)
    sft = stage("sft", stages.train_language_model, optimisation=config.fine_tuning, seed=seed("sft"), start=base,
                demonstrations=cleaner)
    # 2. People compare its answers: which is more helpful, which more harmful, is each harmful at all?
    ask = partial(cache.run, fn=stages.collect_comparisons, rater=config.rater, policy=sft, **sampling)
    labels = ask("labels", prompts=prompts("labels", config.num_pairs, config.label_shares, "train"),
                 mismatched=config.mismatched, seed=seed("labels"))
    held_out = ask("held-out", prompts=prompts("held-out", config.num_evaluated, config.label_shares, "test"),
                   seed=seed("held-out"))
    # 3. A reward model, a cost model, and for comparison a cost model without sign terms.
    learn = partial(stage, fn=stages.fit_preference_model, start=sft, optimisation=config.preference, seed=seed("fit"))
    reward, cost, pairwise = stages.side_by_side(
        lambda: learn("reward", pairs=labels.helpful, make_loss=make_reward_loss),
        lambda: learn("cost", pairs=labels.harm, make_loss=make_cost_loss),
        lambda: learn("pairwise-cost", pairs=labels.harm, make_loss=make_reward_loss))
    score_pairs = partial(stages.raw_pair_scores, config.network)
    measured = constrained.preference_statistics(score_pairs, reward, cost, pairwise, held_out, world, config.rater)
    # 4. Scores in units of the SFT policy's own spread. Can the limit be met at all?
    scored = cache.run("scale", stages.scale_scores, policy=sft, reward=reward, cost=cost, **sampling,
                       prompts=prompts("start", config.num_evaluated, config.rl_shares, "train"), seed=seed("start"))
    constraint = dict(limit=config.harm_limit / float(scored["cost"].scale), multiplier=config.multiplier)
    stages.check_cost_limit(truth=config.truth, **shape, policy=sft, **scored, **constraint, ppo=config.ppo,
                            prompts=prompts("limit", 64, config.rl_shares, "train"), seed=seed("limit"))
    # 5. RL from the same start on the same prompts: under the limit, and on the reward alone.
    optimise = partial(stage, fn=stages.train_policy, truth=config.truth, start=sft, reward=scored["reward"],
                       ptx=cleaner, prompts=prompts("rl", 4_096, config.rl_shares, "train"), optimisation=config.rl,
                       seed=seed("rl"))
    safe, plain = stages.side_by_side(
        lambda: optimise("constrained", cost=scored["cost"], ppo=config.ppo, **constraint),
        lambda: optimise("plain", ppo=dataclasses.replace(config.ppo, kl_coef=config.ppo.kl_coef / 2)))
    # 6. All policies on the same held-out prompts, which are the same for every seed.
    test = world.sample_prompts(1, config.num_evaluated, dict(zip(Family, config.rl_shares)), "test")
    evaluate = partial(stages.evaluate_policy, **sampling, **scored, prompts=test, seed=seed("test"))
    arms = {arm: evaluate(policy=policy) for arm, policy in (("SFT", sft), ("plain", plain), ("constrained", safe))}
    return measured | constrained.report(
        run.path, world, arms, limit=constraint["limit"], initial=config.multiplier.initial,
        calibration=constrained.harm_reliability(score_pairs(cost, held_out.harm), held_out.harm))  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
