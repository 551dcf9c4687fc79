"""What every loss promises, checked on one table: jit, vmap, precision, leading dimensions, errors, exact gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhfjax import losses

B, T, V = 6, 4, 5
rng = np.random.default_rng(0)
MASK = np.arange(T) < np.array([4, 1, 3, 2, 4, 2])[:, None]


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def unit(*shape):
    return rng.uniform(0.05, 0.95, size=shape).astype(np.float32)


SIGNS = np.where(rng.uniform(size=(B, T, 2)) < 0.5, -1, 1).astype(np.float32)
OUTCOMES = rng.dirichlet(np.ones(3), size=(B, T)).astype(np.float32)
TOKENS = lambda: (normal(B, T), normal(B, T), MASK)
ABOVE = np.triu(unit(B, V, V), 1)
PREFS = ABOVE + np.tril(1 - np.swapaxes(ABOVE, -1, -2), -1) + np.eye(V, dtype=np.float32) / 2
POLICY = rng.dirichlet(np.ones(V), size=B).astype(np.float32)

# name: (arrays with a leading batch axis, options, which of the arrays receive a gradient)
CASES = {
    "bradley_terry_loss": ((normal(B, T), normal(B, T)), {"margin": 0.3}, (0, 1)),
    "soft_bradley_terry_loss": ((normal(B, T), normal(B, T), unit(B, T)), {}, (0, 1, 2)),
    "rao_kupper_loss": ((normal(B, T), normal(B, T), OUTCOMES), {"tie_width": 0.7}, (0, 1, 2)),
    "cost_loss": ((normal(B, T), normal(B, T), unit(B, T), SIGNS), {}, (0, 1, 2, 3)),
    "score_regularization": ((normal(B, T),), {}, (0,)),
    "ppo_clip_loss": ((normal(B, T), normal(B, T), normal(B, T)), {"clip": 0.2}, (0,)),
    "clipped_value_loss": ((normal(B, T), normal(B, T), normal(B, T)), {"clip": 0.5}, (0,)),
    "reinforce_loss": ((normal(B, T), normal(B, T)), {}, (0,)),
    "kl_k1": ((normal(B, T), normal(B, T)), {}, (0, 1)),
    "kl_k2": ((normal(B, T), normal(B, T)), {}, (0, 1)),
    "kl_k3": ((normal(B, T), normal(B, T)), {}, (0, 1)),
    "entropy": ((normal(B, T, V),), {}, (0,)),
    "kl_shaped_rewards": ((normal(B), *TOKENS()), {"kl_coef": 0.1, "clip": 1.0}, (0, 1, 2)),
    "kl_shaped_rewards_and_costs": (
        (normal(B), normal(B), *TOKENS()),
        {"kl_coef": 0.1, "clip": 1.0},
        (0, 1, 2, 3),
    ),
    "gae": (TOKENS(), {"gamma": 0.9, "gae_lambda": 0.8}, (0, 1)),
    "discounted_returns": ((normal(B, T), MASK), {"gamma": 0.9}, (0,)),
    "adaptive_kl_coef": ((unit(B), 6 + unit(B)), {"target": 6.0, "num_samples": 512, "horizon": 10_000}, (0, 1)),
    "mixed_advantages": ((normal(B, T), normal(B, T), normal(B, T)), {}, (0, 1, 2)),
    "multiplier_loss": ((normal(B), normal(B)), {"limit": -0.5}, ()),
    "moving_average": ((normal(B), normal(B)), {"decay": 0.9, "count": 3}, (0, 1)),
    "tempered_policy": ((normal(B, T), normal(B, T), normal(B, T)), {"log_lambda": 0.4, "kl_coef": 1.0}, (0, 1, 2)),
    "reachable_cost": ((normal(B, T), normal(B, T)), {"kl_coef": 1.0}, (0, 1)),
    "self_play_rewards": ((PREFS,), {}, (0,)),
    "exploitability": ((2 * PREFS - 1, POLICY), {}, (0, 1)),
    "hedge_update": ((normal(B, T), normal(B, T)), {"learning_rate": 0.3}, (0, 1)),
}
# Of these only the named arrays receive a gradient: the rest are constants by design.
CONSTANTS = {"ppo_clip_loss": (1, 2), "clipped_value_loss": (1, 2), "reinforce_loss": (1,), "multiplier_loss": (1,)}

every_loss = pytest.mark.parametrize("name", CASES)


def case(name):
    arrays, options, differentiable = CASES[name]
    return functools.partial(getattr(losses, name), **options), arrays, differentiable


def as_type(arrays, dtype):
    return [a if a.dtype == bool else jnp.asarray(a, dtype) for a in arrays]


def assert_trees_close(actual, expected, rtol=2e-6, atol=2e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def test_the_table_names_every_public_function():
    elsewhere = {"whiten", "clamp_log_lambda", "check_limit"}  # test_masked.py, test_losses_lagrange.py
    assert set(CASES) | elsewhere == set(losses.__all__)
    for name in losses.__all__:
        assert name in losses.__doc__, f"{name} is missing from the map in losses/__init__.py"


@every_loss
def test_jit_and_vmap_agree_with_the_plain_call(name):
    loss, arrays, _ = case(name)
    plain = loss(*arrays)
    assert_trees_close(jax.jit(loss)(*arrays), plain)
    assert_trees_close(jax.vmap(loss)(*arrays), plain)


@every_loss
def test_leading_dimensions_are_free(name):
    loss, arrays, _ = case(name)
    nested = loss(*[a.reshape(2, 3, *a.shape[1:]) for a in arrays])
    assert_trees_close(jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), nested), loss(*arrays))


@every_loss
def test_bfloat16_is_raised_to_float32_at_the_door(name):
    loss, arrays, _ = case(name)
    rounded = as_type(arrays, jnp.bfloat16)
    result = loss(*rounded)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result))
    assert_trees_close(result, loss(*as_type(rounded, jnp.float32)), rtol=0, atol=0)


@every_loss
def test_integers_are_an_error(name):
    loss, arrays, _ = case(name)
    for i, array in enumerate(arrays):
        if array.dtype != bool:
            with pytest.raises(AssertionError, match="int32 but expected"):
                loss(*arrays[:i], array.astype(np.int32), *arrays[i + 1 :])


@every_loss
def test_unequal_shapes_are_an_error(name):
    loss, arrays, _ = case(name)
    for i, array in enumerate(arrays if len(arrays) > 1 else ()):
        if (name, i) != ("mixed_advantages", 2):  # log_lambda broadcasts
            with pytest.raises((AssertionError, ValueError), match="shape"):
                loss(*arrays[:i], array[:-1], *arrays[i + 1 :])


@every_loss
def test_gradients_match_finite_differences(name):
    loss, arrays, differentiable = case(name)
    with jax.enable_x64(True):
        arrays = as_type(arrays, jnp.float64)

        @jax.jit
        def of_differentiable(*chosen):
            filled = dict(zip(differentiable, chosen))
            return loss(*[filled.get(i, a) for i, a in enumerate(arrays)])

        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(loss(*arrays)))
        chosen = [arrays[i] for i in differentiable]
        if chosen:
            check_grads(of_differentiable, chosen, order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_receive_no_gradient(name):
    loss, arrays, _ = case(name)
    for i, array in enumerate(arrays):
        gradient = jax.grad(lambda x, i=i: loss(*arrays[:i], x, *arrays[i + 1 :]).sum())(jnp.asarray(array))
        assert np.any(gradient != 0) == (i not in CONSTANTS[name])


GARBAGE = (np.nan, np.inf, -np.inf, 1e30)
MASKED = ["ppo_clip_loss", "clipped_value_loss", "reinforce_loss", "kl_k1", "kl_k2", "kl_k3", "entropy"]
MASKED += ["kl_shaped_rewards", "kl_shaped_rewards_and_costs", "gae", "discounted_returns"]


@pytest.mark.parametrize("name", MASKED)
def test_garbage_in_padding_changes_neither_value_nor_gradient(name):
    loss, arrays, _ = case(name)
    if arrays[-1] is not MASK:
        loss = functools.partial(loss, mask=MASK)
    tokenwise = [i for i, a in enumerate(arrays) if a.dtype != bool and a.shape[:2] == (B, T)]

    @jax.jit
    def value_and_gradients(chosen):
        def total(chosen):
            filled = dict(zip(tokenwise, chosen))
            result = loss(*[filled.get(i, a) for i, a in enumerate(arrays)])
            return sum(jnp.sum(x) for x in jax.tree.leaves(result)), result

        gradients, result = jax.grad(total, has_aux=True)(chosen)
        return result, gradients

    def filled_with(garbage):
        padding = ~MASK
        return [np.where(padding.reshape(B, T, *[1] * (arrays[i].ndim - 2)), garbage, arrays[i]) for i in tokenwise]

    clean = value_and_gradients([a.astype(np.float32) for a in filled_with(0.0)])
    for x in jax.tree.leaves(clean):
        assert np.isfinite(x).all() and not np.any(x[~MASK]), "padding must hold zeros"
    for garbage in GARBAGE:
        dirty = value_and_gradients([a.astype(np.float32) for a in filled_with(garbage)])
        assert_trees_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("name", MASKED)
def test_a_nan_that_counts_is_not_swallowed(name):
    loss, arrays, _ = case(name)
    for i, array in enumerate(arrays):
        if array.dtype != bool:
            broken = np.array(array)
            broken[0] = np.nan  # row 0 is kept in full
            results = jax.tree.leaves(loss(*arrays[:i], broken, *arrays[i + 1 :]))
            assert any(np.isnan(x[0]).any() for x in results)
            assert all(np.isfinite(x[1:]).all() for x in results), "a NaN must stay in its row"


@pytest.mark.parametrize("name", ["gae", "kl_shaped_rewards", "discounted_returns"])
def test_a_mask_of_numbers_is_an_error(name):
    loss, arrays, _ = case(name)
    with pytest.raises(AssertionError, match="bool"):
        loss(*arrays[:-1], MASK.astype(np.float32))
