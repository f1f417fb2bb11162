# SPDX-License-Identifier: Apache-2.0
"""The layers of a model that a penalty or a metric is about, and what the theory says about each of them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from fulgurite.errors import RefusedError, nearest
from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import Correlated, Method, correlated_rows
from fulgurite_plugins.reparametrization.orthogonal_convolutions.theory import Existence, orthogonal_conv_exists

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer of a model.

    Args:
        name: Its name in the model.
        module: The layer.
        norm: Name of the batch norm that follows it, if one does.
    """

    name: str
    module: Any
    norm: str | None = None

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return isinstance(self.module, nn.Linear)

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride per axis."""
        return (1,) if self.linear else self.module.stride

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation per axis."""
        return (1,) if self.linear else self.module.dilation

    @property
    def groups(self) -> int:
        """Groups."""
        return 1 if self.linear else self.module.groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps per axis."""
        return (1,) if self.linear else self.module.kernel_size

    @property
    def channels(self) -> tuple[int, int]:
        """Filters M and channels C of one group of the convolution; a transposed one is the adjoint of that."""
        if self.linear:
            return self.module.out_features, self.module.in_features
        outputs, inputs = self.module.out_channels // self.groups, self.module.in_channels // self.groups
        return (inputs, outputs) if isinstance(self.module, TRANSPOSED) else (outputs, inputs)

    @property
    def columns(self) -> bool:
        """Whether the layer preserves the norm of its inputs when it is orthogonal; else its adjoint does."""
        filters, channels = self.channels
        depth = channels * math.prod(self.stride)
        return filters <= depth if isinstance(self.module, TRANSPOSED) else filters >= depth

    def weight(self) -> Tensor:
        """Return the weight, whole and with its graph; a parametrised one without a step of its buffers."""
        found = _parametrised_weight(self.module) if parametrize.is_parametrized(self.module, "weight") else None
        weight: Tensor = self.module.weight if found is None else found
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    def rows(self, method: Method) -> Correlated:
        """Return the rows whose correlations make the regularizer of the weight."""
        return correlated_rows(self.weight(), self.stride, self.dilation, self.groups, method)

    @property
    def learns(self) -> bool:
        """Whether anything of its weight is trained."""
        if parametrize.is_parametrized(self.module, "weight"):
            return any(p.requires_grad for p in self.module.parametrizations["weight"].parameters())
        return bool(self.module.weight.requires_grad)

    def existence(self) -> Existence:
        """Return whether an orthogonal convolution of its shape exists with circular padding."""
        filters, channels = self.channels
        return orthogonal_conv_exists(filters, channels, self.kernel_size, self.stride, dilation=self.dilation)

    def border(self) -> str | None:
        """Return what surrounds the image, if it is not what the theory is about."""
        spans = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        if self.linear or (all(t < s for t, s in zip(spans, self.stride, strict=True)) and not any(self.padding())):
            return None  # windows do not overlap, and all lie within the image
        if isinstance(self.module, TRANSPOSED):
            return "transposed, cropped at the border"
        mode, padding = self.module.padding_mode, self.padding()
        if mode != "circular":
            return f"padding_mode={mode!r}" if any(padding) else "no padding"
        whole = all(t - s < 2 * p <= t for t, s, p in zip(spans, self.stride, padding, strict=True))
        return None if whole else f"padding={self.module.padding}, which does not give one output per stride"

    def padding(self) -> tuple[float, ...]:
        """Return the padding of each side per axis; a half where one side has one more."""
        padding = self.module.padding
        if isinstance(padding, str):
            whole = (d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True))
            return tuple(0.0 if padding == "valid" else t / 2 for t in whole)
        return tuple(padding)


def find_layers(
    model: nn.Module, modules: str | Sequence[str] = "Conv", include_linear: bool = True, skip_first: bool = False
) -> list[Layer]:
    """Return the layers that a user asks for, each once, in the order in which the model holds them.

    Args:
        model: The model.
        modules: `"Conv"` for all convolutions; else names of layers, or patterns such as `"encoder.*"`.
        include_linear: Whether `"Conv"` takes linear layers too.
        skip_first: Whether to leave out the first convolution.

    Raises:
        ValueError: If a name or a pattern fits no layer, or names something that is neither convolution nor linear.
        RefusedError: If a layer has no weight yet.
    """
    candidates = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules() if name}
    if modules == "Conv":
        kinds = (*CONVOLUTIONS, *TRANSPOSED, *((nn.Linear,) if include_linear else ()))
        chosen = {name: module for name, module in candidates.items() if isinstance(module, kinds)}
    else:
        patterns = [modules] if isinstance(modules, str) else list(modules)
        chosen = {name: candidates[name] for pattern in patterns for name in _matching(pattern, candidates)}
    if skip_first:
        first = next((name for name, module in chosen.items() if not isinstance(module, nn.Linear)), None)
        chosen = {name: module for name, module in chosen.items() if name != first}
    lazy = [
        name for name, module in chosen.items() if isinstance(getattr(module, "weight", None), UninitializedParameter)
    ]
    if lazy:
        raise RefusedError(
            f"orthogonal_convolutions: {', '.join(lazy)} has no weight yet (a lazy layer). Pass one batch through the "
            f"model before training."
        )
    norms = dict(_norms_after(candidates))
    layers: dict[tuple[Any, ...], Layer] = {}
    for name, module in chosen.items():
        layers.setdefault(_identity(module), Layer(name, module, norms.get(name)))
    return list(layers.values())


def _matching(pattern: str, candidates: dict[str, nn.Module]) -> Iterator[str]:
    """Yield the names of layers that fit a pattern; a name without wildcards must be a layer."""
    kinds = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
    if pattern in candidates and not isinstance(candidates[pattern], kinds):
        raise ValueError(
            f"Expected `modules` of orthogonal_convolutions to name convolutions or linear layers, but {pattern!r} is a "
            f"{type(candidates[pattern]).__name__}. To take the layers inside it, write '{pattern}.*'."
        )
    found = [name for name in fnmatch.filter(candidates, pattern) if isinstance(candidates[name], kinds)]
    if not found:
        known = [name for name, module in candidates.items() if isinstance(module, kinds)]
        raise ValueError(
            f"Expected `modules` of orthogonal_convolutions to be 'Conv', or names or patterns of layers, but nothing fits "
            f"{pattern!r}.{nearest(pattern, known)} The model has: {', '.join(known) or 'no such layer'}."
        )
    yield from found


def _identity(module: Any) -> tuple[Any, ...]:
    """Return what makes two layers one: one weight, used in the same way."""
    weight = module if parametrize.is_parametrized(module, "weight") else module.weight
    return (
        id(weight),
        getattr(module, "stride", None),
        getattr(module, "dilation", None),
        getattr(module, "groups", None),
    )


def _norms_after(candidates: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield the names of layers and of the batch norms that stand next to them, as modules are usually written."""
    for (name, module), (after, norm) in zip(candidates.items(), list(candidates.items())[1:], strict=False):
        siblings = name.rpartition(".")[0] == after.rpartition(".")[0]
        width = getattr(module, "out_channels", getattr(module, "out_features", None))
        if siblings and isinstance(norm, NORMS) and norm.num_features == width:
            yield name, after


def _parametrised_weight(module: Any) -> Tensor:
    """Compute a parametrised weight as the forward pass has it: spectral norm must not take another power iteration."""
    parts = [m for m in module.parametrizations["weight"].modules() if m.training]
    for part in parts:
        part.training = False
    try:
        weight: Tensor = module.weight
    finally:
        for part in parts:
            part.training = True
    return weight


def weight_parameters(layer: Layer) -> list[nn.Parameter]:
    """Return the parameters that make the weight of a layer."""
    if parametrize.is_parametrized(layer.module, "weight"):
        return list(layer.module.parametrizations["weight"].parameters())
    return [layer.module.weight] if isinstance(layer.module.weight, nn.Parameter) else []


def border_gap(layer: Layer, weight: Tensor) -> Tensor:
    r"""Return the share of a kernel's energy that is cut off somewhere at the border, in [0, 1].

    An output meets tap $a$ outside the image somewhere if $a d < p$ or $a d \ge p + S (1 + \delta)$, where $\delta$ is
    by how many outputs per axis there are too few for one per stride; an input lacks tap $a$ somewhere if
    $a d < p + S \delta$ or $a d \ge p + S$. Rows count in the row case, columns in the column case. At 0 the layer is
    as orthogonal at the border as it is inside. Of zeros and of no padding; circular padding has no border.

    Args:
        layer: The layer.
        weight: Its weight.
    """
    if layer.border() is None:
        return weight.new_zeros(())
    kept = torch.ones(())
    columns = layer.columns != isinstance(layer.module, TRANSPOSED)
    for k, s, d, p in zip(layer.kernel_size, layer.stride, layer.dilation, layer.padding(), strict=True):
        missing = -math.floor((2 * p - d * (k - 1) - 1) / s) - 1
        low, high = (p + s * missing, p + s) if columns else (p, p + s * (1 + missing))
        places = torch.arange(k) * d
        kept = kept.unsqueeze(-1) * ((places >= math.floor(low)) & (places < math.floor(high)))
    energy = weight.detach().float().square().sum(dim=(0, 1))
    return 1 - (energy * kept.to(energy.device)).sum() / energy.sum()
