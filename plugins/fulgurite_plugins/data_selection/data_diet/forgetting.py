# SPDX-License-Identifier: Apache-2.0
"""Toneva et al. (2019): how often an example that was classified correctly is classified wrongly the next time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fulgurite import distributed, lightning_adapter
from fulgurite.errors import RefusedError
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.losses import LossCall
from fulgurite.splice import Splice
from fulgurite_plugins.data_selection.data_diet.callbacks import scores_folder, seed_name
from fulgurite_plugins.data_selection.data_diet.files import (
    Scores,
    describe_dataset,
    describe_model,
    describe_run,
    labels_of,
    save_scores,
    versions,
)


class ForgettingEvents(Intervention):
    """Count forgetting events of every training example while it is trained on; no pass is added.

    At each presentation the prediction of the training step itself counts: train mode, augmented input, before the update;
    one that is not finite counts as wrong, and how many were so is logged. An event is a wrong prediction after a correct
    one. Examples that were never correct score infinity, those that were never presented NaN.

    Args:
        epochs: After how many epochs the counts so far are written, too ("early forgetting"); at the end they always are.
        directory: Where files go, as `forgetting-seed=S-epoch=E.safetensors`; by default `scores` in the trainer's root.
        criterion: The criterion, if the training step calls several.

    Raises:
        ValueError: If an epoch is not a positive integer.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ForgettingEvents()])  # doctest: +SKIP
    """

    capabilities = Capabilities(sample_indices=True)

    def __init__(self, epochs: Sequence[int] = (), directory: str | None = None, criterion: str | None = None) -> None:
        if any(isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1 for epoch in epochs):
            raise ValueError(f"Expected `epochs` of ForgettingEvents to be positive integers, but got {epochs!r}.")
        self.epochs = epochs
        self.directory = directory
        self.criterion = criterion
        self._counts: Counts | None = None
        self._restored: dict[str, Any] | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._not_finite: Any = 0
        self._length: int | None = None
        self._dataset: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what the training of another trainer has left; a checkpoint is restored after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self._counts, self._restored, self._pending, self._not_finite = None, None, [], 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the counts, and warn of sampling with replacement."""
        splice = Splice.of(trainer)
        assert splice is not None
        assert splice.tracker is not None
        self._counts = Counts(splice.tracker.dataset_size)
        if self._restored is not None:
            self._pending = self._counts.load_state_dict(self._restored)
            self._restored = None
        self._watch_loader(trainer)
        sampler = _sampler(trainer)
        if getattr(sampler, "replacement", False):
            warnings.warn(
                f"ForgettingEvents: {type(sampler).__name__} draws with replacement, so that examples are presented "
                f"unequally often, and those that come often have more occasions to be forgotten.",
                stacklevel=2,
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the loader of the epoch; at the end of it, another one may have been asked for."""
        self._watch_loader(trainer)

    def _watch_loader(self, trainer: pl.Trainer) -> None:
        sampler = _sampler(trainer)
        self._length = len(sampler.dataset) if hasattr(sampler, "num_replicas") else None
        self._dataset = lightning_adapter.train_loaders(trainer)[0].dataset

    def on_loss(self, call: LossCall) -> LossCall:
        """Note which examples of the batch are classified correctly."""
        outputs, targets, indices = call.outputs.detach(), call.step.targets, call.step.indices
        assert targets is not None
        if outputs.ndim != 2 or targets.ndim > 2 or (targets.is_floating_point() and targets.shape != outputs.shape):
            raise RefusedError(
                f"ForgettingEvents counts when a classifier errs, but the criterion {call.name} got outputs of shape "
                f"{list(outputs.shape)} and targets of shape {list(targets.shape)}, not one row of logits and one class per "
                f"example. Name another criterion with `criterion=`."
            )
        if indices is None or len(indices) != len(outputs):
            raise RefusedError(
                f"ForgettingEvents: the DataLoader drew {0 if indices is None else len(indices)} examples for this batch, "
                f"but the criterion got outputs for {len(outputs)}: something dropped or mixed examples in between."
            )
        classes = targets.argmax(dim=1) if targets.is_floating_point() else targets
        finite = outputs.isfinite().all(dim=1)
        self._pending.append((indices, (outputs.argmax(dim=1) == classes) & finite))
        self._not_finite += (~finite).sum()  # without a synchronisation: a tensor on the device from then on
        return call

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the presentations of all ranks together, and count."""
        counts = self._counts
        assert counts is not None
        counts.count(self._presentations(), self._length)
        self._pending = []
        pl_module.log(f"{self.name}/events_per_example", float(counts.events.double().mean()))
        pl_module.log(f"{self.name}/not_finite", torch.as_tensor(self._not_finite).float(), reduce_fx="sum")
        self._not_finite = 0
        pl_module.log(f"{self.name}/never_learned", float((~counts.learned).double().mean()))
        if trainer.current_epoch + 1 in self.epochs:
            self._write(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the scores."""
        if self._counts is not None and int(self._counts.presented.sum()) and trainer.current_epoch not in self.epochs:
            self._write(trainer, pl_module, trainer.current_epoch)
        self._dataset = None

    def scores(self) -> Tensor:
        """Return the forgetting score of each example `[N]`, as of the last epoch's end.

        Raises:
            RefusedError: If nothing has been trained on.
        """
        if self._counts is None:
            raise RefusedError("ForgettingEvents has no scores yet: they are counted while a trainer fits.")
        return self._counts.scores()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the presentations since; on several ranks, all of them call this."""
        if self._counts is None:
            return self._restored or {"version": 1}
        return {"version": 1, **self._counts.state_dict(), "pending": self._presentations()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the counts until the size of the data is known."""
        self._counts, self._restored = None, state_dict if "events" in state_dict else None

    def _presentations(self) -> Tensor:
        """Return (global position, index, correct) `[n, 3]` of all ranks since the last epoch's end, in order."""
        rank, world = distributed.world()
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *(index for index, _ in self._pending)])
        flags = torch.cat([torch.empty(0, dtype=torch.int64), *(correct.cpu().long() for _, correct in self._pending)])
        rows = torch.stack([torch.arange(len(indices)) * world + rank, indices, flags], dim=1)
        assert self._counts is not None
        gathered = torch.cat(distributed.gather_rows(rows, capacity=-(-len(self._counts.events) // world)))
        return gathered[gathered[:, 0].argsort()]

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        counts = self._counts
        if not trainer.is_global_zero or counts is None:
            return
        name = f"forgetting@{epoch}"
        provenance = {
            "dataset": describe_dataset(self._dataset),
            "model": describe_model(module),
            "runs": [describe_run(epoch, trainer.global_step)],
            "presentations": {name: int(counts.presented.max())},
            **versions(),
        }
        path = scores_folder(trainer, self.directory) / f"forgetting-{seed_name()}epoch={epoch}.safetensors"
        save_scores(path, Scores({name: counts.scores()}, labels_of(self._dataset), provenance))


class Counts:
    """Forgetting events of `N` examples, on the CPU.

    Args:
        size: The number of examples.
    """

    def __init__(self, size: int) -> None:
        self.events = torch.zeros(size, dtype=torch.int64)
        self.presented = torch.zeros(size, dtype=torch.int64)
        self.previous = torch.zeros(size, dtype=torch.bool)
        self.learned = torch.zeros(size, dtype=torch.bool)

    def count(self, presentations: Tensor, length: int | None = None) -> None:
        """Count the events of rows (position, index, correct) `[n, 3]`, in order of position.

        Args:
            presentations: The rows; an example may come several times.
            length: Positions from here on are those with which a distributed sampler has padded, and do not count.
        """
        if length is not None:
            presentations = presentations[presentations[:, 0] < length]
        order = presentations[:, 1].argsort(stable=True)
        index, correct = presentations[order, 1], presentations[order, 2].bool()
        if not len(index):
            return
        changes = index[1:] != index[:-1]
        first = torch.cat([torch.tensor([True]), changes])
        last = torch.cat([changes, torch.tensor([True])])
        previous = torch.cat([correct[:1], correct[:-1]])
        previous[first] = self.previous[index[first]]
        self.events.index_add_(0, index, (previous & ~correct).long())
        self.presented.index_add_(0, index, torch.ones_like(index))
        self.previous[index[last]] = correct[last]
        self.learned[index[correct]] = True

    def scores(self) -> Tensor:
        """Return events `[N]`; infinity for those never correct, NaN for those never presented."""
        scores = torch.where(self.learned, self.events.float(), math.inf)
        return torch.where(self.presented > 0, scores, math.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of everything."""
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Restore, and return this rank's presentations since the last epoch's end.

        Raises:
            RefusedError: If the checkpoint is of another number of examples.
        """
        if len(state["events"]) != len(self.events):
            raise RefusedError(
                f"The training set has {len(self.events)} examples, but the checkpoint of ForgettingEvents counts "
                f"{len(state['events'])}. Resume with the dataset that the checkpoint was made with."
            )
        for name, value in vars(self).items():
            value.copy_(state[name])
        rank, world = distributed.world()
        own = state["pending"][state["pending"][:, 0] % world == rank]
        return [(own[:, 1], own[:, 2].bool())] if len(own) else []


def _sampler(trainer: pl.Trainer) -> Any:
    loader = lightning_adapter.train_loaders(trainer)[0]
    return getattr(loader.batch_sampler, "sampler", loader.sampler)
