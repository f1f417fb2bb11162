# SPDX-License-Identifier: Apache-2.0
"""Short inner trainings of copies of the user's module, to score examples before the run that trains on some of them."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from fulgurite import distributed
from fulgurite.errors import RefusedError
from fulgurite.quiet import quiet
from fulgurite.teachers import FrozenCopy
from fulgurite_plugins.data_selection.data_diet.callbacks import ScoreExamples
from fulgurite_plugins.data_selection.data_diet.files import Scores, average, describe_dataset, load_scores, save_scores
from fulgurite_plugins.data_selection.data_diet.forgetting import ForgettingEvents
from fulgurite_plugins.data_selection.data_diet.scoring import Scoring, batch_size_of

Reinitialise = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class InnerRuns:
    """What is to be trained and scored.

    Args:
        scoring: Its one name may also be `"forgetting"`.
        epoch: After how many epochs.
        runs: Number of trainings, which differ in initial weights and order.
        seed: Seeds them.
        reinit: Draws new initial weights; None calls `reset_parameters` of every layer.
        directory: Where the scores of finished runs are, so that a later attempt finds them; None for a folder that is
            removed when all are finished.
    """

    scoring: Scoring
    epoch: float
    runs: int
    seed: int
    reinit: Reinitialise | None
    directory: str | None


def template_of(module: pl.LightningModule) -> pl.LightningModule:
    """Return a copy of a module before anything is done to it: what the inner runs train."""
    copied = FrozenCopy(module, "train").module
    for own, theirs in zip(copied.parameters(), module.parameters(), strict=True):
        own.requires_grad_(theirs.requires_grad)
    for name, mode in {name: child.training for name, child in module.named_modules()}.items():
        copied.get_submodule(name).training = mode
    return copied


def inner_scores(
    trainer: pl.Trainer, template: pl.LightningModule, loader: DataLoader[Any], inner: InnerRuns
) -> Scores:
    """Return the mean of the scores of all inner runs; ranks share the runs among them, and all get the result.

    Each run trains a copy of `template` with its own step, optimizer and schedule on the whole training set, on one device,
    with the global batch size of the trainer; its callbacks and loggers take no part. The global random streams stay where
    they are.

    Args:
        trainer: The trainer whose run is yet to begin.
        template: The module as the user made it.
        loader: The training loader, not yet restricted.
        inner: What is to be run.

    Raises:
        RefusedError: If layers cannot draw new initial weights, or scores are not finite numbers.
    """
    key = _key(trainer, template, loader, inner)
    root = Path(inner.directory) if inner.directory else Path(trainer.default_root_dir) / "scores" / f"unfinished-{key}"
    files = [root / f"{inner.scoring.names[0]}-{key}-run{run}.safetensors" for run in range(inner.runs)]
    rank, world = distributed.world()
    mine = files[rank::world]
    with isolate_rng():
        # In an order of one's own, so that two processes that need the same runs share the work.
        while missing := [file for file in mine if not file.exists()]:
            _train_one(trainer, template, loader, inner, files.index(random.SystemRandom().choice(missing)), files)
    distributed.gather_objects(None)  # all files are there
    parts = [load_scores(file) for file in files]
    for number, part in enumerate(parts):
        (name, values), *_ = part.values.items()
        if bool(values.isnan().any()):
            raise RefusedError(
                f"{inner.scoring.user}: inner run {number} gave NaN as {name} of {int(values.isnan().sum())} examples, the "
                f"first of them {values.isnan().nonzero()[0].item()}: it diverged, or never met them. Lower the learning "
                f"rate, or score later."
            )
    result = average(parts)
    distributed.gather_objects(None)  # all ranks have read them
    if not inner.directory and rank == 0:
        shutil.rmtree(root, ignore_errors=True)
    return result


def _train_one(
    trainer: pl.Trainer,
    template: pl.LightningModule,
    loader: DataLoader[Any],
    inner: InnerRuns,
    run: int,
    files: list[Path],
) -> None:
    """Train and score one run, and write its file."""
    seed = inner.seed * 1_000_003 + run
    _seed(seed)
    module = template_of(template)
    with tempfile.TemporaryDirectory() as folder:
        steps = [_Reinitialised(inner.reinit, seed, inner.scoring.user), *_scorers(inner, folder)]
        data = _inner_loader(loader, trainer.world_size)
        fitting = _inner_trainer(trainer, steps, folder, inner.epoch, len(data))
        with quiet():
            fitting.fit(module, data)
        (found,) = Path(folder).rglob("*.safetensors")
        scores = load_scores(found)
    (values,) = scores.values.values()
    provenance = {**scores.provenance, "runs": [{**scores.provenance["runs"][0], "seed": seed}]}
    save_scores(
        files[run],
        Scores({f"{inner.scoring.names[0]}@{inner.epoch:g}": values}, scores.targets, _renamed(provenance, inner)),
    )


def _renamed(provenance: Mapping[str, Any], inner: InnerRuns) -> Mapping[str, Any]:
    """Forgetting events count whole epochs."""
    if "presentations" not in provenance:
        return provenance
    (number,) = provenance["presentations"].values()
    return {**provenance, "presentations": {f"{inner.scoring.names[0]}@{inner.epoch:g}": number}}


def _scorers(inner: InnerRuns, folder: str) -> list[pl.Callback]:
    scoring = inner.scoring
    if scoring.names == ("forgetting",):
        return [ForgettingEvents(directory=folder, criterion=scoring.criterion), _Stop(inner.epoch)]
    return [
        ScoreExamples(
            scoring.names,
            (inner.epoch,),
            scoring.dataset,
            scoring.parameters,
            scoring.chunk,
            scoring.augmentations,
            folder,
            stop=True,
            criterion=scoring.criterion,
        ),
        *([_Stop(0)] if inner.epoch == 0 else []),
    ]


def _inner_trainer(
    trainer: pl.Trainer, callbacks: list[pl.Callback], folder: str, epoch: float, batches: int
) -> pl.Trainer:
    """Return a quiet trainer like `trainer`, on one device of it, that trains long enough to be scored."""
    device = trainer.strategy.root_device
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is not None and 0 <= epochs < epoch:
        epochs = math.ceil(epoch)
    if 0 <= steps < epoch * math.ceil(batches / trainer.accumulate_grad_batches):
        steps = -1
    return pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.index is None else [device.index],
        precision=trainer.precision,
        max_epochs=epochs,
        max_steps=steps,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _inner_loader(loader: DataLoader[Any], world: int) -> DataLoader[Any]:
    """Return a loader of the whole training set with the global batch size, in an order from the global generator."""
    return DataLoader(
        loader.dataset,
        batch_size_of(loader) * world,
        shuffle=not isinstance(loader.sampler, SequentialSampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
    )


class _Reinitialised(pl.Callback):
    """Gives the module new initial weights when training begins, also those that `configure_model` made."""

    def __init__(self, reinit: Reinitialise | None, seed: int, user: str) -> None:
        self.reinit = reinit
        self.seed = seed
        self.user = user

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _seed(self.seed)
        with torch.no_grad():
            (self.reinit or _reset)(pl_module)
        if self.reinit is None:
            return
        for name, parameter in pl_module.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise RefusedError(f"{self.user}: `reinit` left {name} with values that are not finite.")


def reset_or_refuse(module: nn.Module, user: str) -> None:
    """Refuse a module with a layer that cannot draw new initial weights.

    Raises:
        RefusedError: Naming the layer.
    """
    for name, child in module.named_modules():
        if child._parameters and _resetter(child) is None and any(p is not None for p in child._parameters.values()):
            raise RefusedError(
                f"{user} trains copies of the model from new initial weights, but {name or 'the module'} "
                f"({type(child).__name__}) has parameters and no `reset_parameters`. Give it that method, or pass "
                f"`reinit`, a function that draws new initial weights of a module in place."
            )


def _reset(module: nn.Module) -> None:
    reset_or_refuse(module, "PruneTrainingSet")
    for child in module.modules():
        reset = _resetter(child)
        if reset is not None:
            reset()


def _resetter(module: nn.Module) -> Callable[[], Any] | None:
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


class _Stop(pl.Callback):
    """Ends training after so many epochs."""

    def __init__(self, epoch: float) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.epoch == 0:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


def _seed(seed: int) -> None:
    """Seed the global generators; unlike `seed_everything` this leaves the environment alone."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def _key(trainer: pl.Trainer, template: pl.LightningModule, loader: DataLoader[Any], inner: InnerRuns) -> str:
    """Hash what determines the scores of a run, as far as it can be seen."""
    scoring = inner.scoring
    shapes = [(name, list(p.shape), p.requires_grad) for name, p in template.named_parameters()]
    plain = {
        k: v for k, v in vars(template).items() if isinstance(v, int | float | str | bool) and not k.startswith("_")
    }
    try:
        source = inspect.getsource(type(template))
    except (OSError, TypeError):
        source = ""
    optimizers = [
        {k: repr(v) for k, v in group.items() if k != "params"} for o in trainer.optimizers for group in o.param_groups
    ]
    schedules = [type(config.scheduler).__qualname__ for config in trainer.lr_scheduler_configs]
    facts = [
        describe_dataset(loader.dataset), batch_size_of(loader) * trainer.world_size, loader.drop_last, shapes, plain,
        repr(dict(template.hparams)), source, optimizers, schedules, trainer.max_epochs, trainer.max_steps,
        trainer.accumulate_grad_batches, trainer.gradient_clip_val, str(trainer.precision), scoring.names,
        repr(scoring.parameters), scoring.augmentations, inner.epoch, inner.seed,
        None if inner.reinit is None else getattr(inner.reinit, "__qualname__", ""),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, default=repr).encode()).hexdigest()[:12]
