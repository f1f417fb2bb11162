# SPDX-License-Identifier: Apache-2.0
r"""The factor of a window's $S = m \lambda I + K$, brought from one gradient to the next in $O(m^2)$ instead of $O(m^3)$.

Rows and columns of $S = R^T R$ stand in the order in which the gradients came, the oldest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64
"""Rows that are turned at a time. On one core 32 are a little quicker; threads wait for each other less often with more."""


def factorize(system: Tensor) -> Tensor:
    """Return the upper factor $R$ of $S$ `[m, m]`; that of its diagonal should $S$ not be positive definite."""
    factor, info = torch.linalg.cholesky_ex(system, upper=True)
    return torch.where(info == 0, factor, system.diagonal().sqrt().diag())


def slide_(factor: Tensor, column: Tensor, least: float) -> None:
    r"""Take the oldest gradient out of $R$ and the newest in, in place.

    Without its first column $R$ is upper Hessenberg: below its diagonal there is one element per column. Orthogonal
    transformations of neighbouring rows, a block of them at a time, make it triangular again. The new last column is what
    a factorisation would put there, by substitution. Orthogonal transformations do not amplify rounding, however small
    the damping: many slides are as good as a factorisation, and it is never made anew.

    Args:
        factor: $R$ `[m, m]`; below its diagonal it is left with roundings instead of zeros.
        column: The last column of the new $S$ `[m]`: the newest gradient's products with the others, the oldest first.
        least: What the square of the last element of $R$, a Schur complement, is at least: $m \lambda$.
    """
    rows = len(factor)
    for start in range(0, rows - 1, _BLOCK):
        stop = min(start + _BLOCK, rows - 1)
        block = factor[start : stop + 1, start + 1 :]
        turned = torch.linalg.qr(block[:, : stop - start], mode="complete").Q.mT @ block
        factor[start:stop, start:-1] = turned[:-1]
        factor[stop, start + 1 :] = turned[-1]  # the last row takes part in the next block, and so does not move yet
    unit = torch.zeros_like(column).index_fill_(0, torch.tensor(rows - 1), 1.0)
    factor[-1], factor[:, -1] = unit, unit
    new = torch.linalg.solve_triangular(factor.mT, column.unsqueeze(1), upper=False).squeeze(1)
    new[-1] = (column[-1] - new[:-1].square().sum()).clamp_min(least).sqrt()
    factor[:, -1] = new


def newest_column(factor: Tensor) -> Tensor:
    """Return the last column of $S^{-1}$ `[m]`."""
    right = torch.zeros_like(factor[0])
    right[-1] = 1 / factor[-1, -1]
    return torch.linalg.solve_triangular(factor, right.unsqueeze(1), upper=True).squeeze(1)
