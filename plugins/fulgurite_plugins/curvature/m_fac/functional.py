# SPDX-License-Identifier: Apache-2.0
r"""The equations of Frantar, Kurtic, Alistarh (2021), M-FAC: products with the inverse of a damped empirical Fisher.

| symbol | meaning | argument |
|---|---|---|
| $g_i$, $G$ | gradients, as the rows of a matrix `[m, d]` | `gradients` |
| $\lambda$ | damping, positive | `damping` |
| $F$ | $\lambda I + \frac{1}{m} \sum_i g_i g_i^T$ `[d, d]`, never formed | |
| $K$, $S$ | $G G^T$ and $m \lambda I + K$ `[m, m]` | `gram` |
| $w$, $\rho$ | weights; what the loss rises by when one of them is removed | `weights` |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fulgurite.errors import check_argument, is_number


def woodbury_ihvp(gradients: Tensor, vectors: Tensor, damping: float) -> Tensor:
    r"""Return $F^{-1} x = \frac{1}{\lambda} (x - G^T S^{-1} G x)$ (the identity of Woodbury), without any `[d, d]` matrix.

    Everything is computed in float64. It costs $O(d m^2)$; for many products with the same gradients `FisherInverse`
    keeps what can be kept.

    Args:
        gradients: The rows $g_i$ `[m, d]`.
        vectors: What to multiply `[d]` or `[d, k]`.
        damping: $\lambda$, positive.

    Returns:
        The products, in the shape and precision of `vectors`.

    Raises:
        ValueError: If `damping` is not positive.

    Example:
        >>> woodbury_ihvp(torch.tensor([[1.0, 0.0]]), torch.tensor([2.0, 2.0]), damping=1.0)
        tensor([1., 2.])
    """
    check_damping(damping, "woodbury_ihvp")
    rows, columns = gradients.double(), vectors.double().reshape(len(vectors), -1)
    inner = torch.cholesky_solve(rows @ columns, gram_cholesky(rows @ rows.T, damping))
    return ((columns - rows.T @ inner) / damping).view_as(vectors).to(vectors.dtype)


def gram_cholesky(gram: Tensor, damping: float) -> Tensor:
    r"""Return the lower factor of $S = m \lambda I + K$ in float64; it is not checked, and does not wait for the device.

    Args:
        gram: $K = G G^T$ `[..., m, m]`.
        damping: $\lambda$.
    """
    shift = gram.shape[-1] * damping * torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    return torch.linalg.cholesky_ex(gram.double() + shift).L


def window_coefficients(gram: Tensor, slot: Tensor, damping: float, rounding: float = 0.0) -> Tensor:
    r"""Return the coefficients $c = m S^{-1} e_s$ `[m]` for which $F^{-1} g_s = G^T c$ (the dynamic algorithm).

    The gradient that is preconditioned is itself a row of the window, $g_s = G^T e_s$. With $I - S^{-1} K = m \lambda
    S^{-1}$ Woodbury's difference becomes a single product, in which nothing cancels and no rounding is multiplied by
    $1/\lambda$:

    $$F^{-1} g_s = \frac{1}{\lambda} (G^T e_s - G^T S^{-1} K e_s) = m\, G^T S^{-1} e_s.$$

    Products in float32 leave an error in $K$ that may be larger than $m \lambda$. As much as it may be is added to the
    diagonal, each element in its own scale. Should $S$ not be positive definite all the same, the gradient is scaled
    as if it were alone in the window. Nothing waits for the device.

    Args:
        gram: $K$ `[m, m]` in float64.
        slot: The row $s$, a tensor `[1]`.
        damping: $\lambda$.
        rounding: The relative error of $K$, as a norm.
    """
    system = damped(gram, damping, rounding)
    factor, info = torch.linalg.cholesky_ex(system)
    unit = torch.zeros_like(system[0]).index_fill_(0, slot, 1.0)
    solved = torch.cholesky_solve(unit.unsqueeze(1), factor).squeeze(1)
    return len(gram) * torch.where(info == 0, solved, unit / system.diagonal())


def damped(gram: Tensor, damping: float, rounding: float = 0.0) -> Tensor:
    r"""Return $S = m \lambda I + K$, with a part of the diagonal of $K$ `[m, m]` added to it as rounding."""
    return gram.diagonal_scatter(len(gram) * damping + (1 + rounding) * gram.diagonal())


def static_recursion(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""Return $h_i = F_{i-1}^{-1} g_i$ `[m, d]` and $m + g_i^T h_i$ `[m]`, as the paper writes its static algorithm.

    $$h_i = \frac{g_i}{\lambda} - \sum_{j<i} h_j \frac{h_j^T g_i}{m + g_j^T h_j}, \qquad
      F^{-1} x = \frac{x}{\lambda} - \sum_j h_j \frac{h_j^T x}{m + g_j^T h_j}.$$

    It takes $m$ steps one after the other; it is here to be compared with (`FisherInverse` is what to use).

    Args:
        gradients: The rows $g_i$ `[m, d]`.
        damping: $\lambda$.
    """
    rows = len(gradients)
    h = torch.zeros_like(gradients)
    divisors = gradients.new_zeros(rows)
    for i, gradient in enumerate(gradients):
        h[i] = gradient / damping - h[:i].T @ ((h[:i] @ gradient) / divisors[:i])
        divisors[i] = rows + gradient @ h[i]
    return h, divisors


def obs_saliency(weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
    r"""Return $\rho_i = w_i^2 / (2 [F^{-1}]_{ii})$: what removing one weight, and moving the others, adds to the loss.

    Args:
        weights: $w$ `[d]`.
        inverse_diagonal: $\mathrm{diag}(F^{-1})$ `[d]`, positive.

    Example:
        >>> obs_saliency(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2.0]))
        tensor([1., 1.])
    """
    return weights.square() / (2 * inverse_diagonal)


def densities(start: float, end: float, rounds: int) -> list[float]:
    """Return the densities after each of `rounds` rounds, which fall geometrically from `start` to `end` (section 4).

    Args:
        start: The density at first, in (0, 1].
        end: The density at last, in (0, `start`].
        rounds: Number of rounds, at least 1.

    Raises:
        ValueError: If a density or the number of rounds is outside its range.

    Example:
        >>> densities(1.0, 0.25, 2)
        [0.5, 0.25]
    """
    check_argument(is_number(start) and 0 < start <= 1, "start", "densities", "in (0, 1]", start)
    check_argument(is_number(end) and 0 < end <= start, "end", "densities", f"in (0, {start}]", end)
    check_argument(isinstance(rounds, int) and rounds >= 1, "rounds", "densities", "a positive integer", rounds)
    return [*(start * (end / start) ** (j / rounds) for j in range(1, rounds)), end]


def check_damping(damping: object, owner: str) -> None:
    """Raise ValueError unless the damping is a positive number."""
    check_argument(is_number(damping) and damping > 0, "damping", owner, "a positive number", damping)  # type: ignore[operator]


@contextmanager
def full_precision() -> Iterator[None]:
    r"""Multiply float32 matrices on CUDA devices as float32 and not as TF32, whose rounding $1/\\lambda$ would amplify."""
    settings = torch.backends.cuda.matmul
    found = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = found
