# SPDX-License-Identifier: Apache-2.0
"""Weights replaced by companded ones, and made plain again: in a model, and in a state dict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from fulgurite.errors import RefusedError
from fulgurite_plugins.reparametrization.weight_compander.functional import EDGE, Companding, compand, companding
from fulgurite_plugins.reparametrization.weight_compander.modules import Compander, scale_of
from fulgurite_plugins.reparametrization.weight_compander.selection import Place, companded, holders, refuse_unusable

Init = Literal["preserve", "direct"]

_PLAIN = "plain_weights"
"""Attribute of a parametrisation under which what loads plain weights into it is kept."""

_MANY = 0.2
"""Part of a tensor's entries that may be clipped without advice to choose a larger amplitude."""


@dataclass(frozen=True)
class Scales:
    """The rule by which a tensor gets its `a` and `b`: given numbers, or multiples of its standard deviation.

    Args:
        a: Amplitude; None for the relative rule.
        b: Width; None for the relative rule.
        relative: `a` and `b` as multiples of the standard deviation.
    """

    a: float | None
    b: float | None
    relative: tuple[float, float]

    def of(self, weights: Iterable[Tensor], name: str) -> tuple[float, float]:
        """Return `a` and `b` for some tensors taken together.

        Raises:
            RefusedError: If the rule is relative, and their standard deviation is zero or not finite.
        """
        if self.a is not None and self.b is not None:
            return self.a, self.b
        std = float(
            torch.cat(
                [weight.detach().flatten().to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
            ).std()
        )
        if not 0.0 < std < math.inf:
            raise RefusedError(
                f"WeightCompander: the standard deviation of `{name}` is {std:g}, so that nothing can be relative to it. "
                f"Give `a` and `b`, or exclude the layer."
            )
        return self.relative[0] * std, self.relative[1] * std


def reparametrise(
    module: nn.Module,
    places: list[Place],
    scales: Scales,
    fn: str | Companding = "arctan",
    learn: bool = False,
    init: Init = "preserve",
    shared: bool = False,
) -> None:
    """Let weight tensors of a model be computed by `Compander`s, in place; the parameters stay the same objects.

    Args:
        module: The model, in which all holders of a tied tensor are looked for.
        places: The tensors; those that a `Compander` computes already are left as they are.
        scales: The rule for `a` and `b`.
        fn: The companding function.
        learn: Whether `a` and `b` are learned.
        init: `"preserve"`: the weights stay what they are, as far as the bound allows. `"direct"`: the free tensor is what
            the weights were.
        shared: Whether all of them share one `a` and `b`.

    Raises:
        RefusedError: If a tensor cannot be reparametrised; nothing has been changed then.
    """
    found = holders(module, [place for place in places if place.compander is None])
    tied = [group for group in found.values() if group]
    for group in tied:
        for place in group:
            refuse_unusable(place)
    firsts = [group[0] for group in tied]
    if shared and firsts:
        common = Compander(*scales.of((place.parameter for place in firsts), "all weights together"), fn, learn)
        companders = [common] * len(tied)
    else:
        companders = [Compander(*scales.of([p.parameter], p.name), fn, learn) for p in firsts]
    if init == "preserve":
        _warn_of_clipping({p.name: (p.parameter, c) for p, c in zip(firsts, companders, strict=True)})
    for group, compander in zip(tied, companders, strict=True):
        _register(group, compander, init, None if shared else scales)


def _register(group: list[Place], compander: Compander, init: Init, scales: Scales | None) -> None:
    parameter = group[0].parameter
    compander.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    free = compander.right_inverse(parameter.detach()) if init == "preserve" else parameter.detach().clone()
    for place in group:
        order = tuple(name for name, _ in place.host.named_parameters(recurse=False))
        parametrize.register_parametrization(place.host, place.tensor, compander)
        plain = _PlainWeights(place.tensor, scales, order)
        plain.handle = place.host.register_load_state_dict_pre_hook(plain)
        setattr(place.chain, _PLAIN, plain)
    with torch.no_grad():
        parameter.copy_(free)  # each registration has inverted it once


class _PlainWeights:
    """Lets a companded layer load a state dict of plain weights: it becomes what surgery would have made of them.

    Args:
        tensor: The name of the weight tensor.
        scales: The rule for `a` and `b`; None leaves them as they are.
        order: The layer's parameters in their original order.
    """

    handle: RemovableHandle

    def __init__(self, tensor: str, scales: Scales | None, order: tuple[str, ...]) -> None:
        self.tensor = tensor
        self.scales = scales
        self.order = order

    def __call__(self, host: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        inner = f"{prefix}parametrizations.{self.tensor}."
        plain = prefix + self.tensor
        if plain not in state or f"{inner}original" in state:
            return
        compander = Place(host, self.tensor, plain).compander
        if compander is None:
            return
        weight = state.pop(plain)
        values = dict(compander.state_dict())
        target = compander
        if self.scales is not None:
            a, b = self.scales.of([weight], plain)
            values = compander.encoded(a, b)
            target = Compander(a, b, compander.companding)
        target = target.to(weight.device)
        _warn_of_clipping({plain: (weight, target)})
        with torch.no_grad():
            state[f"{inner}original"] = target.right_inverse(weight)
        state.update({f"{inner}0.{name}": value for name, value in values.items()})


def _warn_of_clipping(tensors: Mapping[str, tuple[Tensor, Compander]]) -> None:
    clipped = {}
    for name, (weight, compander) in tensors.items():
        edge = compander.companding.bound(EDGE) * compander.scales()[0].detach()
        fraction = float((weight.detach().abs() > edge.to(weight.device)).float().mean())
        if fraction:
            clipped[name] = fraction
    if not clipped:
        return
    worst = max(clipped, key=lambda name: clipped[name])
    advice = " Choose a larger amplitude: the first number of `relative`, or `a`." if clipped[worst] > _MANY else ""
    rank_zero_warn(
        f"WeightCompander: {len(clipped)} of {len(tensors)} tensors had entries at or beyond the bound, which were clipped "
        f"to it: {clipped[worst]:.1%} of `{worst}`, the most.{advice}"
    )


def fold(module: nn.Module) -> nn.Module:
    """Replace companded weights of a model by plain ones of the same values, in place.

    The model is then as if it had never been reparametrised: classes, names and order of its parameters, speed. To keep
    on training, fold a copy: `fold(copy.deepcopy(module))`.

    Args:
        module: The model.

    Returns:
        The same model.

    Raises:
        RefusedError: If a tensor is sharded, or something else is parametrised on top; nothing has been changed then.

    Example:
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(3, 2), "weight", Compander())
        >>> [name for name, _ in fold(layer).named_parameters()]
        ['bias', 'weight']
    """
    places = companded(module)
    for place in places:
        if isinstance(place.parameter, DTensor):
            raise RefusedError(
                f"`{place.name}` is sharded and cannot be folded in place. Gather a full state dict and pass it to "
                f"`fold_state_dict`."
            )
        if place.chain is not None and len(place.chain) > 1:
            raise RefusedError(
                f"`{place.name}` has further parametrisations on top of the Compander. Remove these first."
            )
    folded: set[int] = set()
    orders: dict[nn.Module, tuple[str, ...]] = {}
    for place in places:
        host, parameter = place.host, place.parameter
        plain = getattr(place.chain, _PLAIN, None)
        if plain is not None:
            plain.handle.remove()
            orders[host] = max(orders.get(host, ()), plain.order, key=len)
        _own_class(host)
        # What a tied tensor's second holder would compute is computed from what is plain by then.
        parametrize.remove_parametrizations(host, place.tensor, leave_parametrized=id(parameter) not in folded)
        folded.add(id(parameter))
    for host, order in orders.items():
        _restore_order(host, order)
    return module


def _own_class(host: nn.Module) -> None:
    """Give a parametrised module a class of its own: a deep copy shares it, and would lose its weights with this one."""
    cls = type(host)
    host.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))


def _restore_order(host: nn.Module, order: tuple[str, ...]) -> None:
    for name in order:
        parameter = getattr(host, name)
        if isinstance(parameter, nn.Parameter):  # else something else has parametrised it
            delattr(host, name)
            host.register_parameter(name, parameter)


def fold_state_dict(state: Mapping[str, Any], fn: str | Companding = "arctan") -> dict[str, Any]:
    """Return the state dict of the plain model for that of a companded one; other entries stay as they are.

    Args:
        state: The state dict, for instance `checkpoint["state_dict"]` of a checkpoint written during training.
        fn: The companding function of the training.

    Returns:
        A new dictionary, which a model that knows nothing of this loads strictly.

    Raises:
        ValueError: If `fn` is not known.

    Example:
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(3, 2), "weight", Compander())
        >>> sorted(fold_state_dict(layer.state_dict()))
        ['bias', 'weight']
    """
    companding(fn)
    plain: dict[str, Any] = {}
    for key, value in state.items():
        before, inner, after = key.rpartition("parametrizations.")
        tensor, _, rest = after.partition(".")
        prefix = f"{before}{inner}{tensor}."
        found = _scales_in(state, prefix) if inner else None
        if found is None:
            plain[key] = value
        elif rest == "original":
            plain[before + tensor] = compand(value.detach(), *found, fn)
    return plain


def _scales_in(state: Mapping[str, Any], prefix: str) -> tuple[Tensor, Tensor] | None:
    """Return `a` and `b` of a tensor in a state dict; None if no Compander computes it."""
    a, b, log_a, log_b = (state.get(f"{prefix}0.{name}") for name in ("a", "b", "log_a", "log_b"))
    if a is not None and b is not None:
        return a, b
    return None if log_a is None or log_b is None else (scale_of(log_a), scale_of(log_b))


def holds_plain_weights(state: Mapping[str, Any], module: nn.Module) -> list[str]:
    """Return the names of companded tensors of a model for which a state dict has plain weights."""
    return [place.name for place in companded(module) if place.name in state]


def parameter_groups(module: nn.Module, lr: float, lr_scale: float = 0.01) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer in which learned `a` and `b` have no decay and a smaller learning rate.

    For training loops of one's own; in a Lightning trainer `WeightCompander` sees to it.

    Args:
        module: The model.
        lr: Learning rate of the other parameters.
        lr_scale: What it is multiplied by for `a` and `b`.

    Returns:
        One group with all other trainable parameters, and one with the learned `a` and `b` if there are any.

    Example:
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(3, 2), "weight", Compander(learn=True))
        >>> [len(group["params"]) for group in parameter_groups(layer, lr=0.1)]
        [2, 2]
    """
    learned = learned_scales(module)
    others = [p for p in module.parameters() if p.requires_grad and all(p is not found for found in learned)]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr}]
    if learned:
        groups.append({"params": learned, "lr": lr * lr_scale, "weight_decay": 0.0})
    return groups


def learned_scales(module: nn.Module) -> list[nn.Parameter]:
    """Return the logarithms of learned `a` and `b` in a model."""
    companders = [child for child in module.modules() if isinstance(child, Compander) and child.learn]
    return [parameter for compander in companders for parameter in (compander.log_a, compander.log_b)]
