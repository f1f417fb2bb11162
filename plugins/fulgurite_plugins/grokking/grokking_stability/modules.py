# SPDX-License-Identifier: Apache-2.0
"""The perceptron of the paper's modular arithmetic and sparse parity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from fulgurite.errors import check_argument, is_number


class ModularMLP(nn.Module):
    r"""A multilayer perceptron with ReLU and without biases: as many times homogeneous in its weights as it has layers.

    Args:
        input_shape: Shape of one input; it is flattened.
        num_classes: Number of outputs.
        hidden: Widths of the hidden layers.
        alpha: What the logits are multiplied by, positive; with a learning rate divided by its square, large values
            train lazily.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> sum(p.numel() for p in ModularMLP((226,), 113).parameters())
        107800
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (200, 200), alpha: float = 1.0
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden, num_classes]
        positive = all(isinstance(width, int) and width >= 1 for width in widths)
        check_argument(positive, "hidden", "ModularMLP", "positive whole numbers between input and classes", widths)
        check_argument(is_number(alpha) and alpha > 0, "alpha", "ModularMLP", "a positive number", alpha)
        self.alpha = alpha
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs `[B, *]` to logits `[B, num_classes]`."""
        logits = self.layers(inputs)
        return logits if self.alpha == 1 else self.alpha * logits
