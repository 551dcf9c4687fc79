"""HRLAIF (Li et al., 2403.08309): where a judge has a taste for style, check what can be checked.

Claim     With labels of a judge that likes style, RL wins more comparisons and satisfies less often. Checking the
          answers to questions first, and the judge only then, restores satisfaction and keeps the wins. AI red teaming
          with rewritten answers lowers harm at little cost in help. All of it grows with the dose of the bias.
Paper     Satisfaction -4.58 points for basic RLAIF, +2.08 for HRLAIF, against the policy before RL (probably 240
          prompts); both raise the win ratio; lower toxicity, a little less helpful (abstract and digest).
Command   python experiments/hrlaif/hybrid.py               one seed on a laptop
          python experiments/hrlaif/hybrid.py --seeds 5     verdicts
Cost      about 16 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   One judge, whose labels get a bias of a given dose; people's win ratio is that of simulated people who like
          style a little, satisfaction is by the world's truth. The judge was taught few sums. The AI that
          flags and rewrites is a cost model, and the best-rated unflagged one of the policy's own answers.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.gold_metrics import gold_values
from rlhfjax.evaluation.win_rate import gold_agreement, people_win_rate
from rlhfjax.experiment import main
from rlhfjax.feedback.hybrid import hybrid_prefs, rewrite, rewritten_pairs, with_style_bias
from rlhfjax.feedback.red_team import attack
from rlhfjax.pipeline import CHECKPOINT_JUDGE, JudgeConfig, Pipeline, PipelineConfig, Shares, scales
from rlhfjax.rl.fit import take
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.rl.preference_models import make_cost_loss
from rlhfjax.stages import FitConfig, RLConfig, judging
from rlhfjax.worlds.language import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """Basic and hybrid labels of the same pairs by the same judge."""

    num_pairs: int = 6_000
    """Pairs that the judge labels."""
    preference: FitConfig = FitConfig(num_steps=750, learning_rate=1e-3, weight_decay=0.05)
    """Preference models, four passes over those pairs."""
    judge: JudgeConfig = JudgeConfig(shares=(0.45, 0.25, 0.25, 0.05))
    """The AI labeller, before its bias. It was taught few questions: it calculates badly."""
    doses: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Log-odds that a word of style adds to the judge's verdict; the last is that of the claims."""
    label_shares: Shares = (0.45, 0.0, 0.05, 0.50)
    """Benign, dangerous, grey and verifiable prompts among those labelled for help; the red team sees to danger."""
    harm_shares: Shares = (0.30, 0.35, 0.15, 0.20)
    """Among those labelled for harm."""
    rl_shares: Shares = (0.30, 0.10, 0.10, 0.50)
    """The same in RL and in its evaluation."""
    rl: RLConfig = RLConfig(num_iterations=150)
    """Every arm."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.03)
    """One RL update, in every arm."""
    num_candidates: int = 4_096
    """Dangerous and grey prompts that the AI red team tries; half are kept, and answered harmlessly."""
    num_rewrites: int = 8
    """Answers among which the rewrite is found: of those not flagged as harmful, the one that the judge rates best."""
    red_shares: Shares = (0.0, 0.7, 0.3, 0.0)
    """Kinds of prompts that the red team tries."""


SCALES = scales(Config,
                smoke=dict(judge=JudgeConfig(num_pairs=400, optimisation=FitConfig(num_steps=50)), doses=(0.0, 1.0),
                           num_candidates=64),
                real=dict(judge=CHECKPOINT_JUDGE))  # fmt: skip
CLAIMS = claims(
    "HRLAIF (2403.08309)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("HR-1 wins", "basic_win", ">=", 0.5, "rises", "people's win rate of basic RLAIF against SFT"),
    ("HR-1 falls", "basic_satisfaction", "<=", 0.0, "-4.58 points", "satisfaction of basic RLAIF minus SFT's"),
    ("HR-2 beats", "hybrid_over_basic", ">=", 0.0, "6.66 points", "satisfaction, hybrid minus basic"),
    ("HR-2 restores", "hybrid_satisfaction", ">=", -0.005, "+2.08 points", "satisfaction of HRLAIF minus SFT's"),
    ("HR-2 wins", "hybrid_win", ">=", 0.5, "rises", "people's win rate of HRLAIF against SFT"),
    ("HR-3 checked", "agreement_gain", ">=", 0.1, "better", "agreement of labels with r* on questions, hybrid - basic"),
    ("HR-3 rest", "agreement_rest", "within", 0.01, "-", "the same on other prompts"),
    ("HR-5 harm", "harm_change", "<=", 0.0, "less toxic", "harm rate with harmlessness labels minus basic RLAIF's"),
    ("HR-5 help", "help_change", ">=", -0.02, "costs some", "satisfaction on benign prompts, with minus without them"),
    ("HR-1 dose", "dose_response", "<=", 0.0, "-", "satisfaction of basic RLAIF, strongest dose minus none"),
)  # fmt: skip


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    world, sft, strong = house.world, house.sft(house.base()), config.doses[-1]
    # 1. The judge labels pairs of SFT's answers, with a taste for style of every dose; the strongest is then checked.
    judge = house.judge("judge", sft, config.judge)
    labels = house.compare("labels", sft)
    said = cache.run("ai-labels", judging.judge_pairs, config=judge.config, judge=judge.fitted, pairs=labels.helpful)
    plain = dataclasses.replace(labels.helpful, prefs=np.asarray(said.prefs))
    pairs = {f"basic {dose:g}": with_style_bias(world, plain, dose) for dose in config.doses}
    basic = f"basic {strong:g}"
    pairs["hybrid"] = dataclasses.replace(pairs[basic], prefs=hybrid_prefs(world, pairs[basic]))
    # 2. Harmlessness: the AI flags prompts that SFT answers harmfully, and rewrites are to beat those answers.
    harm_labels = house.compare("harm-labels", sft, prompts=house.prompts("harm", config.num_pairs, config.harm_shares))
    cost = house.fit("cost", harm_labels.harm, sft, make_loss=make_cost_loss)
    harmful = house.scaled(sft, "scale-harm", cost=cost)["cost"].raw  # above 0
    candidates = house.prompts("red", config.num_candidates, config.red_shares)
    rows, _ = attack(candidates, partial(house.answers, sft, name="red"), harmful, num_found=len(candidates) // 2)
    # Benign prompts are rewritten too, lest the reward model learns that rewrites are answers to shy from.
    control = house.prompts("control", len(rows) // 2, (1.0, 0.0, 0.0, 0.0))
    found = jax.tree.map(lambda *x: np.concatenate(x), take(candidates, rows), control)
    originals = house.answers(sft, found, "originals")
    tries = house.answers(sft, take(found, np.repeat(np.arange(len(found)), config.num_rewrites)), "rewrites")
    better = rewrite(tries, judge(tries) - 1e3 * (harmful(tries) > 0), config.num_rewrites)
    wanted = ((harmful(originals) > 0) | (found.family == Family.BENIGN)) & (harmful(better) <= 0)
    red = take(rewritten_pairs(originals, better), np.flatnonzero(wanted))
    pairs["harmless"] = jax.tree.map(lambda *x: np.concatenate(x), pairs["hybrid"], red)
    # 3. A reward model and RL for each, from the same start.
    models = dict(zip(pairs, stages.side_by_side(*(
        partial(house.fit, f"reward {arm}", labelled, sft) for arm, labelled in pairs.items()))))
    scored = house.scaled(sft, **models)
    policies = dict(zip(pairs, stages.side_by_side(*(
        partial(house.optimise, arm, sft, scored[arm]) for arm in pairs))))
    answers = {arm: house.answers(policy) for arm, policy in {"SFT": sft, **policies}.items()}
    gold = {arm: gold_values(world, rollout) for arm, rollout in answers.items()}
    wins = {arm: people_win_rate(world, config.rater, answers[arm], answers["SFT"], house.seed("people"))
            for arm in policies}
    change = {arm: gold[arm]["satisfaction"] - gold["SFT"]["satisfaction"] for arm in policies}
    question = np.asarray(world.family(plain.prompts)) == Family.VERIFIABLE
    agreed = lambda arm, kept: gold_agreement(world, pairs[arm], kept)
    figures.save(figures.lines(config.doses, {
        "satisfaction minus SFT's": [change[f"basic {dose:g}"] for dose in config.doses],
        "people's win rate minus 1/2": [wins[f"basic {dose:g}"] - 0.5 for dose in config.doses]},
        "log-odds for a word of style", "basic RLAIF"), run.path / "figures/dose.png")
    return {
        "basic_win": wins[basic], "hybrid_win": wins["hybrid"],
        "basic_satisfaction": change[basic], "hybrid_satisfaction": change["hybrid"],
        "hybrid_over_basic": change["hybrid"] - change[basic],
        "agreement_gain": agreed("hybrid", question) - agreed(basic, question),
        "agreement_rest": agreed("hybrid", ~question) - agreed(basic, ~question),
        "harm_change": gold["harmless"]["harm_rate"] - gold[basic]["harm_rate"],
        "help_change": gold["harmless"]["satisfaction_benign"] - gold["hybrid"]["satisfaction_benign"],
        "dose_response": change[basic] - change[f"basic {config.doses[0]:g}"],
        "rewritten": len(red),
        **{f"{arm} win": value for arm, value in wins.items()},
        **{f"{arm} {name}": value for arm, values in gold.items() for name, value in values.items()}}


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
