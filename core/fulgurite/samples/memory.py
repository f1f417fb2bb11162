# SPDX-License-Identifier: Apache-2.0
"""One value per training example, written as the example is met and shared between ranks once per epoch."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fulgurite import distributed
from fulgurite.errors import FulguriteError, RefusedError

Storage = Literal["auto", "device", "cpu", "memmap"]


class SampleMemory:
    """A row per training example, `[N, *shape]`, and which rows have been written.

    A row whose sum is not finite is not stored (the old one stays); `rejected` counts them, on the device, and the next
    `exchange` or `state_dict` warns of them. On several
    ranks each rank writes into its own copy at once and reads what it wrote itself and what it got in the last `exchange`;
    there is no second copy of the rows. All ranks make it together.

    Args:
        size: Number of examples `N` of the training set.
        shape: Shape of one row.
        dtype: Precision of the rows.
        device: Device on which rows are read and written.
        storage: Where the rows lie: on the `device`; in `cpu` memory (pinned for a CUDA device); in a `memmap` file of this
            process, removed with it; or `auto`: on the device up to a tenth of its free memory, else on the CPU.
        name: Who remembers, for messages and file names.

    Raises:
        RefusedError: If the rows do not fit, with the number of bytes; or if ranks have training sets of different sizes.
    """

    def __init__(
        self,
        size: int,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: Storage = "auto",
        name: str = "SampleMemory",
    ) -> None:
        if storage not in get_args(Storage):
            raise ValueError(f"Expected `storage` of {name} to be one of {get_args(Storage)}, but got {storage!r}.")
        sizes = distributed.gather_objects(size)
        if len(set(sizes)) > 1:
            raise RefusedError(
                f"{name} needs all ranks to train on one dataset, whose indices mean the same everywhere, but their "
                f"training sets have {', '.join(f'{s:,}' for s in sizes)} examples. Give every rank the whole dataset and "
                f"let a distributed sampler divide it."
            )
        self.device = torch.device(device)
        self.name = name
        self.storage = _choose_storage(storage, size, shape, dtype, self.device, name)
        self._rows = self._allocate(size + 1, shape, dtype)
        self._written = torch.zeros(size + 1, dtype=torch.bool, device=self.device)
        self.values, self.seen = self._rows[:size], self._written[:size]  # one row more, for what is not stored
        self._complete = False  # whether all rows are known to have been written
        self._rejected = torch.zeros((), dtype=torch.int64, device=self.device)
        self._reported = 0
        self._uncounted: list[Tensor] = []
        self._pending: list[Tensor] = []
        self._deferred: tuple[Tensor, Tensor, Any] | None = None

    @property
    def size(self) -> int:
        """The number of examples."""
        return self.values.shape[0]

    @property
    def rejected(self) -> Tensor:
        """How many rows were not stored because they were not finite: a scalar on the device."""
        self._count()
        return self._rejected

    def _count(self) -> None:
        if self._uncounted:
            self._rejected += (~torch.cat(self._uncounted)).sum()
            self._uncounted.clear()

    def _report(self) -> None:
        """Say how many rows were left out since it was last said."""
        rejected = int(self._rejected)
        if rejected > self._reported:
            warnings.warn(
                f"{self.name} did not store {rejected - self._reported:,} rows that were not finite, {rejected:,} in all: "
                f"what it remembers of these examples stays as it was. Look for the step whose outputs are NaN or infinite, "
                f"for instance with Trainer(detect_anomaly=True).",
                stacklevel=3,
            )
        self._reported = rejected

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(self.values.shape[1:])

    def read(self, indices: Tensor, indices_on_device: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the rows `[B, *shape]` of examples and whether each has been written `[B]`, on the device.

        The second is None if, at the last exchange, all rows of the memory had been written.

        Args:
            indices: `[B]` on the CPU.
            indices_on_device: The same on the device, if the caller has it already.
        """
        on_device = indices.to(self.device) if indices_on_device is None else indices_on_device
        seen = None if self._complete else self.seen.index_select(0, on_device)
        if self.values.device == self.device:
            return self.values.index_select(0, on_device), seen
        self._flush()
        staged = torch.empty((len(indices), *self.shape), dtype=self.values.dtype, pin_memory=True)
        torch.index_select(self.values, 0, indices, out=staged)
        return staged.to(self.device, non_blocking=True), seen

    def write(self, indices: Tensor, rows: Tensor, indices_on_device: Tensor | None = None) -> None:
        """Store finite rows `[B, *shape]`; no synchronisation with the device.

        Args:
            indices: `[B]` on the CPU.
            rows: The rows, on the device.
            indices_on_device: The same indices on the device, if the caller has them already.

        Raises:
            FulguriteError: If the rows do not have the shape that the memory was made for.
        """
        if tuple(rows.shape) != (len(indices), *self.shape):
            raise FulguriteError(
                f"Expected {self.name} to get rows of shape {[len(indices), *self.shape]}, but got {list(rows.shape)}. "
                f"The number of classes must not change during training, and nothing may drop or mix the examples of a "
                f"batch between the DataLoader and the criterion."
            )
        on_device = indices.to(self.device) if indices_on_device is None else indices_on_device
        rows = rows.detach().to(self.values.dtype)
        finite = _finite(rows)
        self._uncounted.append(finite)  # counted once per epoch: small operations are most of what a write costs
        stored_at = torch.where(finite, on_device, self.size)
        if not self._complete:
            self._written.index_fill_(0, stored_at, True)
        if distributed.is_distributed():
            self._pending.append(indices)
        if self.values.device == self.device:
            self._rows.index_copy_(0, stored_at, rows)
            return
        self._flush()
        staged = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        staged.copy_(rows, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._deferred = (indices, staged, done)

    def exchange(self) -> None:
        """Give every rank the rows that the others wrote since the last exchange: one collective, on all ranks.

        Where a sampler's padding made several ranks write one example, the row of the lowest global position wins.
        """
        self._flush()
        self._count()
        self._report()
        if distributed.world()[1] > 1:
            self._apply(self._gather(*self._own_pending()), self.values.dtype)
            self._pending.clear()
        self._complete = bool(self.seen.all())

    def state_dict(self, directory: Path | None = None) -> dict[str, Any]:
        """Return the state; on several ranks all of them must call this, and the state of rank 0 is the one to save.

        It holds the rows as of the last exchange and what every rank has written since, so that a resumed run reads what
        an uninterrupted one reads. The state of the other ranks is empty but for its version.

        Args:
            directory: Where to put the rows of a memory-mapped memory, as a side file that the state names and of which it
                holds the hash. Without it the rows go into the state.
        """
        self._flush()
        self._count()
        self._report()
        rank, world = distributed.world()
        pending = self._gather(*self._own_pending()) if world > 1 else []
        rejected = sum(distributed.gather_objects(int(self.rejected)))
        with self._as_of_last_exchange(pending) as seen:
            if rank != 0:
                return {"version": 1}
            if self.storage == "memmap" and directory is not None:
                rows = _write_side_file(directory, self.name, self.values)
            else:
                rows = {"values": self.values.to("cpu", copy=True)}
        return {"version": 1, "seen": seen, "rejected": rejected, "pending": [p.cpu() for p in pending], **rows}

    def load_state_dict(self, state: dict[str, Any], directory: Path | None = None) -> None:
        """Restore what `state_dict` returned, also on another number of ranks.

        Raises:
            FulguriteError: If the sizes differ, or a side file is missing or is not the one that was written.
        """
        saved = state["values"] if "values" in state else _read_side_file(directory, self.name, state)
        if saved.shape[0] != self.size:
            raise FulguriteError(
                f"The training set has {self.size} examples, but {self.name}'s checkpoint remembers {saved.shape[0]}. "
                f"Resume with the dataset that the checkpoint was made with, or train without the checkpoint."
            )
        if tuple(saved.shape[1:]) != self.shape:
            raise FulguriteError(
                f"{self.name} keeps rows of shape {list(self.shape)}, but its checkpoint has {list(saved.shape[1:])}: "
                f"the number of classes changed. Resume with the model that the checkpoint was made with."
            )
        rank, world = distributed.world()
        self.values.copy_(saved)
        self.seen.copy_(state["seen"])
        self._uncounted.clear()
        self._reported = state["rejected"] if rank == 0 else 0
        self._rejected.fill_(self._reported)
        self._pending.clear()
        pending = state["pending"]
        if len(pending) == world:
            self._apply(pending[rank : rank + 1], saved.dtype)
            self._restore_pending(pending[rank])
        elif pending:
            self._apply(pending, saved.dtype)
        self._complete = bool(self.seen.all())

    def _allocate(self, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.storage == "memmap":
            handle, path = tempfile.mkstemp(prefix=f"fulgurite-{self.name}-".lower(), suffix=".memory")
            os.close(handle)
            rows = torch.from_file(path, shared=True, size=size * math.prod(shape), dtype=dtype).view(size, *shape)
            if os.name == "posix":  # the mapping keeps the file; nothing is left behind however the process ends
                Path(path).unlink()
            else:
                weakref.finalize(self, Path(path).unlink, missing_ok=True)
            return rows
        device = torch.device("cpu") if self.storage == "cpu" else self.device
        pin = device.type == "cpu" and self.device.type == "cuda"
        return torch.zeros((size, *shape), dtype=dtype, device=device, pin_memory=pin)

    def _flush(self) -> None:
        """Finish a copy from the device to the CPU that was started in the last write."""
        if self._deferred is None:
            return
        indices, rows, done = self._deferred
        done.synchronize()
        finite = _finite(rows)
        self.values[indices[finite]] = rows[finite]
        self._deferred = None

    def _own_pending(self) -> tuple[Tensor, Tensor]:
        """Examples written since the last exchange, each once, and the global position of their last writing."""
        rank, world = distributed.world()
        drawn = torch.cat([torch.empty(0, dtype=torch.int64), *self._pending])
        index, inverse = drawn.unique(return_inverse=True)
        last = torch.zeros_like(index).scatter_reduce_(0, inverse, torch.arange(len(drawn)), "amax")
        known = index != _UNKNOWN
        return index[known], last[known] * world + rank

    def _restore_pending(self, packed: Tensor) -> None:
        """Continue a saved list of own writings: the last position of each example is known, the others do not matter."""
        index, position, _ = _unpack_header(packed)
        if len(index) > 0:
            last = position // distributed.world()[1]
            self._pending = [torch.full((int(last.max()) + 1,), _UNKNOWN).scatter_(0, last, index)]

    def _gather(self, index: Tensor, position: Tensor) -> list[Tensor]:
        """The packed rows of every rank: one collective if no rank has more than its share."""
        return distributed.gather_rows(self._pack(index, position), capacity=-(-self.size // distributed.world()[1]))

    def _pack(self, index: Tensor, position: Tensor) -> Tensor:
        """Index, position, whether the row has been written, and the row: bytes `[n, width]`."""
        rows = self.values[index.to(self.values.device)].cpu()
        seen = self.seen[index.to(self.device)].cpu().to(torch.uint8)
        parts = [
            index.view(-1, 1).view(torch.uint8),
            position.view(-1, 1).view(torch.uint8),
            seen.view(-1, 1),
            rows.reshape(len(index), math.prod(self.shape)).view(torch.uint8),
        ]
        return torch.cat(parts, dim=1)

    def _unpack_rows(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        return packed.narrow_copy(1, 17, packed.shape[1] - 17).view(dtype).view(len(packed), *self.shape)

    def _apply(self, gathered: list[Tensor], dtype: torch.dtype) -> None:
        """Store what ranks have written; of several rows of one example, that of the lowest position."""
        first = torch.full((self.size,), torch.iinfo(torch.int64).max)
        for packed in gathered:
            index, position, seen = _unpack_header(packed)
            first.scatter_reduce_(0, index[seen], position[seen], "amin")
        for packed in gathered:
            index, position, seen = _unpack_header(packed)
            wins = seen & (position == first[index])
            self._store(index[wins], self._unpack_rows(packed[wins], dtype))

    def _store(self, index: Tensor, rows: Tensor) -> None:
        self.values[index.to(self.values.device)] = rows.to(self.values)
        self.seen[index.to(self.device)] = True

    @contextmanager
    def _as_of_last_exchange(self, pending: list[Tensor]) -> Iterator[Tensor]:
        """Put back, on rank 0 and for a block, the rows that it has overwritten since; yield what had been seen.

        A rank that has not overwritten them itself sends them. Those that every rank has overwritten count as not seen:
        what is pending holds them for each rank.
        """
        seen = self.seen.cpu().clone()
        if not pending:
            yield seen
            return
        rank = distributed.world()[0]
        index = wanted = _unpack_header(pending[0])[0]
        kept = wanted[:0]
        for other in range(1, len(pending)):
            overwritten = torch.isin(wanted, _unpack_header(pending[other])[0])
            if other == rank:
                kept = wanted[~overwritten]
            wanted = wanted[overwritten]
        sent = self._gather(kept, torch.zeros_like(kept))
        if rank != 0:
            yield seen
            return
        present = self.values[index.to(self.values.device)]
        seen[index] = False
        for packed in sent:
            found, _, known = _unpack_header(packed)
            seen[found] = known
            self.values[found.to(self.values.device)] = self._unpack_rows(packed, self.values.dtype).to(self.values)
        try:
            yield seen
        finally:
            self.values[index.to(self.values.device)] = present


_UNKNOWN = -1
"""Stands in a restored list of writings where an example was written that was written again later."""


def _unpack_header(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The indices, the positions, and whether each row has been written, of what `SampleMemory._pack` packed."""
    # `contiguous` would not copy a single row, whose stride and offset fit no wider type
    index = packed.narrow_copy(1, 0, 8).view(torch.int64).view(-1)
    position = packed.narrow_copy(1, 8, 8).view(torch.int64).view(-1)
    return index, position, packed[:, 16].bool()


def _finite(rows: Tensor) -> Tensor:
    """Return whether each row is finite `[B]`: by its sum, which is quicker than to look at every value."""
    return (
        rows.flatten(1).sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)) if rows.ndim > 1 else rows
    ).isfinite()


def _choose_storage(
    storage: Storage, size: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str
) -> Storage:
    needed = size * math.prod(shape) * dtype.itemsize
    if storage == "auto":
        storage = "device" if device.type == "cpu" or needed <= free_bytes(device) // 10 else "cpu"
    if storage == "memmap":
        available = shutil.disk_usage(tempfile.gettempdir()).free
    else:
        available = free_bytes(device if storage == "device" else torch.device("cpu"))
    if needed > available:
        raise RefusedError(
            f"{name} needs {needed:,} bytes for {size:,} examples x {math.prod(shape):,} values ({dtype}), but only "
            f"{available:,} bytes are free ({storage}). Use dtype='float16', storage='memmap' (its file goes where TMPDIR "
            f"points), or a method without a memory (PSKD: teacher='snapshot')."
        )
    return storage


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device, as far as it tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**62


def _write_side_file(directory: Path, name: str, values: Tensor) -> dict[str, Any]:
    content = values.cpu().contiguous().view(torch.uint8).numpy()
    digest = hashlib.sha256(content.data).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name.lower()}-{digest[:16]}.memory"
    if not path.exists():
        partial = path.with_suffix(".partial")
        content.tofile(partial)
        partial.replace(path)
    return {
        "side_file": path.name,
        "sha256": digest,
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
    }


def _read_side_file(directory: Path | None, name: str, state: dict[str, Any]) -> Tensor:
    path = None if directory is None else directory / state["side_file"]
    if path is None or not path.exists():
        raise FulguriteError(
            f"{name}'s checkpoint keeps its memory in the side file {state['side_file']!r}, which is not in "
            f"{str(directory)!r}. Put the file there; it was written beside the checkpoint."
        )
    dtype = getattr(torch, state["dtype"])
    size = math.prod(state["shape"])
    if path.stat().st_size == size * dtype.itemsize:
        values = torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(state["shape"])
        if hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest() == state["sha256"]:
            return values
    raise FulguriteError(
        f"The side file {str(path)!r} of {name}'s checkpoint has other contents than when the checkpoint was "
        f"written (its SHA-256 differs). Restore the original file."
    )
