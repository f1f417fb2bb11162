# SPDX-License-Identifier: Apache-2.0
"""What one use of a parameter adds to each example's gradient, kept in factors as long as they are smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Dense:
    """The gradient itself.

    Args:
        gradient: `[B, *shape of the parameter]`.
    """

    gradient: Tensor

    @property
    def numbers(self) -> int:
        """Numbers that its norm takes in memory."""
        return self.gradient.numel()

    def squared_norm(self) -> Tensor:
        """Return the squared norm per example, `[B]`."""
        return self.gradient.flatten(1).square().sum(dim=1)

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the gradient, `[B, *shape]`."""
        return self.gradient


@dataclass(frozen=True)
class Outer:
    r"""A sum of outer products over positions, $\sum_t \delta_t a_t^\top$, in each of `G` groups: a linear map's gradient.

    Args:
        left: Gradients of the outputs, $\delta$: `[B, G, O, T]`.
        right: Inputs, $a$: `[B, G, I, T]`.
    """

    left: Tensor
    right: Tensor

    @property
    def numbers(self) -> int:
        """Numbers that its norm takes in memory."""
        batch, groups, outputs, positions = self.left.shape
        inputs = self.right.shape[2]
        return self.left.numel() + self.right.numel() + batch * groups * min(2 * positions**2, outputs * inputs)

    def squared_norm(self) -> Tensor:
        r"""Return the squared norm per example, `[B]`.

        One position gives $|\delta|^2 |a|^2$. Of more, either $\langle \Delta^\top \Delta, A^\top A \rangle$, which takes
        `T * T` numbers, or the gradient itself, which takes `O * I`: whichever needs fewer operations.
        """
        outputs, positions = self.left.shape[2:]
        inputs = self.right.shape[2]
        if positions == 1:
            return (_square_sums(self.left, 2) * _square_sums(self.right, 2)).sum(dim=1)
        if positions * (outputs + inputs) < outputs * inputs:
            products = (self.left.mT @ self.left).mul_(self.right.mT @ self.right)
            return products.flatten(1).sum(dim=1).clamp_min_(0.0)  # rounding may leave a tiny negative number
        return _square_sums(self.left @ self.right.mT, 1)

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the gradient, `[B, *shape]`."""
        return (self.left @ self.right.mT).reshape(len(self.left), *shape)


@dataclass(frozen=True)
class Rows:
    """Gradients of rows that were looked up in a table.

    Args:
        index: The rows, `[B, T]`.
        gradient: Gradient of each looked-up row, `[B, T, H]`.
    """

    index: Tensor
    gradient: Tensor

    @property
    def numbers(self) -> int:
        """Numbers that its norm takes in memory."""
        return 3 * self.gradient.numel()

    def squared_norm(self) -> Tensor:
        """Return the squared norm per example, `[B]`; gradients of one row add up before."""
        order = self.index.argsort(dim=1)
        rows = self.index.gather(1, order)
        group = F.pad((rows[:, 1:] != rows[:, :-1]).long().cumsum(dim=1), (1, 0))
        spread = (-1, -1, self.gradient.shape[2])
        gradient = self.gradient.gather(1, order.unsqueeze(2).expand(spread))
        return _square_sums(torch.zeros_like(gradient).scatter_add_(1, group.unsqueeze(2).expand(spread), gradient), 1)

    def outer(self, rows: int) -> Outer:
        """Return the same as outer products with one-hot columns of `rows` numbers."""
        left = F.one_hot(self.index, rows).to(self.gradient.dtype)
        return Outer(left.mT.unsqueeze(1), self.gradient.mT.unsqueeze(1))

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the gradient, `[B, *shape]`."""
        return self.outer(shape[0]).dense(shape)


Gradient: TypeAlias = Dense | Outer | Rows


def added(uses: Sequence[Gradient], shape: torch.Size) -> Gradient:
    """Return the sum of the gradients from several uses of one parameter: a reused module, tied weights."""
    if len(uses) == 1:
        return uses[0]
    if all(isinstance(use, Rows) for use in uses):
        return Rows(torch.cat([u.index for u in uses], dim=1), torch.cat([u.gradient for u in uses], dim=1))  # type: ignore[union-attr]
    outers = [use.outer(shape[0]) if isinstance(use, Rows) else use for use in uses]
    if all(isinstance(use, Outer) for use in outers):
        lefts, rights = zip(*((use.left, use.right) for use in outers if isinstance(use, Outer)), strict=True)
        if len({left.shape[1] for left in lefts}) == 1:
            return Outer(torch.cat(lefts, dim=3), torch.cat(rights, dim=3))
    return Dense(torch.stack([use.dense(shape) for use in uses]).sum(dim=0))


def _square_sums(tensor: Tensor, kept: int) -> Tensor:
    """Return the sums of squares over all dimensions after the first `kept`."""
    return tensor.flatten(kept).square().sum(dim=-1)
