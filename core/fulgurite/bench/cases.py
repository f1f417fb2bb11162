# SPDX-License-Identifier: Apache-2.0
"""What is measured, what came out, and what it is held to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

from fulgurite.errors import FulguriteError

Block = Callable[[], float]
"""Measures one block of a variant and returns one number: seconds per step, seconds per call, bytes."""

Unit = Literal["seconds", "bytes"]
Comparison = Literal["ratio", "difference"]


@dataclass(frozen=True)
class Missing:
    """A block for a variant that cannot be measured on this machine, such as a peer that is not installed.

    Args:
        reason: Why not, and what to do; one line for the table.
    """

    reason: str

    def __call__(self) -> NoReturn:
        """Refuse to be measured."""
        raise FulguriteError(self.reason)


@dataclass(frozen=True)
class Estimate:
    """The median of a quantity over rounds, with a distribution-free interval from order statistics.

    Args:
        median: The median.
        low: Lower end of the interval that holds the true median with 95 % confidence; the minimum for fewer than 6 rounds.
        high: Upper end; the maximum for fewer than 6 rounds.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from one value per round."""
        from scipy.stats import binom

        ordered = sorted(values)
        outside = max(1, int(binom.ppf(0.025, len(ordered), 0.5)))
        return cls(statistics.median(ordered), ordered[outside - 1], ordered[-outside])


@dataclass(frozen=True)
class Row:
    """One variant of a case, beside the reference.

    Args:
        variant: Its name.
        values: What it measured, by round.
        reference: What the reference measured in the same rounds.
        missing: Why it measured nothing, if so.
    """

    variant: str
    values: tuple[float, ...]
    reference: tuple[float, ...]
    missing: str | None = None

    @property
    def value(self) -> Estimate:
        """The quantity itself."""
        return Estimate.of(self.values)

    @property
    def difference(self) -> Estimate:
        """Variant minus reference, paired by round."""
        return Estimate.of([value - other for value, other in zip(self.values, self.reference, strict=True)])

    @property
    def ratio(self) -> Estimate:
        """Variant divided by reference, paired by round."""
        return Estimate.of([value / other for value, other in zip(self.values, self.reference, strict=True)])


@dataclass(frozen=True)
class Target:
    """What a variant is held to.

    Args:
        variant: The variant.
        comparison: What is bounded: its `"ratio"` to the reference, or its `"difference"` from it.
        at_most: Upper bound, in the unit of the case for a difference.
        at_least: Lower bound.

    Raises:
        ValueError: If `comparison` is neither of the two.
    """

    variant: str
    comparison: Comparison
    at_most: float = math.inf
    at_least: float = -math.inf

    def __post_init__(self) -> None:
        if self.comparison not in get_args(Comparison):
            raise ValueError(
                f"Expected `comparison` of Target to be 'ratio' or 'difference', but got {self.comparison!r}."
            )

    def judge(self, row: Row) -> Literal["met", "missed", "unclear", "not measured"]:
        """Return whether the whole interval lies within the bounds, wholly outside, or across one of them."""
        if row.missing is not None:
            return "not measured"
        estimate: Estimate = getattr(row, self.comparison)
        if self.at_least <= estimate.low and estimate.high <= self.at_most:
            return "met"
        return "missed" if estimate.high < self.at_least or estimate.low > self.at_most else "unclear"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: One line for the head of the table.
        blocks: Builds the variants, by name, when the case is run: data and models are not made before. One that this
            machine cannot measure is `Missing`, and stands in the table with the reason.
        reference: The variant that the others are compared with.
        targets: What some of them are held to.
        unit: What the blocks measure.
        rounds: Rounds unless the caller says otherwise; one is enough for a count of bytes.
    """

    name: str
    blocks: Callable[[], Mapping[str, Block]]
    reference: str
    targets: tuple[Target, ...] = ()
    unit: Unit = "seconds"
    rounds: int = 60


@dataclass(frozen=True)
class Bench:
    """The cases of a plugin: what `Plugin.bench` names.

    Args:
        cases: The cases, in the order in which they are run.
    """

    cases: tuple[Case, ...]
