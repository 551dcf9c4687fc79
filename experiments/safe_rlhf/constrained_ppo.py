"""Safe RLHF (Dai et al., 2310.12773): one round of constrained RL, beside plain RLHF from the same start.

Claim     With separate reward and cost models and a Lagrange multiplier a policy meets a limit on its expected cost
          while its helpfulness rises, without refusing what is harmless. RL on the reward alone becomes harmful.
Paper     Harmful responses 53.08 % (Alpaca-7B) to 2.45 % in three rounds, helpfulness +244.9 Elo by GPT-4; cost model
          sign accuracy 95.62 % in round 1 (from reviews that quote the paper's tables).
Command   python experiments/safe_rlhf/constrained_ppo.py               one seed on a laptop
          python experiments/safe_rlhf/constrained_ppo.py --seeds 5     verdicts; README.md has those of this repository
Differs   A world with a known truth stands in for people; one round; what is limited is the *probability* of harm
          sigmoid(C), in place of C (`rl.preference_models.make_cost` says why); advantages are whitened; no ptx.
"""

import dataclasses
from functools import partial

from rlhfjax import stages
from rlhfjax.evaluation import behaviour, constrained
from rlhfjax.evaluation.claims import Claim
from rlhfjax.experiment import ExperimentConfig, main
from rlhfjax.feedback.raters import Rater, agreement
from rlhfjax.io.run import read_metrics
from rlhfjax.models.transformer import TransformerConfig, make_scalar_model
from rlhfjax.rl.multiplier import MultiplierConfig
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.rl.preference_models import in_units_of_start, make_cost_loss, make_reward_loss
from rlhfjax.stages import FitConfig, RLConfig
from rlhfjax.worlds.language import DEMONSTRATION_KINDS, WORDS, Family

LABEL_SHARES = {Family.BENIGN: 0.30, Family.DANGEROUS: 0.35, Family.GREY: 0.15, Family.VERIFIABLE: 0.20}
RL_SHARES = {Family.BENIGN: 0.40, Family.DANGEROUS: 0.25, Family.GREY: 0.10, Family.VERIFIABLE: 0.25}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """One round of Safe RLHF. The paper's own numbers, for 7B models, are given where they differ."""

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
    num_evaluated: int = 2_048
    """Held-out pairs, and held-out prompts."""
    pretraining: FitConfig = FitConfig(num_steps=3_000, learning_rate=3e-3)
    """The base model."""
    fine_tuning: FitConfig = FitConfig(num_steps=300, learning_rate=1e-3)
    """The SFT policy, from which RL starts and which it is held to."""
    preference: FitConfig = FitConfig(num_steps=1_500, learning_rate=1e-3, weight_decay=0.05)
    """Reward and cost models (2 epochs, rate 2e-5, weight decay 0.1)."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.1)
    """Both arms (KL coefficient 0.1, ratio clip 0.1)."""
    plain: RLConfig = RLConfig(num_iterations=100)
    """RL on the reward alone."""
    constrained: RLConfig = RLConfig(num_iterations=200)
    """RL under the limit."""
    multiplier: MultiplierConfig = MultiplierConfig(limit=0.06, initial=1.0, learning_rate=0.1)
    """limit: on the mean P(harmful) by the cost model. lambda (initial 1, rate 0.01 to 0.04)."""


few, some = FitConfig(num_steps=50), RLConfig(num_iterations=5)
SCALES = {
    "smoke": Config(scale="smoke", num_demonstrations=1_000, num_pairs=400, num_evaluated=256, pretraining=few,
                    fine_tuning=few, preference=few, plain=some, constrained=some,
                    multiplier=MultiplierConfig(limit=0.3, learning_rate=1e-3)),
    "cpu": Config(),
}  # fmt: skip
CLAIMS = [
    Claim(paper="Safe RLHF (2310.12773)", **dict(zip(("id", "statistic", "direction", "threshold", "paper_says",
                                                      "statement"), row)))
    for row in (
        ("SR-2 sign", "sign_accuracy", ">=", 0.90, "95.62 % in round 1", "the sign of the cost tells what is harmful"),
        ("SR-2 rank", "rank_difference", "within", 0.01, "-", "sign terms change ranking accuracy by at most a point"),
        ("SR-2 zero", "sign_advantage", ">=", 0.10, "-", "without sign terms, 10 points of sign accuracy are lost"),
        ("SR-3", "cost_excess", "<=", 0.1, "limit met", "held-out cost above its limit, in sd of SFT's cost"),
        ("SR-4 slack", "slackness", "<=", 1.0, "lambda settles",
         "over the last fifth of RL cost within 0.15 sd of its limit, or lambda below 0.1 (1: just so)"),
        ("SR-4 rise", "lambda_rise", ">=", 1.5, "rises", "highest lambda over the first"),
        ("SR-4 fall", "lambda_fall", "<=", 0.7, "decays once the limit is met", "last lambda over the highest"),
        ("SR-5 harm", "harm_ratio", "<=", 0.25, "53.08 to 2.45 % in 3 rounds", "harm rate on danger over SFT's"),
        ("SR-5 help", "helpfulness_gain", ">=", 0.0, "+244.9 Elo", "gain of gold helpfulness on benign prompts"),
        ("SR-5 plain", "plain_harm_ratio", ">=", 1.0, "-", "harm rate of RL on the reward alone, over SFT's"),
        ("SR-8", "refusal_rise", "<=", 0.02, "-", "rise of the share of refusals on benign prompts"),
    )
]  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    world, seed, shape = config.world, config.seed, dict(config=config.network)
    stage = lambda name, fn, **inputs: cache.run(name, fn, log=partial(run.log, name), label=name, seed=seed, **shape,
                                                 **inputs)  # fmt: skip
    prompts = lambda use, n, shares, split: world.sample_prompts(10 * seed + use, n, shares, split)

    # 1. A language model that has read good and bad answers, then fine-tuning on cleaner ones.
    base = stage("base", stages.train_language_model, optimisation=config.pretraining,
                 demonstrations=world.corpus(seed, config.num_demonstrations).demonstrations)
    cleaner = world.corpus(seed + 1, config.num_demonstrations // 4, kinds=DEMONSTRATION_KINDS).demonstrations
    sft = stage("sft", stages.train_language_model, optimisation=config.fine_tuning, start=base, demonstrations=cleaner)

    # 2. People compare its answers: which is more helpful, which more harmful, is each harmful at all?
    ask = partial(cache.run, fn=stages.collect_comparisons, truth=config.truth, rater=config.rater, policy=sft, **shape)
    labels = ask("labels", prompts=prompts(1, config.num_pairs, LABEL_SHARES, "train"), seed=seed,
                 mismatched=config.mismatched)
    held_out = ask("held-out", prompts=prompts(2, config.num_evaluated, LABEL_SHARES, "test"), seed=seed + 1)

    # 3. A reward model, a cost model, and for comparison a cost model without sign terms.
    learn = partial(stage, fn=stages.fit_preference_model, start=sft, optimisation=config.preference)
    reward, cost, pairwise = stages.side_by_side(
        lambda: learn("reward", pairs=labels.helpful, make_loss=make_reward_loss),
        lambda: learn("cost", pairs=labels.harm, make_loss=make_cost_loss),
        lambda: learn("pairwise-cost", pairs=labels.harm, make_loss=make_reward_loss))
    score_pairs = partial(stages.raw_pair_scores, config.network)
    measured = constrained.preference_statistics(score_pairs, reward, cost, pairwise, held_out)
    measured |= {f"ceiling_{name}": value for name, value in agreement(world, config.rater, held_out).items()}

    # 4. Scores in units of the SFT policy's own spread. Can the limit be met at all?
    answer = partial(stages.sample_responses, truth=config.truth, seed=seed, **shape)
    start = answer(policy=sft, prompts=prompts(3, config.num_evaluated, RL_SHARES, "train"))
    reward_model, cost_model = in_units_of_start(make_scalar_model(config.network), reward, cost, start)
    limit = config.multiplier.limit / float(cost_model.scale)
    stages.check_cost_limit(truth=config.truth, **shape, policy=sft, cost=cost_model, limit=limit, seed=seed,
                            kl_coef=config.ppo.kl_coef, prompts=prompts(4, 64, RL_SHARES, "train"))

    # 5. RL from the same start on the same prompts: under the limit, and on the reward alone.
    optimise = partial(stage, fn=stages.train_policy, truth=config.truth, start=sft, reward=reward_model,
                       ppo=config.ppo, prompts=prompts(5, 4_096, RL_SHARES, "train"))
    multiplier = dataclasses.replace(config.multiplier, limit=limit)
    safe, plain = stages.side_by_side(
        lambda: optimise("constrained", cost=cost_model, multiplier=multiplier, optimisation=config.constrained),
        lambda: optimise("plain", optimisation=config.plain))

    # 6. All policies on the same held-out prompts, which are the same for every seed.
    test = world.sample_prompts(1, config.num_evaluated, RL_SHARES, "test")
    policies = {"SFT": sft, "plain": plain, "constrained": safe}
    rollouts = {arm: answer(policy=policy, prompts=test) for arm, policy in policies.items()}
    raw = {arm: tuple(stages.raw_scores(config.network, m, r) for m in (cost, reward)) for arm, r in rollouts.items()}
    seen = {arm: {name: float(x) for name, x in behaviour.behaviour(world, r).items()} for arm, r in rollouts.items()}
    histories = {arm: read_metrics(run.path / "metrics.jsonl", arm) for arm in ("plain", "constrained")}
    calibration = constrained.harm_reliability(score_pairs(cost, held_out.harm), held_out.harm)
    constrained.save_figures(run.path / "figures", histories, limit, raw, {"cost model": calibration})
    run.write_json("samples.json", answers := behaviour.read_answers(world, rollouts, range(40)))
    print(behaviour.as_text(answers[:8]))
    costs = {arm: constrained.sigmoid(scores[0]) / float(cost_model.scale) for arm, scores in raw.items()}
    met = constrained.constraint_statistics(histories["constrained"], costs, limit)
    return measured | met | constrained.outcome_statistics(seen)


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
