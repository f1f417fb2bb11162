# SPDX-License-Identifier: Apache-2.0
"""Which parameters are meant, and models whose examples have no gradients of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fulgurite.errors import RefusedError, nearest
from fulgurite.per_example.examples import Examples


def choose(model: nn.Module, parameters: str | Sequence[str], examples: Examples) -> dict[str, nn.Parameter]:
    """Return the chosen parameters that require gradients, by the first of their names.

    Args:
        model: The model.
        parameters: `"all"`, `"last_layer"`, or patterns of names.
        examples: Examples of which the model is shown the first, to find its last layer.

    Raises:
        ValueError: If a pattern matches no parameter, or none of the chosen ones requires gradients.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters == "all":
        chosen = trainable
    elif parameters == "last_layer":
        chosen = _last_layer(model, trainable, examples)
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Expected `parameters` to be 'all', 'last_layer' or patterns of parameter names, but no parameter of "
                    f"{type(model).__name__} matches {pattern!r}.{nearest(pattern, names)}"
                )
        wanted = {
            parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        chosen = {name: parameter for name, parameter in trainable.items() if parameter in wanted}
    if not chosen:
        raise ValueError(
            f"None of the parameters {parameters!r} of {type(model).__name__} requires gradients. Choose others, or "
            f"unfreeze them."
        )
    return chosen


def _last_layer(model: nn.Module, trainable: dict[str, nn.Parameter], examples: Examples) -> dict[str, nn.Parameter]:
    """Return the parameters of the module that is called last among those that own some."""
    owned: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in trainable.items():
        owned.setdefault(_owner(name), {})[name] = parameter
    called: list[str] = []
    hooks = [
        model.get_submodule(owner).register_forward_pre_hook(lambda *_, owner=owner: called.append(owner))
        for owner in owned
    ]
    try:
        with torch.no_grad():
            examples.call(model, examples.part(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return owned[called[-1]] if called else {}


def _owner(name: str) -> str:
    """Return the name of the module that a parameter belongs to; what `parametrize` keeps for a layer is the layer's."""
    parts = name.split(".")[:-1]
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts)


def refuse_coupled(model: nn.Module) -> None:
    """Refuse a model in which the examples of a batch have no gradients of their own, or whose parameters are sharded.

    Raises:
        RefusedError: If so; the message names the module or parameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            reason = "is in training mode" if module.running_mean is not None else "keeps no running statistics"
            raise RefusedError(
                f"{type(module).__name__} {name!r} {reason}: every example's output depends on the whole batch, so that "
                f"examples have no gradients of their own. Measure in evaluation mode: `with undisturbed(model) as "
                f"network: ...`, or replace the layer by GroupNorm."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise RefusedError(
                f"{type(module).__name__} {name!r} has max_norm={module.max_norm}: it changes its weight whenever it is "
                f"called, and a measurement must change nothing. Set its max_norm to None while measuring."
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise RefusedError(
                f"Parameter {name!r} is sharded or quantised ({type(parameter.data).__name__}): gradients per example need "
                f"whole, plain parameters. Measure with an unsharded copy of the model."
            )


def substituted(model: nn.Module, parameters: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return the model with other tensors in the place of parameters.

    `torch.func.functional_call`, told of a parameter of a module that stands in several places, replaces it once for each,
    and takes its own replacement for the original. Parameters that several modules share are replaced in each of them.

    Args:
        model: The model.
        parameters: Tensors by the name of the parameter.
    """
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    everywhere = {place: t for name, t in parameters.items() for place in places[id(model.get_parameter(name))]}

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, everywhere, args, kwargs, tie_weights=False)

    return call


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is no plain tensor of its full shape: a shard, or quantised."""
    return type(parameter.data) is not Tensor or any(hasattr(parameter, mark) for mark in _SHARDED)


_SHARDED = ("_fsdp_flattened", "ds_id")
"""Marks that FSDP and DeepSpeed leave on parameters that are not plain tensors of their full shape."""
