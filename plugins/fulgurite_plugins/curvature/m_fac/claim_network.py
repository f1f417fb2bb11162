# SPDX-License-Identifier: Apache-2.0
"""The network of the claim about the optimizer: its inputs are scaled so that the problem is ill-conditioned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class IllConditioned(nn.Module):
    """A perceptron with one hidden layer of tanh, each of whose inputs is multiplied by a factor of its own.

    The factors are spaced evenly on a logarithmic scale and in an order that is drawn once, the same for every network.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of outputs.
        hidden: Width of the hidden layer.
        smallest: The smallest factor.
        largest: The largest factor.
    """

    factors: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: int = 32,
        smallest: float = 0.03,
        largest: float = 3.0,
    ) -> None:
        super().__init__()
        inputs = math.prod(input_shape)
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(0))
        spaced = torch.logspace(math.log10(smallest), math.log10(largest), inputs)
        self.register_buffer("factors", spaced[order])
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs `[B, *]` to logits `[B, C]`."""
        return self.layers(inputs.flatten(1) * self.factors)
