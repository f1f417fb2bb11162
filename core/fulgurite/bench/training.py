# SPDX-License-Identifier: Apache-2.0
"""Blocks that time training steps, or count the memory of a training run."""

from __future__ import annotations

import functools
import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fulgurite.bench.cases import Block
from fulgurite.bench.machine import synchronize

Callbacks = Callable[[], Sequence[pl.Callback]]
"""Makes the callbacks of one training run."""


@dataclass(frozen=True)
class Training:
    """What the variants of a case train: everything but the callbacks.

    Args:
        module: Makes the LightningModule.
        loader: Makes the training DataLoader; `batches` makes one that costs next to nothing.
        untimed_epochs: Epochs before the first step that is timed: warm-up, or a method's first epoch that does less.
        steps: Steps of one block.
        cycle: Steps after which a method has done everything that it does in some of them; `steps` are a multiple.
    """

    module: Callable[[], pl.LightningModule]
    loader: Callable[[], DataLoader[Any]]
    untimed_epochs: int = 1
    steps: int = 20
    cycle: int = 1

    def fit(self, callbacks: Sequence[pl.Callback], epochs: int) -> None:
        """Train without logger, checkpoints, progress bar and validation, from a seed that is always the same."""
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module(), self.loader())


def trainers(training: Training, variants: Mapping[str, Callbacks]) -> dict[str, Block]:
    """Return blocks that continue a training run with certain callbacks, and give the seconds of one training step.

    Every variant has a trainer that is paused while the others have their turn, so that blocks can be short: what slows
    the machine for longer than a round slows all variants. A step is timed inside `fit`, from one `on_train_batch_start`
    to the next: all that Lightning and the callbacks do for a batch. A block gives the median of its steps, or cycles; on an
    accelerator, where steps are enqueued and not awaited, their mean between two synchronisations.
    """
    return {name: PausedTraining(training, callbacks) for name, callbacks in variants.items()}


class PausedTraining:
    """A `fit` in a thread of its own, which advances only while its block is measured."""

    def __init__(self, training: Training, callbacks: Callbacks) -> None:
        self._training = training
        self._callbacks = callbacks
        self._timer = _StepTimer(training.untimed_epochs, training.steps, training.cycle)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __call__(self) -> float:
        """Let the training go on for a block; return the seconds of one of its steps."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._fit, daemon=True)
            self._thread.start()
        self._timer.resume.release()
        self._timer.paused.acquire()
        if self._error is not None:
            raise self._error
        return self._timer.seconds

    def close(self) -> None:
        """Let the training end."""
        self._timer.stop = True
        self._timer.resume.release()
        if self._thread is not None:
            self._thread.join()

    def _fit(self) -> None:
        self._timer.resume.acquire()
        try:
            self._training.fit([self._timer, *self._callbacks()], epochs=_UNLIMITED)
        except BaseException as error:
            self._error = error
        finally:
            self._timer.paused.release()


_UNLIMITED = 10_000
"""More epochs than anybody measures; a number, because a method may need the planned length of training."""


class _StepTimer(pl.Callback):
    def __init__(self, untimed_epochs: int, steps: int, cycle: int) -> None:
        self.untimed_epochs = untimed_epochs
        self.steps = steps
        self.cycle = cycle
        self.resume = threading.Semaphore(0)
        self.paused = threading.Semaphore(0)
        self.stop = False
        self.seconds = math.nan
        self._starts: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch < self.untimed_epochs:
            return
        if len(self._starts) == self.steps:
            self._end_block(pl_module.device)
            self.paused.release()
            self.resume.acquire()
            trainer.should_stop = self.stop
        if not self._starts:
            synchronize()
        self._starts.append(time.perf_counter())

    def _end_block(self, device: torch.device) -> None:
        if device.type != "cpu":
            synchronize()
        starts = [*self._starts, time.perf_counter()]
        if device.type == "cpu":
            ends = starts[:: self.cycle]
            self.seconds = statistics.median(after - before for before, after in pairwise(ends)) / self.cycle
        else:
            self.seconds = (starts[-1] - starts[0]) / self.steps
        self._starts.clear()


def training_memory(training: Training, variants: Mapping[str, Callbacks], epochs: int = 2) -> dict[str, Block]:
    """Return blocks that train with certain callbacks, and give the bytes of all tensors alive when training ends."""

    def block(callbacks: Callbacks) -> float:
        counter = _TensorBytes()
        training.fit([*callbacks(), counter], epochs)
        return counter.bytes

    return {name: functools.partial(block, callbacks) for name, callbacks in variants.items()}


class _TensorBytes(pl.Callback):
    bytes = math.nan

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()
        # Of these types alone: the compiler's stand-ins for tensors are tensors too, and have no storage.
        tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter) and not found.is_sparse]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.bytes = float(sum(storages.values()))
