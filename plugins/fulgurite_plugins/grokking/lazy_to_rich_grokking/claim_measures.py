# SPDX-License-Identifier: Apache-2.0
"""What the claim compares beside the monitor's own measures: losses relative to other losses."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from fulgurite_plugins.grokking.lazy_to_rich_grokking.monitor import LazyRichMonitor


class Ratios(pl.Callback):
    """Log ratios of the losses that a `LazyRichMonitor` of a centred network has measured, at the end of every epoch.

    `ratio/test` and `ratio/train` are relative to the loss of the network at the start, whose output is zero;
    `ratio/test_to_kernel_regression` to that of the best solution with the first kernel; `ratio/test_to_train_when_learnt`
    is that of the test loss to the training loss when the latter first is a tenth of its start.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log them."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        history = next(c for c in callbacks if isinstance(c, LazyRichMonitor)).history
        start, now = history[0], history[-1]
        pl_module.log("ratio/train", now["train_loss"] / start["train_loss"])
        pl_module.log("ratio/test", now["val_loss"] / start["val_loss"])
        pl_module.log("ratio/test_to_kernel_regression", now["val_loss"] / now["kernel_regression_val_loss"])
        learnt = next((m for m in history if m["train_loss"] <= 0.1 * start["train_loss"]), None)
        if learnt is not None:
            relative = {name: learnt[name] / start[name] for name in ("train_loss", "val_loss")}
            pl_module.log("ratio/test_to_train_when_learnt", relative["val_loss"] / relative["train_loss"])
