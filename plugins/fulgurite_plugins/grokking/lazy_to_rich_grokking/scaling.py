# SPDX-License-Identifier: Apache-2.0
"""The surgery: a network whose output is multiplied by a number, and is zero when training begins if it is centred."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fulgurite.errors import RefusedError, nearest
from fulgurite.per_example.recording import at_least_float32

Center = Literal["none", "copy", "antisymmetric"]

_NAME = "output_scaling"
"""The name under which a module keeps the scale of a network in it."""

_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Layers whose gains may have several dimensions, and are not weights."""


class OutputScale(nn.Module):
    r"""What a scaled network gives instead of its output $g$: $\alpha g$, $\alpha (g - g_0)$ or $\alpha (g - g') / \sqrt 2$.

    The number is a buffer in float32, whatever precision the network is cast to, and multiplies in float32 at least.

    Args:
        alpha: The number.
        center: What is subtracted: nothing, a frozen copy's output, or that of a twin which is trained.
        other: The copy or the twin.
        init_scale: What the weights had been multiplied by.
    """

    alpha: Tensor

    def __init__(self, alpha: float, center: Center, other: nn.Module | None, init_scale: float = 1.0) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        self.center = center
        self.other = other
        self.called = False

    def forward(self, output: Tensor) -> Tensor:
        """Return the argument: an `nn.Sequential` that keeps its own scale calls it as its last part."""
        return output

    def hook(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """Return the scaled output, given the network's output and arguments."""
        if not isinstance(output, Tensor):
            raise RefusedError(
                f"OutputScaling multiplies the output of a network, which must be a tensor, but got a "
                f"{type(output).__name__}. Name the part whose output is a tensor by `module=`."
            )
        self.called = True
        output = at_least_float32(output)
        if self.other is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.center == "antisymmetric"):
                other = at_least_float32(self.other(*args, **kwargs))
            output = output - other
        return (self.alpha / math.sqrt(2) if self.center == "antisymmetric" else self.alpha) * output

    def train(self, mode: bool = True) -> OutputScale:
        """Set the mode; a frozen copy follows it except for dropout, so that batch normalisation agrees."""
        super().train(mode)
        if self.center == "copy" and self.other is not None:
            for module in self.other.modules():
                if isinstance(module, _DropoutNd):
                    module.training = False
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OutputScale:
        alpha = self.alpha
        super()._apply(fn, recurse)
        if not self.alpha.is_meta:
            self.alpha = alpha.to(self.alpha.device)
        return self


def find(module: nn.Module, name: str | None, owner: str) -> nn.Module:
    """Return the network that is meant: the one named; of a LightningModule, else, its only part that has parameters.

    A LightningModule with several such parts, and any other module, is meant itself.

    Raises:
        RefusedError: If there is no module of that name.
    """
    found = module
    if name is not None:
        known = dict(module.named_modules())
        if name not in known:
            parts = [part for part in known if part and _NAME not in part]
            hint = nearest(name, parts) or f" Known are {', '.join(parts[:8])}."
            raise RefusedError(
                f"Expected `module` of {owner} to name a part of {type(module).__name__}, but got {name!r}.{hint}"
            )
        found = known[name]
    elif isinstance(module, pl.LightningModule):
        parts = [
            child for key, child in module.named_children() if key != _NAME and any(True for _ in child.parameters())
        ]
        found = parts[0] if len(parts) == 1 else module
    return getattr(found, "_orig_mod", found)


def scale_of(module: nn.Module) -> OutputScale | None:
    """Return the scale that a module keeps, None if nothing in it is scaled."""
    found = module._modules.get(_NAME)
    return found if isinstance(found, OutputScale) else None


def scale_weights(network: nn.Module, factor: float) -> None:
    r"""Multiply the weights of a network in place: its trainable parameters of two or more dimensions.

    Biases and the parameters of normalisations stay. A network of $L$ layers that is positively homogeneous then gives
    $c^L$ times what it gave, if its biases are zero.

    Args:
        network: The network.
        factor: The factor $c$.

    Raises:
        RefusedError: If there are no weights to multiply, or they have no values yet.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = layer.weight.item(), layer.bias.item()
        >>> scale_weights(layer, 2.0)
        >>> layer.weight.item() / before[0], layer.bias.item() / before[1]
        (2.0, 1.0)
    """
    gains = {p for part in network.modules() if isinstance(part, _NORMALISATIONS) for p in part.parameters()}
    weights: list[Tensor] = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2 and p not in gains]
    if not weights or any(weight.is_meta for weight in weights):
        found = "has no values for them yet (meta device)" if weights else "has none"
        raise RefusedError(
            f"OutputScaling(init_scale={factor:g}) multiplies trainable parameters of two or more dimensions, but "
            f"{type(network).__name__} {found}. Leave it at 1, or name another network by `module=`."
        )
    with torch.no_grad():
        torch._foreach_mul_(weights, factor)


def scale_output(
    module: nn.Module, network: nn.Module, alpha: float, center: Center, init_scale: float = 1.0
) -> OutputScale:
    """Scale the output of a network in place, after its weights.

    Args:
        module: The module that shall keep the scale; `network` is a part of it, or it.
        network: The network.
        alpha: The number.
        center: See `OutputScale`.
        init_scale: What to multiply the weights by, before any copy of them is taken.
    """
    if init_scale != 1:
        scale_weights(network, init_scale)
    other = None
    if center != "none":
        other = copy.deepcopy(network)
        other.requires_grad_(False) if center == "copy" else None
    scale = OutputScale(alpha, center, other, init_scale).train(network.training)
    module.add_module(_NAME, scale)
    network.register_forward_hook(scale.hook, with_kwargs=True)
    return scale


def merge(module: nn.Module, head: str | None = None) -> None:
    r"""Fold $\alpha$ into the linear layer that the scaled network ends with, and take the scale out.

    Args:
        module: The module that was scaled, without centring.
        head: The name, within the scaled network, of the linear or convolutional layer whose output is the network's
            output; None for a network that is such a layer, or an `nn.Sequential` that ends with one.

    Raises:
        RefusedError: If nothing is scaled, the network is centred, or the layer is not found.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> _ = scale_output(layer, layer, 3.0, "none")
        >>> merge(layer)
        >>> layer.weight.item()
        3.0
    """
    scale = scale_of(module)
    if scale is None:
        raise RefusedError(f"merge: nothing in {type(module).__name__} is scaled.")
    network, key = next(
        (m, key) for m in module.modules() for key, hook in m._forward_hooks.items() if _is(hook, scale)
    )
    if scale.center != "none":
        raise RefusedError(
            f"merge: {type(network).__name__} is centred ({scale.center!r}): what is subtracted cannot be folded into a "
            f"layer. Save the module as it is; its state holds alpha and what is subtracted."
        )
    layer = _last(network) if head is None else find(network, head, "merge")
    if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
        raise RefusedError(
            f"merge: alpha can be folded into a linear or convolutional layer, but {type(network).__name__} ends with a "
            f"{type(layer).__name__}. Name the layer whose output is the network's by `head=`."
        )
    with torch.no_grad():
        layer.weight.mul_(scale.alpha)
        if layer.bias is not None:
            layer.bias.mul_(scale.alpha)
    del module._modules[_NAME], network._forward_hooks[key], network._forward_hooks_with_kwargs[key]


def _is(hook: Any, scale: OutputScale) -> bool:
    return getattr(hook, "__self__", None) is scale


def _last(network: nn.Module) -> nn.Module:
    children = [child for name, child in network.named_children() if name != _NAME]
    return _last(children[-1]) if isinstance(network, nn.Sequential) and children else network
