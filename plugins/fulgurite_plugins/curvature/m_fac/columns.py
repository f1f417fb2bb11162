# SPDX-License-Identifier: Apache-2.0
"""Which coordinates of which parameters are the columns of a window, and which of them this rank holds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fulgurite import distributed
from fulgurite.errors import check_argument


@dataclass
class Segment:
    """The parameters of one group, which enter a window together.

    Args:
        parameters: The parameters.
        kept: Positions `[n]` in the concatenated parameters that are columns; None for all.
    """

    parameters: list[Tensor]
    kept: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        """Numbers of each parameter that this process holds."""
        return [local(parameter).numel() for parameter in self.parameters]

    @property
    def columns(self) -> int:
        """Number of columns."""
        return sum(self.sizes) if self.kept is None else len(self.kept)


class Columns:
    """The columns of a window, in the order of the parameters; a new group's follow those of the earlier ones.

    With `shard` each rank holds, of every group, a W-th of the columns; the last rank's part is filled up with zeros.

    Args:
        shard: Whether the ranks divide the columns among themselves.
        sparse: Whether coordinates that are exactly zero now are left out.
    """

    def __init__(self, shard: bool, sparse: bool) -> None:
        self.shard = shard
        self.sparse = sparse
        self.segments: list[Segment] = []

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, in order."""
        return [parameter for segment in self.segments for parameter in segment.parameters]

    @property
    def total(self) -> int:
        """Number of columns, of all ranks together if they divide them."""
        return sum(segment.columns for segment in self.segments)

    @property
    def width(self) -> int:
        """Number of columns of this rank."""
        return sum(self._shares())

    def append(self, parameters: Sequence[Tensor]) -> None:
        """Add the parameters of a group.

        Raises:
            ValueError: If one of them is complex.
        """
        for parameter in parameters:
            check_argument(not parameter.is_complex(), "params", "MFAC", "real", f"a parameter of {parameter.dtype}")
        segment = Segment(list(parameters))
        if self.sparse:
            flat = torch.cat([local(parameter).detach().reshape(-1) for parameter in parameters])
            segment.kept = flat.nonzero().squeeze(1)
            if len(segment.kept) == len(flat):
                warnings.warn(
                    "MFAC(sparse=True) leaves out the weights that are exactly zero when it is built, but found none among "
                    f"{len(flat)}. Prune the model, or load its weights, before the optimizer is built.",
                    stacklevel=4,
                )
        self.segments.append(segment)

    def gather(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return this rank's columns `[width]` of a gradient, given per parameter; None stands for zero."""
        parts, rest = [], list(gradients)
        rank, _ = self._place()
        for segment, share in zip(self.segments, self._shares(), strict=True):
            own, rest = rest[: len(segment.parameters)], rest[len(segment.parameters) :]
            flat = torch.cat(
                [
                    local(p).new_zeros(local(p).numel()) if g is None else local(g).reshape(-1)
                    for g, p in zip(own, segment.parameters, strict=True)
                ]
            )
            if segment.kept is not None:
                flat = flat[segment.kept.to(flat.device)]
            if self.shard:
                part = flat[rank * share : (rank + 1) * share]
                flat = F.pad(part, (0, share - len(part)))
            parts.append(flat)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def scatter(self, columns: Tensor) -> list[Tensor]:
        """Return a vector over this rank's columns `[width]` as one tensor per parameter, gathered from all ranks."""
        _, world = self._place()
        found: list[Tensor] = []
        everything = distributed.concatenated(columns.unsqueeze(0)) if self.shard else columns.unsqueeze(0)
        for segment, piece in zip(self.segments, everything.view(world, -1).split(self._shares(), dim=1), strict=True):
            flat = piece.reshape(-1)[: segment.columns]
            if segment.kept is not None:
                kept = segment.kept.to(flat.device)
                flat = flat.new_zeros(sum(segment.sizes)).index_copy_(0, kept, flat)
            pairs = zip(flat.split(segment.sizes), segment.parameters, strict=True)
            found += [part.view_as(local(parameter)) for part, parameter in pairs]
        return found

    def together(self, rows: Tensor) -> Tensor:
        """Return the columns of all ranks `[m, total]`, given this rank's `[m, width]`; all ranks call it."""
        if not self.shard:
            return rows
        _, world = self._place()
        everything = [distributed.concatenated(row.unsqueeze(0)).view(world, -1) for row in rows]
        return torch.stack([torch.cat(self._unpadded(row)) for row in everything])

    def apart(self, rows: Tensor) -> Tensor:
        """Return this rank's columns `[m, width]`, given those of all `[m, total]`."""
        if not self.shard:
            return rows
        rank, _ = self._place()
        pieces = rows.split([segment.columns for segment in self.segments], dim=1)
        parts = []
        for piece, share in zip(pieces, self._shares(), strict=True):
            part = piece[:, rank * share : (rank + 1) * share]
            parts.append(F.pad(part, (0, share - part.shape[1])))
        return torch.cat(parts, dim=1)

    def _unpadded(self, everything: Tensor) -> list[Tensor]:
        pieces = everything.split(self._shares(), dim=1)
        return [piece.reshape(-1)[: s.columns] for piece, s in zip(pieces, self.segments, strict=True)]

    def _place(self) -> tuple[int, int]:
        return distributed.world() if self.shard else (0, 1)

    def _shares(self) -> list[int]:
        _, world = self._place()
        return [-(-segment.columns // world) for segment in self.segments]


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, which may be distributed."""
    return cast("Any", tensor).to_local() if isinstance(tensor, DTensor) else tensor
