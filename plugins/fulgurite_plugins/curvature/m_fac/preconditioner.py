# SPDX-License-Identifier: Apache-2.0
"""The dynamic algorithm: a sliding window of gradients, its Gram matrix, and the direction for the newest of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fulgurite import distributed
from fulgurite.curvature.window import GradientWindow
from fulgurite.errors import RefusedError
from fulgurite.samples.memory import free_bytes
from fulgurite_plugins.curvature.m_fac.columns import Columns
from fulgurite_plugins.curvature.m_fac.functional import damped, window_coefficients
from fulgurite_plugins.curvature.m_fac.sliding import factorize, newest_column, slide_

_SLIDING = 2048
"""Gradients from which on a CPU brings the factor forward instead of factorising anew at each step, as it pays there."""


class Preconditioner:
    """Takes in gradients, and returns each multiplied by the inverse of the damped Fisher of the last of them.

    The window is made when the first gradient comes, on its device or on `device`.

    Args:
        columns: Which coordinates the columns of the window are.
        num_grads: Number of gradients $m$.
        dtype: Precision in which they are stored.
        device: Where they are stored; None for the device of the parameters.
        summed: Whether products are summed over ranks, because each holds only a part of the columns.
    """

    def __init__(
        self, columns: Columns, num_grads: int, dtype: torch.dtype, device: torch.device | None, summed: bool
    ) -> None:
        self.columns = columns
        self.num_grads = num_grads
        self.dtype = dtype
        self.device = device
        self.summed = summed
        self.window: GradientWindow | None = None
        self.gram = torch.zeros(num_grads, num_grads, dtype=torch.float64)
        self.factor: tuple[float, Tensor] | None = None  # the damping that it was made with, and R
        self.skipped = torch.zeros(1, dtype=torch.int64)

    @torch.no_grad()
    def step(self, gradient: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        r"""Take in a gradient, and return its direction.

        Args:
            gradient: This rank's columns of it `[width]`.
            damping: $\lambda$.

        Returns:
            The direction $F^{-1} g$ `[width]`, and whether the gradient was finite (a tensor `[1]`). One that is not
            leaves the window as it was, and has no direction.
        """
        window = self.prepare(gradient.device)
        row = gradient.to(window.gradients)
        slot = window.slot
        wide = row.to(window.accumulate)
        square = (wide @ wide).reshape(1)
        numbers = torch.cat([window.products(row), square]).double()
        if self.summed:
            numbers = distributed.average_(numbers) * distributed.world()[1]
        products, square = numbers[:-1], numbers[-1:]
        finite = square.isfinite()
        window.push(row, finite)
        products = torch.where(finite, products.index_copy(0, slot, square), self.gram.index_select(0, slot)[0])
        self.gram.index_copy_(0, slot, products.unsqueeze(0)).index_copy_(1, slot, products.unsqueeze(1))
        self.skipped += ~finite
        rounding = torch.finfo(window.accumulate).eps * self.num_grads**0.5  # of all products together, as a norm
        if self.num_grads < _SLIDING or self.gram.device.type != "cpu":
            self.factor = None
            coefficients = window_coefficients(self.gram, slot, damping, rounding)
        elif finite:  # on a CPU nothing waits for it
            coefficients = self._slide(slot, damping, rounding)
        else:
            coefficients = torch.zeros_like(products)
        return window.combination(coefficients).to(gradient), finite.to(gradient.device)

    def _slide(self, slot: Tensor, damping: float, rounding: float) -> Tensor:
        """Bring the factor to the window as it is now, and return the coefficients of its newest gradient's direction."""
        order = (slot + 1 + torch.arange(self.num_grads)) % self.num_grads
        if self.factor is None or self.factor[0] != damping:
            self.factor = damping, factorize(damped(self.gram[order][:, order], damping, rounding))
        else:
            column = self.gram[slot.squeeze(0), order]
            column[-1] = self.num_grads * damping + (1 + rounding) * column[-1]
            slide_(self.factor[1], column, self.num_grads * damping)
        newest = self.num_grads * newest_column(self.factor[1])
        return torch.zeros_like(newest).index_copy_(0, order, newest)

    def prepare(self, device: torch.device) -> GradientWindow:
        """Return the window, made, moved to where it belongs or grown if need be.

        Raises:
            RefusedError: If it does not fit into memory.
        """
        device, width = self.device or device, self.columns.width
        if self.window is None:
            self._check_memory(device, width)
            self.window = GradientWindow(self.num_grads, width, self.dtype, device)
        if self.window.gradients.device != device:
            self.window.to(device)
        if self.window.size < width:
            self.window.grow(width)
        if self.gram.device != device:
            self.gram, self.skipped = self.gram.to(device), self.skipped.to(device)
        return self.window

    def state_dict(self) -> dict[str, Any]:
        """Return the window with the columns of all ranks, which all of them must ask for, and its Gram matrix."""
        window = self.window
        kept = [segment.kept for segment in self.columns.segments]
        state: dict[str, Any] = {"kept": kept, "gram": self.gram, "skipped": self.skipped, "window": None}
        state["factor"] = self.factor
        if window is not None:
            state["window"] = {**window.state_dict(), "gradients": self.columns.together(window.gradients)}
        return state

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore window and Gram matrix.

        Raises:
            ValueError: If they are those of another number of gradients or of parameters.
        """
        if len(state["gram"]) != self.num_grads:
            raise ValueError(
                f"Expected a checkpoint of MFAC with num_grads={self.num_grads}, but got one with num_grads="
                f"{len(state['gram'])}. Build the optimizer with that number."
            )
        for segment, kept in zip(self.columns.segments, state["kept"], strict=True):
            segment.kept = kept
        self.window = self.factor = None
        self.gram, self.skipped = state["gram"].clone(), state["skipped"].clone()
        if state["factor"] is not None:
            made_with, factor = state["factor"]
            self.factor = made_with, factor.to("cpu", copy=True)
        if state["window"] is None:
            return
        found = state["window"]["gradients"].shape[1]
        if found != self.columns.total:
            raise ValueError(
                f"Expected a checkpoint of MFAC for {self.columns.total} parameters, but got one for {found}. Give the "
                f"optimizer the parameters, in the order, that it was saved with."
            )
        own = self.columns.apart(state["window"]["gradients"])
        self.prepare(device).load_state_dict({**state["window"], "gradients": own})

    def _check_memory(self, device: torch.device, width: int) -> None:
        needed = self.num_grads * width * self.dtype.itemsize + 5 * 8 * self.num_grads**2
        free = free_bytes(device)
        if needed > free:
            raise RefusedError(
                f"MFAC: the window of {self.num_grads} gradients of {width:,} numbers needs {needed:,} bytes, but {free:,} "
                f"are free on {device}. Use fewer gradients (num_grads), storage_dtype='bfloat16', shard=True on several "
                f"ranks, or storage_device='cpu'."
            )
