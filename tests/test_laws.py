"""Shapes that papers claim: each law is recovered where it is planted, and loses where another one is."""

import math

import numpy as np
import pytest

from rlhfjax.evaluation.calibration import upper_tail
from rlhfjax.evaluation.constrained import dominance, weight_at_limit
from rlhfjax.evaluation.laws import at_one_kl, early_kl_laws, first_crossing, kl_laws, least_squares, scaling_law
from rlhfjax.evaluation.statistics import rank_correlation

# Least squares


def test_a_line_through_four_points_by_hand():
    """y = 0.1 + 0.6 x leaves the residuals -0.1, 0.3, -0.3, 0.1 of a spread of 2."""
    fit = least_squares({"x": [0, 1, 2, 3]}, [0, 1, 1, 2])
    np.testing.assert_allclose(fit.coefficients, [0.1, 0.6], atol=1e-12)
    assert (fit.r2, fit.aic) == pytest.approx((1 - 0.2 / 2, 4 * math.log(0.2 / 4) + 2 * 2))


def test_without_an_intercept_r2_is_still_about_the_mean():
    """y = 9/14 x leaves 6 - 81/14 of a spread of 2."""
    fit = least_squares({"x": [0, 1, 2, 3]}, [0, 1, 1, 2], intercept=False)
    np.testing.assert_allclose(fit.coefficients, [9 / 14])
    assert (fit.r2, fit.aic) == pytest.approx((1 - 3 / 14 / 2, 4 * math.log(3 / 14 / 4) + 2 * 1))


def test_several_columns_are_those_of_the_normal_equations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=30)
    design = np.column_stack([np.ones(30), x])
    fit = least_squares(dict(enumerate(x.T)), y)
    np.testing.assert_allclose(fit.coefficients, np.linalg.solve(design.T @ design, design.T @ y))
    rest = y - design @ fit.coefficients
    assert (fit.r2, fit.aic) == pytest.approx((1 - rest.var() / y.var(), 30 * math.log(np.mean(rest**2)) + 8))


def test_too_few_rows_for_a_fit_are_refused():
    least_squares({"x": [0, 1, 2, 3]}, [0, 1, 1, 2])
    with pytest.raises(ValueError, match="2 coefficients need at least 4 rows, got 3"):
        least_squares({"x": [0, 1, 2]}, [0, 1, 1])


# Reward over KL

D = np.linspace(0.2, 3, 60)
PLANTED = {
    "sqrt": ([1.5], 1.5 * D),
    "linear": ([0.4], 0.4 * D**2),
    "best-of-n": ([1.5, -0.2], D * (1.5 - 0.2 * D)),
    "optimisation": ([1.5, -0.5], D * (1.5 - 0.5 * np.log(D))),
}


@pytest.mark.parametrize("law", PLANTED)
def test_the_law_that_was_planted_wins_with_its_coefficients(law):
    coefficients, gain = PLANTED[law]
    fits = kl_laws(D**2, gain + 0.01 * np.random.default_rng(0).normal(size=len(D)))
    assert min(fits, key=lambda name: fits[name].aic) == law
    np.testing.assert_allclose(fits[law].coefficients, coefficients, atol=0.01)
    assert fits[law].r2 > 0.999


def test_the_early_law_ends_at_half_of_the_gain():
    """Reward climbs along 0.8 sqrt(KL) from -1, then along nothing: all of the curve would hide what its start says.

    It gains 2.1 in all, and half of that, 1.05, at the first i with 0.16 sqrt(i) > 1.05: that is 44.
    """
    kl = 0.04 * np.arange(200)
    climb = 0.8 * np.sqrt(kl)
    scores = -1 + np.where(climb < 1.2, climb, 1.2 + 0.9 * np.linspace(0, 1, 200))
    kl[0] = -1e-9  # as rounding leaves it
    early = early_kl_laws(kl, scores)
    np.testing.assert_allclose(early["sqrt"].coefficients, [0.8])
    assert early["sqrt"].r2 == pytest.approx(1) and kl_laws(kl[1:], scores[1:] + 1)["sqrt"].r2 < 0.998
    assert early["sqrt"].aic < early["linear"].aic == kl_laws(kl[1:45], scores[1:45] + 1)["linear"].aic


def test_a_curve_that_jumps_still_gives_five_points():
    kl, scores = np.arange(10.0), np.array([0, 3, 3.1, 3, 3.2, 3.1, 9, -9, 5, 0.0])
    scores[6:] = 3
    seen, expected = early_kl_laws(kl, scores), kl_laws(kl[1:6], scores[1:6])
    for name, fit in expected.items():
        np.testing.assert_array_equal(seen[name].coefficients, fit.coefficients)


def test_curves_are_read_at_the_kl_that_all_of_them_reach():
    """One ends at KL 4.95, whose last tenth has the median 4.725; of the other the ten points around that count."""
    far, near = np.arange(100) / 10, np.arange(100) / 20
    assert at_one_kl((far, far), (near, 2 * near)) == pytest.approx([4.75, 2 * 4.725])
    assert at_one_kl((near, near), (far[::-1], far[::-1])) == pytest.approx([0.45, 0.45], abs=0.03)  # one that returns


def test_the_first_crossing_is_that_of_a_mean_of_five():
    values = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert [first_crossing(values, aim) for aim in (0.3, 0.5, 0.9)] == [5, 6, 8]
    assert first_crossing(values, 1.1) == len(values) + 1  # never
    assert first_crossing([1.0] * 9, 0.9) == 5  # there from the start: what one window takes


# Accuracy over size and data

SIZES, PAIRS = (x.ravel() for x in np.meshgrid([7e3, 25e3, 9e4, 324e3], [750, 1500, 3000, 6000, 12000]))


def accuracies(bend=0.0):
    noise = 5e-4 * np.random.default_rng(0).normal(size=len(SIZES))
    return 0.5 + 0.007 * np.log(SIZES) + 0.015 * np.log(PAIRS) - bend * np.log(PAIRS / 3000) ** 2 + noise


def test_the_slopes_of_a_scaling_law_are_recovered():
    law = scaling_law(accuracies(), SIZES, PAIRS)
    assert (law["size_slope"], law["data_slope"]) == pytest.approx((0.007, 0.015), abs=3e-4)
    assert law["r2"] > 0.99 and law["curvature"] < 2
    other = scaling_law(accuracies(), PAIRS, SIZES)  # which is which
    assert (other["size_slope"], other["data_slope"]) == pytest.approx((law["data_slope"], law["size_slope"]))


def test_a_bend_in_a_scaling_law_shows():
    law = scaling_law(accuracies(bend=0.005), SIZES, PAIRS)
    assert law["curvature"] > 10 and law["r2"] > 0.9  # R2 alone would let it pass
    assert law["data_slope"] == pytest.approx(0.015, abs=3e-4)  # in the middle of the grid


# The upper tail


def labelled(scores, trust):
    """Labels that come out as `sigmoid(trust * gap)` says."""
    chance = 1 / (1 + np.exp(-trust * (scores[:, 0] - scores[:, 1])))
    return (np.random.default_rng(1).random(len(scores)) < chance).astype(float)


def excess(scores, prefs):
    tail = upper_tail(scores, prefs)
    return (tail.accuracy[0] - tail.accuracy[-1]) - (tail.calibrated[0] - tail.calibrated[-1])


def test_accuracy_falls_in_the_upper_tail_beyond_calibration_only_where_scores_are_overconfident_there():
    scores = 2 * np.random.default_rng(0).normal(size=(40_000, 2))
    tail = upper_tail(scores, labelled(scores, 1.0))
    assert tail.accuracy[0] - tail.accuracy[-1] > 0.05  # whoever scores: gaps are small up there
    np.testing.assert_allclose(tail.accuracy, tail.calibrated, atol=0.02)
    assert abs(excess(scores, labelled(scores, 1.0))) < 0.02
    high = scores.min(1) > 0.5
    assert excess(scores, labelled(scores, np.where(high, 0.1, 1.0))) > 0.1
    assert excess(scores, labelled(scores, np.where(high, 4.0, 1.0))) < -0.1


def test_the_upper_tail_by_hand():
    """Lower scores 0, 1, 2, 3: of all pairs the first is wrong and the tie is left out; of the upper half all right."""
    scores = np.array([[1, 0], [1, 1.5], [3, 2], [3, 4]])
    tail = upper_tail(scores, [0, 0.5, 1, 0], shares=(1, 0.5))
    sigmoid = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(tail.threshold, [0, 1.5])
    np.testing.assert_allclose(tail.accuracy, [2 / 3, 1])
    np.testing.assert_allclose(tail.calibrated, [sigmoid, sigmoid])
    assert list(tail.count) == [3, 2]


# What is read off points


def test_dominance_is_the_smaller_margin_of_the_best_rival():
    """(helpfulness, harm): one rival helps more and harms more, one is better in both, by 0.1 and 0.02."""
    points = {"ours": (1.0, 0.05), "bold": (1.5, 0.2), "better": (1.1, 0.03), "mild": (0.5, 0.0)}
    assert dominance(points, "ours", ["bold", "mild"]) == pytest.approx(-0.15)
    assert dominance(points, "ours", ["bold", "mild", "better"]) == pytest.approx(0.02)
    assert dominance(points, "better", ["ours"]) == pytest.approx(-0.1)


def test_the_weight_at_the_limit_is_between_the_last_that_misses_and_the_first_that_meets_it():
    """Half way from 1 to 2 on a logarithmic axis is sqrt(2)."""
    assert weight_at_limit({0.5: 0.4, 2.0: -0.1, 1.0: 0.1, 4.0: 0.05}) == pytest.approx(math.sqrt(2))
    assert weight_at_limit({0.5: -0.1, 1.0: -0.2}) == 0.5  # all meet it
    assert weight_at_limit({0.5: 0.2, 1.0: 0.1}) == 1.0  # none does


def test_a_rank_correlation_sees_order_alone():
    x = [1, 2, 3, 4, 5]
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, [5, 4, 3, 2, -900]) == pytest.approx(-1)
    assert rank_correlation(x, [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))  # 1 - 6 sum d^2 / (n (n^2 - 1))
