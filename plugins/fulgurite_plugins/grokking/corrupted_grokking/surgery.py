# SPDX-License-Identifier: Apache-2.0
"""Neurons are taken out of a model: by zeros, by masks, or really."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fulgurite.errors import RefusedError
from fulgurite_plugins.grokking.corrupted_grokking.neurons import Neurons

Order = Literal["lowest", "highest", "random"]
Place = tuple[nn.Module, str, int]
"""A module, the name of its tensor, and the dimension of the tensor that belongs to the neurons."""


def ranked(scores: Tensor, order: Order, seed: int = 0) -> Tensor:
    """Return the neurons `[N]` in the order in which they are taken out.

    Args:
        scores: `[N]`.
        order: `"lowest"` or `"highest"` scores first, or at `"random"`.
        seed: Seed of the random order.
    """
    if order == "random":
        return torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed)).to(scores.device)
    return scores.argsort(descending=order == "highest", stable=True)


def places(neurons: Neurons) -> list[Place]:
    """Return the weights of the neurons and their biases."""
    found: list[Place] = []
    for layer in neurons.incoming.values():
        found += [(layer, "weight", 0)] + ([] if layer.bias is None else [(layer, "bias", 0)])
    return found + [(layer, "weight", 1) for layer in neurons.outgoing.values()]


def mask_for(place: Place, pruned: Tensor) -> Tensor:
    """Return what the tensor of a place is to be multiplied with: 0 for pruned neurons, else 1; it broadcasts."""
    module, name, axis = place
    tensor: Tensor = getattr(module, name)
    shape = [1] * tensor.ndim
    shape[axis] = tensor.shape[axis]
    mask = torch.ones(tensor.shape[axis], dtype=tensor.dtype, device=tensor.device)
    return mask.index_fill_(0, pruned.to(tensor.device), 0).view(shape)


class _Mask(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * self.mask


def masks_of(neurons: Neurons) -> list[tuple[Place, _Mask]]:
    """Return the masks of the neurons that are in place."""
    found = []
    for place in places(neurons):
        if parametrize.is_parametrized(place[0], place[1]):
            laid: Any = place[0].parametrizations
            found += [(place, mask) for mask in laid[place[1]] if isinstance(mask, _Mask)]
    return found


def lay_masks(neurons: Neurons) -> None:
    """Let the weights of the neurons be multiplied with masks, which are 1."""
    nothing = torch.empty(0, dtype=torch.int64)
    for place in places(neurons):
        parametrize.register_parametrization(place[0], place[1], _Mask(mask_for(place, nothing)))


def fold_masks(neurons: Neurons) -> None:
    """Make the masked weights plain."""
    for (module, name, _), _mask in masks_of(neurons):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def fold_masks_in_state(state: dict[str, Any]) -> None:
    """Make the masked weights of a state dict plain, in place."""
    for key in [key for key in state if key.endswith(".0.mask") and ".parametrizations." in key]:
        prefix, name = key.removesuffix(".0.mask").rsplit(".parametrizations.", 1)
        original = state.pop(f"{prefix}.parametrizations.{name}.original")
        state[f"{prefix}.{name}"] = original * state.pop(key)


@torch.no_grad()
def zero_moments(neurons: Neurons, pruned: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Set what optimizers remember of the pruned weights to zero, with which these would come back."""
    for place in places(neurons):
        parameter, mask = getattr(place[0], place[1]), mask_for(place, pruned)
        for state, key in _remembered(parameter, optimizers):
            state[key].mul_(mask)


@torch.no_grad()
def remove(neurons: Neurons, kept: Tensor, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Make the layers smaller: the parameters stay the same objects, so that optimizers keep them, with less in them.

    Args:
        neurons: The neurons.
        kept: Those that stay.
        optimizers: What they remember is made smaller too.

    Raises:
        RefusedError: If a weight is computed from others, or the neurons are normalised together.
    """
    check_removable(neurons)
    optimizers = list(optimizers)
    norms = [norm for norm in neurons.norms if not isinstance(norm, nn.LayerNorm)]
    sized = places(neurons) + [
        (norm, name, 0)
        for norm in norms
        for name in ("weight", "bias", "running_mean", "running_var")
        if getattr(norm, name) is not None
    ]
    for module, name, axis in sized:
        tensor: Tensor = getattr(module, name)
        indices = kept.to(tensor.device)
        for state, key in _remembered(tensor, optimizers):
            state[key] = state[key].index_select(axis, indices)
        tensor.data = tensor.data.index_select(axis, indices)
        tensor.grad = None
    for layer in neurons.incoming.values():
        layer.out_features = len(kept)
    for layer in neurons.outgoing.values():
        layer.in_features = len(kept)
    for norm in norms:
        norm.num_features = len(kept)


def check_removable(neurons: Neurons) -> None:
    """Refuse to remove neurons where that would not be what zeros are.

    Raises:
        RefusedError: If a weight is computed from others, or the neurons are normalised together.
    """
    if any(isinstance(norm, nn.LayerNorm) for norm in neurons.norms):
        raise RefusedError(
            "IPRPruning(mode='remove'): a LayerNorm normalises the neurons together, so that removing some changes all "
            "others. Use mode='zero' or 'mask', with which the zeros count in it, or batch norm."
        )
    for module, name, _ in places(neurons):
        if name not in module._parameters:
            raise RefusedError(
                f"IPRPruning(mode='remove') makes parameters smaller, but the {name} of a {type(module).__name__} is "
                f"computed from others. Use mode='zero' or 'mask', or prune when the weights are plain again."
            )


def fit_to_state(neurons: Neurons, names: dict[nn.Module, str], state: dict[str, Any]) -> None:
    """Make layers as small as those of a state dict from which neurons were removed; which ones does not matter."""
    layer = next(iter(neurons.incoming.values()))
    saved = state.get(f"{names[layer]}.weight")
    if saved is not None and len(saved) < neurons.width:
        remove(neurons, torch.arange(len(saved)))


def _remembered(tensor: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> list[tuple[dict[str, Any], str]]:
    """Return where optimizers keep a tensor of the shape of a parameter for it."""
    states = [optimizer.state[tensor] for optimizer in optimizers if tensor in optimizer.state]
    return [
        (state, key)
        for state in states
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == tensor.shape
    ]
