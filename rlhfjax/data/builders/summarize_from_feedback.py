"""OpenAI's comparisons of summaries of Reddit posts."""

from rlhfjax.data.builders.comparisons import Comparisons


class SummarizeFromFeedback(Comparisons):
    """pref = P(first is the better summary). The prompt is the post, between its subreddit and "TL;DR:"."""

    SHAPE, LABELS = "summaries", ("pref",)
    DESCRIPTION = "Two summaries of a post; people chose the better one (the part called comparisons)."
    HOMEPAGE = "https://github.com/openai/summarize-from-feedback"
    CITATION = """@article{stiennon2020learning,
  title={Learning to summarize from human feedback},
  author={Stiennon, Nisan and others}, journal={arXiv:2009.01325}, year={2020}}"""
    LICENSE = "Modified MIT for the repository; the posts are their authors', under Reddit's terms."
