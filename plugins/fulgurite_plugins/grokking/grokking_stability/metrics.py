# SPDX-License-Identifier: Apache-2.0
"""Softmax Collapse, zero losses and naive loss minimisation as metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fulgurite_plugins.grokking.grokking_stability.collapse import collapsed, has_zero_loss, inner_products
from fulgurite_plugins.grokking.grokking_stability.functional import precision


class _Fraction(Metric):
    """A fraction of examples."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    found: Tensor
    total: Tensor

    def __init__(self, dtype: torch.dtype | str = "float32", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        precision(dtype, type(self).__name__, "dtype")
        self.precision = str(dtype).removeprefix("torch.")
        for name in ("found", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def count(self, found: Tensor) -> None:
        """Add examples, of which those that are True have been found."""
        self.found += found.sum()
        self.total += found.numel()

    def compute(self) -> Tensor:
        """Return the fraction; NaN if nothing was seen."""
        return self.found.float() / self.total


class SoftmaxCollapse(_Fraction):
    """The fraction of examples for which the sum of softmax's exponentials is exactly 1, so that only one class counts.

    `update(logits, targets)` takes logits `[N, C, *]` in the precision in which the loss gets them; targets are not read.

    Args:
        dtype: The precision of the softmax: `"float16"`, `"bfloat16"`, `"float32"` or `"float64"`.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If the precision is none of these.

    Example:
        >>> metric = SoftmaxCollapse("float32")
        >>> metric.update(torch.tensor([[16.0, 0.0], [17.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, logits: Tensor, targets: Tensor | None = None) -> None:
        """Add examples."""
        self.count(collapsed(logits, self.precision, dim=1))


class ZeroLossFraction(_Fraction):
    """The fraction of examples whose cross entropy is exactly 0, so that they teach nothing any more.

    `update(logits, targets)` takes logits `[N, C, *]` in the precision in which the loss gets them, and class
    indices `[N, *]`.

    Args:
        dtype: The precision of the loss: `"float16"`, `"bfloat16"`, `"float32"` or `"float64"`.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If the precision is none of these.

    Example:
        >>> metric = ZeroLossFraction("float32")
        >>> metric.update(torch.tensor([[17.0, 0.0], [17.0, 0.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add examples."""
        self.count(has_zero_loss(logits, targets, self.precision))


class NLMAlignment(Metric):
    r"""The cosine between the descent direction and the weights, $\cos(-\nabla L, \theta)$; 1 only scales the weights.

    `update(parameter, gradient)` takes a parameter of any shape and its gradient; several updates are parts of one vector,
    so that it is the alignment of all of them together.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = NLMAlignment()
        >>> metric.update(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 4.0]))
        >>> metric.compute()
        tensor(0.6000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    products: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("products", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add a part of the parameters, and the gradient for it."""
        self.products += inner_products(parameter, gradient).to(self.products.dtype)

    def compute(self) -> Tensor:
        """Return the cosine; NaN if parameters or gradient are zero, or nothing was seen."""
        ww, wg, gg = self.products
        return (-wg / (ww * gg).sqrt()).float()
