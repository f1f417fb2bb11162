# SPDX-License-Identifier: Apache-2.0
"""The component."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl

Unit = Literal["batch", "epoch"]


class Counter(pl.Callback):
    """Count batches.

    Args:
        every: Report after so many batches.
        unit: What is counted: batches
            or epochs.
        names (list[str]): Names of the counters.
    """

    def __init__(self, every: int, unit: Unit = "batch", names: object = (), **options: object) -> None:
        self.every = every
        self.unit = unit
        self.names = names
        self.options = options
        self.seen = 0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
