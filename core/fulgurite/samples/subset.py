# SPDX-License-Identifier: Apache-2.0
"""Training on a part of the training set, or on a reweighted one, changed between epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class TrainingSubset:
    """Restricts or reweights the training set of a trainer, from the next epoch on.

    The dataset stays what it is and indices keep their meaning; only the sampler changes. Lightning asks for the loader
    again, so that batch limits and the validation interval are right, and puts in its DistributedSampler as usual: all
    ranks see parts of the same subset. To be changed before training or in `on_train_epoch_end`, by all ranks alike.
    `trainer.estimated_stepping_batches` counts with the present length: a schedule made from it before a change does not
    know of the change.

    Args:
        trainer: The trainer.
        user: Who changes the training set, for messages.
        seed: Seeds the order of a shuffled subset; equal on all ranks.
    """

    def __init__(self, trainer: pl.Trainer, user: str, seed: int = 0) -> None:
        self.trainer = trainer
        self.user = user
        self.seed = seed
        self.indices: Tensor | None = None
        self.weights: Tensor | None = None
        self._undo: Callable[[], None] | None = None

    def restrict(self, indices: Tensor) -> None:
        """Train on the examples `indices` `[n]` only.

        Raises:
            RefusedError: If `indices` is empty, repeats an example, or the training data have no indices.
        """
        if len(indices) == 0 or len(indices.unique()) != len(indices) or int(indices.min()) < 0:
            raise RefusedError(
                f"{self.user}: expected `indices` to name at least one example, none twice and by no negative number, but "
                f"got {len(indices)} indices of {len(indices.unique())} examples."
            )
        self._change(indices.clone(), None)

    def reweight(self, weights: Tensor) -> None:
        """Draw examples with probabilities proportional to `weights` `[N]`, with replacement, as many as there are.

        Raises:
            RefusedError: If a weight is negative or not finite, or all are zero.
        """
        if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or not bool((weights > 0).any()):
            raise RefusedError(
                f"{self.user}: expected `weights` to be finite, non-negative and not all zero, but got values from "
                f"{float(weights.min())} to {float(weights.max())}."
            )
        self._change(None, weights.clone())

    def reset(self) -> None:
        """Train on everything again."""
        self._change(None, None)

    def close(self) -> None:
        """Leave the trainer as it was found; an epoch that follows uses all examples."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            lightning_adapter.reload_train_loader(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return {"indices": self.indices, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the subset; to be called before the training loader is made."""
        self._change(state["indices"], state["weights"])

    def _change(self, indices: Tensor | None, weights: Tensor | None) -> None:
        self.indices, self.weights = indices, weights
        if self._undo is None:
            source = lightning_adapter.train_source(self.trainer)
            original = source.dataloader

            def dataloader() -> Any:
                return self._restricted(original())

            source.__dict__["dataloader"] = dataloader
            self._undo = lambda: source.__dict__.pop("dataloader", None)
        lightning_adapter.reload_train_loader(self.trainer)

    def _restricted(self, loader: Any) -> Any:
        if self.indices is None and self.weights is None:
            return loader
        if (
            not isinstance(loader, DataLoader)
            or isinstance(loader.dataset, IterableDataset)
            or not hasattr(loader.dataset, "__len__")
        ):
            raise RefusedError(
                f"{self.user} changes which training examples are used, which needs one DataLoader over a dataset with "
                f"indices and a length, but the training data are {_describe(loader)}."
            )
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        if type(sampler).__name__ not in _REPLACEABLE:
            raise RefusedError(
                f"{self.user} changes which training examples are used by another sampler, but the training DataLoader "
                f"has one of its own, {type(sampler).__name__}, which would be lost. Use shuffle=True or shuffle=False."
            )
        overfit_batches = self.trainer.overfit_batches  # type: ignore[attr-defined]
        if overfit_batches > 0:
            raise RefusedError(
                f"{self.user} changes which training examples are used, and so does overfit_batches={overfit_batches} of "
                f"the trainer. Use one of them."
            )
        if not lightning_adapter.distributes_samples(self.trainer):
            raise RefusedError(
                f"{self.user} changes which training examples are used, and needs Lightning to divide them among "
                f"{self.trainer.world_size} ranks, but the trainer has use_distributed_sampler=False. Remove that argument."
            )
        size = len(loader.dataset)
        if self.weights is not None and len(self.weights) != size:
            raise RefusedError(f"{self.user}: got {len(self.weights)} weights for {size} training examples.")
        if self.indices is not None and int(self.indices.max()) >= size:
            raise RefusedError(
                f"{self.user}: index {int(self.indices.max())} is outside the training set of {size} examples."
            )
        shuffle = type(sampler).__name__ != "SequentialSampler"
        return lightning_adapter.with_sampler(
            loader,
            SubsetSampler(
                size,
                self.indices,
                self.weights,
                shuffle,
                self.seed,
                lambda: lightning_adapter.epochs_processed(self.trainer),
            ),
        )


_REPLACEABLE = ("SequentialSampler", "RandomSampler", "DistributedSampler", "StatefulDistributedSampler")
"""Samplers that choose no examples, of torch and torchdata."""


def _describe(loader: Any) -> str:
    kind = type(loader).__name__
    return f"of type {kind}" + (f" over {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else "")


class SubsetSampler(Sampler[int]):
    """Yields chosen examples, or draws by weight; the same on every rank for the same seed and epoch.

    Args:
        size: Number of examples `N` of the dataset.
        indices: The examples to use `[n]`, or None for all.
        weights: Weights `[N]` to draw by, or None.
        shuffle: Whether chosen examples come in a new order in each epoch.
        seed: The seed of order and draws.
        epoch: Tells the epoch. It is asked, and not set by Lightning, which sets it after a resumed loader has been begun.
    """

    def __init__(
        self,
        size: int,
        indices: Tensor | None,
        weights: Tensor | None,
        shuffle: bool,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.indices = torch.arange(size) if indices is None else indices
        self.weights = weights
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        if self.weights is not None:
            chosen = torch.multinomial(self.weights.double(), len(self), replacement=True, generator=generator)
        elif self.shuffle:
            chosen = self.indices[torch.randperm(len(self), generator=generator)]
        else:
            chosen = self.indices
        return iter(chosen.tolist())
