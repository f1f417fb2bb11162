# SPDX-License-Identifier: Apache-2.0
"""Small networks for examples, claims and tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Sequential):
    """A multilayer perceptron with ReLU that flattens its input.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of outputs.
        hidden: Widths of the hidden layers.
        dropout: Rate of dropout after each hidden layer; None for no such layers.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (128, 128),
        dropout: float | None = None,
    ) -> None:
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), *([] if dropout is None else [nn.Dropout(dropout)])]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class SmallConvNet(nn.Module):
    """Two convolutions with batch norm, average pooling and a linear layer, for images of any size.

    Args:
        input_shape: Shape of one image, `(channels, height, width)`.
        num_classes: Number of outputs.
        width: Channels of the first convolution; the second has twice as many.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"Expected `input_shape` of SmallConvNet to be (channels, height, width), but got {tuple(input_shape)}. "
                f"Use MLP for inputs that are not images."
            )
        self.features = nn.Sequential(
            nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, channels, height, width]` to logits `[B, num_classes]`."""
        return self.head(self.features(x))
