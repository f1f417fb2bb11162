# SPDX-License-Identifier: Apache-2.0
"""The network of the claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn


class TanhMLP(nn.Sequential):
    """A multilayer perceptron with tanh that flattens its input.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of outputs.
        hidden: Widths of the hidden layers.
    """

    def __init__(
        self, input_shape: Sequence[int] = (1, 8, 8), num_classes: int = 10, hidden: Sequence[int] = (64,)
    ) -> None:
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))
