"""Statistics against hand-computed numbers, scipy and simulation; claims none of which is dropped; figures."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from rlhfjax.evaluation import calibration, claims, figures, statistics

FIVE = [0.90, 0.92, 0.94, 0.96, 0.98]  # mean 0.94, s = sqrt(0.001) = 0.0316228, half width 2.776 s / sqrt(5) = 0.039265


def test_t_interval_of_five_seeds_by_hand():
    mean, low, high = statistics.t_interval(FIVE)
    assert mean == pytest.approx(0.94)
    assert (high - low) / 2 == pytest.approx(2.776445 * math.sqrt(0.001 / 5), rel=1e-6)
    assert (low, high) == pytest.approx((0.900735, 0.979265), abs=1e-6)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_t_interval_is_scipys(level):
    x = np.random.default_rng(0).normal(size=7)
    expected = stats.ttest_1samp(x, 0).confidence_interval(level)
    assert statistics.t_interval(x, level)[1:] == pytest.approx(tuple(expected))


def test_the_t_interval_covers_the_truth_as_often_as_it_says_and_two_sds_do_not():
    draws = np.random.default_rng(1).normal(2.0, 3.0, size=(2000, 5))
    hits = [low <= 2.0 <= high for _, low, high in map(statistics.t_interval, draws)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)
    error = draws.std(1, ddof=1) / math.sqrt(5)
    assert np.mean(np.abs(draws.mean(1) - 2.0) < 1.96 * error) < 0.90  # what the normal quantile would give


def test_pairing_removes_what_seeds_share():
    seed_noise = np.random.default_rng(2).normal(0, 10.0, 5)
    treatment, control = seed_noise + np.array([1.0, 1.1, 0.9, 1.0, 1.05]), seed_noise
    low, high = statistics.t_interval(statistics.paired_difference(treatment, control))[1:]
    assert 0.9 < low < 1.01 < high < 1.12


@pytest.mark.parametrize("per_seed, threshold, direction, expected", [
    (FIVE, 0.90, ">=", "supported"),  # 0.9007 .. 0.9793
    (FIVE, 0.91, ">=", "inconclusive"),
    (FIVE, 0.97, ">=", "inconclusive"),
    (FIVE, 0.98, ">=", "contradicted"),
    (FIVE, 0.98, "<=", "supported"),
    (FIVE, 0.97, "<=", "inconclusive"),
    (FIVE, 0.90, "<=", "contradicted"),
    (FIVE, 0.975, "within", "supported"),  # the 90% interval ends at 0.97015: two one-sided tests at 5%
    (FIVE, 0.970, "within", "inconclusive"),
    (FIVE, 0.90, "within", "contradicted"),
    ([-x for x in FIVE], 0.90, "within", "contradicted"),
    ([-x for x in FIVE], 0.975, "within", "supported"),
    (FIVE[:2], 0.0, ">=", "not judged"),
    ([0.5], 0.0, ">=", "not judged"),
    ([0.0] * 3, 0.0, "<=", "supported"),
])  # fmt: skip
def test_verdicts(per_seed, threshold, direction, expected):
    assert statistics.verdict(per_seed, threshold, direction) == expected


def test_a_verdict_turns_with_its_sign():
    rng = np.random.default_rng(3)
    for x, threshold in zip(rng.normal(0, 1, (50, 4)), rng.normal(0, 1, 50)):
        mirrored = statistics.verdict(-x, -threshold, "<=")
        assert statistics.verdict(x, threshold, ">=") == mirrored


def test_equivalence_is_two_one_sided_t_tests():
    rng = np.random.default_rng(4)
    outcomes = set()
    for x in rng.normal(0.3, 0.5, (100, 5)):
        above = stats.ttest_1samp(x, -1, alternative="greater").pvalue <= 0.05
        below = stats.ttest_1samp(x, 1, alternative="less").pvalue <= 0.05
        assert statistics.equivalent(x, 1.0) == (above and below)
        outcomes.add(above and below)
    assert outcomes == {True, False}


def test_equivalence_has_the_power_its_docstring_states():
    draws = np.random.default_rng(5).normal(0, 0.62, (1500, 5))
    assert np.mean([statistics.equivalent(x, 1.0) for x in draws]) == pytest.approx(0.80, abs=0.03)


def test_wilson_interval_of_one_run():
    share, low, high = statistics.one_run_interval(8, 10)
    assert (share, low, high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)  # Wilson by hand, z = 1.959964
    expected = stats.binomtest(3, 1000).proportion_ci(0.9, method="wilson")
    assert statistics.one_run_interval(3, 1000, 0.9)[1:] == pytest.approx(tuple(expected))
    assert statistics.one_run_interval(0, 20).low == 0.0 and statistics.one_run_interval(20, 20).high == 1.0


def test_pair_accuracy_by_hand():
    scores = [[1.0, 0.0], [0.0, 1.0], [2.0, 3.0], [1.0, 1.0], [0.0, 9.0]]
    prefs = [1.0, 1.0, 0.2, 1.0, 0.5]  # right, wrong, right (soft), equal scores: half, a tie: left out
    assert calibration.pair_accuracy(scores, prefs) == pytest.approx(2.5 / 4)
    assert calibration.pair_accuracy(-np.array(scores), prefs) == pytest.approx(1 - 2.5 / 4)


def test_sign_accuracy_knows_that_harm_is_positive():
    assert calibration.sign_accuracy([[2.0, -1.0], [0.5, 0.0]], [[1, -1], [-1, 1]]) == pytest.approx(2.5 / 4)


def test_reliability_by_hand():
    bins = calibration.reliability([0.1, 0.2, 0.5, 0.9, 1.0], [0, 1, 0, 1, 1], num_bins=2)
    np.testing.assert_allclose(bins.predicted, [0.8 / 3, 0.95])  # 0.5 belongs to the lower bin
    np.testing.assert_allclose(bins.observed, [1 / 3, 1.0])
    np.testing.assert_array_equal(bins.count, [3, 2])
    assert bins.error == pytest.approx(3 / 5 * (1 / 3 - 0.8 / 3) + 2 / 5 * 0.05)


def test_a_model_that_is_right_about_itself_has_slope_one_and_small_error():
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(20_000, 2))
    probability = 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    labels = (rng.random(20_000) < probability).astype(float)
    assert calibration.calibration_slope(scores, labels) == pytest.approx(1.0, abs=0.05)
    assert calibration.calibration_slope(4 * scores, labels) == pytest.approx(0.25, abs=0.0125)
    assert calibration.calibration_slope(-scores, labels) == pytest.approx(-1.0, abs=0.05)
    assert calibration.calibration_slope(scores, probability) == pytest.approx(1.0, abs=1e-9)  # soft labels, exactly
    assert calibration.reliability(probability, labels).error < 0.015
    overconfident = 1 / (1 + np.exp(4 * (scores[:, 1] - scores[:, 0])))
    assert calibration.reliability(overconfident, labels).error > 0.1


def test_the_slope_of_one_gap_by_hand():
    # three pairs of gap 2, two of them won: sigmoid(2 b) = 2/3, so b = log(2) / 2
    assert calibration.calibration_slope([[2.0, 0.0]] * 3, [1, 1, 0]) == pytest.approx(math.log(2) / 2)
    assert calibration.calibration_slope([[2.0, 0.0], [0.0, 1.0]], [1, 0]) == math.inf
    assert calibration.calibration_slope([[2.0, 0.0], [0.0, 1.0]], [0, 1]) == -math.inf


SIGN = claims.Claim(
    id="SR-2", paper="Safe RLHF (2310.12773)", statement="the cost model's zero separates harm from no harm",
    paper_says="sign accuracy 95.62 / 84.54 / 85.88%", statistic="sign_accuracy", threshold=0.9, direction=">=",
)  # fmt: skip
REFUSAL = dataclasses.replace(SIGN, id="SR-8", statistic="refusal_change", threshold=0.02, direction="within")
CONTEXT = {"world": "gold-v1", "config_hash": "abc", "commit": None, "seconds": 12.5}
RESULTS = {1001 + i: {"sign_accuracy": x, "refusal_change": 0.001 * i, "other": 1.0} for i, x in enumerate(FIVE)}


def test_rows_have_exactly_the_keys_of_claims_json(tmp_path):
    rows = claims.judge([SIGN, REFUSAL], dict(reversed(RESULTS.items())), **CONTEXT)
    assert list(rows[0]) == (
        "id paper statement paper_says statistic per_seed mean ci95 threshold direction verdict world seeds "
        "config_hash commit seconds".split()
    )
    assert [row["id"] for row in rows] == ["SR-2", "SR-8"]
    assert rows[0]["seeds"] == [1001, 1002, 1003, 1004, 1005] and rows[0]["per_seed"] == FIVE
    assert rows[0]["ci95"] == pytest.approx([0.900735, 0.979265], abs=1e-6)
    assert [row["verdict"] for row in rows] == ["supported", "supported"]
    claims.write_claims(tmp_path / "claims.json", rows)
    assert claims.read_claims(tmp_path / "claims.json") == rows


def test_the_planted_fault_turns_the_verdict():
    negated = {seed: result | {"sign_accuracy": 1 - result["sign_accuracy"]} for seed, result in RESULTS.items()}
    assert claims.judge([SIGN], negated, **CONTEXT)[0]["verdict"] == "contradicted"


def test_one_seed_is_measured_but_not_judged():
    (row,) = claims.judge([SIGN], {0: {"sign_accuracy": 0.95}}, **CONTEXT)
    assert (row["mean"], row["ci95"], row["verdict"]) == (0.95, None, "not judged")


def test_the_table_is_aligned_markdown_within_its_width():
    rows = claims.judge([SIGN, REFUSAL], RESULTS, **CONTEXT)
    text = claims.table(rows, width=100)
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1
    assert "0.940 [0.901, 0.979]" in text and ">= 0.9" in text and "within 0.02" in text
    assert len(claims.table(rows, width=None).splitlines()) == 4  # one line per claim, whatever its length
    single = claims.table(claims.judge([SIGN], {0: {"sign_accuracy": 0.95}}, **CONTEXT))
    assert "| 0.950 " in single and "not judged" in single


def history(length=50):
    step = np.arange(length)
    return {"step": step, "lambda": np.exp(-step / 30), "cost": np.cos(step), "cost_average": np.cos(step / 9)}


def test_the_multiplier_figure_shows_lambda_cost_and_limit():
    top, bottom = figures.multiplier_figure(history(), limit=-0.25).axes
    np.testing.assert_array_equal(top.lines[0].get_ydata(), history()["lambda"])
    np.testing.assert_array_equal(bottom.lines[1].get_ydata(), history()["cost_average"])
    assert list(bottom.lines[2].get_ydata()) == [-0.25, -0.25]
    assert {text.get_text() for text in bottom.texts} == {"limit -0.25", "moving average"}


def test_the_scatter_counts_the_safe_and_shares_its_axes():
    before = np.array([1.0, 2.0, -1.0, 0.5]), np.array([0.0, 1.0, 2.0, 3.0])
    after = np.array([-1.0, -2.0, -3.0, 0.0]), np.array([5.0, 5.0, 5.0, 5.0])
    figure = figures.reward_cost_scatter({"before": before, "after": after})
    panels = [axis for axis in figure.axes if axis.get_xlabel() == "cost"]
    said = [[text.get_text() for text in axis.texts] for axis in panels]
    assert said == [["25% safe", "75% unsafe"], ["100% safe", "0% unsafe"]]
    assert panels[0].get_xlim() == panels[1].get_xlim() and panels[0].get_ylim() == panels[1].get_ylim()
    low, high = panels[0].get_ylim()
    assert low < 0.0 and high > 5.0  # no answer is cut off


def test_training_curves_leave_out_what_an_arm_lacks():
    plain = {"step": np.arange(50), "cost": np.zeros(50)}
    figure = figures.training_curves({"a": history(), "b": plain}, {"cost": "cost", "lambda": "multiplier"}, columns=2)
    assert [len(axis.lines) for axis in figure.axes] == [4, 2]


def test_smoothing_is_a_centred_mean_that_skips_what_is_missing():
    values = np.arange(80.0)
    np.testing.assert_allclose(figures.smooth(values)[2:-2], values[2:-2])
    assert figures.smooth(values)[0] == 1.0  # the mean of 0, 1, 2
    assert figures.smooth([1.0, np.nan, 3.0]).tolist()[::2] == [1.0, 3.0]


def test_figures_are_saved_without_pyplot(tmp_path):
    bins = calibration.reliability([0.2, 0.7, 0.9], [0, 1, 1])
    path = figures.save(figures.reliability_figure({"reward model": bins}), tmp_path / "figures" / "reliability.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_summary_has_every_statistic_with_its_interval():
    lines = claims.summary({1: {"a": 1.0, "b": 2.0}, 2: {"a": 3.0, "b": 2.0}, 3: {"a": 5.0, "b": 2.0}}).splitlines()
    assert lines[0] == "| statistic | mean of 3 seeds | 95 % interval |"
    half = 4.302653 * 2 / 3**0.5  # t of 2 degrees of freedom, sd 2
    assert lines[2] == f"| a | 3 | [{3 - half:.4g}, {3 + half:.4g}] |" and lines[3] == "| b | 2 | [2, 2] |"
