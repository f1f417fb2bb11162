# SPDX-License-Identifier: Apache-2.0
"""Which examples are in the batch, and what is remembered or decided about each."""

from fulgurite.samples.fixed import FixedBatches
from fulgurite.samples.holdout import EndlessStream, HoldOut, hold_out
from fulgurite.samples.memory import SampleMemory
from fulgurite.samples.subset import TrainingSubset
from fulgurite.samples.tracker import SampleTracker

__all__ = ["EndlessStream", "FixedBatches", "HoldOut", "SampleMemory", "SampleTracker", "TrainingSubset", "hold_out"]
