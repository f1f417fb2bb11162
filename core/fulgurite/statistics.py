# SPDX-License-Identifier: Apache-2.0
"""Paired comparison of runs that share a seed: means, spreads and Student's t intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fulgurite.records import RunRecord, select

Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1 in the denominator; nan for a single value)."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """The mean of a - b over pairs, with its confidence interval.

    Args:
        mean: Mean of the differences.
        low: Lower end of the interval; minus infinity for a single pair.
        high: Upper end of the interval; infinity for a single pair.
        standard_error: Sample standard deviation of the differences divided by sqrt(n); nan for a single pair.
        wins: Pairs in which a is strictly better than b.
        n: Number of pairs.
        confidence: Confidence level of the interval.
        better: Which values counted as better in `wins`.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    wins: int
    n: int
    confidence: float
    better: Direction

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class PairedRatio:
    """The geometric mean of a / b over pairs, with an interval that is symmetric on the log scale.

    Args:
        ratio: Geometric mean of the ratios.
        low: Lower end of the interval; 0 for a single pair.
        high: Upper end of the interval; infinity for a single pair.
        n: Number of pairs.
        confidence: Confidence level of the interval.
    """

    ratio: float
    low: float
    high: float
    n: int
    confidence: float


def summary(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation of `values`.

    Raises:
        ValueError: If there is no value.
    """
    if not len(values):
        raise ValueError("Expected `values` to hold at least one number, but got none.")
    n, mean = len(values), _mean(values)
    if n == 1:
        return Summary(mean, math.nan, 1)
    return Summary(mean, math.sqrt(_mean([(v - mean) * (v - mean) for v in values]) * n / (n - 1)), n)


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, better: Direction = "lower"
) -> PairedDifference:
    """Return the mean of a - b over pairs with its Student's t interval, and in how many pairs a is better.

    The interval assumes that the differences are independent and roughly normal. A single pair has an infinite
    interval; differences that are all equal have an interval of width zero.

    Args:
        a: Values of one variant, one per seed.
        b: Values of the reference for the same seeds, in the same order.
        confidence: Confidence level, between 0 and 1.
        better: Whether a wins a pair by being lower or by being higher; equal values are no win.

    Raises:
        ValueError: If the lengths differ or are zero, or `confidence` does not lie between 0 and 1.
    """
    _check_pairs(a, b)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, half, error = _t_interval(differences, confidence)
    wins = sum(d < 0 if better == "lower" else d > 0 for d in differences)
    return PairedDifference(mean, mean - half, mean + half, error, wins, len(differences), confidence, better)


def paired_ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> PairedRatio:
    """Return the geometric mean of a / b over pairs with a Student's t interval on the log scale.

    Args:
        a: Positive values of one variant, for instance seconds per step, one per seed.
        b: Positive values of the reference for the same seeds, in the same order.
        confidence: Confidence level, between 0 and 1.

    Raises:
        ValueError: If the lengths differ or are zero, a value is not positive and finite, or `confidence` does not
            lie between 0 and 1.
    """
    _check_pairs(a, b)
    bad = [v for v in (*a, *b) if not (math.isfinite(v) and v > 0)]
    if bad:
        raise ValueError(f"Expected the values of a ratio to be positive and finite, but got {bad[0]!r}.")
    mean, half, _ = _t_interval([math.log(x) - math.log(y) for x, y in zip(a, b, strict=True)], confidence)
    high = math.exp(mean + half) if mean + half < 700 else math.inf
    return PairedRatio(math.exp(mean), math.exp(mean - half), high, len(a), confidence)


def paired_values(
    records: Iterable[RunRecord], setting: str, variant: str, reference: str, metric: str
) -> dict[int, tuple[float, float]]:
    """Return, by seed, the final value of `metric` of `variant` and of `reference`, for seeds where both succeeded."""
    records = list(records)
    ours, theirs = select(records, setting, variant), select(records, setting, reference)
    return {
        seed: (ours[seed].metrics[metric], theirs[seed].metrics[metric])
        for seed in sorted(ours.keys() & theirs.keys())
        if metric in ours[seed].metrics and metric in theirs[seed].metrics
    }


def _t_interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Return the mean, half the width of its interval and its standard error."""
    if not 0 < confidence < 1:
        raise ValueError(f"Expected `confidence` to lie between 0 and 1, but got {confidence!r}.")
    if len(values) == 1:
        return values[0], math.inf, math.nan
    from scipy.special import stdtrit  # the quantile of Student's t, without the import time of scipy.stats

    described = summary(values)
    error = described.std / math.sqrt(len(values))
    return described.mean, float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * error, error


def _mean(values: Sequence[float]) -> float:
    if not all(math.isfinite(v) for v in values):
        return sum(values) / len(values)
    return math.fsum(values) / len(values)


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"Expected `a` and `b` to be pairs, at least one, but got {len(a)} and {len(b)} values.")
