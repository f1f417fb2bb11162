# SPDX-License-Identifier: Apache-2.0
"""A kernel that is orthogonal from the start, found by minimising the regularizer alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import lorth
from fulgurite_plugins.reparametrization.orthogonal_convolutions.theory import orthogonal_conv_exists

_ITERATIONS = 5000


def orthogonal_conv_init_(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    tolerance: float = 1e-8,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill a kernel with a convolution whose $L_\text{orth}$ is at most `tolerance`, found by L-BFGS from Xavier's start.

    It takes a second or two for tens of channels and minutes for hundreds. As many filters as channels with stride 1
    and more than one tap is the hard case: minimisation may end above the tolerance, and a warning then gives the value.

    Args:
        weight: Kernel `[M, C / groups, *k]`, filled in place; minimised in float64.
        stride: Stride, one number or one per axis.
        dilation: Dilation.
        groups: Groups.
        tolerance: The value of $L_\text{orth}$ at which to stop.
        generator: Where the start is drawn from; None for torch's own.

    Returns:
        The kernel.

    Raises:
        ValueError: If no orthogonal convolution of this shape exists.

    Example:
        >>> kernel = orthogonal_conv_init_(torch.empty(4, 2, 3, 3), generator=torch.Generator().manual_seed(0))
        >>> bool(lorth(kernel) < 1e-8)
        True
    """
    if weight.ndim > 2:
        filters, channels = weight.shape[0] // groups, weight.shape[1]
        found = orthogonal_conv_exists(filters, channels, tuple(weight.shape[2:]), stride, dilation=dilation)
        if not found.exists:
            raise ValueError(f"Expected a shape of which an orthogonal convolution exists, but got {found.reason}.")
    start = nn.init.xavier_normal_(weight.new_empty(weight.shape, dtype=torch.float64), generator=generator)
    kernel, reached = _minimise(start, lambda kernel: lorth(kernel, stride, dilation, groups), tolerance)
    if not reached <= tolerance:
        warnings.warn(
            f"orthogonal_conv_init_ reached L_orth = {reached:.2g}, not {tolerance:.2g}, for a kernel of shape "
            f"{list(weight.shape)} with stride {stride}. Draw again, or add a channel or a filter: the square case is hard.",
            stacklevel=2,
        )
    with torch.no_grad():
        return weight.copy_(kernel)


def _minimise(start: Tensor, objective: Callable[[Tensor], Tensor], tolerance: float) -> tuple[Tensor, float]:
    """Minimise by L-BFGS in float64, and stop at the tolerance; return the minimiser and its value."""
    from scipy.optimize import minimize

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(start.device).view(start.shape)

    def value_and_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            kernel = tensor(values).requires_grad_()
            value = objective(kernel)
            (gradient,) = torch.autograd.grad(value, kernel)
        return float(value.detach()), gradient.flatten().cpu().numpy()

    def stop_at_tolerance(intermediate_result: Any) -> None:
        if intermediate_result.fun <= tolerance:
            raise StopIteration

    found = minimize(
        value_and_gradient,
        start.flatten().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        callback=stop_at_tolerance,
        options={"maxcor": 20, "maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "ftol": 0.0, "gtol": 0.0},
    )
    return tensor(found.x), float(found.fun)
