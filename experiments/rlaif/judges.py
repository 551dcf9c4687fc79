"""RLAIF (Lee et al., 2309.00267): which of its answers a language model prefers, by the size of the judge.

Claim     Larger judges agree more with people and are less swayed by which answer stands first; asking in both orders
          and averaging raises agreement, the more the more a judge is biased.
Paper     Agreement with people 62.7, 73.8, 78.0 % for PaLM 2 XS, S, L; the same position wins in both orders in 56, 21,
          18 % of pairs, mostly the second for XS and S (99, 91 %), the first for L (94 %).
Command   python experiments/rlaif/judges.py               one seed on a laptop
          python experiments/rlaif/judges.py --seeds 5     verdicts
Cost      about 15 minutes of one busy CPU core, base model included (Python 3.11, jax 0.10.2).
Differs   A judge is no general model that is merely prompted: it is trained from scratch on people's comparisons and
          ratings of one policy's answers, the preferred one first in 65 % of the pairs, from which it has its position
          bias. Sizes differ by a factor of 26. No rationales, no exemplars.
"""

import dataclasses
from functools import partial

import numpy as np
from jax import tree

from rlhfjax import stages
from rlhfjax.evaluation import figures
from rlhfjax.evaluation.claims import claims
from rlhfjax.evaluation.judges import judge_statistics, told_apart
from rlhfjax.experiment import main
from rlhfjax.pipeline import JudgeConfig, Pipeline, PipelineConfig, scales
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

    def at(self, width: int, first_share: float) -> JudgeConfig:
        return dataclasses.replace(self.judge, width=width, first_share=first_share)


SCALES = scales(Config,
                smoke=dict(widths=(8, 16), judge=JudgeConfig(num_pairs=400, optimisation=FitConfig(num_steps=50))),
                real=dict(widths=(128, 256, 512)))  # fmt: skip
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
    pairs = told_apart(house.world, house.compare("held-out", sft, split="test").helpful)
    # 2. Judges of every size learn from the same labels, in either order.
    orders = {"biased": config.judge.first_share, "balanced": 0.5}
    names = [(order, width) for order in orders for width in config.widths]
    house.lessons(sft, config.judge)  # once, before they are shared
    learned = stages.side_by_side(*(partial(house.judge, f"judge-{order}-{width}", sft, config.at(width, orders[order]))
                                    for order, width in names))
    # 3. What they say of held-out pairs, in both orders, and of single answers.
    said = lambda judge: judge_statistics(house.world, pairs,
                                          judging.judge_pairs(config=judge.config, judge=judge.fitted, pairs=pairs),
                                          judging.rate_pairs(config=judge.config, judge=judge.fitted, pairs=pairs))
    found = {name: said(judge) for name, judge in zip(names, learned)}
    of = lambda name, *which: np.array([found[order, width][name] for order in which for width in config.widths])
    sizes = [sum(x.size for x in tree.leaves(judge.fitted)) for judge in learned[: len(config.widths)]]
    aligned = {"both orders averaged": of("alignment", "biased"), "one order": of("one_order", "biased"),
               "averaged, by the truth": of("alignment_gold", "biased")}
    figures.save(figures.lines(sizes, aligned, "parameters", "agreement with people", log=True),
                 run.path / "figures/alignment.png")
    swayed = {f"taught in {order} order": of("same_position", order) for order in orders}
    figures.save(figures.lines(sizes, swayed, "parameters", "the same position wins in both orders", log=True),
                 run.path / "figures/position.png")
    return {
        "alignment_step": np.diff(of("alignment", "biased")).min(),
        "same_position_step": -np.diff(of("same_position", "biased")).max(),
        "swap_gain": of("gain", "biased").mean(),
        "gain_correlation": np.corrcoef(of("gain", *orders), of("same_position", *orders))[0, 1],
        **{f"{order} {width} {name}": value for (order, width), values in found.items()
           for name, value in values.items()}}  # fmt: skip


if __name__ == "__main__":
    main(__file__, SCALES, experiment, CLAIMS)
