# SPDX-License-Identifier: Apache-2.0
r"""The equations of MacKay, Vicol, Lorraine, Duvenaud, Grosse (2019), Self-Tuning Networks.

| symbol | meaning | argument |
|---|---|---|
| $\lambda$ | hyperparameters on the whole real line | `lam` |
| $r(\lambda)$ | the same in the range that they are allowed | `value`, `RangeMap.constrain` |
| $s$ | scale of the perturbation, $s = \text{softplus}(\rho)$ | `scale` |
| $H$ | number of hyperparameters | last dimension |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class RangeMap:
    r"""The map between the real line and the ranges that hyperparameters are allowed, elementwise.

    $(a, b)$: $a + (b - a)\,\sigma(\lambda)$; $(a, \infty)$: $a + \text{softplus}(\lambda)$; $(-\infty, b)$:
    $b - \text{softplus}(\lambda)$; the whole line: $\lambda$. Values stay strictly inside, also where the formula rounds to
    an end.

    Args:
        low: The lower end $a$, possibly `-inf`; or a sequence of `H` ends, for the last dimension of what is mapped.
        high: The upper end $b$, possibly `inf`; likewise.

    Raises:
        ValueError: If an end is NaN, a lower end is not below its upper end, or the sequences differ in length.

    Example:
        >>> RangeMap(0.0, 0.9).constrain(torch.tensor(0.0))
        tensor(0.4500)
    """

    def __init__(self, low: float | Sequence[float], high: float | Sequence[float]) -> None:
        self.low = torch.as_tensor(low, dtype=torch.float64)
        self.high = torch.as_tensor(high, dtype=torch.float64)
        if self.low.shape != self.high.shape or not bool((self.low < self.high).all()):
            raise ValueError(
                f"Expected `low` of RangeMap to be below `high`, for each hyperparameter, but got {low!r} and {high!r}."
            )
        below, above = self.low.isfinite(), self.high.isfinite()
        forms = {"interval": below & above, "above": below & ~above, "below": ~below & above}
        self._forms = {name: where for name, where in forms.items() if bool(where.any())}
        self._ends: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def constrain(self, lam: Tensor) -> Tensor:
        r"""Return $r(\lambda)$, of the shape of `lam` `[*]`, or `[*, H]` for sequences of ends."""
        ends = self._on(lam)
        low, high = ends["low"], ends["high"]
        value = lam
        for form in self._forms:
            if form == "interval":
                mapped = low + (high - low) * torch.sigmoid(lam)
            else:
                mapped = low + F.softplus(lam) if form == "above" else high - F.softplus(lam)
            value = torch.where(ends[form], mapped, value)
        return torch.minimum(torch.maximum(value, ends["least"]), ends["most"]) if self._forms else value

    def unconstrain(self, value: Tensor) -> Tensor:
        r"""Return $\lambda = r^{-1}(\text{value})$, of the same shape; infinite or NaN outside the range."""
        ends = self._on(value)
        low, high = ends["low"], ends["high"]
        lam = value
        for form in self._forms:
            if form == "interval":
                mapped = torch.log(value - low) - torch.log(high - value)
            else:
                mapped = softplus_inverse(value - low if form == "above" else high - value)
            lam = torch.where(ends[form], mapped, lam)
        return lam

    def _on(self, like: Tensor) -> dict[str, Tensor]:
        """Return the ends on a device and in a dtype, made once; infinite ones as 0, where no formula uses them."""
        key = (like.device, like.dtype)
        if key not in self._ends:
            low, high = self.low.to(like.dtype), self.high.to(like.dtype)
            inf, tiny = torch.full_like(low, math.inf), torch.finfo(like.dtype).tiny
            least = torch.where(low == 0, tiny, torch.nextafter(low, inf))
            most = torch.where(high == 0, -tiny, torch.nextafter(high, -inf))
            table = {
                "low": torch.where(low.isfinite(), low, 0.0),
                "high": torch.where(high.isfinite(), high, 0.0),
                "least": torch.where(low.isfinite(), least, -inf),
                "most": torch.where(high.isfinite(), most, inf),
                **self._forms,
            }
            self._ends[key] = {name: tensor.to(like.device) for name, tensor in table.items()}
        return self._ends[key]


def softplus_inverse(value: Tensor) -> Tensor:
    r"""Return $\rho$ with $\text{softplus}(\rho) = \text{value}$, of the same shape, for positive values.

    Example:
        >>> round(float(F.softplus(softplus_inverse(torch.tensor(3.0)))), 4)
        3.0
    """
    return value + torch.log(-torch.expm1(-value))


def gaussian_entropy(scale: Tensor) -> Tensor:
    r"""Return the entropy of independent Gaussians, $\sum_k \log (s_k \sqrt{2 \pi e})$, a scalar.

    Args:
        scale: Standard deviations $s$ `[H]`, positive.

    Example:
        >>> gaussian_entropy(torch.ones(1))
        tensor(1.4189)
    """
    return torch.log(scale).sum() + scale.numel() * 0.5 * (1.0 + math.log(2.0 * math.pi))


def perturb(
    lam: Tensor, scale: Tensor, n: int, shared: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    r"""Return $\lambda_i = \lambda + s \epsilon_i$, $\epsilon_i \sim N(0, I)$, for `n` examples.

    Differentiable in `lam` and `scale` (reparametrised).

    Args:
        lam: The hyperparameters $\lambda$ `[H]`.
        scale: Standard deviations $s$ `[H]`.
        n: Number of examples.
        shared: Boolean `[H]`, true for hyperparameters of which all examples take the draw of the first; None for none.
        generator: Source of $\epsilon$, on the device of `lam`.

    Returns:
        Perturbed hyperparameters `[n, H]`.

    Example:
        >>> perturb(torch.zeros(2), torch.ones(2), 3, torch.tensor([True, False])).shape
        torch.Size([3, 2])
    """
    noise = torch.randn(n, lam.numel(), generator=generator, dtype=lam.dtype, device=lam.device)
    if shared is not None:
        noise = torch.where(shared, noise[:1], noise)
    return torch.addcmul(lam, scale, noise)


def ridge_gates(singular_values: Tensor, lam: Tensor | float) -> Tensor:
    r"""Return the gates $\sigma(2 \log d - \lambda) = d^2 / (d^2 + e^\lambda)$ of ridge regression, of the shape of $d$.

    Args:
        singular_values: Singular values $d \ge 0$ of the design matrix.
        lam: Logarithm of the penalty, a number or a scalar tensor.
    """
    return torch.sigmoid(2.0 * torch.log(singular_values) - lam)


def ridge_gate(X: Tensor, y: Tensor, lam: Tensor | float) -> Tensor:
    r"""Return the exact best response of a linear model to an L2 penalty.

    With $X = P\,\text{diag}(d)\,Q^T$ it is $w^*(\lambda) = Q\,\text{diag}(\sigma(2 \log d - \lambda) / d)\,P^T y$, which
    minimises $|y - X w|^2 + e^\lambda |w|^2$. In the basis of $Q$ every row of the
    solution is gated by a sigmoid of $\lambda$: the form whose linearisation the gated layers are.

    Args:
        X: Inputs `[n, d]`.
        y: Targets `[n]` or `[n, k]`.
        lam: Logarithm of the penalty, a number or a scalar tensor; differentiable.

    Returns:
        Weights `[d]` or `[d, k]`.

    Example:
        >>> ridge_gate(torch.eye(2), torch.tensor([2.0, 4.0]), 0.0)
        tensor([1., 2.])
    """
    P, d, Qt = torch.linalg.svd(X, full_matrices=False)
    shrinkage = torch.where(d > 0, ridge_gates(d, lam) / d, 0.0)
    projected = P.T @ y
    return Qt.T @ (shrinkage * projected if y.ndim == 1 else shrinkage[:, None] * projected)
