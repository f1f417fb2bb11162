# SPDX-License-Identifier: Apache-2.0
"""Which weight tensors of a model are meant, and whether they can be reparametrised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fulgurite.errors import RefusedError, nearest
from fulgurite_plugins.reparametrization.weight_compander.modules import Compander

_CONV = "Conv"
"""Stands for all convolutions of torch, transposed ones too."""


class Place(NamedTuple):
    """A weight tensor of a model: the attribute `tensor` of the submodule `host`, called `name` in the whole."""

    host: nn.Module
    tensor: str
    name: str

    @property
    def chain(self) -> parametrize.ParametrizationList | None:
        """The parametrisations of the tensor, one on top of the other; None if it is plain."""
        if not parametrize.is_parametrized(self.host, self.tensor):
            return None
        chains = cast("Mapping[str, parametrize.ParametrizationList]", self.host.parametrizations)
        return chains[self.tensor]

    @property
    def parameter(self) -> Tensor:
        """The free tensor if there is one, else the weights themselves."""
        if self.chain is not None:
            return next(self.chain.parameters(recurse=False))
        return getattr(self.host, self.tensor)

    @property
    def compander(self) -> Compander | None:
        """What computes the weights; None if they are plain."""
        first = None if self.chain is None else self.chain[0]
        return first if isinstance(first, Compander) else None


def listed(items: str | Iterable[str]) -> list[str]:
    """Return the items of a text separated by commas, or of a list of such texts."""
    texts = [items] if isinstance(items, str) else items
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def companded(module: nn.Module) -> list[Place]:
    """Return all weight tensors of a model that a `Compander` computes, a tied one once per holder."""
    return [
        place
        for name, host in module.named_modules()
        for tensor in _parametrised(host)
        if (place := Place(host, tensor, _joined(name, tensor))).compander is not None
    ]


def select(
    module: nn.Module, modules: str | Iterable[str], exclude: str | Iterable[str] = (), include_bias: bool = False
) -> list[Place]:
    """Return the trainable weight tensors of a model that some items stand for, in the model's order.

    An item is the name of a class of layers (`"Linear"`; `"Conv"` for all convolutions), or the name of a submodule,
    with wildcards: of a layer, or of a part of the model whose linear and convolutional layers are meant.

    Args:
        module: The model.
        modules: Items to take.
        exclude: Items to leave out; `"first"` and `"last"` are the first and the last layer of those taken.
        include_bias: Whether to take biases of these layers too.

    Raises:
        RefusedError: If an item stands for nothing, or nothing is left to reparametrise.
    """
    wanted, unwanted = listed(modules), listed(exclude)
    layers = {name: layer for name, layer in module.named_modules() if not _is_inner(name)}
    taken = [name for name, layer in layers.items() if any(_means(item, name, layer) for item in wanted)]
    taken = [name for name in taken if any(True for _ in _tensors(layers[name], include_bias))]
    _refuse_without_meaning(wanted, taken, layers)
    _refuse_without_meaning([item for item in unwanted if item not in ("first", "last")], taken, layers)
    ends = {"first": taken[:1], "last": taken[-1:]}
    for item in unwanted:
        out = ends.get(item) or [name for name in taken if _means(item, name, layers[name])]
        taken = [name for name in taken if name not in out]
    places = [Place(layers[name], t, _joined(name, t)) for name in taken for t in _tensors(layers[name], include_bias)]
    trainable = [place for place in places if place.parameter.requires_grad]
    if not trainable:
        raise RefusedError(
            f"WeightCompander: no trainable weight is left by modules={', '.join(wanted)!r}, exclude="
            f"{', '.join(unwanted)!r} ({len(places)} frozen). Layers with weights: {_candidates(layers)}."
        )
    return trainable


def holders(module: nn.Module, places: Iterable[Place]) -> dict[int, list[Place]]:
    """Return, for each of some tensors, all its holders in a model (more than one if it is tied), by the tensor's id."""
    found: dict[int, list[Place]] = {id(place.parameter): [] for place in places}
    for name, host in module.named_modules(remove_duplicate=True):
        if _is_inner(name):
            continue
        for tensor in _tensors(host, include_bias=True, all_of_them=True):
            place = Place(host, tensor, _joined(name, tensor))
            if id(place.parameter) in found:
                found[id(place.parameter)].append(place)
    return found


def refuse_unusable(place: Place) -> None:
    """Raise RefusedError unless a tensor is a plain, materialised, unsharded, floating-point parameter."""
    host, weight = place.host, place.parameter
    if place.chain is not None:
        by = ", ".join(type(part).__name__ for part in place.chain)
        raise _refused(place, f"is parametrised already, by {by}", "Remove that first, or exclude the layer.")
    whole = place.tensor.rpartition("_")[0]
    if whole and isinstance(getattr(host, whole, None), Tensor):
        found = f"is what a hook makes `{whole}` from (pruning, or weight normalisation of the old kind)"
        raise _refused(place, found, "Make that permanent first, or exclude the layer.")
    if is_lazy(weight):
        raise _refused(place, "belongs to a lazy layer that has no weights yet", "Pass one batch through it before.")
    if weight.is_meta:
        raise _refused(place, "lies on the meta device and has no values", "Give it its values before.")
    if isinstance(weight, DTensor):
        raise _refused(
            place,
            "is sharded already",
            "Call `WeightCompander(...).operate(self)` in `configure_model`, before `fully_shard`.",
        )
    if not weight.is_floating_point() or weight.ndim == 0:
        raise _refused(place, f"has the type {weight.dtype} and {weight.ndim} dimensions", "Exclude the layer.")
    if isinstance(host, nn.RNNBase):
        raise _refused(
            place,
            f"belongs to a {type(host).__name__}, which keeps a list of its own of the weights and would pass this by",
            f"Use {type(host).__name__}Cell, or exclude the layer.",
        )


def _refused(place: Place, found: str, advice: str) -> RefusedError:
    return RefusedError(f"WeightCompander cannot reparametrise `{place.name}`: it {found}. {advice}")


def _means(item: str, name: str, layer: nn.Module) -> bool:
    if item in {cls.__name__ for cls in type(layer).__mro__} or (item == _CONV and isinstance(layer, _ConvNd)):
        return True
    if fnmatchcase(name, item):
        return True
    parts = name.split(".")
    inside = any(fnmatchcase(".".join(parts[:length]), item) for length in range(1, len(parts)))
    return inside and isinstance(layer, nn.Linear | _ConvNd)


def _tensors(layer: nn.Module, include_bias: bool, all_of_them: bool = False) -> Iterator[str]:
    """Yield the names of a layer's weights and, if asked, biases, whether they are parametrised or not."""
    own = [name for name, _ in layer.named_parameters(recurse=False, remove_duplicate=False)]
    for name in dict.fromkeys([*_parametrised(layer), *own]):
        if all_of_them or "weight" in name or (include_bias and "bias" in name):
            yield name


def _parametrised(layer: nn.Module) -> list[str]:
    return list(cast("Mapping[str, Any]", layer.parametrizations)) if parametrize.is_parametrized(layer) else []


def _is_inner(name: str) -> bool:
    """Whether a module is part of a parametrisation."""
    return "parametrizations" in name.split(".")


def _joined(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def _candidates(layers: dict[str, nn.Module]) -> str:
    found = [f"{name} ({type(layer).__name__})" for name, layer in layers.items() if any(_tensors(layer, False))]
    shown = ", ".join(found[:12]) or "none"
    return f"{shown} and {len(found) - 12} more" if len(found) > 12 else shown


def _refuse_without_meaning(items: list[str], taken: list[str], layers: dict[str, nn.Module]) -> None:
    for item in items:
        kind = item == _CONV or isinstance(getattr(nn, item, None), type)
        if kind or any(_means(item, name, layers[name]) for name in taken):
            continue
        known = [*layers, *{cls.__name__ for layer in layers.values() for cls in type(layer).__mro__}]
        raise RefusedError(
            f"WeightCompander: {item!r} is neither the class nor the name of a layer with weights."
            f"{nearest(item, known)} Layers with weights: {_candidates(layers)}."
        )
