# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes and how much memory training takes, measured inside a running training."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

_WARM_UP = 10
"""Steps that are left out of the median of a training that has no second epoch."""


class StepTimer(pl.Callback):
    """Time the training steps of a fit; validation is not counted.

    A step, one batch, lasts from its start to the start of the next, so that loading the batch and everything that
    Lightning and callbacks do for it is part of it; the last step before a validation or the end of an epoch lasts to
    its own end. On an accelerator nothing waits for the device in a step: the device is synchronised where an uninterrupted
    sequence of steps begins and ends, and each of its steps counts with the mean.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._first_epoch: int | None = None
        self._closed_seconds = 0.0
        self._warm_up = array("d")
        self._steps = array("d")
        self._starts: list[float] = []
        self._end = 0.0

    @property
    def median_seconds(self) -> float | None:
        """Median seconds of a step after the first epoch of the fit; of a single epoch, without its first ten steps.

        With ten steps or fewer in all, of all steps; None before the first.
        """
        values = self._steps or self._warm_up[_WARM_UP:] or self._warm_up
        return statistics.median(values) if values else None

    @property
    def training_seconds(self) -> float:
        """Seconds spent in training steps so far."""
        return self._closed_seconds + (max(0.0, self._end - self._starts[0]) if self._starts else 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier fit."""
        self._reset()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the start of a step."""
        if self._first_epoch is None:
            self._first_epoch = trainer.current_epoch
        if not self._starts:
            _synchronize(pl_module.device)
        self._starts.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the end of a step; separate the warm-up from what follows."""
        self._end = time.perf_counter()
        if trainer.current_epoch == self._first_epoch and len(self._warm_up) + len(self._starts) == _WARM_UP:
            self._close(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._close(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._close(trainer, pl_module)

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End an uninterrupted sequence of steps."""
        if not self._starts:
            return
        on_device = pl_module.device.type != "cpu"
        if on_device:
            _synchronize(pl_module.device)
            self._end = time.perf_counter()
        seconds, count = self._end - self._starts[0], len(self._starts)
        self._closed_seconds += seconds
        target = self._warm_up if trainer.current_epoch == self._first_epoch else self._steps
        if on_device:
            target.extend([seconds / count] * count)
        else:
            target.extend(after - before for before, after in pairwise([*self._starts, self._end]))
        self._starts.clear()


def reset_peak_memory(device: torch.device) -> None:
    """Make `peak_memory` count from here on, where the system can: on CUDA, and for the process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: what torch has allocated on a CUDA device, else what was resident of the process.

    The resident memory of a process holds the interpreter, the libraries and whatever a forked process has inherited from
    its parent; only its growth over a training says something about that training. None on a system that does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
