# SPDX-License-Identifier: Apache-2.0
"""A weight that changes over training: the one type that every plugin uses for such arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["constant", "linear", "cosine", "warmup"]
Unit = Literal["epoch", "step"]


@dataclass(frozen=True)
class Schedule:
    r"""A scalar weight as a function of training progress.

    With $f = t / T$, where $t = 1, \dots, T$ counts epochs (or optimizer steps), the weight $w$ is

    - `constant`: $w = \text{end}$;
    - `linear`: $w = \text{start} + (\text{end} - \text{start}) f$;
    - `cosine`: $w = \text{start} + (\text{end} - \text{start}) (1 - \cos \pi f) / 2$;
    - `warmup`: linear until $f = \text{warmup}$, then constant at `end`.

    Args:
        end: The weight at the end of training.
        start: The weight that the ramp begins from, at $t = 0$.
        shape: The form of the ramp.
        unit: What $t$ counts: epochs or optimizer steps.
        warmup: The fraction of training that a `warmup` takes, in (0, 1].

    Raises:
        ValueError: If a weight is not finite, `shape` or `unit` is unknown, or `warmup` is outside (0, 1].

    Example:
        >>> [Schedule(0.8).at(epoch, 4) for epoch in (1, 2, 3, 4)]
        [0.2, 0.4, 0.6000000000000001, 0.8]
    """

    end: float
    start: float = 0.0
    shape: Shape = "linear"
    unit: Unit = "epoch"
    warmup: float = 0.1

    def __post_init__(self) -> None:
        for name in ("end", "start"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"Expected `{name}` of Schedule to be a finite number, but got {value!r}.")
        if self.shape not in get_args(Shape):
            raise ValueError(f"Expected `shape` of Schedule to be one of {get_args(Shape)}, but got {self.shape!r}.")
        if self.unit not in get_args(Unit):
            raise ValueError(f"Expected `unit` of Schedule to be one of {get_args(Unit)}, but got {self.unit!r}.")
        if not 0.0 < self.warmup <= 1.0:
            raise ValueError(f"Expected `warmup` of Schedule to be in (0, 1], but got {self.warmup!r}.")

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """Return a weight that never changes."""
        return cls(end=value, start=value, shape="constant")

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest weight that the schedule takes."""
        if self.shape == "constant":
            return (self.end, self.end)
        return (min(self.start, self.end), max(self.start, self.end))

    def at(self, position: float, total: float) -> float:
        """Return the weight at `position` of `total` (both in the schedule's unit).

        Positions outside [0, total] count as its ends, so that a run that goes on longer keeps the final weight.
        """
        if self.shape == "constant":
            return self.end
        fraction = min(max(position / total, 0.0), 1.0) if total > 0 else 1.0
        if self.shape == "cosine":
            fraction = (1.0 - math.cos(math.pi * fraction)) / 2.0
        elif self.shape == "warmup":
            fraction = min(fraction / self.warmup, 1.0)
        return self.start + (self.end - self.start) * fraction
