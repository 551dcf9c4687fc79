"""RLAIF (Lee et al., 2309.00267): labels of an AI judge against labels of people, and the judge inside the loop.

Claim     RL on AI labels is as good as RL on people's: both beat SFT, also at equal length, where they win by less,
          and neither beats the other by more than 3 points. A judge that rates answers directly is no worse than a
          reward model fitted to its comparisons, which grows stale as the policy moves.
Paper     Summarisation: RLAIF 71 %, RLHF 73 % against SFT, 50 % against each other; at equal length 59, 61, 47 %;
          direct RLAIF 74 % against SFT, 60 % against same-size RLAIF (full text).
Command   python experiments/rlaif/rlaif.py               one seed on a laptop
          python experiments/rlaif/rlaif.py --seeds 5     verdicts
Cost      about 14 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   Who wins is the world's truth. The judge is trained on people's comparisons and ratings of other answers,
          the preferred one first in 65 % of them, so its errors are its own; judges.py measures it. All rewards are in
          units of their spread over SFT's answers.
"""

import dataclasses
from functools import partial

import numpy as np

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.calibration import pair_accuracy
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.gold_metrics import gold_values
from rlhfjax.evaluation.win_rate import compare_policies, order_agreement
from rlhfjax.experiment import main
from rlhfjax.io.run import read_metrics
from rlhfjax.pipeline import CHECKPOINT_JUDGE, JudgeConfig, Pipeline, PipelineConfig, scales
from rlhfjax.rl.fit import take
from rlhfjax.rl.ppo import PPOConfig, reinforce
from rlhfjax.stages import FitConfig, RLConfig, judging


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """Two labellers of the same pairs, one learner, three rewards."""

    num_pairs: int = 6_000
    """Pairs that people and the judge both label."""
    preference: FitConfig = FitConfig(num_steps=750, learning_rate=1e-3, weight_decay=0.05)
    """Preference models, four passes over those pairs."""
    judge: JudgeConfig = JudgeConfig()
    """The AI labeller."""
    ppo: PPOConfig = reinforce(0.05, temperature=0.9)
    """REINFORCE with a baseline for 0.95 r - 0.05 KL, sampled at 0.9 (as in the paper)."""
    rl: RLConfig = RLConfig(num_iterations=200, learning_rate=1e-3)
    """Every arm; one step per batch."""


SCALES = scales(Config,
                smoke=dict(judge=JudgeConfig(num_pairs=400, optimisation=FitConfig(num_steps=50))),
                real=dict(judge=CHECKPOINT_JUDGE))  # fmt: skip
CLAIMS = claims(
    "RLAIF (2309.00267)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("RA-1 AI", "ai_win", ">=", 0.5, "71 %", "gold win rate of RLAIF against SFT"),
    ("RA-1 people", "people_win", ">=", 0.5, "73 %", "gold win rate of RLHF against SFT"),
    ("RA-1 equal", "ai_advantage", "within", 0.03, "50 %", "gold win rate of RLAIF against RLHF, minus a half"),
    ("RA-2 AI", "ai_win_at_one_length", ">=", 0.5, "59 %", "RLAIF against SFT at equal length"),
    ("RA-2 shrinks", "ai_win_by_length", ">=", 0.0, "12 points", "RLAIF against SFT, raw minus at equal length"),
    ("RA-6 direct", "direct_win", ">=", 0.5, "60 %", "direct RLAIF against RLAIF"),
    ("RA-6 stale", "staleness", ">=", 0.0, "-", "agreement of reward model and judge, on SFT's - RLAIF's answers"),
)


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    sft = house.sft(house.base())
    # 1. People and the judge label the same pairs; the judge learned from other ones.
    judge = house.judge("judge", sft, config.judge)
    people = house.compare("labels", sft).helpful
    verdicts = cache.run("ai-labels", judging.judge_pairs, config=judge.config, judge=judge.fitted, pairs=people)
    labels = {"people": people, "ai": dataclasses.replace(people, prefs=np.asarray(verdicts.prefs))}
    # 2. A reward model from either, and the judge's own rating of an answer.
    models = dict(zip(labels, stages.side_by_side(*(
        partial(house.fit, f"reward-{who}", pairs, sft) for who, pairs in labels.items()))))
    scored = house.scaled(sft, **models, direct=judge)
    # 3. The same RL for each, policy and baseline from SFT.
    optimise = partial(house.optimise, critic=(config.network, sft))
    policies = dict(zip(scored, stages.side_by_side(*(
        partial(optimise, arm, sft, scorer) for arm, scorer in scored.items()))))
    answers = {arm: house.answers(policy) for arm, policy in {"SFT": sft, **policies}.items()}
    duel = lambda first, second: compare_policies(house.world, answers[first], answers[second])
    held_out = house.compare("held-out", sft, split="test").helpful
    twice = take(house.test, np.repeat(np.arange(config.num_evaluated), 2))
    pairs = {arm: house.answers(policy, twice, "twice") for arm, policy in (("SFT", sft), ("ai", policies["ai"]))}
    agreed = {arm: order_agreement(scored["ai"](both), scored["direct"](both)) for arm, both in pairs.items()}
    curves = {arm: read_metrics(run.path / "metrics.jsonl", arm) for arm in policies}
    figures.save(figures.training_curves(curves, {
        "score": "reward (sd of SFT)", "gold_helpfulness": "gold helpfulness r*", "length": "tokens per answer",
        "kl": "KL to SFT (nats per answer)"}, columns=2), run.path / "figures/training.png")
    ai, direct = duel("ai", "SFT"), duel("direct", "ai")
    return {
        "ai_win": ai["win_rate"],
        "people_win": duel("people", "SFT")["win_rate"],
        "ai_advantage": duel("ai", "people")["win_rate"] - 0.5,
        "ai_win_at_one_length": ai["at_one_length"],
        "ai_win_by_length": ai["win_rate"] - ai["at_one_length"],
        "direct_win": direct["win_rate"],
        "direct_win_over_SFT": duel("direct", "SFT")["win_rate"],
        "staleness": agreed["SFT"] - agreed["ai"],
        "label_agreement": pair_accuracy(np.stack([verdicts.prefs, 1 - verdicts.prefs], 1), people.prefs),
        **{f"{who} accuracy": pair_accuracy(stages.raw_pair_scores(config.network, model, held_out), held_out.prefs)
           for who, model in models.items()},
        **{f"{arm} {name}": value for arm, rollout in answers.items()
           for name, value in gold_values(house.world, rollout).items()}}  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
