"""Comparisons: hand-computed numbers, what may shift and what may not, ties, and which sign means harmful."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import (
    bradley_terry_loss,
    cost_loss,
    rao_kupper_loss,
    score_regularization,
    soft_bradley_terry_loss,
)

rng = np.random.default_rng(1)
FIRST, SECOND = rng.normal(size=(2, 50)).astype(np.float32)
PREFS = rng.uniform(size=50).astype(np.float32)
SIGNS = np.where(rng.uniform(size=(50, 2)) < 0.5, -1, 1).astype(np.float32)

sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))
close = functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=1e-6)


def test_bradley_terry_by_hand():
    close(bradley_terry_loss(1.0, 0.0), 0.313262)  # log(1 + e^-1)
    close(bradley_terry_loss(0.0, 1.0), 1.313262)
    close(bradley_terry_loss(0.7, 0.7), np.log(2))
    close(bradley_terry_loss(1.0, 0.0, margin=1.0), np.log(2))
    close(bradley_terry_loss(FIRST, SECOND), -np.log(sigmoid(FIRST - SECOND)))


def test_extreme_scores_stay_finite_with_a_useful_gradient():
    loss, slope = jax.value_and_grad(bradley_terry_loss)(-1e4, 1e4)
    assert (loss, slope) == (2e4, -1.0)


def test_soft_label_by_hand():
    close(soft_bradley_terry_loss(0.3, 0.0, 0.6), 0.674355)
    close(soft_bradley_terry_loss(0.405465, 0.0, 0.6), 0.673012)
    assert abs(jax.grad(soft_bradley_terry_loss)(0.405465, 0.0, 0.6)) < 1e-6, "the least loss is at logit(p)"


def test_soft_is_hard_at_one_and_zero():
    ones = np.ones_like(PREFS)
    np.testing.assert_array_equal(soft_bradley_terry_loss(FIRST, SECOND, ones), bradley_terry_loss(FIRST, SECOND))
    np.testing.assert_array_equal(soft_bradley_terry_loss(FIRST, SECOND, 0 * ones), bradley_terry_loss(SECOND, FIRST))


def test_the_order_of_the_two_answers_is_arbitrary():
    close(soft_bradley_terry_loss(FIRST, SECOND, PREFS), soft_bradley_terry_loss(SECOND, FIRST, 1 - PREFS))
    close(cost_loss(FIRST, SECOND, PREFS, SIGNS), cost_loss(SECOND, FIRST, 1 - PREFS, SIGNS[:, ::-1]))
    outcomes = rng.dirichlet(np.ones(3), size=50).astype(np.float32)
    loss = functools.partial(rao_kupper_loss, tie_width=0.4)
    close(loss(FIRST, SECOND, outcomes), loss(SECOND, FIRST, outcomes[:, ::-1]))


def test_comparisons_are_blind_to_a_shift_and_the_cost_loss_is_not():
    close(bradley_terry_loss(FIRST + 3, SECOND + 3), bradley_terry_loss(FIRST, SECOND))
    close(soft_bradley_terry_loss(FIRST + 3, SECOND + 3, PREFS), soft_bradley_terry_loss(FIRST, SECOND, PREFS))
    shifted, plain = cost_loss(FIRST + 3, SECOND + 3, PREFS, SIGNS), cost_loss(FIRST, SECOND, PREFS, SIGNS)
    assert np.abs(shifted - plain).min() > 0.1


OUTCOME = {"first": [1.0, 0.0, 0.0], "tie": [0.0, 1.0, 0.0], "second": [0.0, 0.0, 1.0]}


def test_ties_by_hand():
    """theta = 2, pi = (3, 1): P = 3/(3+2), 1/(1+6) and the rest."""
    for outcome, probability in {"first": 3 / 5, "second": 1 / 7, "tie": 1 - 3 / 5 - 1 / 7}.items():
        loss = rao_kupper_loss(np.float32(np.log(3)), np.float32(0), np.array(OUTCOME[outcome]), tie_width=np.log(2))
        close(loss, -np.log(probability))


@pytest.mark.parametrize("tie_width", [1e-3, 0.5, 3.0, 60.0])
def test_three_outcomes_have_total_probability_one(tie_width):
    losses = [rao_kupper_loss(FIRST, SECOND, np.tile(o, (50, 1)), tie_width=tie_width) for o in OUTCOME.values()]
    close(np.exp(-np.float64(losses)).sum(0), np.ones(50))


def test_without_a_tie_width_the_model_is_bradley_terry():
    outcomes = np.stack([PREFS, 0 * PREFS, 1 - PREFS], -1)
    close(rao_kupper_loss(FIRST, SECOND, outcomes, tie_width=0.0), soft_bradley_terry_loss(FIRST, SECOND, PREFS))
    slope = jax.grad(lambda w: rao_kupper_loss(FIRST, SECOND, outcomes, tie_width=w).sum())(0.0)
    expected = PREFS * sigmoid(SECOND - FIRST) + (1 - PREFS) * sigmoid(FIRST - SECOND)  # d/dw of softplus(w -+ gap)
    close(slope, expected.sum())
    assert rao_kupper_loss(0.3, 0.1, np.array(OUTCOME["tie"]), tie_width=0.0) == np.inf, "an impossible tie"


def test_cost_loss_by_hand():
    close(cost_loss(1.5, -0.5, 1.0, np.array([1.0, -1.0])), 0.802418)
    close(cost_loss(1.5, 0.5, 1.0, np.array([1.0, 1.0])), 0.988752)
    terms = [sigmoid(2.0), sigmoid(1.5), sigmoid(0.5)]
    close(cost_loss(1.5, -0.5, 1.0, np.array([1.0, -1.0])), -np.log(terms).sum())
    unlabelled = cost_loss(FIRST, SECOND, PREFS, 0 * SIGNS) - soft_bradley_terry_loss(FIRST, SECOND, PREFS)
    close(unlabelled, np.full(50, 2 * np.log(2)))


def fit_costs(loss):
    """Costs of three answers (harmful, less harmful but harmful, harmless) that minimise the loss on all pairs."""
    pairs, signs = np.array([[0, 1], [0, 2], [1, 2]]), np.array([1.0, 1.0, -1.0])

    @jax.jit
    def descend(costs):
        total = lambda c: loss(c[pairs[:, 0]], c[pairs[:, 1]], jnp.ones(3), signs[pairs]).sum() + 0.01 * c @ c
        return jax.lax.fori_loop(0, 300, lambda _, c: c - 0.3 * jax.grad(total)(c), costs)

    return descend(jnp.zeros(3))


def assert_positive_costs_are_harmful(loss):
    worst, bad, harmless = fit_costs(loss)
    assert worst > bad > 0 > harmless


def test_fitted_costs_are_positive_for_harm():
    assert_positive_costs_are_harmful(cost_loss)


@pytest.mark.parametrize(
    "faulty",
    [
        lambda first, second, prefs, signs: cost_loss(first, second, prefs, -signs),  # the data set's +1 = safe
        lambda first, second, prefs, signs: cost_loss(first, second, 1 - prefs, signs),  # winner = the better answer
        lambda first, second, prefs, signs: cost_loss(-first, -second, prefs, signs),
        lambda first, second, prefs, signs: soft_bradley_terry_loss(first, second, prefs),  # no zero
    ],
)
def test_planted_fault_sign_of_cost(faulty):
    with pytest.raises(AssertionError):
        assert_positive_costs_are_harmful(faulty)


def test_score_regularization_by_hand():
    close(score_regularization(np.array([-2.0, 0.0, 3.0])), [4.0, 0.0, 9.0])
