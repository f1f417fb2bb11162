# SPDX-License-Identifier: Apache-2.0
"""The dataset indices of every training batch, for datasets that do not return them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

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
    flight, which both leave intact.

    Args:
        user: Who needs the indices, for messages.
    """

    def __init__(self, user: str) -> None:
        self.user = user
        self.dataset_size = 0
        self._drawn: deque[list[int]] = deque()
        self._delivered: deque[list[int]] = deque()
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
            lightning_adapter.replace_batch_sampler(
                loader, lambda inner: _RecordingBatchSampler(inner, self._begin_pass, self._drawn.append)
            ),
            lightning_adapter.after_each_batch(loader, self._deliver),
        ]
        self.dataset_size = len(loader.dataset)

    def detach(self) -> None:
        """Leave the loader as it was found."""
        for undo in self._undo:
            undo()
        self._undo = []
        self._begin_pass()

    def next(self) -> Tensor | None:
        """Return the indices `[B]` of the next batch that has left the loader, or None if there is none."""
        return torch.tensor(self._delivered.popleft(), dtype=torch.int64) if self._delivered else None

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
        if loader.batch_sampler is None:
            raise RefusedError(
                f"{self.user} needs the dataset index of each training example, but the training DataLoader has "
                f"batch_size=None, so that one index stands for a whole batch. Let the DataLoader make the batches, or "
                f"{self._way_out}."
            )

    def _begin_pass(self) -> None:
        self._drawn.clear()
        self._delivered.clear()

    def _deliver(self, iterator: Any) -> None:
        ahead = lightning_adapter.in_flight(iterator)
        while len(self._drawn) > ahead + 1:
            self._drawn.popleft()
        self._delivered.append(self._drawn.popleft())


class _RecordingBatchSampler(BatchSampler):
    """Looks like the batch sampler that it wraps, and reports every list of indices that is drawn from it."""

    def __init__(self, inner: Any, begin: Callable[[], None], report: Callable[[list[int]], None]) -> None:
        self._inner = inner
        self._begin = begin
        self._report = report

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[int]]:
        self._begin()
        inner = iter(self._inner)
        stateful = hasattr(inner, "state_dict") and hasattr(inner, "load_state_dict")
        return (_StatefulRecordingIterator if stateful else _RecordingIterator)(inner, self._report)


class _RecordingIterator:
    def __init__(self, inner: Iterator[list[int]], report: Callable[[list[int]], None]) -> None:
        self.inner = inner
        self.report = report

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        indices = next(self.inner)
        self.report(list(indices))
        return indices


class _StatefulRecordingIterator(_RecordingIterator):
    """Passes the state of torchdata's iterators through."""

    def state_dict(self) -> Any:
        return self.inner.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)  # type: ignore[attr-defined]
