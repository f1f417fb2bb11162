# SPDX-License-Identifier: Apache-2.0
"""Label smoothing, by an amount for each example."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite_plugins.bilevel.self_tuning_networks.layouts import Layout, check_layout, spread
from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import LossTarget

if TYPE_CHECKING:
    from fulgurite.losses import LossCall

_BINARY = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


class LabelSmoothing(LossTarget):
    r"""The smoothing of the targets, $(1 - v)\, y + v / C$, on top of what the criterion does; for two classes $C = 2$.

    Args:
        layout: What the leading dimensions of the criterion's outputs `[B, C, *]` are.

    Raises:
        ValueError: If the layout is unknown.
    """

    bounds = (0.0, 1.0)

    def __init__(self, layout: Layout = "batch") -> None:
        check_layout(layout, "LabelSmoothing")
        self.layout = layout

    def on_loss(self, call: LossCall, value: Tensor) -> LossCall:
        """Smooth the targets of a cross entropy, binary or over classes.

        Raises:
            FulguriteError: If the criterion is another one.
        """
        binary = call.fn in _BINARY
        soft = call if binary else call.soften()
        targets = soft.targets
        classes = 2 if binary else targets.shape[1]
        smoothing = spread(value, tuple(targets.shape), self.layout, 0 if binary else 1, "LabelSmoothing")
        return soft.replace(
            targets=torch.lerp(targets, torch.full_like(targets, 1.0 / classes), smoothing.to(targets.dtype))
        )
