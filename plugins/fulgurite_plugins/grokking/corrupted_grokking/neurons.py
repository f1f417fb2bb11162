# SPDX-License-Identifier: Apache-2.0
"""Where the neurons of a hidden layer are: the layers that lead to them and away from them, and what normalises them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fulgurite.errors import RefusedError
from fulgurite_plugins.grokking.corrupted_grokking.functional import Basis, neuron_scores

Layers = Mapping[str, Sequence[str]] | Literal["auto"]
Norm = nn.modules.batchnorm._BatchNorm | nn.LayerNorm


@dataclass(frozen=True)
class Neurons:
    """The neurons of one hidden layer.

    Args:
        width: Their number `N`.
        incoming: Linear layers with `N` outputs, by name.
        outgoing: Linear layers with `N` inputs, by name.
        norms: Normalisations of the neurons between them.
    """

    width: int
    incoming: Mapping[str, nn.Linear]
    outgoing: Mapping[str, nn.Linear]
    norms: tuple[Norm, ...]

    def scores(self, r: float, basis: Basis) -> Tensor:
        """Return the score of every neuron `[N]`; see `neuron_scores`.

        Raises:
            RefusedError: If the basis does not fit a layer.
        """
        for name, layer in (*self.incoming.items(), *self.outgoing.items()):
            inputs = layer.in_features if name in self.incoming else layer.out_features
            if isinstance(basis, Tensor) and basis.shape[-1] != inputs:
                raise RefusedError(
                    f"The basis has {basis.shape[-1]} components, but the neurons have {inputs} weights in `{name}`. Give a "
                    f"basis [K, {inputs}], or other layers."
                )
        with torch.no_grad():
            incoming = [whole(layer.weight) for layer in self.incoming.values()]
            outgoing = [whole(layer.weight) for layer in self.outgoing.values()]
            return neuron_scores(incoming, outgoing, r, basis)


def whole(weight: Tensor) -> Tensor:
    """Return a weight of which this rank may hold a part only."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def find_neurons(module: nn.Module, layers: Layers, user: str) -> Neurons:
    """Return the neurons that layers name.

    Args:
        module: The model.
        layers: `{"in": [...], "out": [...]}`, names of linear layers; or `"auto"`: the first linear layers of one shape, in
            the order in which they were made, that are followed by one with as many inputs as they have outputs.
        user: Who asks, for messages.

    Raises:
        RefusedError: If there are no such layers, or they do not have the same neurons.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if layers == "auto":
        names = _first_pair(linear)
        if names is None:
            raise RefusedError(
                f"{user} looks for linear layers of which one leads to neurons and the next leads away from them, but "
                f"{type(module).__name__} has {_listed(linear)}. Name them: layers={{'in': [...], 'out': [...]}}."
            )
    else:
        names = [list(layers.get("in", ())), list(layers.get("out", ()))]
    for name in (*names[0], *names[1]):
        if name not in linear:
            raise RefusedError(
                f"{user}: `layers` names {name!r}, but {type(module).__name__} has {_listed(linear)}. Name linear layers."
            )
    incoming, outgoing = ({name: linear[name] for name in side} for side in names)
    widths = [layer.out_features for layer in incoming.values()] + [layer.in_features for layer in outgoing.values()]
    if not incoming or not outgoing or len(set(widths)) != 1:
        raise RefusedError(
            f"{user} needs layers `in` that lead to the same neurons that layers `out` lead away from, but {names[0]} and "
            f"{names[1]} have {widths} neurons."
        )
    return Neurons(
        widths[0], incoming, outgoing, _norms_between(module, incoming.values(), outgoing.values(), widths[0])
    )


def _first_pair(linear: Mapping[str, nn.Linear]) -> list[list[str]] | None:
    names = list(linear)
    for start, name in enumerate(names):
        shape = linear[name].weight.shape
        run = start
        while run < len(names) and linear[names[run]].weight.shape == shape:
            run += 1
        after = run if run < len(names) else None
        if shape[0] == shape[1] and run > start + 1:  # square layers follow each other
            after, run = start + 1, start + 1
        if after is not None and linear[names[after]].in_features == linear[name].out_features:
            return [names[start:run], [names[after]]]
    return None


def _norms_between(
    module: nn.Module, incoming: Iterable[nn.Linear], outgoing: Iterable[nn.Linear], width: int
) -> tuple[Norm, ...]:
    """Return the normalisations of as many numbers that were made after an incoming and before an outgoing layer."""
    first, last = set(map(id, incoming)), set(map(id, outgoing))
    found: list[Norm] = []
    inside = False
    for child in module.modules():
        if id(child) in last:
            break
        inside = inside or id(child) in first
        if inside and isinstance(child, Norm) and _width(child) == width:
            found.append(child)
    return tuple(found)


def _width(norm: Norm) -> int:
    return norm.normalized_shape[-1] if isinstance(norm, nn.LayerNorm) else norm.num_features


def batch_norm_scales(norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    r"""Return by how much a batch norm scales each neuron in evaluation, $|\gamma| / \sqrt{\text{var} + \epsilon}$ `[N]`."""
    assert norm.running_var is not None
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else whole(norm.weight)
    return (gamma.abs() / (norm.running_var + norm.eps).sqrt()).detach()


def _listed(linear: Mapping[str, nn.Linear]) -> str:
    shapes = [f"{name or 'itself'} ({layer.in_features} to {layer.out_features})" for name, layer in linear.items()]
    return ", ".join(shapes) or "no linear layer"
