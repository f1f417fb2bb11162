# SPDX-License-Identifier: Apache-2.0
"""Kernel-label alignment and generalisation delay as metrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from fulgurite_plugins.grokking.lazy_to_rich_grokking.functional import Delay, check_threshold


class KernelAlignment(Metric):
    r"""The alignment $\langle K, Y Y^\top \rangle_F\, /\, (|K|_F\, |Y Y^\top|_F)$ of a kernel that comes in blocks.

    `update(kernel, targets, others)` takes a block `[B, M]` of the kernel, and the targets of its rows, `[B]` or `[B, C]`,
    and columns, `[M]` or `[M, C]` (those of the rows by default). Blocks of any cut of the matrix add up, over ranks too.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = KernelAlignment()
        >>> metric.update(torch.eye(4), torch.ones(4))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    product: Tensor
    kernel_square: Tensor
    target_square: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("product", "kernel_square", "target_square"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, kernel: Tensor, targets: Tensor, others: Tensor | None = None) -> None:
        """Add a block of the kernel, and the targets of its rows and columns."""
        rows, columns = (
            t.to(kernel.dtype).reshape(len(t), -1) for t in (targets, targets if others is None else others)
        )
        if kernel.shape != (len(rows), len(columns)):
            raise ValueError(
                f"Expected a block of the kernel [B, M] with targets of its rows [B, *] and columns [M, *], but got "
                f"{list(kernel.shape)}, {list(rows.shape)} and {list(columns.shape)}."
            )
        of_targets = rows @ columns.mT
        self.product = self.product + (kernel * of_targets).sum().to(self.product.dtype)
        self.kernel_square = self.kernel_square + kernel.square().sum().to(self.product.dtype)
        self.target_square = self.target_square + of_targets.square().sum().to(self.product.dtype)

    def compute(self) -> Tensor:
        """Return the alignment, in [0, 1] for a whole positive semi-definite kernel; NaN if nothing was seen."""
        return self.product / (self.kernel_square.sqrt() * self.target_square.sqrt())


class GeneralizationDelay(Metric):
    r"""How many decades of steps the test loss lags behind the training loss, $\log_{10}(t_\text{test} / t_\text{train})$.

    `update(train_losses, test_losses, steps)` takes both losses, `[T]` or scalars, and the steps of their measurement; $t$
    is the first step at which a loss lies at or below `tau` times the loss of the trivial predictor. What follows a loss
    that is not finite is not counted.

    Args:
        tau: The threshold, relative to the trivial loss; positive.
        trivial_train: The training loss of the trivial predictor; positive.
        trivial_test: Its test loss; positive.
        smoothing: Weight of the past in a running mean of each loss, in [0, 1); 0 for none. It needs updates in the order
            of steps.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> metric = GeneralizationDelay()
        >>> metric.update(torch.tensor([0.5, 0.05, 0.01]), torch.tensor([0.9, 0.8, 0.05]), torch.tensor([1, 10, 100]))
        >>> metric.compute()
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    crossed: Tensor
    means: Tensor
    stopped: Tensor

    def __init__(
        self,
        tau: float = 0.1,
        trivial_train: float = 1.0,
        trivial_test: float = 1.0,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_threshold("GeneralizationDelay", tau, smoothing)
        for name, value in (("trivial_train", trivial_train), ("trivial_test", trivial_test)):
            if not 0 < value < math.inf:
                raise ValueError(f"Expected `{name}` of GeneralizationDelay to be positive, but got {value!r}.")
        self.tau = tau
        self.trivial = (trivial_train, trivial_test)
        self.smoothing = smoothing
        self.add_state("crossed", default=torch.full((2,), math.inf), dist_reduce_fx="min")
        self.add_state("stopped", default=torch.full((2,), math.inf), dist_reduce_fx="min")
        self.add_state("means", default=torch.full((2,), math.nan), dist_reduce_fx="mean")

    def update(self, train_losses: Tensor | float, test_losses: Tensor | float, steps: Tensor | int) -> None:
        """Add both losses at some steps."""
        losses = torch.stack(
            [torch.as_tensor(x).to(self.means).reshape(-1) for x in (train_losses, test_losses)], dim=1
        )
        steps = torch.as_tensor(steps).to(self.means).reshape(-1)
        losses = losses / torch.tensor(self.trivial).to(losses)
        for loss, step in zip(losses, steps, strict=True):
            mixed = self.smoothing * self.means + (1 - self.smoothing) * loss
            self.means = torch.where(self.means.isnan(), loss, mixed)
            self.crossed = torch.where(self.means <= self.tau, step, math.inf).minimum(self.crossed)
            self.stopped = torch.where(loss.isfinite(), math.inf, step).minimum(self.stopped)

    @property
    def delay(self) -> Delay:
        """When both became small."""
        return Delay(*torch.where(self.crossed < self.stopped, self.crossed, math.inf).tolist())

    def compute(self) -> Tensor:
        """Return the delay in decades; infinite if only the training loss ever was small, NaN if neither was."""
        stopped = [
            name for name, step in zip(("training", "test"), self.stopped.tolist(), strict=True) if step < math.inf
        ]
        if stopped:
            rank_zero_warn(
                f"GeneralizationDelay: the {' and the '.join(stopped)} loss was not finite; what follows is not counted."
            )
        return torch.tensor(self.delay.decades, dtype=self.means.dtype, device=self.means.device)
