"""`where`-based reductions: the only ones the library uses.

True = counts. Masked-out entries may hold anything (NaN, inf): they change neither the value nor the gradient, because
they are replaced *before* the arithmetic. (Multiplying by a 0/1 mask would not do: `inf * 0 = nan`.) A global mean is
one sum over one count, never a mean of means, so sharding or accumulation cannot bias it.
"""

import chex
import jax
import jax.numpy as jnp


def _check(x: jax.Array, mask: jax.Array) -> None:
    chex.assert_equal_shape([x, mask])
    chex.assert_type(x, float)
    chex.assert_type(mask, bool)


def masked_fill(x: jax.Array, mask: jax.Array, fill: float = 0.0) -> jax.Array:
    """`x` where `mask`, else `fill`."""
    _check(x, mask)
    return jnp.where(mask, x, fill)


def masked_sum(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Sum of the kept entries, in float32 at least."""
    kept = masked_fill(x, mask)
    return jnp.sum(kept, axis=axis, dtype=jnp.promote_types(kept.dtype, jnp.float32))


def masked_mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Mean of the kept entries; NaN where nothing is kept, so that an empty mask cannot pass for a loss of 0."""
    total = masked_sum(x, mask, axis)
    return total / jnp.sum(mask, axis=axis).astype(total.dtype)


def masked_var(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Biased (population) variance of the kept entries: the convention of PPO's advantage whitening."""
    mean = masked_mean(x, mask, axis)
    mean = mean if axis is None else jnp.expand_dims(mean, axis)
    return masked_mean(jnp.square(masked_fill(x, mask) - mean), mask, axis)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, eps: float = 1e-8) -> jax.Array:
    """`(x - mean) / sqrt(var + eps)` with the mean and biased variance of *all* kept entries, over every axis.

    Args:
        x: `[...]` floats. mask: `[...]` bool.
        shift_mean: False adds the mean back (lm-human-preferences whitens rewards so).
    Returns:
        `[...]`, 0 where masked out.
    Source: lm-human-preferences (biased variance, eps 1e-8); there without a mask.
    """
    kept, mean = masked_fill(x, mask), masked_mean(x, mask)
    white = (kept - mean) * jax.lax.rsqrt(masked_var(x, mask) + eps)
    return masked_fill((white if shift_mean else white + mean).astype(kept.dtype), mask)


def last_index(mask: jax.Array) -> jax.Array:
    """Index of the last kept position on the last axis: `[..., T] -> [...]` int32; -1 where nothing is kept."""
    chex.assert_type(mask, bool)
    positions = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    return jnp.max(jnp.where(mask, positions, -1), axis=-1)


def at_last(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The entry of `x [..., T]` at the last kept position: `[...]`. This is where a score is read.

    NaN for a row that keeps nothing: it has no score, and must not borrow one from its padding.
    """
    _check(x, mask)
    index = last_index(mask)
    entry = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(index < 0, jnp.nan, entry)
