# SPDX-License-Identifier: Apache-2.0
"""Optimal brain surgery on flat weights: which to drop, and how the others make up for them; shared out between ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite import distributed
from fulgurite_plugins.curvature.m_fac.fisher import FisherInverse
from fulgurite_plugins.curvature.m_fac.functional import obs_saliency


def obs_update(weights: Tensor, inverse: FisherInverse, dropped: Tensor, joint: bool = False) -> Tensor:
    r"""Return the weights with some of them exactly zero, and the others moved to make up for it.

    Each dropped weight alone asks for the step $-F^{-1} e_i w_i / [F^{-1}]_{ii}$, which is the exact minimum of the
    quadratic model under $w_i = 0$. The paper adds these steps up. The minimum with all of them zero together is

    $$\delta = -F^{-1} E (E^T F^{-1} E)^{-1} w_Q,$$

    with the columns of $E$ the unit vectors of the dropped weights $Q$: one linear system per block.

    Args:
        weights: $w$ `[d]`.
        inverse: $F^{-1}$ for these weights.
        dropped: Which to drop, booleans `[d]`.
        joint: Whether to solve for all dropped weights of a block together; needs blocks no larger than is affordable.
    """
    if joint:
        step = _joint_step(weights, inverse, dropped)
    else:
        step = inverse.mul(torch.where(dropped, -weights / inverse.diag().to(weights), 0.0))
    return torch.where(dropped, 0.0, weights + step)


def _joint_step(weights: Tensor, inverse: FisherInverse, dropped: Tensor) -> Tensor:
    size, steps, start = inverse.block_size, [], 0
    filling = (0, -len(weights) % size)
    values = F.pad(torch.where(dropped, weights, 0.0).double(), filling).view(-1, size, 1)
    flags = F.pad(dropped, filling).view(-1, size, 1)
    for some in inverse.blocks():
        part = slice(start, start + len(some))
        start += len(some)
        blocks, flag = some.double(), flags[part].to(some.device)
        system = torch.where(flag & flag.mT, blocks, torch.eye(size, dtype=torch.float64, device=some.device))
        multipliers = torch.linalg.solve(system, values[part].to(some.device))  # zero for the weights that stay
        steps.append(-(blocks @ multipliers))
    return torch.cat(steps).reshape(-1)[: len(weights)].to(weights)


def lowest(scores: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return booleans `[d]` that are true for the lowest scores of each part.

    Args:
        scores: `[d]`.
        sizes: Lengths of the consecutive parts.
        counts: How many to choose of each part.
    """
    chosen = []
    for part, count in zip(scores.split(list(sizes)), counts, strict=True):
        positions = part.topk(count, largest=False).indices
        chosen.append(torch.zeros_like(part, dtype=torch.bool).index_fill_(0, positions, True))
    return torch.cat(chosen)


def prune_once(
    weights: Tensor,
    rows: Tensor,
    number: int,
    sizes: Sequence[int],
    counts: Sequence[int],
    damping: float,
    block_size: int | None,
    joint: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Drop the least salient weights and update the others; all ranks call this, and get the same.

    With blocks, each rank works on a part of them, of which it gets the gradients of all ranks. A single block is
    worked on by every rank.

    Args:
        weights: $w$ `[d]`.
        rows: The gradients that this rank has computed `[n, d]`.
        number: The gradients of all ranks together $m$, of which each has computed every W-th.
        sizes: Lengths of the consecutive parts of `weights` that are ranked apart.
        counts: How many to drop of each part.
        damping: $\lambda$.
        block_size: Columns of a block; None for a single one.
        joint: Whether to solve for all dropped weights of a block together.

    Returns:
        The new weights `[d]` and which of them were dropped `[d]`.
    """
    rank, world = distributed.world()
    most = -(-number // world)
    if block_size is None:
        rank, world = 0, 1
    size = block_size or len(weights)
    share = -(-len(weights) // (size * world)) * size
    parts = [slice(owner * share, (owner + 1) * share) for owner in range(world)]
    inverse: FisherInverse | None = None
    for owner, part in enumerate(parts):
        some = rows[:, part]
        gathered = distributed.gather_rows(some, capacity=most) if some.shape[1] else []
        if owner == rank and gathered:
            inverse = FisherInverse(torch.cat(gathered), damping, block_size)
    own = parts[rank]

    def everywhere(values: Tensor) -> Tensor:
        filled = F.pad(values, (0, share - len(values)))
        return (distributed.concatenated(filled) if world > 1 else filled)[: len(weights)]

    nothing = weights[:0]
    diagonal = everywhere(nothing if inverse is None else inverse.diag().to(weights))
    dropped = lowest(obs_saliency(weights, diagonal), sizes, counts)
    updated = nothing if inverse is None else obs_update(weights[own], inverse, dropped[own], joint)
    return everywhere(updated), dropped
