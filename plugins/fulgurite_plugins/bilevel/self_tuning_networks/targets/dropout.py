# SPDX-License-Identifier: Apache-2.0
"""Dropout rates inside the model: of activations, of the rows of an embedding, of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.layouts import Layout, check_layout, spread
from fulgurite_plugins.bilevel.self_tuning_networks.patterns import matches
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import own_weights
from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import Site, Target


class TunedDropout(nn.Module):
    """The mixin of dropout layers whose rate is a hyperparameter, one for each example.

    Without present values it is the layer that it was.
    """

    plain: ClassVar[type[nn.Module]]
    channelwise: ClassVar[bool] = True
    conditioning: Conditioning
    index: int
    layout: Layout

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the masked activations `[B, *]`, or `[B, C, *]` with whole channels masked."""
        rate = self.conditioning.column(self.index) if self.training else None
        if rate is None:
            return super().forward(input)
        shape = tuple(input.shape)
        if self.channelwise:
            shape = (*shape[:2], *[1] * (len(shape) - 2))
        keep = 1.0 - spread(rate, shape, self.layout, 1 if self.channelwise else 0, self)
        return input * masked(keep, shape, self.conditioning).to(input.dtype)


class _Elements(TunedDropout, nn.Dropout):
    plain = nn.Dropout
    channelwise = False


class _Channels1d(TunedDropout, nn.Dropout1d):
    plain = nn.Dropout1d


class _Channels2d(TunedDropout, nn.Dropout2d):
    plain = nn.Dropout2d


class _Channels3d(TunedDropout, nn.Dropout3d):
    plain = nn.Dropout3d


_KINDS: dict[type[nn.Module], type[TunedDropout]] = {
    kind.plain: kind for kind in (_Elements, _Channels1d, _Channels2d, _Channels3d)
}


def masked(keep: Tensor, shape: tuple[int, ...], conditioning: Conditioning) -> Tensor:
    """Return a mask of `shape` that is `1 / keep` with probability `keep` and else 0; `keep` broadcasts to it."""
    return (conditioning.uniform(shape, keep.device) < keep) / keep


class Dropout(Target):
    """The rate of the model's `nn.Dropout` layers (also 1d, 2d, 3d), for each example its own.

    Args:
        pattern: Which layers, by qualified name.
        per_layer: Whether each has a hyperparameter of its own, or all have one in common.
        layout: What the leading dimensions of their inputs are.

    Raises:
        ValueError: If the layout is unknown.
    """

    bounds = (0.0, 1.0)

    def __init__(self, pattern: str = "*", per_layer: bool = True, layout: Layout = "batch") -> None:
        check_layout(layout, "Dropout")
        self.pattern = pattern
        self.per_layer = per_layer
        self.layout = layout
        self._layers: list[TunedDropout] = []

    def expand(self, module: nn.Module) -> Sequence[tuple[str, Target]]:
        """Return one target per layer if each shall have its own.

        Raises:
            ValueError: If the pattern matches no dropout layer.
        """
        names = self._names(module)
        if not self.per_layer or len(names) == 1:
            return [("", self)]
        return [(name, Dropout(name, per_layer=False, layout=self.layout)) for name in names]

    def attach(self, site: Site) -> None:
        """Make the rates of the layers follow the hyperparameter.

        Raises:
            ValueError: If another hyperparameter tunes one of them already.
        """
        for name in self._names(site.module):
            layer: Any = site.module.get_submodule(name)
            if isinstance(layer, TunedDropout):
                if layer.conditioning is site.conditioning and layer.index != site.index:
                    raise ValueError(f"Expected one hyperparameter for the rate of {name!r}, but got two.")
            else:
                layer.__class__ = _KINDS[type(layer)]
            layer.conditioning, layer.index, layer.layout = site.conditioning, site.index, self.layout
            self._layers.append(layer)

    def detach(self) -> None:
        """Give the layers back the rates that they had."""
        for layer in self._layers:
            layer.__class__ = layer.plain  # type: ignore[assignment]
            del layer.conditioning, layer.index, layer.layout
        self._layers.clear()

    def _names(self, module: nn.Module) -> list[str]:
        kinds = (*_KINDS, *_KINDS.values())
        layers = {name: layer for name, layer in module.named_modules() if type(layer) in kinds}
        names = [name for name in layers if matches(name, [self.pattern])]
        if not names:
            raise ValueError(
                f"Dropout({self.pattern!r}) matches no dropout layer of {type(module).__name__}. Its layers of the kinds "
                f"nn.Dropout, Dropout1d, Dropout2d and Dropout3d are: {', '.join(layers) or 'none'}. Dropout that is called "
                f"as a function (F.dropout), or inside nn.LSTM or nn.MultiheadAttention, cannot be found: make it a layer."
            )
        return names


class EmbeddingDropout(Target):
    """The probability with which a row of an embedding is zero throughout the batch; the others are divided by `1 - p`.

    Args:
        pattern: Which `nn.Embedding` layers, by qualified name.
    """

    needs_shared = True
    bounds = (0.0, 1.0)

    def __init__(self, pattern: str = "*") -> None:
        self.pattern = pattern
        self._undo: list[Callable[[], None]] = []

    def attach(self, site: Site) -> None:
        """Mask what the embeddings return.

        Raises:
            ValueError: If the pattern matches no embedding.
        """
        layers = [
            m
            for name, m in site.module.named_modules()
            if isinstance(m, nn.Embedding) and matches(name, [self.pattern])
        ]
        if not layers:
            raise ValueError(
                f"EmbeddingDropout({self.pattern!r}) matches no nn.Embedding of {type(site.module).__name__}."
            )
        mask = _RowMask(site.conditioning, site.index)
        self._undo = [layer.register_forward_hook(mask).remove for layer in layers]

    def detach(self) -> None:
        """Leave the embeddings alone."""
        while self._undo:
            self._undo.pop()()


class _RowMask:
    """A forward hook of embeddings."""

    def __init__(self, conditioning: Conditioning, index: int) -> None:
        self.conditioning = conditioning
        self.index = index

    def __call__(self, layer: nn.Embedding, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rate = self.conditioning.column(self.index) if layer.training else None
        if rate is None:
            return None
        mask = masked(1.0 - rate[:1], (layer.num_embeddings,), self.conditioning)
        return output * mask.to(output.dtype)[args[0]].unsqueeze(-1)


class WeightDrop(Target):
    """The probability with which an element of a weight is zero throughout the batch; the others are divided by `1 - p`.

    A gated weight is masked as a whole: its elementary and its hyper part alike.

    Args:
        pattern: Which weights, by the qualified names of parameters, such as `"cell.weight_hh"`.
    """

    needs_shared = True
    bounds = (0.0, 1.0)

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._undo: list[Callable[[], None]] = []

    def attach(self, site: Site) -> None:
        """Mask the weights whenever their layer is called.

        Raises:
            ValueError: If the pattern matches no weight.
        """
        found: dict[nn.Module, list[str]] = {}
        for qualified, layer, name, _ in own_weights(site.module):
            if matches(qualified, [self.pattern]):
                found.setdefault(layer, []).append(name)
        if not found:
            raise ValueError(f"WeightDrop({self.pattern!r}) matches no weight of {type(site.module).__name__}.")
        for layer, names in found.items():
            mask = _WeightMask(site.conditioning, site.index, names)
            self._undo += [
                layer.register_forward_pre_hook(mask.lay).remove,
                layer.register_forward_hook(mask.lift, always_call=True).remove,
            ]

    def detach(self) -> None:
        """Leave the weights alone."""
        while self._undo:
            self._undo.pop()()


class _WeightMask:
    """Two forward hooks of a layer, which lay masked weights in place of its own for the time of a call."""

    def __init__(self, conditioning: Conditioning, index: int, names: list[str]) -> None:
        self.conditioning = conditioning
        self.index = index
        self.names = names
        self.own: list[dict[str, Any]] = []

    def lay(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rate = self.conditioning.column(self.index) if layer.training else None
        own: dict[str, Any] = {}
        self.own.append(own)
        if rate is None:
            return
        for name in self.names:
            weight = layer._parameters[name]
            assert weight is not None
            mask = masked(1.0 - rate[:1], tuple(weight.shape), self.conditioning).to(weight.dtype)
            for part in (name, f"hyper_{name}"):
                if layer._parameters.get(part) is not None:
                    own[part] = layer._parameters[part]
                    _put(layer, part, own[part] * mask)

    def lift(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name, parameter in self.own.pop().items():
            _put(layer, name, parameter)


def _put(layer: nn.Module, name: str, weight: Tensor) -> None:
    """Lay a weight in a parameter's place, as `torch.func.functional_call` does."""
    layer._parameters[name] = weight  # type: ignore[assignment]
    if isinstance(layer, nn.RNNBase):  # reads a list of its own
        layer._flat_weights[layer._flat_weights_names.index(name)] = weight
