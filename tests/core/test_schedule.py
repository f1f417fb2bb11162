# SPDX-License-Identifier: Apache-2.0
"""The course of a weight over training, against its closed forms."""

from __future__ import annotations

import math

import pytest

from fulgurite import Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.constant(0.3), [0.3] * 5),
        (Schedule(0.8), [0.0, 0.2, 0.4, 0.6, 0.8]),
        (Schedule(0.2, start=1.0), [1.0, 0.8, 0.6, 0.4, 0.2]),
        (Schedule(2.0, start=1.0, shape="cosine"), [1.5 - 0.5 * math.cos(math.pi * f / 4) for f in range(5)]),
        (Schedule(1.0, shape="warmup", warmup=0.5), [0.0, 0.5, 1.0, 1.0, 1.0]),
        (Schedule(1.0, start=0.5, shape="warmup", warmup=1.0), [0.5, 0.625, 0.75, 0.875, 1.0]),
    ],
)
def test_closed_forms(schedule, expected):
    assert [schedule.at(t, 4) for t in range(5)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "warmup"])
def test_positions_outside_count_as_the_ends_and_range_bounds_the_weights(shape):
    schedule = Schedule(0.25, start=0.75, shape=shape)
    low, high = schedule.range
    weights = [schedule.at(t / 10, 7) for t in range(-20, 100)]
    assert low == min(weights)
    assert high == max(weights)
    assert schedule.at(8, 7) == schedule.at(7, 7) == 0.25
    assert schedule.at(1, 0) == 0.25


def test_length_without_end_keeps_the_start():
    assert Schedule(1.0, start=0.5).at(100, math.inf) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": math.nan}, "`end` of Schedule to be a finite number, but got nan"),
        ({"end": "1"}, "`end`"),
        ({"end": 1, "start": math.inf}, "`start`"),
        ({"end": 1, "shape": "linaer"}, "`shape` of Schedule.*'linaer'"),
        ({"end": 1, "unit": "batch"}, "`unit` of Schedule.*'batch'"),
        ({"end": 1, "warmup": 0.0}, r"`warmup` of Schedule to be in \(0, 1\]"),
        ({"end": 1, "warmup": 1.5}, "`warmup`"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)
