# SPDX-License-Identifier: Apache-2.0
"""The trainers of the kit: quiet, on the CPU, with the strategy and precision that were asked for, and tidied up after."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import distributed as dist

from fulgurite import lightning_adapter
from fulgurite.errors import FulguriteError

_LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables that Lightning's launcher sets, and takes at the next training for those of a cluster."""


def make_trainer(callbacks: Sequence[Any] = (), **arguments: Any) -> pl.Trainer:
    """Return a quiet CPU trainer of two epochs."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "default_root_dir": _folder().name,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with contained():
        return pl.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder for what components write, which would else be the one in which the user called the kit."""
    return tempfile.TemporaryDirectory()


@contextmanager
def contained() -> Iterator[list[str]]:
    """Keep messages out of the tables, and what a distributed strategy of one process leaves out of the next training.

    Yields the list that fills with the warnings of the block, also with those that are logged.
    """
    said = _Said()
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    present = {name: os.environ.get(name) for name in _LAUNCHED}
    grouped, excepthook = dist.is_initialized(), sys.excepthook
    logging.root.addHandler(said)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = said.warned
            yield said.texts
    finally:
        logging.root.removeHandler(said)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not grouped and dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()
            sys.excepthook = excepthook  # torch replaces it with the group
        for name, value in present.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class _Said(logging.Handler):
    """Writes down what is warned of, and shows nothing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.texts.append(str(message))


def trainer_settings(strategy: str | None, precision: str | None) -> dict[str, Any]:
    """Return the arguments with which every trainer of the kit is made.

    Raises:
        FulguriteError: If the kit cannot train so: an unknown name, a precision or a strategy that needs another device.
    """
    given = {"strategy": strategy, "precision": precision}
    settings = {name: value for name, value in given.items() if value not in (None, "auto", "32-true", "32")}
    if precision is not None and precision.startswith("16"):
        raise FulguriteError(
            f"The kit trains on the CPU, and precision={precision!r} needs a GPU. Use bf16-mixed; the loss scale of "
            f"16-mixed and the steps that it skips are simulated by the checks fp16_loss_scale and fp16_skipped_step."
        )
    try:
        trainer = make_trainer(**settings)
    except Exception as error:
        said = " ".join(str(error).split())
        raise FulguriteError(
            f"The kit cannot train with {_words(settings)}: {said} Strategies of the kit: auto, ddp, "
            f"ddp_find_unused_parameters_true. Precisions: 32-true, 64-true, bf16-mixed, bf16-true."
        ) from error
    family = lightning_adapter.strategy_name(trainer)
    launcher = type(trainer.strategy.launcher).__name__
    if family not in ("single", "ddp") or "MultiProcessing" in launcher:
        raise FulguriteError(
            f"The kit cannot train with {_words(settings)}, which shards the model or starts processes of its own. Use "
            f"auto, ddp or ddp_find_unused_parameters_true; the check sharded_parameters tries a sharded model on two ranks."
        )
    # The batches of a check are the same under every strategy: Lightning's sampler would draw them in another order.
    return {**settings, "use_distributed_sampler": False} if family == "ddp" else settings


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
