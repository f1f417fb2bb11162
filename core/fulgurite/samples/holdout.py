# SPDX-License-Identifier: Apache-2.0
"""A part of the training set that is kept from training, and an endless stream of batches of it for a plugin's own use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from fulgurite import distributed
from fulgurite.errors import RefusedError
from fulgurite.random import derived_seed, seeded
from fulgurite.samples.subset import TrainingSubset

if TYPE_CHECKING:
    import lightning.pytorch as pl


def hold_out(size: int, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split the indices of `size` examples at random: those to train on, and those that are held out.

    The same for the same arguments, on every rank and in every run. A larger fraction holds out a superset.

    Args:
        size: Number of examples `N`.
        fraction: The part to hold out, in (0, 1); the rounded number of examples is.
        seed: The seed of the choice.

    Returns:
        Two sorted tensors of indices, `[N - n]` and `[n]`.

    Raises:
        ValueError: If `fraction` is outside (0, 1).

    Example:
        >>> [len(part) for part in hold_out(10, 0.2)]
        [8, 2]
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"Expected `fraction` to be in (0, 1), but got {fraction!r}.")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(size))
    held = round(fraction * size)
    return order[held:].sort().values, order[:held].sort().values


class HoldOut:
    """Keeps a fixed random part of the training set from training, from the next epoch on.

    The size of the training set is not known before Lightning asks for the loader; then the split is made, before Lightning
    puts in its DistributedSampler. It is the same on all ranks, and its indices are in the state.

    Args:
        trainer: The trainer; to be called in `setup`.
        user: Who holds examples out, for messages.
        fraction: The part to hold out, in (0, 1).
        seed: Seeds the split, and the order of what is left; equal on all ranks.

    Attributes:
        held: The indices `[n]` that are held out; None before the training loader has been made.
    """

    def __init__(self, trainer: pl.Trainer, user: str, fraction: float, seed: int = 0) -> None:
        self.user = user
        self.fraction = fraction
        self.seed = seed
        self.held: Tensor | None = None
        self._loader: Any = None
        self._restored: dict[str, Any] | None = None
        self._subset = TrainingSubset(trainer, user, seed)
        self._subset.restrict_by(self._split)

    def stream(self, seed: int) -> EndlessStream:
        """Return a stream of batches of the examples that are held out; once the training loader has been made."""
        return EndlessStream(self._loader, self.user, seed, self.held)

    def close(self) -> None:
        """Leave the trainer as it was found."""
        self._subset.close()
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Return the indices of both parts; to be called once the training loader has been made."""
        return {"trained_on": self._subset.indices, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the split; to be called before the training loader is made."""
        self._restored = state
        self._subset.restrict_by(self._split)

    def _split(self, loader: Any) -> Tensor:
        self._loader = loader
        size = len(loader.dataset)
        if self._restored is None:
            trained_on, self.held = hold_out(size, self.fraction, self.seed)
            return trained_on
        trained_on, self.held = self._restored["trained_on"], self._restored["held"]
        if len(trained_on) + len(self.held) != size:
            raise RefusedError(
                f"{self.user} goes on with a split of {len(trained_on)} examples to train on and {len(self.held)} held out, "
                f"but the training set now has {size}. Resume with the same data."
            )
        return trained_on


class EndlessStream:
    """Batches of a loader's examples for ever, in a new order on each pass, divided among the ranks.

    The passes, one after the other, are an endless sequence of examples. Of R ranks with batches of B, rank r gets as its
    k-th batch the elements from (k R + r) B on. Uneven ends do not matter, and the position is one number, equal on all
    ranks.
    Random numbers that examples draw from torch's global generator, such as augmentations, are seeded by rank and position
    and leave the generator as it was.

    Args:
        loader: A DataLoader over a dataset with indices: its dataset, batch size, collate function and workers are used.
        user: Who reads the stream, for messages.
        seed: Seeds the order; equal on all ranks.
        indices: The examples `[n]`; None for all.

    Raises:
        RefusedError: If the data have no indices, or are fewer than one batch.
    """

    def __init__(self, loader: Any, user: str, seed: int = 0, indices: Tensor | None = None) -> None:
        if (
            not isinstance(loader, DataLoader)
            or isinstance(loader.dataset, IterableDataset)
            or not hasattr(loader.dataset, "__len__")
        ):
            data = loader.dataset if isinstance(loader, DataLoader) else loader
            raise RefusedError(
                f"{user} draws held-out batches for ever, which needs a DataLoader over a dataset with indices and a "
                f"length, but got a {type(loader).__name__} over {type(data).__name__}. Use a map-style dataset."
            )
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if batch_size is None:
            raise RefusedError(
                f"{user} draws held-out batches of the size of the DataLoader, but that has batch_size=None. Give it a size."
            )
        dataset: Dataset[Any] = loader.dataset
        count = len(dataset) if indices is None else len(indices)  # type: ignore[arg-type]
        if count < batch_size:
            raise RefusedError(
                f"{user} needs at least one batch of {batch_size} held-out examples, but there are {count}. Hold out more, "
                f"or use smaller batches."
            )
        self.seed = seed
        self.position = 0
        self._batches = _EndlessBatches(np.arange(count) if indices is None else indices.numpy(), batch_size, seed)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._batches,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(seed),
        )
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        """Return this rank's next batch, as the collate function made it."""
        if self._iterator is None:
            self._batches.start = self.position
            self._iterator = iter(self._loader)
        with seeded(derived_seed(self.seed, distributed.world()[0], self.position), torch.device("cpu")):
            batch = next(self._iterator)
        self.position += 1
        return batch

    def close(self) -> None:
        """Stop the workers; the stream can be read on."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self.close()
        self.position = state["position"]


class _EndlessBatches(Sampler[list[int]]):
    """The batches of one rank, as lists of indices."""

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        rank, ranks = distributed.world()
        number, size = self.start, len(self.indices)
        epoch, order = -1, self.indices
        while True:
            first = (number * ranks + rank) * self.batch_size
            batch: list[int] = []
            while len(batch) < self.batch_size:
                wanted, offset = divmod(first + len(batch), size)
                if wanted != epoch:
                    epoch, order = wanted, self._order(wanted)
                batch += order[offset : offset + self.batch_size - len(batch)].tolist()
            yield batch
            number += 1

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.indices)
