# SPDX-License-Identifier: Apache-2.0
"""Interleaved, side-by-side measurement of variants: training steps, pure functions, memory.

All variants of a case run in one process, one block each per round, in an order that changes from round to round. What is
compared is paired by round, so that a busy machine slows both sides of a pair; medians over rounds do the rest.

Example:
    >>> rows = interleave(calls({"sum": lambda: sum(range(100)), "len": lambda: len(range(100))}), 6, reference="sum")
    >>> [row.variant for row in rows]
    ['sum', 'len']
"""

from __future__ import annotations

from fulgurite.bench.cases import Bench, Block, Case, Comparison, Estimate, Missing, Row, Target, Unit
from fulgurite.bench.functions import calls, peer
from fulgurite.bench.machine import device, machine
from fulgurite.bench.own import BENCH
from fulgurite.bench.running import interleave, run_case
from fulgurite.bench.training import Callbacks, Training, trainers, training_memory
from fulgurite.bench.workloads import Classifier, batches, convolutional, perceptron

__all__ = [
    "BENCH",
    "Bench",
    "Block",
    "Callbacks",
    "Case",
    "Classifier",
    "Comparison",
    "Estimate",
    "Missing",
    "Row",
    "Target",
    "Training",
    "Unit",
    "batches",
    "calls",
    "convolutional",
    "device",
    "interleave",
    "machine",
    "peer",
    "perceptron",
    "run_case",
    "trainers",
    "training_memory",
]
