# SPDX-License-Identifier: Apache-2.0
"""Means, intervals and ratios on hand-made data and against scipy's own tests."""

import math

import pytest
from scipy import stats

from fulgurite.records import RunRecord
from fulgurite.statistics import paired_difference, paired_ratio, paired_values, summary


def test_paired_difference_by_hand():
    """Differences -1, -2, -3: mean -2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653."""
    result = paired_difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    half = 4.302652729749464 / math.sqrt(3)
    assert result.mean == -2.0
    assert result.standard_error == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    assert (result.low, result.high) == (pytest.approx(-2 - half, rel=1e-9), pytest.approx(-2 + half, rel=1e-9))
    assert (result.wins, result.n, result.excludes_zero) == (3, 3, False)


def test_interval_equals_scipy_paired_t():
    a, b = [0.31, 0.29, 0.35, 0.33, 0.30], [0.36, 0.33, 0.34, 0.38, 0.37]
    for confidence in (0.9, 0.95, 0.99):
        expected = stats.ttest_rel(a, b).confidence_interval(confidence)
        result = paired_difference(a, b, confidence)
        assert (result.low, result.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_wins_follow_the_direction_and_ties_are_none():
    a, b = [1.0, 2.0, 3.0, 9.0], [2.0, 2.0, 4.0, 1.0]
    assert paired_difference(a, b, better="lower").wins == 2
    assert paired_difference(a, b, better="higher").wins == 1


def test_a_single_pair_has_an_infinite_interval():
    result = paired_difference([1.0], [2.0])
    assert (result.mean, result.low, result.high, result.n) == (-1.0, -math.inf, math.inf, 1)
    assert math.isnan(result.standard_error)
    assert not result.excludes_zero


def test_equal_differences_have_an_interval_of_width_zero():
    result = paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (result.mean, result.low, result.high, result.standard_error) == (-0.5, -0.5, -0.5, 0.0)
    assert result.excludes_zero
    assert not paired_difference([1.0, 1.0], [1.0, 1.0]).excludes_zero


def test_values_that_are_not_finite_exclude_nothing():
    for bad in (math.nan, math.inf):
        result = paired_difference([1.0, bad], [2.0, 2.0])
        assert not math.isfinite(result.mean)
        assert not result.excludes_zero


def test_summary():
    assert summary([1.0, 2.0, 3.0, 4.0]).std == pytest.approx(math.sqrt(5 / 3), rel=1e-12)
    assert (summary([2.0]).mean, summary([2.0]).n, math.isnan(summary([2.0]).std)) == (2.0, 1, True)
    with pytest.raises(ValueError, match="at least one number"):
        summary([])


def test_ratio_is_geometric_and_symmetric_under_exchange():
    """The ratio of b to a is the inverse of that of a to b, and so is its interval."""
    a, b = [1.0, 4.0, 2.0], [1.0, 1.0, 1.0]
    forth, back = paired_ratio(a, b), paired_ratio(b, a)
    assert forth.ratio == pytest.approx(2.0, rel=1e-12)
    spread = stats.t.ppf(0.975, 2) * math.log(2) / math.sqrt(3)
    assert forth.high == pytest.approx(2 * math.exp(spread), rel=1e-9)
    assert back.ratio == pytest.approx(1 / forth.ratio)
    assert (back.low, back.high) == (pytest.approx(1 / forth.high), pytest.approx(1 / forth.low))


def test_ratio_of_a_single_pair():
    result = paired_ratio([3.0], [2.0])
    assert (result.ratio, result.low, result.high) == (pytest.approx(1.5), 0.0, math.inf)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_ratio([], [])
    with pytest.raises(ValueError, match=r"`confidence`.*95"):
        paired_difference([1.0, 2.0], [1.0, 3.0], confidence=95)
    with pytest.raises(ValueError, match=r"positive and finite, but got 0\.0"):
        paired_ratio([0.0, 1.0], [1.0, 1.0])


def test_only_common_successful_seeds_are_paired():
    def run(variant: str, seed: int, value: float, setting: str = "main", status: str = "ok") -> RunRecord:
        return RunRecord(setting, variant, seed, status, metrics={"nll": value})

    records = [run("baseline", 0, 1.0), run("baseline", 2, 1.2), run("baseline", 3, 1.3), run("baseline", 4, 1.4)]
    records += [run("x", 2, 0.2), run("x", 0, 0.0), run("x", 1, 0.1), run("x", 3, 0.3, status="failed")]
    records += [RunRecord("main", "x", 4, "ok", metrics={"other": 1.0}), run("x", 2, 9.0, setting="other")]
    assert paired_values(records, "main", "x", "baseline", "nll") == {0: (0.0, 1.0), 2: (0.2, 1.2)}
