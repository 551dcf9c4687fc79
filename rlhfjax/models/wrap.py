"""Bring your own network: a stranger's `nnx.Module`, or any pure function, behind the face of `models.Model`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rlhfjax.models.transformer import Cache, Model, check_inputs
from rlhfjax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapped:
    """All that the library asks of a stranger's configuration. A scalar model has no vocabulary."""

    vocab_size: int | None = None


def wrap(
    init: Callable[[jax.Array], Params],
    forward: Callable[[Params, jax.Array, jax.Array], jax.Array],
    *,
    vocab_size: int | None = None,
    logical_axes: Any = None,
) -> Model:
    """A Model from two pure functions, to be sampled from and trained like our own.

    It has no key-value cache: a decoding step reads all tokens again, which costs O(length) forward passes a response.

    Args:
        init: `(key) -> params`, a nested dict of arrays.
        forward: `(params, tokens [B, S], mask [B, S]) -> outputs`: logits `[B, S, vocab_size]`, those at position i
            speaking of token i + 1, or scalars `[B, S]` for a reward, cost or value network (vocab_size None). It must
            be causal, and blind to tokens that `mask` leaves out: rows are padded on both sides.
        logical_axes: the tree of params with a tuple of axis names (those of `parallel.mesh.TRAIN_RULES`) in place of
            each array. Only a mesh needs it, and names each parameter that lacks one.
    Raises, when applied:
        ValueError: outputs of another shape.
    """

    def apply(params: Params, tokens, mask, *, cache: Cache | None = None, num_outputs: int | None = None):
        check_inputs(tokens, mask, cache, num_outputs)
        start, num = 0, tokens.shape[1]
        if cache is not None:
            start = cache.length
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
            tokens, mask = write(cache.layers, tokens), write(cache.mask, mask)
            cache = Cache(layers=tokens, mask=mask, length=start + num)
        outputs = jnp.asarray(forward(params, jnp.where(mask, tokens, 0), mask), jnp.float32)
        wanted = tokens.shape if vocab_size is None else (*tokens.shape, vocab_size)
        if outputs.shape != wanted:
            raise ValueError(f"this network gives outputs {outputs.shape} for tokens {tokens.shape}, where {wanted} "
                             "are wanted: logits of the vocabulary, or one number per token")  # fmt: skip
        kept = num if num_outputs is None else num_outputs
        return jax.lax.dynamic_slice_in_dim(outputs, start + num - kept, kept, axis=1), cache

    def init_cache(batch_size: int, length: int) -> Cache:
        empty = lambda dtype: jnp.zeros((batch_size, length), dtype)
        return Cache(layers=empty(jnp.int32), mask=empty(bool), length=jnp.zeros((), jnp.int32))

    return Model(config=Wrapped(vocab_size=vocab_size), init=init, apply=apply, init_cache=init_cache,
                 logical_axes=lambda: logical_axes or {})  # fmt: skip


def wrap_module(
    make: Callable[[nnx.Rngs], nnx.Module], *, vocab_size: int | None = None, logical_axes: Any = None
) -> Model:
    """`wrap` for a Flax module: `make(rngs)` builds it, and `module(tokens, mask)` gives its outputs.

    logical_axes: by default read from its parameters, `nnx.Param(value, axes=("embed", "mlp"))`. What it holds besides
    parameters (running statistics, dropout's counters) is an error: a step here is a pure function of the parameters.
    """
    split = lambda key: nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
    definition, shapes, rest = nnx.split(nnx.eval_shape(lambda key: make(nnx.Rngs(key)), jax.random.key(0)),
                                         nnx.Param, ...)  # fmt: skip
    if others := jax.tree.leaves(rest):
        raise ValueError(f"the module holds {len(others)} variables that are no nnx.Param (batch statistics or random "
                         "state, say): build it without them")  # fmt: skip
    is_param = lambda x: isinstance(x, nnx.Param)
    axes = jax.tree.map(lambda p: p.get_metadata().get("axes"), shapes, is_leaf=is_param)
    return wrap(
        jax.jit(lambda key: nnx.to_pure_dict(split(key)[1])),
        lambda params, tokens, mask: nnx.merge(definition, params)(tokens, mask),
        vocab_size=vocab_size,
        logical_axes=logical_axes or nnx.to_pure_dict(axes),
    )
