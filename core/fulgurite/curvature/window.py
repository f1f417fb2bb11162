# SPDX-License-Identifier: Apache-2.0
"""The last gradients of a training, as the rows of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fulgurite.errors import check_argument

_PIECE = 2**20
"""Numbers that are converted at a time, where rows are stored in fewer bits than products need."""


class GradientWindow:
    """A ring buffer of flat gradients: `rows` gradients of `size` numbers, zero until they are written.

    A new gradient overwrites the oldest. Nothing that a training step needs waits for the device: the position is a
    tensor, and a gradient that is not to be taken in leaves everything as it was without a branch.

    Args:
        rows: Number of gradients $m$ that are kept, at least 1.
        size: Numbers in a gradient $P$; 0 is allowed (a rank that holds no parameters).
        dtype: Precision in which rows are stored; products are computed in at least float32.
        device: Where they lie.

    Raises:
        ValueError: If `rows` or `size` is out of range, or `dtype` is no floating-point type.

    Example:
        >>> window = GradientWindow(2, 3)
        >>> for number in (1.0, 2.0, 3.0):
        ...     slot = window.push(torch.full((3,), number))
        >>> window.in_order()
        tensor([[2., 2., 2.],
                [3., 3., 3.]])
    """

    def __init__(
        self, rows: int, size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        check_argument(isinstance(rows, int) and rows >= 1, "rows", "GradientWindow", "a positive integer", rows)
        check_argument(isinstance(size, int) and size >= 0, "size", "GradientWindow", "0 or more", size)
        check_argument(dtype.is_floating_point, "dtype", "GradientWindow", "a floating-point type", dtype)
        self.gradients = torch.zeros(rows, size, dtype=dtype, device=device)
        self.pushed = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def rows(self) -> int:
        """Number of gradients that are kept, $m$."""
        return self.gradients.shape[0]

    @property
    def size(self) -> int:
        """Numbers in a gradient, $P$."""
        return self.gradients.shape[1]

    @property
    def accumulate(self) -> torch.dtype:
        """The precision of products: that of the rows, at least float32."""
        return torch.promote_types(self.gradients.dtype, torch.float32)

    @property
    def slot(self) -> Tensor:
        """The row `[1]` that the next gradient goes to, on the device."""
        return self.pushed % self.rows

    def __len__(self) -> int:
        """Return how many rows have been written; waits for the device."""
        return min(int(self.pushed), self.rows)

    @torch.no_grad()
    def push(self, gradient: Tensor, accept: Tensor | None = None) -> Tensor:
        """Overwrite the oldest row, and return its number `[1]` on the device.

        Args:
            gradient: The gradient `[P]`.
            accept: Whether to take it in, a boolean of one element on the device; None always does.
        """
        slot = self.slot
        row = gradient.to(self.gradients)
        if accept is not None:
            row = torch.where(accept, row, self.gradients.index_select(0, slot)[0])
        self.gradients.index_copy_(0, slot, row.unsqueeze(0))
        self.pushed += 1 if accept is None else accept.to(torch.int64)
        return slot

    @torch.no_grad()
    def products(self, vector: Tensor) -> Tensor:
        """Return the product $G x$ `[m]` of every row with a vector `[P]`, in `accumulate`."""
        vector = vector.to(self.gradients.device, self.accumulate)
        if self.gradients.dtype == self.accumulate:
            return self.gradients @ vector
        result = vector.new_zeros(self.rows)
        for part in self._pieces():
            result += self.gradients[:, part].to(self.accumulate) @ vector[part]
        return result

    @torch.no_grad()
    def combination(self, coefficients: Tensor) -> Tensor:
        """Return the combination $G^T c$ `[P]` of the rows with coefficients `[m]`, in `accumulate`."""
        coefficients = coefficients.to(self.gradients.device, self.accumulate)
        if self.gradients.dtype == self.accumulate:
            return coefficients @ self.gradients
        result = coefficients.new_empty(self.size)
        for part in self._pieces():
            result[part] = coefficients @ self.gradients[:, part].to(self.accumulate)
        return result

    def in_order(self) -> Tensor:
        """Return a copy of the rows that have been written `[n, P]`, the oldest first; waits for the device."""
        pushed = int(self.pushed)
        if pushed <= self.rows:
            return self.gradients[:pushed].clone()
        return self.gradients.roll(-(pushed % self.rows), 0)

    def grow(self, size: int) -> None:
        """Append columns of zeros, for parameters that have come to the model.

        Args:
            size: The new number of columns, not below the present one.

        Raises:
            ValueError: If it is below.
        """
        check_argument(size >= self.size, "size", "GradientWindow.grow", f"at least {self.size}", size)
        new = self.gradients.new_zeros(self.rows, size - self.size)
        self.gradients = torch.cat([self.gradients, new], dim=1)

    def to(self, device: torch.device) -> GradientWindow:
        """Move it to a device, and return it."""
        self.gradients, self.pushed = self.gradients.to(device), self.pushed.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as they lie, and how many gradients have been pushed."""
        return {"version": 1, "gradients": self.gradients, "pushed": self.pushed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore rows and position, in this window's precision and on its device.

        Raises:
            ValueError: If the state is of a window with other rows or another size.
        """
        found = state_dict["gradients"]
        if found.shape != self.gradients.shape:
            raise ValueError(
                f"Expected the state of a GradientWindow of {self.rows} gradients of {self.size} numbers, but got one of "
                f"{found.shape[0]} gradients of {found.shape[1]} numbers. Build it with the numbers that it was saved with."
            )
        self.gradients.copy_(found)
        self.pushed.copy_(state_dict["pushed"])

    def _pieces(self) -> list[slice]:
        width = max(1, _PIECE // self.rows)
        return [slice(start, start + width) for start in range(0, self.size, width)]
