"""Stages with an AI labeler: what a judge learns from, its training, and its labels. See `rlhfjax.stages`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhfjax import stages
from rlhfjax.feedback.judge import (
    JUDGE_WORDS,
    JudgingData,
    Verdicts,
    check_judging_data,
    make_both_orders,
    make_judge_loss,
    make_rating,
)
from rlhfjax.feedback.raters import Rater, rate
from rlhfjax.io.monitor import Monitor
from rlhfjax.models.transformer import TransformerConfig, make_language_model
from rlhfjax.parallel import mesh
from rlhfjax.rl.fit import take
from rlhfjax.stages import FitConfig
from rlhfjax.types import Params, PreferenceBatch, check_finite
from rlhfjax.worlds.gold_world import gold_world
from rlhfjax.worlds.language import Prompts


def collect_judging_data(
    *, truth: str, rater: Rater, config: TransformerConfig, policy: Params, prompts: Prompts, temperature: float,
    mismatched: float, seed: int,
) -> JudgingData:  # fmt: skip
    """Two responses of the policy to every prompt; people say which is more helpful, and rate each by itself.

    mismatched: see `stages.collect_comparisons`.
    """
    pairs = stages.collect_comparisons(
        truth=truth, rater=rater, config=config, policy=policy, prompts=prompts, temperature=temperature,
        mismatched=mismatched, seed=seed).helpful  # fmt: skip
    stars = rate(gold_world(truth), rater, *_single_answers(pairs), seed).stars
    return JudgingData(pairs=pairs, stars=stars.reshape(-1, 2))


def train_judge(
    *, config: TransformerConfig, data: JudgingData, optimisation: FitConfig, seed: int, label: str, monitor: Monitor
) -> Params:
    """A judge from scratch: a language model over `JUDGE_WORDS` that learns to read and to judge at once."""
    check_judging_data(data)
    if config.vocab_size != len(JUDGE_WORDS):
        raise ValueError(f"a judge has {len(JUDGE_WORDS)} words, config.vocab_size is {config.vocab_size}")
    model = make_language_model(config)
    axes = model.logical_axes()
    params = mesh.create(model.init, jax.random.key(seed), axes=axes)
    return stages.fit(
        make_judge_loss(model), params, data, optimisation, axes=axes, seed=seed, monitor=monitor, label=label
    )


def judge_pairs(*, config: TransformerConfig, judge: Params, pairs: PreferenceBatch, block: int = 256) -> Verdicts:
    """The judge's verdicts on any number of pairs, in both orders; `Verdicts.prefs` are its soft labels."""
    return _in_blocks(_verdicts(config), config, judge, (pairs,), block)


def rate_pairs(*, config: TransformerConfig, judge: Params, pairs: PreferenceBatch, block: int = 512) -> np.ndarray:
    """The judge's expected score in [1, 10] of each response by itself, `[N, 2]`."""
    return _in_blocks(_ratings(config), config, judge, _single_answers(pairs), block).reshape(-1, 2)


def _single_answers(pairs: PreferenceBatch) -> tuple[np.ndarray, ...]:
    """Prompts, their mask, responses and theirs, `[2 N, ...]`: both responses of a pair in neighbouring rows."""
    twice, flat = (lambda x: np.repeat(x, 2, axis=0)), lambda x: np.reshape(x, (-1, np.shape(x)[-1]))
    return twice(pairs.prompts), twice(pairs.prompt_mask), flat(pairs.responses), flat(pairs.responses_mask)


@functools.cache
def _verdicts(config: TransformerConfig) -> Callable:
    return _program(make_both_orders(make_language_model(config)))


@functools.cache
def _ratings(config: TransformerConfig) -> Callable:
    return _program(make_rating(make_language_model(config)))


def _program(judge: Callable) -> Callable:
    return jax.jit(lambda *args: jax.tree.map(lambda x: mesh.constrain(x, None), judge(*args)))


def _in_blocks(program: Callable, config: TransformerConfig, params: Params, data: tuple, block: int) -> Any:
    """`program(params, *data)` for any number of rows: every block has the same compiled shape."""
    num, block = len(jax.tree.leaves(data)[0]), mesh.padded(block)
    rows = np.arange(-(-num // block) * block) % num  # the last block wraps around
    params = mesh.place(params, make_language_model(config).logical_axes())
    blocks = [mesh.fetch(program(params, *mesh.place_rows(take(data, r)))) for r in rows.reshape(-1, block)]
    said = jax.tree.map(lambda *x: np.concatenate(x)[:num], *blocks)
    for leaf in jax.tree.leaves(said):
        check_finite("what the judge said", leaf)
    return said
