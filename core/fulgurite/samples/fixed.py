# SPDX-License-Identifier: Apache-2.0
"""The same examples every time: batches of a fixed part of a dataset, for measurements during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fulgurite import distributed, lightning_adapter
from fulgurite.errors import RefusedError, check_argument
from fulgurite.random import derived_seed, seeded

if TYPE_CHECKING:
    import lightning.pytorch as pl


class FixedBatches:
    """Batches of a fixed set of examples, on the module's device, in a fixed order, as often as one likes.

    The examples are drawn once, without replacement, from the loader's dataset, whatever its sampler does. What examples
    draw from torch's global generators, such as augmentations, is the same each time, and leaves the generators as they
    were. There are no worker processes.

    Args:
        trainer: The trainer, which moves batches to the device as it does in training.
        user: Who reads them, for messages.
        loader: `"train"` or `"val"`: the only loader of the trainer for it; or a DataLoader. Its dataset, collate function
            and batch size are used.
        max_samples: How many examples at most; None for all.
        batch_size: Examples per batch; None for the loader's.
        seed: Seeds the choice and what examples draw.
        share: Whether each rank gets a part of its own, every W-th of the examples; parts may differ by one example. Else
            every rank gets all.

    Raises:
        RefusedError: If the data have no indices, or there is not exactly one such loader.
        ValueError: If a number is not positive.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        user: str,
        loader: Literal["train", "val"] | DataLoader[Any] = "train",
        max_samples: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        share: bool = False,
    ) -> None:
        for name, value in (("max_samples", max_samples), ("batch_size", batch_size)):
            check_argument(value is None or value > 0, name, user, "a positive number or None", value)
        self._trainer = trainer
        self._loader = _only(trainer, user, loader)
        self._seed = seed
        size = len(self._loader.dataset)  # type: ignore[arg-type]
        self.indices: Tensor = torch.arange(size)
        """The examples `[n]`, in the order in which they come; equal on all ranks."""
        if max_samples is not None and max_samples < size:
            drawn = torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(seed)))
            self.indices = drawn[:max_samples].sort().values
        given = self._loader
        self.batch_size: int = batch_size or given.batch_size or getattr(given.batch_sampler, "batch_size", None) or 64
        self._share = share

    def __iter__(self) -> Iterator[Any]:
        rank, world = distributed.world() if self._share else (0, 1)
        own = self.indices[rank::world]
        for number, chunk in enumerate(own.split(self.batch_size)):
            if not len(chunk):
                return
            part: DataLoader[Any] = DataLoader(
                self._loader.dataset,
                len(chunk),
                sampler=chunk.tolist(),
                collate_fn=self._loader.collate_fn,
                generator=torch.Generator().manual_seed(self._seed),
            )
            device = self._trainer.lightning_module.device
            with seeded(derived_seed(self._seed, rank, number), device), torch.inference_mode(False):
                batch = lightning_adapter.to_device(self._trainer, next(iter(part)))
            if batch is not None:  # as in training, where the loop skips what a loader gives so
                yield batch

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        rank, world = distributed.world() if self._share else (0, 1)
        return -(-len(self.indices[rank::world]) // self.batch_size)


def _only(trainer: pl.Trainer, user: str, loader: Any) -> DataLoader[Any]:
    found = [loader]
    if loader == "train":
        found = lightning_adapter.present_train_loaders(trainer)
    elif loader == "val":
        loaders = trainer.val_dataloaders
        found = loaders if isinstance(loaders, list) else [loaders] if loaders is not None else []
    elif isinstance(loader, str):
        raise ValueError(f"Expected the data of {user} to be 'train', 'val' or a DataLoader, but got {loader!r}.")
    if len(found) != 1:
        raise RefusedError(
            f"{user} measures on the examples of one {loader} DataLoader, but the trainer has {len(found)}. Give it a "
            f"DataLoader of its own."
        )
    dataset = getattr(found[0], "dataset", None)
    if not isinstance(found[0], DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise RefusedError(
            f"{user} measures on a fixed set of examples, which needs a DataLoader over a dataset with indices and a "
            f"length, but got a {type(found[0]).__name__} over {type(dataset).__name__}. Give it a DataLoader "
            f"over a map-style dataset."
        )
    return found[0]
