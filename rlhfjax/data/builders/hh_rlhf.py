"""Anthropic's helpful and harmless dialogues."""

from rlhfjax.data.builders.comparisons import Comparisons


class HhRlhf(Comparisons):
    """Human preferences between two last turns of a dialogue: `chosen`, `rejected`."""

    SHAPE, LABELS = "trl", ("pref",)
    DESCRIPTION = "Dialogues with an assistant; people chose the more helpful, or the more harmless, last turn."
    HOMEPAGE = "https://github.com/anthropics/hh-rlhf"
    CITATION = """@article{bai2022training,
  title={Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback},
  author={Bai, Yuntao and others}, journal={arXiv:2204.05862}, year={2022}}"""
    LICENSE = "MIT. Holds offensive content; its authors do not mean it for training dialogue agents directly."
