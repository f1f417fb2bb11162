# SPDX-License-Identifier: Apache-2.0
"""The time of a step of a method that does more in some steps than in others."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl

from fulgurite.bench import Classifier, Training, batches, trainers


class Slow(pl.Callback):
    """Takes 200 ms in every second step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.2 * (batch_idx % 2))


def test_block_counts_whole_cycles():
    def seconds(cycle: int) -> float:
        training = Training(lambda: Classifier((4, 4, 3)), batches(160, 4, 3, 8), steps=2, cycle=cycle)
        block: Any = trainers(training, {"slow": lambda: [Slow()]})["slow"]
        try:
            block()
            return min(block() for _ in range(2))
        finally:
            block.close()

    assert 0.095 < seconds(2) < 0.195
