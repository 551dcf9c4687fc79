"""PKU-SafeRLHF: helpfulness and harm, labelled apart."""

from rlhfjax.data.builders.comparisons import Comparisons


class PkuSafeRlhf(Comparisons):
    """pref = P(first more helpful), harm_pref = P(first **more harmful**), sign_0 and sign_1: +1 = harmful."""

    SHAPE, LABELS = "pair", ("pref", "harm_pref", "sign_0", "sign_1")
    DESCRIPTION = "Two responses to a prompt: which is more helpful, which is safer, and whether each is safe at all."
    HOMEPAGE = "https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF"
    CITATION = """@article{dai2023safe,
  title={Safe RLHF: Safe Reinforcement Learning from Human Feedback},
  author={Dai, Josef and others}, journal={arXiv:2310.12773}, year={2023}}"""
    LICENSE = "CC BY-NC 4.0: not for commercial use. Holds harmful content."
