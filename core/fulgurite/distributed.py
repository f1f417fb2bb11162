# SPDX-License-Identifier: Apache-2.0
"""Communication between ranks. Nothing else in Fulgurite calls `torch.distributed`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_HEADER = 16
"""Bytes before the rows: their number, and room so that rows of every dtype are aligned."""


def is_distributed() -> bool:
    """Return whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; `(0, 1)` without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def gather_rows(rows: Tensor, capacity: int) -> list[Tensor]:
    """Return the rows of every rank, in the order of ranks; ranks may have different numbers of rows.

    The number of rows travels in the same buffer as the rows, so that this is one collective whenever no rank has more
    than `capacity` rows; otherwise all ranks agree, from the same headers, on as many more as are needed.

    Args:
        rows: `[n, *]`, equal but for `n` on all ranks, of any dtype.
        capacity: Rows that one collective carries per rank; equal on all ranks, at least 1.
    """
    if not is_distributed():
        return [rows]
    size = dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    width = math.prod(rows.shape[1:]) * rows.element_size()
    content = rows.contiguous().view(-1).view(torch.uint8).to(device)
    header = torch.zeros(_HEADER // 8, dtype=torch.int64).fill_(len(rows)).view(torch.uint8).to(device)
    parts: list[list[Tensor]] = [[] for _ in range(size)]
    counts: list[int] = []
    start = 0
    while start == 0 or start < max(counts):
        chunk = content[start * width : (start + capacity) * width]
        buffer = torch.cat([header, chunk, chunk.new_zeros(capacity * width - len(chunk))])
        received = [torch.empty_like(buffer) for _ in range(size)]
        dist.all_gather(received, buffer)
        counts = [int(r[:8].view(torch.int64)) for r in received]
        for part, r, count in zip(parts, received, counts, strict=True):
            part.append(r[_HEADER : _HEADER + max(0, min(capacity, count - start)) * width])
        start += capacity
    whole = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
    return [
        content.view(rows.dtype).view(count, *rows.shape[1:]).to(rows.device)
        for content, count in zip(whole, counts, strict=True)
    ]


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0, in place."""
    if is_distributed():
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.detach().copy_(value)


def average_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with its mean over all ranks, in one collective, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())
    return tensor


def concatenated(part: Tensor) -> Tensor:
    """Return the parts of all ranks, one after the other, in one collective; waits for no device.

    Args:
        part: `[n, *]`, of one shape and dtype on all ranks.
    """
    if not is_distributed():
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def sum_(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Overwrite a tensor with its sum over the ranks of a group, in one collective, and return it."""
    dist.all_reduce(tensor, group=group)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every rank (small picklable things), in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
