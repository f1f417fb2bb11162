# SPDX-License-Identifier: Apache-2.0
r"""The squared correlations of rows with themselves, in two exact forms, each with its gradient in closed form.

For rows $W$ `[G, R, Q, *k]` both give $L = \sum_d \lVert E_d \rVert_F^2$ with $E_d = \sum_u W_u W_{u+d}^T - [d = 0] I$,
over all lags $d$ that are multiples of a step. Since $E_{-d} = E_d^T$, the gradient is a correlation again,

$$\frac{\partial L}{\partial W_v} = 4 \sum_d E_d W_{v+d},$$

made of the residuals $E$ that the value is made of. Autograd would take more products: it does not know that both factors
of a product are the same tensor.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_CALLS = 2_000_000
"""Multiplications in the time that the calls for one lag take, on a processor's core."""


class Form(Protocol):
    """A way to compute the residuals of rows, the sum of their squares, and its gradient."""

    def factors(self, rows: Tensor) -> Tensor:
        """Return what the residuals are products of, made of rows `[G, R, Q, *k]` by a linear map."""

    def residuals(self, factors: Tensor) -> Tensor:
        """Return all residuals `[..., F, G, R, R]`."""

    def values(self, residuals: Tensor) -> Tensor:
        """Return the sum of squares `[G]` of each group."""

    def gradient(self, factors: Tensor, residuals: Tensor) -> Tensor:
        """Return the gradient `[G, R, Q, *k]` of the sum over all groups."""

    def cost(self, rows: int, columns: int) -> int:
        """Return how many multiplications value and gradient of `R` rows and `Q` columns take."""


@dataclass(frozen=True)
class AtLags:
    """A matrix product of the taps that meet, for one of each pair of opposite lags; without the zeros around a kernel.

    Args:
        kernel: Taps per axis.
        step: Step between lags per axis: the stride of the convolution.
    """

    kernel: tuple[int, ...]
    step: tuple[int, ...]

    def factors(self, rows: Tensor) -> Tensor:
        """Return the taps `[G, R, *k, Q]`, which are cut out in long runs."""
        return rows.movedim(2, -1).clone(memory_format=torch.contiguous_format)

    def residuals(self, taps: Tensor) -> Tensor:
        """Return the residuals `[F, G, R, R]`, that of lag zero first."""
        found = [taps[a].flatten(2) @ taps[b].flatten(2).mT for a, b in self._meetings()]
        return torch.stack([_minus_identity(found[0]), *found[1:]])

    def values(self, residuals: Tensor) -> Tensor:
        """Return the sum of squares `[G]`; every lag but zero stands for two."""
        squares = _squares(residuals)
        return squares[0] + 2 * squares[1:].sum(0)

    def gradient(self, taps: Tensor, residuals: Tensor) -> Tensor:
        """Return the gradient `[G, R, Q, *k]`."""
        total = (residuals[0] @ taps.flatten(2)).view_as(taps)
        for residual, (a, b) in zip(residuals[1:], self._meetings()[1:], strict=True):
            total[a] += (residual @ taps[b].flatten(2)).view_as(taps[b])
            total[b] += (residual.mT @ taps[a].flatten(2)).view_as(taps[a])
        return 4 * total.movedim(-1, 2)

    def cost(self, rows: int, columns: int) -> int:
        """Return the multiplications: half the lags for the value, all of them for the gradient; and the calls."""
        meetings = self._meetings()
        pairs = sum(math.prod(s.stop - s.start for s in a[2:]) for a, _ in meetings)
        return (3 * pairs - math.prod(self.kernel)) * rows**2 * columns + _CALLS * len(meetings)

    def _meetings(self) -> list[tuple[Any, Any]]:
        """Return the taps `u` and `u + d` that meet, as indices, for lag zero and one of each other pair."""
        lags = itertools.product(*itertools.starmap(self._axis, zip(self.kernel, self.step, strict=True)))
        zero = (0,) * len(self.kernel)
        every = slice(None)
        return [
            (
                (every, every, *(slice(max(0, -i), k - max(0, i)) for k, i in zip(self.kernel, d, strict=True))),
                (every, every, *(slice(max(0, i), k - max(0, -i)) for k, i in zip(self.kernel, d, strict=True))),
            )
            for d in lags
            if d >= zero
        ]

    @staticmethod
    def _axis(k: int, s: int) -> range:
        furthest = (k - 1) // s * s
        return range(-furthest, furthest + 1, s)


@dataclass(frozen=True)
class AtFrequencies:
    r"""By Parseval, the mean over $2k - 1$ frequencies per axis, where no two lags fall together; one of each pair.

    With $A_f$ the response of the rows, the residual is $A_f A_f^H - I$, and the gradient $4 (A_f A_f^H - I) A_f$
    transformed back.

    Args:
        kernel: Taps per axis.
    """

    kernel: tuple[int, ...]

    def factors(self, rows: Tensor) -> Tensor:
        """Return real and imaginary part of the frequency response `[2, F, G, R, Q]`."""
        return torch.stack(frequency_response(rows, self._grid())[:2])

    def residuals(self, response: Tensor) -> Tensor:
        """Return real and imaginary part of the residuals `[2, F, G, R, R]`."""
        real, imaginary = response
        half = imaginary @ real.mT
        return torch.stack([_minus_identity(real @ real.mT + imaginary @ imaginary.mT), half - half.mT])

    def values(self, residuals: Tensor) -> Tensor:
        """Return the sum of squares `[G]`."""
        return self._fourier(residuals)[2] @ _squares(residuals).sum(0)

    def gradient(self, response: Tensor, residuals: Tensor) -> Tensor:
        """Return the gradient `[G, R, Q, *k]`."""
        cosine, sine, weight = self._fourier(response)
        real, imaginary = response
        a, b = (4 * weight).view(-1, 1, 1, 1) * residuals
        moved = cosine.mT @ (a @ real - b @ imaginary).flatten(1) + sine.mT @ (a @ imaginary + b @ real).flatten(1)
        return moved.mT.reshape(*real.shape[1:], *self.kernel)

    def cost(self, rows: int, columns: int) -> int:
        """Return the multiplications: three products of real matrices for the value, four for the gradient."""
        return 7 * (math.prod(self._grid()) // 2 + 1) * rows**2 * columns

    def _fourier(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cosine, sine, count = _fourier(self.kernel, self._grid(), like.dtype, like.device)
        return cosine, sine, count / math.prod(self._grid())

    def _grid(self) -> tuple[int, ...]:
        return tuple(2 * k - 1 for k in self.kernel)


def squared_residuals(rows: Tensor, form: Form) -> Tensor:
    """Return the sum of squared residuals `[G]` of rows `[G, R, Q, *k]` by a form, with its own gradient."""
    if torch.compiler.is_compiling():
        return form.values(form.residuals(form.factors(rows)))
    values: Tensor = _SquaredResiduals.apply(rows, form)[0]
    return values


class _SquaredResiduals(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        factors = form.factors(rows)
        residuals = form.residuals(factors)
        return form.values(residuals), factors, residuals

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        rows, ctx.form = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(rows, *output[1:])
        ctx.save_for_forward(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        rows, factors, residuals = ctx.saved_tensors
        if torch.is_grad_enabled():  # what is saved has no graph, along which the gradient could be differentiated
            factors = ctx.form.factors(rows)
            residuals = ctx.form.residuals(factors)
        return grad.view(-1, *[1] * (rows.ndim - 1)) * ctx.form.gradient(factors, residuals), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None, None]:
        return (ctx.form.gradient(*ctx.saved_tensors) * tangent).flatten(1).sum(1), None, None


def frequency_response(rows: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the matrices $A_f = \sum_u W_u e^{-2 \pi i f u / N}$ at one of each pair of opposite frequencies of a grid.

    Their singular values are those of the convolution on inputs of $S N$ positions.

    Args:
        rows: `[G, R, Q, *k]`.
        grid: Frequencies $N$ per axis.

    Returns:
        Real part and imaginary part `[F, G, R, Q]`, and how many frequencies each stands for, 1 or 2 `[F]`.
    """
    cosine, sine, count = _fourier(tuple(rows.shape[3:]), tuple(grid), rows.dtype, rows.device)
    taps = rows.flatten(3).flatten(0, 2).mT
    size = (len(count), *rows.shape[:3])
    return (cosine @ taps).view(size), (sine @ taps).view(size), count


@functools.lru_cache(maxsize=64)
def _fourier(
    kernel: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        every = itertools.product(*map(range, grid))
        chosen = [f for f in every if f <= tuple(-i % n for i, n in zip(f, grid, strict=True))]
        alone = [all(2 * i % n == 0 for i, n in zip(f, grid, strict=True)) for f in chosen]
        turns = torch.tensor(chosen, dtype=torch.float64) / torch.tensor(grid, dtype=torch.float64)
        taps = torch.tensor([*itertools.product(*map(range, kernel))], dtype=torch.float64)
        angles = 2 * math.pi * (turns @ taps.mT)
        count = 2.0 - torch.tensor(alone, dtype=torch.float64)
        return tuple(t.to(device, dtype) for t in (angles.cos(), -angles.sin(), count))  # type: ignore[return-value]


def _minus_identity(gram: Tensor) -> Tensor:
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return gram


def _squares(residuals: Tensor) -> Tensor:
    return residuals.flatten(-2).square().sum(dim=-1)
