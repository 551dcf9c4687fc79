"""Stages with an AI labeler: what a judge learns from, its training, and its labels. See `rlhfjax.stages`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhfjax import stages
from rlhfjax.feedback.judge import (
    JUDGE_TOKENS,
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
from rlhfjax.worlds.language import Prompts
from rlhfjax.worlds.recorded import World


def collect_judging_data(
    *, world: World, rater: Rater, config: TransformerConfig, policy: Params, prompts: Prompts, temperature: float,
    mismatched: float, seed: int,
) -> JudgingData:  # fmt: skip
    """Two responses of the policy to every prompt; people say which is more helpful, and rate each by itself.

    mismatched: see `stages.collect_comparisons`.
    """
    pairs = stages.collect_comparisons(
        world=world, rater=rater, config=config, policy=policy, prompts=prompts, temperature=temperature,
        mismatched=mismatched, seed=seed).helpful  # fmt: skip
    stars = rate(world, rater, *_single_answers(pairs), seed).stars
    return JudgingData(pairs=pairs, stars=stars.reshape(-1, 2))


def train_judge(
    *, config: TransformerConfig, data: JudgingData, optimisation: FitConfig, start: Params | None = None, seed: int,
    label: str, monitor: Monitor,
) -> Params:  # fmt: skip
    """A judge: a language model over a world's words and `JUDGE_TOKENS` that learns to read and to judge at once.

    start: a language model over the words alone, to begin with; by default from scratch.
    """
    check_judging_data(data)
    pairs, words = data.pairs, config.vocab_size - len(JUDGE_TOKENS)
    kept = ((pairs.prompts, pairs.prompt_mask), (pairs.responses, pairs.responses_mask))
    if (highest := max(int(np.max(np.where(mask, tokens, 0))) for tokens, mask in kept)) >= words:
        raise ValueError(f"the pairs use token {highest}; of config.vocab_size {config.vocab_size} a judge's own "
                         f"{len(JUDGE_TOKENS)} leave {words}")  # fmt: skip
    model = make_language_model(config)
    axes = model.logical_axes()
    params = mesh.create(model.init, jax.random.key(seed), axes=axes) if start is None else with_judge_tokens(start)
    return stages.fit(
        make_judge_loss(model), params, data, optimisation, axes=axes, seed=seed, monitor=monitor, label=label
    )


def with_judge_tokens(params: Params) -> Params:
    """A language model's parameters on the host with a row for each of `JUDGE_TOKENS` behind its vocabulary: the mean
    of its rows, each a little apart from the others."""

    def longer(rows: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).normal(size=(len(JUDGE_TOKENS), rows.shape[1])) * 0.1 * rows.std()
        return np.concatenate([rows, (rows.mean(0) + noise).astype(rows.dtype)])

    longer_head = {"head": longer(np.asarray(params["head"]).T).T} if "head" in params else {}
    return params | {"embed": longer(np.asarray(params["embed"]))} | longer_head


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
