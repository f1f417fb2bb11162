# SPDX-License-Identifier: Apache-2.0
"""The gradients of layers' parameters per example, from what a layer was given and the gradient of what it returned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.per_example.gradients import Dense, Gradient, Outer, Rows

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Rule:
    """How the gradients of one kind of layer come about; the first argument of each function is the layer.

    Args:
        prepare: Makes of the inputs what `weight` needs, whatever the gradient of the outputs is.
        weight: Gradient of the weight, from that and the gradient of the outputs.
        bias: Gradient of the bias, from the gradient of the outputs.
    """

    prepare: Callable[[Any, Tensor], Tensor]
    weight: Callable[[Any, Tensor, Tensor], Gradient]
    bias: Callable[[Any, Tensor], Tensor]


def _sequence(layer: nn.Linear, tensor: Tensor) -> Tensor:
    """`[B, *, H]` -> `[B, 1, H, T]`."""
    return tensor.reshape(len(tensor), 1, math.prod(tensor.shape[1:-1]), tensor.shape[-1]).mT


def patches(layer: Convolution, inputs: Tensor) -> Tensor:
    """Return the inputs that each output position of a convolution sees.

    Args:
        layer: The convolution, with `G` groups and kernels of `K` elements.
        inputs: `[B, C, *]`.

    Returns:
        `[B, G, C / G * K, T]`, in the order of the weight's elements.
    """
    inputs = F.pad(inputs, _padding(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    dimensions = len(layer.kernel_size)
    for dimension in range(dimensions):
        span = layer.dilation[dimension] * (layer.kernel_size[dimension] - 1) + 1
        inputs = inputs.unfold(2 + dimension, span, layer.stride[dimension])[..., :: layer.dilation[dimension]]
    # [B, C, *positions, *kernel] -> [B, C, *kernel, *positions]
    positions, kernel = range(2, 2 + dimensions), range(2 + dimensions, 2 + 2 * dimensions)
    elements = inputs.shape[1] // layer.groups * math.prod(layer.kernel_size)
    count = math.prod(inputs.shape[2 : 2 + dimensions])
    return inputs.permute(0, 1, *kernel, *positions).reshape(len(inputs), layer.groups, elements, count)


def _padding(layer: Convolution) -> list[int]:
    """Return the padding as `F.pad` wants it: before and after, the last dimension first."""
    if isinstance(layer.padding, tuple):
        return [side for amount in reversed(layer.padding) for side in (amount, amount)]
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [0] * 2 * len(layer.kernel_size)


def _grouped(layer: Convolution, gradient: Tensor) -> Tensor:
    """`[B, O, *]` -> `[B, G, O / G, T]`."""
    return gradient.flatten(2).unflatten(1, (layer.groups, -1))


def _rows(layer: nn.Embedding, index: Tensor, gradient: Tensor) -> Rows:
    rows = gradient.reshape(*index.shape, gradient.shape[-1])
    return Rows(index, rows if layer.padding_idx is None else rows * (index != layer.padding_idx).unsqueeze(2))


def _per_channel(layer: nn.Module, tensor: Tensor) -> Tensor:
    return tensor.flatten(2).sum(dim=2) if tensor.ndim > 2 else tensor


def _per_feature(layer: nn.LayerNorm | nn.RMSNorm, tensor: Tensor) -> Tensor:
    places = math.prod(tensor.shape[1 : tensor.ndim - len(layer.normalized_shape)])
    return tensor.reshape(len(tensor), places, *layer.normalized_shape).sum(dim=1)


def _normalisation(normalise: Callable[[Any, Tensor], Tensor], reduce: Callable[[Any, Tensor], Tensor]) -> Rule:
    """Return the rule of a layer `weight * normalise(inputs) + bias`; `reduce` sums over the places of each parameter."""
    return Rule(normalise, lambda layer, x, gradient: Dense(reduce(layer, x * gradient)), reduce)


_linear = Rule(
    _sequence, lambda layer, x, g: Outer(_sequence(layer, g), x), lambda layer, g: _sequence(layer, g).sum((1, 3))
)
_convolution = Rule(patches, lambda layer, x, g: Outer(_grouped(layer, g), x), _per_channel)
_batch_norm = _normalisation(
    lambda layer, x: F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps), _per_channel
)

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: Rule(lambda layer, x: x.reshape(len(x), math.prod(x.shape[1:])), _rows, lambda layer, g: g),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.GroupNorm: _normalisation(lambda layer, x: F.group_norm(x, layer.num_groups, eps=layer.eps), _per_channel),
    nn.LayerNorm: _normalisation(lambda layer, x: F.layer_norm(x, layer.normalized_shape, eps=layer.eps), _per_feature),
    nn.RMSNorm: _normalisation(lambda layer, x: F.rms_norm(x, layer.normalized_shape, eps=layer.eps), _per_feature),
}
"""The layers whose gradients have a closed form. A subclass may compute something else, and is none of them."""

_DIMENSIONS: dict[type[nn.Module], int] = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5, nn.Embedding: 1}


def has_rule(layer: nn.Module) -> bool:
    """Return whether a layer's gradients have a closed form, as long as its inputs do too."""
    if type(layer) not in RULES or "forward" in vars(layer):
        return False
    plain = all(name in ("weight", "bias") for name in layer._parameters)
    return plain and not (isinstance(layer, nn.Embedding) and layer.scale_grad_by_freq)


def has_examples_first(layer: nn.Module, inputs: Any, outputs: Any, number: int) -> bool:
    """Return whether a layer was given a batch of `number` examples along the first dimension."""
    return (
        isinstance(inputs, Tensor)
        and isinstance(outputs, Tensor)
        and inputs.ndim >= _DIMENSIONS.get(type(layer), 2)
        and len(inputs) == len(outputs) == number
    )
