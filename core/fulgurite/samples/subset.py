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
        self.keep_length = False
        self._choose: Callable[[Any], Tensor | None] | None = None
        self._undo: Callable[[], None] | None = None

    def restrict(self, indices: Tensor, keep_length: bool = False) -> None:
        """Train on the examples `indices` `[n]` only.

        Args:
            indices: The examples.
            keep_length: Whether an epoch goes through them as often as it takes to have as many examples as the whole
                training set, each time in a new order if the loader shuffles: the number of steps of an epoch stays what it
                was, and with it every schedule.

        Raises:
            RefusedError: If `indices` is empty, repeats an example, or the training data have no indices.
        """
        self._change(self._checked(indices), None, keep_length)

    def restrict_by(self, choose: Callable[[Any], Tensor | None], keep_length: bool = False) -> None:
        """Let `choose` name the examples when Lightning next asks for the training loader, which it is given.

        For a choice that must know the data, which before that may not exist. It is called once, on all ranks; None stands
        for all examples.
        """
        self._change(None, None, keep_length)
        self._choose = choose

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
        self._change(None, weights.clone(), False)

    def unrestricted_loader(self) -> Any:
        """Return a loader of the whole training set, by asking its source once more; the trainer's own stays what it is."""
        found = lightning_adapter.train_source(self.trainer)
        restricted = found.__dict__.pop("dataloader", None)
        try:
            return found.dataloader()
        finally:
            if restricted is not None:
                found.__dict__["dataloader"] = restricted

    def reset(self) -> None:
        """Train on everything again."""
        self._change(None, None, False)

    def close(self) -> None:
        """Leave the trainer as it was found; an epoch that follows uses all examples."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            lightning_adapter.reload_train_loader(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return {"indices": self.indices, "weights": self.weights, "keep_length": self.keep_length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the subset; to be called before the training loader is made."""
        self._change(state["indices"], state["weights"], state["keep_length"])

    def _checked(self, indices: Tensor) -> Tensor:
        if len(indices) == 0 or len(indices.unique()) != len(indices) or int(indices.min()) < 0:
            raise RefusedError(
                f"{self.user}: expected `indices` to name at least one example, none twice and by no negative number, but "
                f"got {len(indices)} indices of {len(indices.unique())} examples."
            )
        return indices.clone()

    def _change(self, indices: Tensor | None, weights: Tensor | None, keep_length: bool) -> None:
        self.indices, self.weights, self.keep_length, self._choose = indices, weights, keep_length, None
        if self._undo is None:
            source = lightning_adapter.train_source(self.trainer)
            original = source.dataloader

            def dataloader() -> Any:
                try:
                    return self._restricted(original())
                except BaseException:
                    lightning_adapter.restore_loader_classes()
                    raise

            source.__dict__["dataloader"] = dataloader
            self._undo = lambda: source.__dict__.pop("dataloader", None)
        lightning_adapter.reload_train_loader(self.trainer)

    def _restricted(self, loader: Any) -> Any:
        if self._choose is not None:
            self._check(loader)
            choose, self._choose = self._choose, None
            chosen = choose(loader)
            self.indices = None if chosen is None else self._checked(chosen)
        if self.indices is None and self.weights is None:
            return loader
        self._check(loader)
        size = len(loader.dataset)
        if self.weights is not None and len(self.weights) != size:
            raise RefusedError(f"{self.user}: got {len(self.weights)} weights for {size} training examples.")
        if self.indices is not None and int(self.indices.max()) >= size:
            raise RefusedError(
                f"{self.user}: index {int(self.indices.max())} is outside the training set of {size} examples."
            )
        shuffle = type(_sampler(loader)).__name__ != "SequentialSampler"
        return lightning_adapter.with_sampler(
            loader,
            SubsetSampler(
                size,
                self.indices,
                self.weights,
                shuffle,
                self.seed,
                lambda: lightning_adapter.epochs_processed(self.trainer),
                self.keep_length,
                self.user,
            ),
        )

    def _check(self, loader: Any) -> None:
        """Refuse data of which no part can be chosen."""
        if (
            not isinstance(loader, DataLoader)
            or isinstance(loader.dataset, IterableDataset)
            or not hasattr(loader.dataset, "__len__")
        ):
            raise RefusedError(
                f"{self.user} changes which training examples are used, which needs one DataLoader over a dataset with "
                f"indices and a length, but the training data are {_describe(loader)}."
            )
        if loader.batch_sampler is not None and not hasattr(loader.batch_sampler, "sampler"):
            raise RefusedError(
                f"{self.user} changes which training examples are used, but the training DataLoader has batches of its own "
                f"(its batch_sampler is a {type(loader.batch_sampler).__name__}), which would be lost. Use batch_size."
            )
        sampler = _sampler(loader)
        if isinstance(sampler, SubsetSampler):
            raise RefusedError(
                f"{sampler.user} and {self.user} both choose which training examples are used. Use one of them."
            )
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


_REPLACEABLE = ("SequentialSampler", "RandomSampler", "DistributedSampler", "StatefulDistributedSampler")
"""Samplers that choose no examples, of torch and torchdata."""


def _sampler(loader: DataLoader[Any]) -> Any:
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


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
        keep_length: Whether an epoch has `size` examples, for which the chosen ones are repeated.
        user: Who has chosen them, for messages.
    """

    def __init__(
        self,
        size: int,
        indices: Tensor | None,
        weights: Tensor | None,
        shuffle: bool,
        seed: int,
        epoch: Callable[[], int],
        keep_length: bool = False,
        user: str = "",
    ) -> None:
        self.user = user
        self.indices = torch.arange(size) if indices is None else indices
        self.length = size if keep_length else len(self.indices)
        self.weights = weights
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        if self.weights is not None:
            chosen = torch.multinomial(self.weights.double(), len(self), replacement=True, generator=generator)
        else:
            n = len(self.indices)
            rounds = range(-(-self.length // n))
            orders = [torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n) for _ in rounds]
            chosen = self.indices[torch.cat(orders)[: self.length]]
        return iter(chosen.tolist())
