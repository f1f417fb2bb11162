# SPDX-License-Identifier: Apache-2.0
"""An upper bound of the Lipschitz constant of a sequential network, from the exact norms of its convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fulgurite.errors import RefusedError
from fulgurite_plugins.reparametrization.orthogonal_convolutions.layers import CONVOLUTIONS, NORMS, TRANSPOSED, Layer
from fulgurite_plugins.reparametrization.orthogonal_convolutions.theory import certified_norm


@dataclass(frozen=True)
class LipschitzCertificate:
    """An upper bound of a network's Lipschitz constant for the Euclidean norm, and what it is the product of.

    Args:
        bound: The bound.
        factors: The bound of each layer, by name.
    """

    bound: float
    factors: dict[str, float]


def lipschitz_certificate(model: nn.Module, grid: int = 32) -> LipschitzCertificate:
    r"""Return an upper bound of the Lipschitz constant in evaluation mode: the product over a chain of layers.

    It holds for inputs of any size. Zeros around an image and outputs that are left out do not raise the norm of a
    convolution, so that the bound of the circular one is theirs too. With circular padding and a stride, the size of the
    input has to be a multiple of the stride.

    Args:
        model: An `nn.Sequential` of layers and further `nn.Sequential`, or one layer.
        grid: Frequencies per axis on which the norms of convolutions are taken, before the bound between them is added.

    Raises:
        RefusedError: If the model holds something that has no known bound: a branch, a layer of one's own, another norm.

    Example:
        >>> lipschitz_certificate(nn.Sequential(nn.Flatten(), nn.Identity(), nn.ReLU())).bound
        1.0
    """
    factors = {name or type(layer).__name__: _factor(name, layer, grid) for name, layer in _chain("", model)}
    return LipschitzCertificate(math.prod(factors.values()), factors)


def _chain(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is nn.Sequential or (isinstance(module, nn.Sequential) and not _overrides_forward(module)):
        for child, layer in module.named_children():
            yield from _chain(f"{name}.{child}" if name else child, layer)
    else:
        yield name, module


def _overrides_forward(module: nn.Sequential) -> bool:
    return type(module).forward is not nn.Sequential.forward


@torch.no_grad()
def _factor(name: str, layer: Any, grid: int) -> float:
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(Layer(name, layer).weight().double(), ord=2))
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return _convolution(name, layer, grid)
    rule = next((rule for kinds, rule in _RULES if isinstance(layer, kinds)), None)
    factor = None if rule is None else rule(layer)
    if factor is None:
        raise RefusedError(
            f"lipschitz_certificate knows no bound for {name or 'the model'}, a {type(layer).__name__}. It takes an "
            f"nn.Sequential of convolutions, linear layers, batch norms, pooling and activations with circular, zero or "
            f"no padding; pass that part of the model."
        )
    return factor


def _convolution(name: str, module: Any, grid: int) -> float:
    layer = Layer(name, module)
    spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    repeats = any(2 * p > t for p, t in zip(layer.padding(), spans, strict=True))
    if module.padding_mode not in ("zeros", "circular") or (module.padding_mode == "circular" and repeats):
        raise RefusedError(
            f"lipschitz_certificate: {name or 'the model'} has padding={module.padding} with padding_mode="
            f"{module.padding_mode!r}, which repeats values of the image and can raise the norm. Use zeros, or circular "
            f"padding of at most half the kernel."
        )
    return float(certified_norm(layer.weight().double(), layer.stride, layer.dilation, layer.groups, grid))


def _overlap(layer: Any) -> tuple[int, int]:
    """Return how many windows of a pooling layer an input is in at most, and how many inputs are in a window."""
    axes = int(type(layer).__name__[-2])
    kernel, stride, dilation = (
        (value,) * axes if isinstance(value, int) else tuple(value)
        for value in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
    )
    per_axis = (math.ceil(k / s) if d == 1 else k for k, s, d in zip(kernel, stride, dilation, strict=True))
    return math.prod(per_axis), math.prod(kernel)


def _average(layer: Any) -> float | None:
    whole = layer.count_include_pad or not any(layer.padding if isinstance(layer.padding, tuple) else (layer.padding,))
    if not whole or layer.ceil_mode or getattr(layer, "divisor_override", None) is not None:
        return None
    windows, size = _overlap(layer)
    return math.sqrt(windows / size)


def _adaptive(layer: Any) -> float | None:
    sizes = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,)
    return 1.0 if all(size == 1 for size in sizes) else None


def _batch_norm(layer: Any) -> float | None:
    if layer.running_var is None:
        return None
    scale = 1.0 if layer.weight is None else layer.weight.abs()
    return float((scale / (layer.running_var + layer.eps).sqrt()).amax())


@functools.cache
def _largest_slope(kind: type[nn.Module], approximate: str = "none") -> float:
    """Return the largest slope of GELU, SiLU or Mish, on a grid so fine that rounding up covers what lies between."""
    x = torch.linspace(-6.0, 6.0, 120_001, dtype=torch.float64, requires_grad=True)
    layer = kind(approximate=approximate) if kind is nn.GELU else kind()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(layer(x).sum(), x)
    return float(slope.abs().amax()) * (1 + 1e-6)


_ONE = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.Tanh,
        nn.Hardtanh,
        nn.Softplus,
        nn.Softsign,
        nn.LogSigmoid,
        nn.Softshrink,
        nn.CELU,
        nn.Softmax,
    ),
)
"""Layers that enlarge no distance in evaluation mode."""

_RULES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], float | None]], ...] = (
    (_ONE, lambda layer: 1.0),
    ((nn.Sigmoid,), lambda layer: 0.25),
    ((nn.LeakyReLU,), lambda layer: max(1.0, abs(layer.negative_slope))),
    ((nn.ELU,), lambda layer: max(1.0, layer.alpha)),
    ((nn.SELU,), lambda layer: 1.0507009873554805 * 1.6732632423543772),
    ((nn.GELU,), lambda layer: _largest_slope(nn.GELU, layer.approximate)),
    ((nn.SiLU,), lambda layer: _largest_slope(nn.SiLU)),
    ((nn.Mish,), lambda layer: _largest_slope(nn.Mish)),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), lambda layer: math.sqrt(_overlap(layer)[0])),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _average),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive),
    (NORMS, _batch_norm),
)
