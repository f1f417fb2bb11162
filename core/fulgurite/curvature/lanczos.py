# SPDX-License-Identifier: Apache-2.0
"""Lanczos' method: the extreme eigenvalues of a symmetric matrix, and its spectral measure, from products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.curvature.operators import Operator

_BREAKDOWN = 1e-10
"""Off-diagonal elements below this part of the largest element end the recursion: an invariant subspace is complete."""


@dataclass(frozen=True)
class Tridiagonal:
    r"""The matrix $T = Q^\top A Q$ in the Krylov space of a start vector.

    Args:
        diagonal: `[k]` in float64, on the CPU; `k` is smaller than asked for if the Krylov space is.
        off_diagonal: `[k - 1]`, likewise.
        basis: $Q$, `[P, k]`, in the dtype and on the device of the vectors.
        remainder: The next off-diagonal element, which bounds the errors; 0 after a breakdown.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor
    remainder: float

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values, ascending, and their weights, which add up to 1; `[k]` each in float64.

        The weights are the squared first components of the eigenvectors of `T`: those of the Gauss quadrature of the
        spectral measure that the start vector sees.
        """
        values, vectors = self._eigen()
        return values, vectors[0].square()

    def largest(self) -> tuple[float, float]:
        """Return the largest Ritz value, and a bound of its distance to an eigenvalue."""
        values, vectors = self._eigen()
        return values[-1].item(), abs(self.remainder * vectors[-1, -1].item())

    def smallest(self) -> tuple[float, float]:
        """Return the smallest Ritz value, and a bound of its distance to an eigenvalue."""
        values, vectors = self._eigen()
        return values[0].item(), abs(self.remainder * vectors[-1, 0].item())

    def _eigen(self) -> tuple[Tensor, Tensor]:
        off = self.off_diagonal
        return torch.linalg.eigh(torch.diag(self.diagonal) + torch.diag(off, 1) + torch.diag(off, -1))


def lanczos(
    matrix: Operator | Callable[[Tensor], Tensor],
    steps: int,
    start: Tensor | None = None,
    seed: int = 0,
    reorthogonalize: bool = True,
) -> Tridiagonal:
    """Run Lanczos' recursion on a symmetric matrix.

    Args:
        matrix: The matrix, or a function that multiplies a vector `[P]` by it; that needs `start`.
        steps: Products to make; fewer are made if the Krylov space ends earlier.
        start: The start vector `[P]`, of any length; None draws a Gaussian one, the same on all ranks.
        seed: Seeds it.
        reorthogonalize: Whether to orthogonalise each vector to all before it, twice. Without, converged eigenvalues
            appear again and again.

    Raises:
        ValueError: If `steps` is not positive, or the start vector is zero, not finite, or missing.
        FloatingPointError: If a product is not finite.
    """
    if steps < 1:
        raise ValueError(f"Expected `steps` to be positive, but got {steps!r}.")
    multiply = matrix.__matmul__ if isinstance(matrix, Operator) else matrix
    if start is None:
        if not isinstance(matrix, Operator):
            raise ValueError("Expected `start`, since `matrix` is a function whose size is not known.")
        drawn = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = drawn.to(matrix.device, matrix.dtype)
    length = start.norm()
    if not 0 < length.item() < float("inf"):
        raise ValueError(f"Expected `start` to be a finite vector that is not zero, but its norm is {length.item()}.")
    steps = min(steps, len(start))
    basis = start.new_empty(steps, len(start))
    basis[0] = start / length
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for step in range(steps):
        image = multiply(basis[step])
        diagonal.append(torch.dot(image, basis[step]).item())
        image = image - diagonal[-1] * basis[step]
        if step:
            image -= off_diagonal[-1] * basis[step - 1]
        if reorthogonalize:
            for _ in range(2):
                image -= basis[: step + 1].mT @ (basis[: step + 1] @ image)
        remainder = image.norm().item()
        if not remainder < float("inf"):
            raise FloatingPointError(f"Product {step + 1} of Lanczos' recursion is not finite.")
        scale = max(map(abs, (*diagonal, *off_diagonal)))
        if remainder <= _BREAKDOWN * scale:
            remainder = 0.0
            break
        if step + 1 < steps:
            off_diagonal.append(remainder)
            basis[step + 1] = image / remainder
    made = len(diagonal)
    return Tridiagonal(
        torch.tensor(diagonal, dtype=torch.float64),
        torch.tensor(off_diagonal, dtype=torch.float64),
        basis[:made].mT,
        0.0 if made == len(start) else remainder,
    )
