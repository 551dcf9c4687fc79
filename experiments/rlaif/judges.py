"""RLAIF (Lee et al., 2309.00267): which of its answers a language model prefers, by the size of the judge.

Claim     Larger judges agree more with people and are less swayed by which answer stands first; asking in both orders
          and averaging raises agreement, the more the more a judge is biased.
Paper     Agreement with people 62.7, 73.8, 78.0 % for PaLM 2 XS, S, L; the same position wins in both orders in 56, 21,
          18 % of pairs, mostly the second for XS and S (99, 91 %), the first for L (94 %).
Command   python experiments/rlaif/judges.py               one seed on a laptop
          python experiments/rlaif/judges.py --seeds 5     verdicts (none was run yet)
Cost      not measured yet at --scale cpu.
Differs   A judge is no general model that is merely prompted: it is trained from scratch on people's comparisons and
          ratings of one policy's answers, the preferred one first in 65 % of the pairs, from which it has its position
          bias. Sizes differ by a factor of 26. No rationales, no exemplars.
"""

import dataclasses
from functools import partial

from rlhfjax import stages
from rlhfjax.evaluation import judges as labelers
from rlhfjax.evaluation.claims import claims
from rlhfjax.experiment import main
from rlhfjax.pipeline import SMOKE, JudgeConfig, Pipeline, PipelineConfig
from rlhfjax.stages import FitConfig, judging


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig):
    """Judges of several sizes, taught on the same labels: the preferred answer mostly first, and in balanced order."""

    widths: tuple[int, ...] = (16, 40, 96)
    """Widths of the judges, smallest first: 7 k, 36 k and 187 k parameters."""
    judge: JudgeConfig = JudgeConfig()
    """How each is taught."""
    num_evaluated: int = 4_096
    """Held-out pairs; those of two equally good answers are then left out."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.widths) < 2 or sorted(set(self.widths)) != list(self.widths):
            raise ValueError(f"widths must be two or more and rise, got {self.widths}")


SCALES = {"smoke": Config(**SMOKE, widths=(8, 16),
                          judge=JudgeConfig(num_pairs=400, optimisation=FitConfig(num_steps=50))),
          "cpu": Config()}  # fmt: skip
CLAIMS = claims(
    "RLAIF (2309.00267)",
    # id, statistic, direction, threshold, what the paper says, what is claimed
    ("RA-3 align", "alignment_step", ">=", 0.0, "62.7, 73.8, 78.0 %", "smallest rise of alignment with people by size"),
    ("RA-3 bias", "same_position_step", ">=", 0.0, "56, 21, 18 %", "smallest fall of the same-position rate by size"),
    ("RA-4 gain", "swap_gain", ">=", 0.0, "done throughout", "what averaging both orders adds to alignment"),
    ("RA-4 bias", "gain_correlation", ">=", 0.0, "-", "correlation of that gain with the same-position rate"),
)


def experiment(config: Config, run, cache) -> dict[str, float]:
    house = Pipeline(config, run, cache)
    # 1. The policy whose answers are judged, as in Safe RLHF. People compare and rate them.
    sft = house.sft(house.base())
    held_out = house.compare("held-out", sft, split="test").helpful
    pairs = labelers.told_apart(house.world, held_out)
    # 2. Judges of every size learn from the same labels, in either order.
    orders = {"biased": config.judge.first_share, "balanced": 0.5}
    taught = lambda order, width: dataclasses.replace(config.judge, first_share=orders[order], width=width)
    names = [(order, width) for order in orders for width in config.widths]
    house.lessons(sft, config.judge)  # once, before they are shared
    learned = stages.side_by_side(*(partial(house.judge, f"judge-{order}-{width}", sft, taught(order, width))
                                    for order, width in names))
    # 3. What they say of held-out pairs, in both orders, and of single answers.
    said = {name: judging.examine_judge(config=judge.config, judge=judge.fitted, pairs=pairs)
            for name, judge in zip(names, learned)}
    of = lambda order: {f"{order} {width}": said[order, width] for width in config.widths}
    return labelers.report(run.path, house.world, config.rater, pairs, of("biased"), of("balanced"))


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
