"""The nouns are pytrees, and the index convention is what its docstring says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.types import PreferenceBatch, Rollout, TrainState, before_response_tokens, check_finite, join

ROLLOUT = Rollout(
    prompts=np.array([[0, 7], [5, 6]]),
    prompt_mask=np.array([[False, True], [True, True]]),
    tokens=np.array([[3, 2, 0], [4, 8, 9]]),
    mask=np.array([[True, True, False], [True, True, True]]),
    logprobs=-np.ones((2, 3), np.float32),
    finished=np.array([True, False]),
)


def test_a_rollout_travels_through_jit_and_knows_statically_whether_it_was_truncated():
    @jax.jit
    def refuse_truncated(rollout):
        if rollout.truncated:  # a Python bool even inside jit
            raise ValueError("truncated")
        return dataclasses.replace(rollout, logprobs=2 * rollout.logprobs)

    np.testing.assert_array_equal(refuse_truncated(ROLLOUT).logprobs, 2 * ROLLOUT.logprobs)
    with pytest.raises(ValueError, match="truncated"):
        refuse_truncated(dataclasses.replace(ROLLOUT, truncated=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROLLOUT.tokens = None


def test_preferences_without_signs_are_a_pytree_too():
    pairs = PreferenceBatch(
        prompts=np.zeros((4, 2), int),
        prompt_mask=np.ones((4, 2), bool),
        responses=np.zeros((4, 2, 3), int),
        responses_mask=np.ones((4, 2, 3), bool),
        prefs=np.array([1.0, 0.0, 0.5, 0.2], np.float32),
    )
    half = jax.tree.map(lambda x: x[:2], pairs)
    assert len(pairs) == 4 and len(half) == 2 and half.signs is None


def test_train_state_steps_like_optax_and_keeps_dtypes():
    optimizer = optax.adam(0.1)
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5], jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    state = TrainState.create(params, optimizer)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads, optimizer))
    state = step(step(state, grads), grads)
    expected, opt_state = params, optimizer.init(params)
    for _ in range(2):
        updates, opt_state = optimizer.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert state.step == 2
    for name, value in expected.items():
        assert state.params[name].dtype == value.dtype
        np.testing.assert_allclose(state.params[name], value, rtol=1e-6)


def test_outputs_before_response_tokens_are_those_that_predict_them():
    """In a network whose output at position i is i, response token t at P + t belongs to output P + t - 1."""
    tokens, mask = join(ROLLOUT.prompts, ROLLOUT.prompt_mask, ROLLOUT.tokens, ROLLOUT.mask)
    assert tokens[0].tolist() == [0, 7, 3, 2, 0] and mask[0].tolist() == [False, True, True, True, False]
    predicts = jnp.roll(tokens, -1, axis=1)  # output i speaks of token i + 1
    np.testing.assert_array_equal(before_response_tokens(predicts, 3), ROLLOUT.tokens)
    np.testing.assert_array_equal(before_response_tokens(predicts[:, -4:], 3), ROLLOUT.tokens)
    assert before_response_tokens(jnp.zeros((2, 5, 11)), 3).shape == (2, 3, 11)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_row(bad):
    check_finite("scores", np.zeros(3))
    check_finite("lambda", 1.0)
    with pytest.raises(FloatingPointError, match="scores is not finite in 1 rows, the first being row 2 of batch 7"):
        check_finite("scores", np.array([[0.0, 0.0], [1.0, 2.0], [0.0, bad]]), where=" of batch 7")
    with pytest.raises(FloatingPointError, match="lambda"):
        check_finite("lambda", bad)
