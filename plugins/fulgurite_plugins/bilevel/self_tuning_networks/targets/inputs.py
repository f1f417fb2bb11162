# SPDX-License-Identifier: Apache-2.0
"""Noise and scale of inputs of any shape, with a strength for each example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import InputTarget


class InputDropout(InputTarget):
    """Set elements of the inputs to zero with probability `p`, and divide the others by `1 - p`."""

    bounds = (0.0, 1.0)

    def transform(self, x: Tensor, value: Tensor, generator: Generator) -> Tensor:
        """Return the masked inputs."""
        keep = 1.0 - over(value, x)
        noise = torch.rand(x.shape, generator=generator, device=x.device)
        return x * ((noise < keep) / keep).to(x.dtype)


class InputScale(InputTarget):
    """Multiply each example by a factor, uniform in `[1 / (1 + v), 1 + v]`."""

    bounds = (0.0, float("inf"))

    def transform(self, x: Tensor, value: Tensor, generator: Generator) -> Tensor:
        """Return the scaled inputs."""
        noise = torch.rand(value.shape, generator=generator, device=x.device)
        return x * over(torch.lerp(1.0 / (1.0 + value), 1.0 + value, noise), x).to(x.dtype)


class GaussianNoise(InputTarget):
    """Add Gaussian noise of standard deviation `v`."""

    bounds = (0.0, float("inf"))

    def transform(self, x: Tensor, value: Tensor, generator: Generator) -> Tensor:
        """Return the noisy inputs."""
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return x + (over(value, x) * noise).to(x.dtype)


class InputFunction(InputTarget):
    """Any function `(x [B, *], value [B]) -> x` as a target.

    Args:
        function: The function; noise in it is its own affair.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def transform(self, x: Tensor, value: Tensor, generator: Generator) -> Tensor:
        """Return what the function makes of the inputs."""
        return self.function(x, value)


def over(value: Tensor, x: Tensor) -> Tensor:
    """View one value per example `[B]` so that it broadcasts over `x` `[B, *]`."""
    return value.view(-1, *[1] * (x.ndim - 1))
