# SPDX-License-Identifier: Apache-2.0
"""The cross entropy of StableMax as a module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.errors import check_argument, check_choice, is_number
from fulgurite_plugins.grokking.grokking_stability.functional import (
    log_stablemax,
    precision,
    stablemax_cross_entropy,
)


class StableMaxCrossEntropy(nn.Module):
    r"""Cross entropy with StableMax in the place of softmax, $-\log \mathrm{StableMax}(\alpha z)_y$.

    It is called as `nn.CrossEntropyLoss` is, with logits `[B, C, *]` and class indices `[B, *]` or probabilities
    `[B, C, *]`.

    Args:
        reduction: `"mean"`, `"sum"` or `"none"`.
        ignore_index: The class index that contributes nothing.
        weight: Class weights `[C]`.
        label_smoothing: In [0, 1].
        compute_dtype: The precision of the computation and of the result, `"float64"` as in the authors' code.
        alpha: What the logits are multiplied by, positive.
        chunk_rows: Examples computed at once; see `stablemax_cross_entropy`.
        check_finite: Whether to look for logits that are not finite, which waits for the device.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> StableMaxCrossEntropy()(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
        tensor(0.2231, dtype=torch.float64)
    """

    weight: Tensor | None

    def __init__(
        self,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = -100,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        compute_dtype: torch.dtype | str = "float64",
        alpha: float = 1.0,
        chunk_rows: int | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_choice(reduction, ("mean", "sum", "none"), "reduction", owner)
        fits = is_number(label_smoothing) and 0 <= label_smoothing <= 1
        check_argument(fits, "label_smoothing", owner, "in [0, 1]", label_smoothing)
        check_argument(is_number(alpha) and alpha > 0, "alpha", owner, "a positive number", alpha)
        precision(compute_dtype, owner)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing
        self.compute_dtype = str(compute_dtype).removeprefix("torch.")
        self.alpha = alpha
        self.chunk_rows = chunk_rows
        self.check_finite = check_finite

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits `[B, C, *]` for targets `[B, *]` or `[B, C, *]`."""
        return stablemax_cross_entropy(
            logits,
            targets,
            self.weight,
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            self.alpha,
            self.compute_dtype,
            self.chunk_rows,
            self.check_finite,
        )

    def predict_proba(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Return the probabilities that logits stand for under this loss.

        Args:
            logits: Logits with classes along `dim`.
            dim: The dimension of the classes.
        """
        return log_stablemax(logits, dim, self.alpha).exp()
