# SPDX-License-Identifier: Apache-2.0
"""The dataset indices of every training batch, for datasets that do not return them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SampleTracker:
    """Records what the final batch sampler yields, and hands each batch that leaves the loader its indices.

    The sampler is the one that Lightning finally uses, after it has put in a DistributedSampler; indices are therefore
    those of the dataset, per rank, in order. Workers fetch ahead and a resumed stateful loader skips ahead: when a batch
    leaves the loader, its indices are found by counting back from the newest index list by the number of batches in
    flight, which both leave intact. Every pass over the loader keeps its own account, so that somebody else may iterate the
    same loader meanwhile.

    Args:
        user: Who needs the indices, for messages.
    """

    def __init__(self, user: str) -> None:
        self.user = user
        self.dataset_size = 0
        self._begun: _Pass | None = None
        self._delivering: _Pass | None = None
        self._undo: list[Callable[[], None]] = []

    def attach(self, loader: Any) -> None:
        """Start to record a training loader.

        Raises:
            RefusedError: If the loader has no sample indices.
        """
        self.detach()
        self._check(loader)
        if getattr(loader, "num_workers", 0) > 0 and not getattr(loader, "in_order", True):
            raise RefusedError(
                f"{self.user} needs batches in the order in which they were drawn, but the training DataLoader has "
                f"in_order=False. Remove that argument."
            )
        self._undo = [
            lightning_adapter.replace_batch_sampler(loader, lambda inner: _RecordingBatchSampler(inner, self._begin)),
            lightning_adapter.after_each_batch(loader, self._deliver),
        ]
        self.dataset_size = len(loader.dataset)

    def detach(self) -> None:
        """Leave the loader as it was found."""
        for undo in self._undo:
            undo()
        self._undo = []
        self._begun = self._delivering = None

    def next(self) -> Tensor | None:
        """Return the indices `[B]` of the next batch that has left the loader, or None if there is none.

        Raises:
            RefusedError: If the sampler yields something else than integers.
        """
        if self._delivering is None or not self._delivering.delivered:
            return None
        drawn = self._delivering.delivered.popleft()
        try:
            # In half the time that torch takes for a list; without examples there is nothing to tell the type.
            indices = np.array(drawn, dtype=None if drawn else np.int64)
        except ValueError:
            indices = np.empty((0, 0))
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise RefusedError(
                f"{self.user} needs the dataset index of each training example, but the sampler yields other keys, such "
                f"as {drawn[0]!r}. Let the dataset be indexed by integers, or {self._way_out}."
            )
        return torch.from_numpy(indices.astype(np.int64, copy=False))

    def check_loaders(self, trainer: pl.Trainer) -> None:
        """Refuse several training loaders: a batch would hold examples of more than one dataset."""
        loaders = lightning_adapter.train_loaders(trainer)
        if len(loaders) > 1:
            raise RefusedError(
                f"{self.user} needs the dataset index of each training example, but the trainer has a CombinedLoader of "
                f"{len(loaders)} training loaders. Train with one DataLoader (concatenate the datasets), or "
                f"{self._way_out}."
            )

    _way_out = "use a plugin, or an option of this one, that needs no sample indices (PSKD: teacher='snapshot')"

    def _check(self, loader: Any) -> None:
        if not isinstance(loader, DataLoader):
            raise RefusedError(
                f"{self.user} needs the dataset index of each training example, which only a torch DataLoader gives, "
                f"but the training data are of type {type(loader).__name__}. Pass a DataLoader, or {self._way_out}."
            )
        if isinstance(loader.dataset, IterableDataset):
            raise RefusedError(
                f"{self.user} needs the dataset index of each training example, but {type(loader.dataset).__name__} is "
                f"an IterableDataset: its examples have no index. Use a map-style dataset, or {self._way_out}."
            )
        if not hasattr(loader.dataset, "__len__"):
            raise RefusedError(
                f"{self.user} needs to know how many training examples there are, but {type(loader.dataset).__name__} has "
                f"no length. Give it `__len__`, or {self._way_out}."
            )
        if loader.batch_sampler is None:
            raise RefusedError(
                f"{self.user} needs the dataset index of each training example, but the training DataLoader has "
                f"batch_size=None, so that one index stands for a whole batch. Let the DataLoader make the batches, or "
                f"{self._way_out}."
            )

    def _begin(self, begun: _Pass) -> None:
        self._begun = begun

    def _deliver(self, iterator: Any) -> None:
        own = lightning_adapter.index_iterator(iterator)
        current = own if isinstance(own, _Pass) else self._begun  # torchdata may skip ahead with itertools.islice
        if current is None:
            return  # begun before the loader was attached
        ahead = lightning_adapter.in_flight(iterator)
        while len(current.drawn) > ahead + 1:
            current.drawn.popleft()
        current.delivered.append(current.drawn.popleft())
        self._delivering = current


class _RecordingBatchSampler(BatchSampler):
    """Looks like the batch sampler that it wraps, and records each pass over it."""

    def __init__(self, inner: Any, begin: Callable[[_Pass], None]) -> None:
        self.__dict__.update(_inner=inner, _begin=begin)
        _pass_state_through(self, inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[int]]:
        begun = _Pass(iter(self._inner))
        self._begin(begun)
        return begun


class _Pass(Iterator[list[int]]):
    """One pass over a batch sampler: what was drawn and is not delivered, and what was delivered and is not asked for."""

    def __init__(self, inner: Iterator[list[int]]) -> None:
        self.inner = inner
        self.drawn: deque[list[int]] = deque()
        self.delivered: deque[list[int]] = deque()
        _pass_state_through(self, inner)

    def __next__(self) -> list[int]:
        indices = next(self.inner)
        self.drawn.append(list(indices))
        return indices


def _pass_state_through(wrapper: Any, inner: Any) -> None:
    """Make a wrapper stateful exactly if what it wraps is: torchdata asks by looking for these attributes."""
    for name in ("state_dict", "load_state_dict"):
        if hasattr(inner, name):
            wrapper.__dict__[name] = getattr(inner, name)
