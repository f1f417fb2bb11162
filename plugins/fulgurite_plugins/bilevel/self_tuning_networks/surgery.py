# SPDX-License-Identifier: Apache-2.0
"""Gates put into somebody's model, in place, and taken out again."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fulgurite.errors import nearest
from fulgurite_plugins.bilevel.self_tuning_networks import layers
from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.layers.gated import Gated, fuse, strip
from fulgurite_plugins.bilevel.self_tuning_networks.layouts import Layout
from fulgurite_plugins.bilevel.self_tuning_networks.patterns import matches

_KINDS: dict[type[nn.Module], type[Gated]] = {
    kind.plain: kind
    for kind in (
        layers.HyperLinear,
        layers.HyperConv1d,
        layers.HyperConv2d,
        layers.HyperConv3d,
        layers.HyperEmbedding,
        layers.HyperLSTMCell,
        layers.HyperGRUCell,
    )
}


def gated_layers(module: nn.Module) -> dict[str, Gated]:
    """Return the gated layers of a model by qualified name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Gated)}


def hyper_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that gates have brought: not to be decayed with the others."""
    return [parameter for layer in gated_layers(module).values() for parameter in layer.hyper_parameters()]


def own_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield the weights of at least two dimensions that a model has of its own, gates or no gates.

    They come with their qualified name, their layer, and their name in it.
    """
    brought = {id(parameter) for parameter in hyper_parameters(module)}
    for prefix, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) not in brought:
                yield f"{prefix}.{name}".lstrip("."), layer, name, parameter


def gate(
    module: nn.Module,
    conditioning: Conditioning,
    num_hyper: int,
    patterns: Iterable[str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    generator: torch.Generator | None = None,
    elementary_scale: bool = False,
) -> list[str]:
    """Make layers of a model depend on the hyperparameters, in place.

    Their own parameters stay the objects that they are, under their names. Frozen layers, layers that share a weight with
    another one, and layers whose weight is parametrised are left out, the latter two with a warning; so are weights that are
    no layer's of the kinds below, such as those of attention. On a model with gates the hyperparameters are newly connected,
    and nothing else happens.

    Args:
        module: The model.
        conditioning: Where its layers shall read the hyperparameters.
        num_hyper: Their number `H`.
        patterns: Patterns of the qualified names of the layers; by default every linear layer, convolution, embedding, LSTM
            cell and GRU cell.
        layouts: By pattern, what the leading dimensions of a layer's input are, where that is not the batch.
        generator: Source of the initial values, on the CPU.
        elementary_scale: Whether a learned scalar multiplies the elementary part of each layer.

    Returns:
        The names of the gated layers.

    Raises:
        ValueError: If a pattern matches no layer that can be gated, or nothing is left to be gated.
    """
    present = gated_layers(module)
    for gated in present.values():
        if gated.num_hyper != num_hyper:
            raise ValueError(f"{gated} is gated by {gated.num_hyper} hyperparameters already, not by {num_hyper}.")
        gated.conditioning = conditioning
    if present:
        return list(present)
    wanted = None if patterns is None else list(patterns)
    for pattern in [*(wanted or ()), *(layouts or ())]:
        _check_pattern(module, pattern)
    chosen = dict(_candidates(module, wanted))
    if not chosen:
        raise ValueError(
            f"{type(module).__name__} has no trainable layer that can be gated{'' if wanted is None else f' by {wanted}'}. "
            f"Gates go into {', '.join(kind.__name__ for kind in _KINDS)}."
        )
    for name, layer in chosen.items():
        layout = next((layout for pattern, layout in (layouts or {}).items() if matches(name, [pattern])), "batch")
        opened: Any = layer
        opened.__class__ = _KINDS[type(layer)]
        opened.add_gates(num_hyper, conditioning, layout, elementary_scale, generator)
    for encoder in _fused_encoders(module):
        encoder.register_forward_pre_hook(_off_the_fast_path)
    return list(chosen)


def ungate(module: nn.Module) -> None:
    """Take all gates out of a model, in place: plain layers with their elementary weights remain."""
    _back_on_the_fast_path(module)
    for gated in gated_layers(module).values():
        strip(gated)


def fuse_model(module: nn.Module, h: Tensor | None) -> nn.Module:
    """Return a copy of a model whose gated layers are plain ones, at fixed hyperparameters, for export.

    Args:
        module: The model.
        h: What enters the gates, `[H]` or `[1, H]`; None for the elementary weights.
    """
    fused = copy.deepcopy(module)
    if isinstance(fused, Gated):
        return fuse(fused, h)
    plain = {layer: fuse(layer, h) for layer in gated_layers(fused).values()}
    _back_on_the_fast_path(fused)
    for parent in fused.modules():
        for name, child in parent._modules.items():
            if isinstance(child, Gated):
                parent._modules[name] = plain[child]
    return fused


def _candidates(module: nn.Module, wanted: list[str] | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that are to be gated; warn of those that are left out against expectation."""
    owners = Counter(id(p) for layer in module.modules() for p in layer._parameters.values() if p is not None)
    for name, layer in module.named_modules():
        if wanted is not None and not matches(name, wanted):
            continue
        if isinstance(layer, LazyModuleMixin) and isinstance(layer, tuple(_KINDS)):
            raise ValueError(
                f"Expected the layers of the model to have weights, but {name!r} is lazy: run a batch first."
            )
        if isinstance(layer, nn.RNNBase):
            warnings.warn(
                f"{name!r} ({type(layer).__name__}) is not gated: its time loop runs inside one kernel. Its weights do not "
                f"follow the hyperparameters; use HyperLSTMCell or HyperGRUCell instead.",
                stacklevel=3,
            )
        kind = _KINDS.get(type(layer))
        if kind is None:
            if nn.utils.parametrize.is_parametrized(layer) and isinstance(layer, tuple(_KINDS)):
                warnings.warn(f"{name!r} is not gated: its parameters are parametrised.", stacklevel=3)
            continue
        weights = [layer._parameters.get(f"weight{suffix}") for suffix in kind.suffixes]
        if any(weight is None or not weight.requires_grad for weight in weights):
            continue
        if any(owners[id(weight)] > 1 for weight in weights):
            warnings.warn(f"{name!r} is not gated: it shares its weight with another layer.", stacklevel=3)
            continue
        yield name, layer


def _check_pattern(module: nn.Module, pattern: str) -> None:
    names = [name for name, _ in module.named_modules() if name]
    matched = [layer for name, layer in module.named_modules() if matches(name, [pattern])]
    if not matched:
        raise ValueError(
            f"No layer of {type(module).__name__} matches {pattern!r}.{nearest(pattern, names)} Its layers are: "
            f"{', '.join(names)}."
        )
    if any(isinstance(layer, nn.RNNBase) for layer in matched) and not any(type(layer) in _KINDS for layer in matched):
        raise ValueError(
            f"Expected {pattern!r} to match layers that can be gated, but it is a recurrent layer whose time loop runs "
            f"inside one kernel. Build it from HyperLSTMCell or HyperGRUCell."
        )


def _fused_encoders(module: nn.Module) -> Iterator[nn.Module]:
    """Yield transformer layers with gates inside: in eval mode torch reads their weights and passes the layers by."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and gated_layers(layer):
            yield layer


def _back_on_the_fast_path(module: nn.Module) -> None:
    for encoder in _fused_encoders(module):
        hooks = encoder._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _off_the_fast_path]:
            del hooks[key]


def _off_the_fast_path(module: nn.Module, args: Any) -> None:
    """Do nothing: torch takes no transformer layer off its modules that has a hook."""
