"""Masked reductions are reductions over the kept entries, whatever padding holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhfjax import masked

rng = np.random.default_rng(4)
X = rng.normal(size=(4, 6)).astype(np.float32)
MASKS = {
    "right padded": np.arange(6) < np.array([6, 1, 3, 5])[:, None],
    "left padded": np.arange(6) >= np.array([0, 5, 3, 1])[:, None],
    "holes": rng.permuted(np.arange(6) < np.array([6, 1, 3, 4])[:, None], axis=1),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
REDUCTIONS = {masked.masked_sum: np.sum, masked.masked_mean: np.mean, masked.masked_var: np.var}
ELEMENTWISE = (masked.masked_fill, masked.whiten)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@every_mask
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_are_those_of_the_kept_entries(reduce, mask):
    truth = REDUCTIONS[reduce]
    close(reduce(X, mask), truth(X[mask]))
    close(reduce(X, mask, axis=1), [truth(row[kept]) for row, kept in zip(X, mask)])
    close(reduce(X.T, mask.T, axis=0), [truth(row[kept]) for row, kept in zip(X, mask)])
    close(reduce(X[None], mask[None], axis=(0, 2)), reduce(X, mask, axis=1))


@every_mask
def test_whiten_gives_kept_entries_mean_zero_and_variance_one(mask):
    white = masked.whiten(X, mask)
    close([white[mask].mean(), white[mask].std()], [0, 1])
    close(white[mask], (X[mask] - X[mask].mean()) / X[mask].std())
    close(masked.whiten(X, mask, shift_mean=False)[mask], white[mask] + X[mask].mean())
    assert not white[~mask].any()


def test_whiten_is_invariant_to_scale_and_shift_and_survives_equal_entries():
    mask = MASKS["holes"]
    close(masked.whiten(10 * X + 3, mask), masked.whiten(X, mask))
    assert not masked.whiten(np.ones_like(X), mask).any()


@every_mask
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_garbage_in_padding_changes_neither_value_nor_gradient(garbage, mask):
    clean, dirty = (jnp.where(mask, X, fill) for fill in (0.0, garbage))
    weights = jnp.cos(jnp.arange(X.size)).reshape(X.shape)  # a plain sum of whitened entries has no gradient
    for function in (*REDUCTIONS, *ELEMENTWISE):
        total = lambda x, f=function: jnp.sum(f(x, mask) * weights)
        (value, gradient), (dirty_value, dirty_gradient) = (jax.value_and_grad(total)(x) for x in (clean, dirty))
        assert value == dirty_value
        np.testing.assert_array_equal(gradient, dirty_gradient)
        assert np.any(gradient != 0) and not np.any(gradient[~mask])


def test_gradients_match_finite_differences():
    mask = MASKS["holes"]
    with jax.enable_x64(True):
        for function in (*REDUCTIONS, masked.whiten, masked.at_last):
            check_grads(lambda x, f=function: f(x, mask), (jnp.asarray(X, jnp.float64),), 1, atol=1e-5, rtol=1e-5)


def test_a_global_mean_is_not_a_mean_of_means():
    x, mask = np.array([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), np.array([[True] * 3, [True, False, False]])
    assert masked.masked_mean(x, mask) == 2.0 != masked.masked_mean(x, mask, axis=1).mean()


def test_an_empty_mask_is_nan_not_zero():
    nothing = np.zeros_like(X, bool)
    assert np.isnan(masked.masked_mean(X, nothing)) and np.isnan(masked.masked_var(X, nothing))
    rows = masked.masked_mean(X, np.array([True, False, True, True])[:, None] & MASKS["right padded"], axis=1)
    assert np.isnan(rows).tolist() == [False, True, False, False]


def test_bfloat16_is_summed_in_float32():
    ones = jnp.ones((1000,), jnp.bfloat16)  # bfloat16 cannot count beyond 256
    assert masked.masked_sum(ones, ones > 0) == 1000
    assert masked.masked_mean(ones, ones > 0).dtype == jnp.float32
    assert masked.whiten(jnp.asarray(X, jnp.bfloat16), MASKS["holes"]).dtype == jnp.bfloat16


@every_mask
def test_last_kept_position(mask):
    last = [np.flatnonzero(row)[-1] for row in mask]
    np.testing.assert_array_equal(masked.last_index(mask), last)
    np.testing.assert_array_equal(masked.at_last(X, mask), X[np.arange(4), last])


def test_a_row_that_keeps_nothing_has_no_last_entry():
    mask = np.zeros((4, 6), bool)
    mask[0, 2] = True
    assert masked.last_index(mask).tolist() == [2, -1, -1, -1]
    entries = masked.at_last(X, mask)
    assert entries[0] == X[0, 2] and np.isnan(entries[1:]).all()


@pytest.mark.parametrize("function", [*REDUCTIONS, *ELEMENTWISE, masked.at_last])
@pytest.mark.parametrize(
    "x, mask, message",
    [
        (X.astype(np.int32), MASKS["holes"], "int32"),
        (X, MASKS["holes"].astype(np.float32), "bool"),
        (X, MASKS["holes"][:1], "shapes"),
    ],
)
def test_wrong_types_and_shapes_are_errors(function, x, mask, message):
    with pytest.raises(AssertionError, match=message):
        function(x, mask)
