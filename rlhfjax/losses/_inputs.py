"""What every loss does at its door: check arrays and options, and raise the precision."""

import numbers

import chex
import jax
import jax.numpy as jnp

from rlhfjax.masked import masked_fill


def as_floats(*arrays, mask: jax.Array | None = None) -> list[jax.Array]:
    """Arrays of one shape and of float dtypes, in float32 at least, and 0 where `mask` is False.

    Filling comes before any arithmetic, so what padding holds (NaN, inf) reaches neither value nor gradient.
    """
    arrays = [jnp.asarray(a) for a in arrays]
    chex.assert_equal_shape(arrays)
    chex.assert_type(arrays, float)
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    arrays = [a.astype(dtype) for a in arrays]
    return arrays if mask is None else [masked_fill(a, mask) for a in arrays]


def check_between(low: float, high: float, **options) -> None:
    """Raise unless each option lies in `[low, high]`. Arrays pass: under jit they have no value yet."""
    for name, value in options.items():
        if isinstance(value, numbers.Real) and not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def check_positive(**options) -> None:
    """Raise unless each option is above 0 and finite. Arrays pass: under jit they have no value yet."""
    for name, value in options.items():
        if isinstance(value, numbers.Real) and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
