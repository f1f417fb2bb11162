# SPDX-License-Identifier: Apache-2.0
"""Part of the paper's claim: gradient descent on the regularizer alone makes a kernel orthogonal, for almost all shapes.

`python -m fulgurite_plugins.reparametrization.orthogonal_convolutions.landscape` prints the table of the documentation.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import polyphase_rows, residual

SHAPES = (
    *((16, 8, 3, 1), (8, 16, 3, 1), (9, 1, 3, 1), (16, 3, 3, 1), (27, 3, 3, 1)),
    *((16, 8, 3, 2), (48, 8, 3, 2), (32, 8, 3, 2), (8, 8, 3, 1)),
)
"""Filters, channels, taps per axis, stride; the last two are square (M = C S^n), with a stride and without."""


@dataclass(frozen=True)
class Descent:
    r"""Values of $L_\text{orth}$ before and after.

    Args:
        start: At Xavier's initialisation, by seed `[seeds]`.
        end: After the last step `[seeds]`.
    """

    start: Tensor
    end: Tensor


def descend(
    filters: int, channels: int, taps: int, stride: int, seeds: int = 4, steps: int = 2500, lr: float = 1e-2
) -> Descent:
    """Minimise the regularizer of square 2-D kernels by Adam with a cosine schedule, in float64.

    The seeds are trained together, as groups of one kernel: Adam treats every number alone.

    Args:
        filters: Filters `M`.
        channels: Channels `C`.
        taps: Taps per axis.
        stride: Stride.
        seeds: Number of seeds, from 0.
        steps: Number of steps.
        lr: Learning rate at the beginning.
    """
    starts = [torch.empty(filters, channels, taps, taps, dtype=torch.float64) for _ in range(seeds)]
    for seed, start in enumerate(starts):
        nn.init.xavier_normal_(start, generator=torch.Generator().manual_seed(seed))
    kernels = torch.cat(starts).requires_grad_()
    optimizer = torch.optim.Adam([kernels], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def values() -> Tensor:
        return residual(polyphase_rows(kernels, stride, groups=seeds))

    begun = values().detach()
    for _ in range(steps):
        optimizer.zero_grad()
        values().sum().backward()
        optimizer.step()
        schedule.step()
    return Descent(begun, values().detach())


def main() -> None:
    """Write the table, in Markdown."""
    rows = [
        "| filters | channels | taps | stride | at the start | after 2500 steps |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        found = descend(*shape)
        start, end = (f"{values.min():.2g} to {values.max():.2g}" for values in (found.start, found.end))
        rows.append(f"| {' | '.join(map(str, shape))} | {start} | {end} |")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
