# SPDX-License-Identifier: Apache-2.0
"""What happens inside the process of one run: build, train, test, record."""

from __future__ import annotations

import copy
import hashlib
import inspect
import shutil
import site
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from fulgurite import spec
from fulgurite.cli.train import FulguriteCLI, assemble
from fulgurite.errors import FulguriteError
from fulgurite.experiment.plan import Run
from fulgurite.records import CurvePoint, RunRecord
from fulgurite.timing import StepTimer, peak_memory, reset_peak_memory

Report = Callable[[int, int | None], None]
"""Told the epoch that begins, counted from 1, and the planned number of epochs."""

_DROPPED = ("ProgressBar", "ModelSummary")
"""Callbacks of a configuration that only write to a terminal, by the end of their class names."""


class Recorder(pl.Callback):
    """Keep every scalar that training and validation log, once per epoch in which it is new.

    Values are read when an epoch is over: after all hooks of its end, so that nothing that is logged there is missed, and
    without waiting for the device in a step.

    Args:
        timer: Says how long training has lasted.
        report: Called when an epoch begins.
    """

    def __init__(self, timer: StepTimer, report: Report) -> None:
        self.timer = timer
        self.report = report
        self.curves: dict[str, list[CurvePoint]] = {}
        self._last: dict[str, Tensor] = {}
        self._epoch: int | None = None
        self._step = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the epoch that is over."""
        self._record(trainer)
        self._epoch = trainer.current_epoch
        bounded = trainer.max_epochs is not None and trainer.max_epochs > 0
        self.report(trainer.current_epoch + 1, trainer.max_epochs if bounded else None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how far training has come."""
        self._step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the last epoch."""
        self._record(trainer)

    def _record(self, trainer: pl.Trainer) -> None:
        if self._epoch is None:
            return
        for name, value in trainer.callback_metrics.items():
            if self._last.get(name) is value:  # Lightning keeps the value of the last validation until the next
                continue
            self._last[name] = value
            point = CurvePoint(self._step, self._epoch, self.timer.training_seconds, float(value))
            self.curves.setdefault(name, []).append(point)


def train(run: Run, work: Path, fingerprint: str, report: Report) -> RunRecord:
    """Train and test one run in this process.

    Args:
        run: The run.
        work: Folder of the run; removed when it has succeeded.
        fingerprint: The hash of what determines the run, as it was when the comparison was checked.
        report: Called when an epoch begins.

    Raises:
        FulguriteError: If the user's code has changed since, or the parameters are not finite when training has ended.
    """
    began = time.perf_counter()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    timer = StepTimer()
    recorder = Recorder(timer, report)
    cli = _build(run, work, [timer, recorder])
    if run.fingerprint(_hash_own_code(cli, without=[timer, recorder])) != fingerprint:
        raise FulguriteError(
            "The code of the model, the data or a callback has changed since the comparison was started. Give the same "
            "command again: it runs what the change concerns."
        )
    trainer, module, datamodule = cli.trainer, cli.model, cli.datamodule
    device = trainer.strategy.root_device
    reset_peak_memory(device)
    before = peak_memory(device)
    trainer.fit(module, datamodule=datamodule, ckpt_path=cli.config.get("ckpt_path"))
    memory = peak_memory(device)
    if memory is not None and before is not None and device.type != "cuda":
        memory -= before
    _check_finite(module)
    metrics = {name: points[-1].value for name, points in recorder.curves.items()}
    if _has_test(module, datamodule):
        trainer.test(module, datamodule=datamodule, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    shutil.rmtree(work, ignore_errors=True)
    return RunRecord(
        *run.key,
        status="ok",
        metrics=metrics,
        curves={name: tuple(points) for name, points in recorder.curves.items()},
        step_seconds=timer.median_seconds,
        seconds=time.perf_counter() - began,
        peak_memory=memory,
        fingerprint=fingerprint,
    )


def check(runs: Iterable[Run], work: Path) -> tuple[dict[tuple[str, str], str], int]:
    """Build every variant once, without training.

    Returns:
        A hash of the user's code by setting and variant, and the number of CUDA devices that the runs can be spread over;
        0 if none of them trains on CUDA.

    Raises:
        FulguriteError: If a configuration or an addition is wrong; the message says what and where.
    """
    sources: dict[tuple[str, str], str] = {}
    devices = 0
    for run in runs:
        if (run.setting, run.variant) not in sources:
            cli = _build(run, work, [])
            trainer = cli.trainer
            if trainer.strategy.launcher is not None:
                raise FulguriteError(
                    f"A comparison trains every run in one process, but the configuration asks for "
                    f"{type(trainer.strategy).__name__} in {trainer.world_size} processes. Set trainer.devices to 1 and "
                    f"trainer.strategy to auto."
                )
            sources[run.setting, run.variant] = _hash_own_code(cli)
            if trainer.strategy.root_device.type == "cuda":
                devices = torch.cuda.device_count()
    return sources, devices


def _build(run: Run, work: Path, callbacks: list[pl.Callback]) -> FulguriteCLI:
    additions = [component for text in run.add for component in spec.build_all(text)]
    for component in additions:
        if not callable(getattr(component, "on_train_batch_start", None)):
            raise FulguriteError(
                f"Expected an addition to be a callback such as PSKD, but {type(component).__name__} is none and cannot "
                f"be put among the trainer's callbacks."
            )
    cli = assemble(quiet(run.config, work), callbacks=[*additions, *callbacks], seed=run.seed)
    for checkpoint in cli.trainer.checkpoint_callbacks:
        if hasattr(checkpoint, "dirpath"):
            checkpoint.dirpath = str(work / "checkpoints")
    return cli


def quiet(config: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Return the configuration without anything that writes to a terminal or outside `work`.

    Checkpoints are written only if the configuration has a callback for them; loggers are replaced by one that keeps
    nothing, so that code which uses `self.logger` works.
    """
    result = copy.deepcopy(dict(config))
    trainer = result["trainer"] = dict(result.get("trainer") or {})
    given = trainer.get("callbacks") or []
    given = [given] if isinstance(given, str | Mapping) else list(given)
    names = [item if isinstance(item, str) else str(item.get("class_path", "")) for item in given]
    trainer["callbacks"] = [item for item, name in zip(given, names, strict=True) if not name.endswith(_DROPPED)]
    trainer |= {
        "logger": {"class_path": "lightning.pytorch.loggers.logger.DummyLogger"},
        "default_root_dir": str(work),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(name.endswith("Checkpoint") for name in names),
    }
    return result


def _has_test(module: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> bool:
    if not is_overridden("test_step", module):
        return False
    return is_overridden("test_dataloader", datamodule if datamodule is not None else module)


def _check_finite(module: pl.LightningModule) -> None:
    bad = [name for name, value in module.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        raise FulguriteError(
            f"Training diverged: {len(bad)} of {sum(1 for _ in module.parameters())} parameters are not finite, "
            f"{bad[0]} among them."
        )


def _hash_own_code(cli: FulguriteCLI, without: Iterable[pl.Callback] = ()) -> str:
    """Hash the files that define the classes of model, data and callbacks; installed packages have versions instead."""
    callbacks = [callback for callback in cli.trainer.callbacks if callback not in without]  # type: ignore[attr-defined]
    objects: list[Any] = [*cli.model.modules(), cli.datamodule, *callbacks]
    installed = [*site.getsitepackages(), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]
    files = set()
    for cls in {base for found in objects for base in type(found).__mro__}:
        try:
            file = inspect.getsourcefile(cls)
        except (TypeError, OSError):
            continue
        if file and Path(file).exists() and not any(Path(file).is_relative_to(folder) for folder in installed):
            files.add(file)
    if not files:
        return ""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()
