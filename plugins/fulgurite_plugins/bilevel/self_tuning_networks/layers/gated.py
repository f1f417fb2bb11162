# SPDX-License-Identifier: Apache-2.0
r"""What all gated layers have in common: their extra parameters, their gates, and how both enter an affine map.

A gated layer computes, for an example with hyperparameters $h$,

$$W x + b + (V_w h) \odot (U x) + (V_b h) \odot c,$$

which is the plain layer with the weights $W + \text{diag}(V_w h)\, U$ and the bias $b + (V_b h) \odot c$, one for each
example, at the cost of one more matrix product.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.layouts import Layout, check_layout, locate

_GATE_STD = 0.01
_EXTRA = ("hyper_", "gate", "elementary_scale")
"""How the names of the parameters begin that the plain layers have not."""


class Gated(nn.Module):
    """The mixin that makes a gated layer of a plain one, whose parameters keep their names.

    Extra parameters: `hyper_weight` $U$, `hyper_bias` $c$ (if there is a bias), `gate.weight` $V$, and with
    `elementary_scale` a scalar of that name, which multiplies $W$ and $b$; of a cell with two affine maps, one set for each.

    Args:
        args: The arguments of the plain layer.
        num_hyper: The number of hyperparameters `H`.
        conditioning: Where the layer reads the hyperparameters; by default one of its own.
        layout: What the leading dimensions of the input are.
        elementary_scale: Whether a learned scalar, at first 1, multiplies $W x + b$.
        generator: Source of the initial values, on the CPU.
        kwargs: The keyword arguments of the plain layer.

    Raises:
        ValueError: If `num_hyper` is not a positive integer or `layout` is unknown.
    """

    plain: ClassVar[type[nn.Module]]
    suffixes: ClassVar[tuple[str, ...]] = ("",)
    conditioning: Conditioning
    layout: Layout
    num_hyper: int
    hyper_weight: Tensor

    def __init__(
        self,
        *args: Any,
        num_hyper: int,
        conditioning: Conditioning | None = None,
        layout: Layout = "batch",
        elementary_scale: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.add_gates(num_hyper, conditioning or Conditioning(), layout, elementary_scale, generator)

    def add_gates(
        self,
        num_hyper: int,
        conditioning: Conditioning,
        layout: Layout = "batch",
        elementary_scale: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add the parameters that the plain layer has not: $U$ and $c$ uniform in +-1/sqrt(fan in), $V$ normal."""
        if not isinstance(num_hyper, int) or num_hyper < 1:
            raise ValueError(f"Expected `num_hyper` of {type(self).__name__} to be positive, but got {num_hyper!r}.")
        check_layout(layout, type(self).__name__)
        self.num_hyper, self.conditioning, self.layout = num_hyper, conditioning, layout
        for suffix in self.suffixes:
            weight, bias = self._own("weight", suffix), self._own("bias", suffix)
            bound = 1.0 / math.sqrt(self.fan_in(weight))
            rows = self.outputs(weight) * (1 if bias is None else 2)
            drawn = {
                "hyper_weight": torch.empty(weight.shape).uniform_(-bound, bound, generator=generator),
                "hyper_bias": None
                if bias is None
                else torch.empty(bias.shape).uniform_(-bound, bound, generator=generator),
                "elementary_scale": torch.ones(()) if elementary_scale else None,
            }
            for name, values in drawn.items():
                self.register_parameter(name + suffix, None if values is None else nn.Parameter(values.to(weight)))
            gate = nn.Linear(num_hyper, rows, bias=False, device="meta")
            gate.weight = nn.Parameter(torch.randn(rows, num_hyper, generator=generator).mul_(_GATE_STD).to(weight))
            self.add_module(f"gate{suffix}", gate)

    def hyper_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the plain layer has not."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith(_EXTRA)]

    @staticmethod
    def fan_in(weight: Tensor) -> int:
        """Return the number of inputs of one output."""
        return weight[0].numel()

    @staticmethod
    def outputs(weight: Tensor) -> int:
        """Return the number of outputs that are gated each on its own."""
        return weight.shape[0]

    @staticmethod
    def over_weight(scale: Tensor, weight: Tensor) -> Tensor:
        """View `scale` `[O]` so that it broadcasts over the weight."""
        return scale.view(-1, *[1] * (weight.ndim - 1))

    def elementary(self, suffix: str = "") -> tuple[Tensor, Tensor | None]:
        """Return weight and bias without gates."""
        weight, bias = self._own("weight", suffix), self._own("bias", suffix)
        scale = self._own("elementary_scale", suffix)
        if scale is None:
            return weight, bias
        return scale * weight, None if bias is None else scale * bias

    def gates(self, h: Tensor, suffix: str = "") -> tuple[Tensor, Tensor | None]:
        r"""Return the scale $V_w h$ and the shift $(V_b h) \odot c$, `[..., O]`, in float32 at least, for `h` `[..., H]`."""
        weight, c = getattr(self, f"gate{suffix}").weight, self._own("hyper_bias", suffix)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with without_autocast(weight.device.type):
            values = F.linear(h.to(weight.device, dtype), weight.to(dtype))
            if c is None:
                return values, None
            scale, shift = values.chunk(2, dim=-1)
            return scale, shift * c.to(dtype)

    def effective(self, h: Tensor | None, suffix: str = "") -> tuple[Tensor, Tensor | None]:
        """Return weight and bias for the one `h`, `[H]` or `[1, H]`; without gates for None."""
        weight, bias = self.elementary(suffix)
        if h is None:
            return weight, bias
        self._check_number(h)
        scale, shift = self.gates(h.reshape(-1), suffix)
        u = self._own("hyper_weight", suffix)
        weight = torch.addcmul(weight, self.over_weight(scale.to(weight.dtype), u), u)
        return weight, bias if bias is None or shift is None else bias + shift.to(bias.dtype)

    def per_example(self) -> Tensor | None:
        """Return the conditioning if it has several rows `[B, H]`; None if one weight serves all examples."""
        h = self.conditioning.h
        if h is None or h.ndim == 1 or len(h) == 1:
            return None
        self._check_number(h)
        return h

    def mixed(self, y: Tensor, u: Tensor, h: Tensor, channel: int, suffix: str = "") -> Tensor:
        """Return `y + scale * u + shift` for elementary outputs `y` and hyper outputs `u`, the same shape.

        Args:
            y: Elementary outputs; the leading dimensions are as `layout` says.
            u: Hyper outputs.
            h: One row of hyperparameters per example `[B, H]`.
            channel: The dimension of `y`, from the end, in which the outputs are numbered.
            suffix: Which of the layer's affine maps it is.

        Raises:
            ValueError: If the leading dimensions do not fit `B`.
        """
        dim, times = locate(y.shape, len(h), self.layout, -channel, self)
        folded = "*" in self.layout
        if folded:
            sizes = (len(h), times) if dim == 0 else (times, len(h))
            y, u = y.unflatten(0, sizes), u.unflatten(0, sizes)
        scale, shift = self.gates(h, suffix)
        view = [1] * y.ndim
        view[dim], view[channel] = len(h), scale.shape[-1]
        out = torch.addcmul(y, scale.to(y.dtype).view(view), u)
        if shift is not None:
            out.add_(shift.to(y.dtype).view(view))
        return out.flatten(0, 1) if folded else out

    def _check_number(self, h: Tensor) -> None:
        if h.shape[-1] != self.num_hyper:
            raise ValueError(
                f"{self} is gated by {self.num_hyper} hyperparameters, but was given {list(h.shape)} of them."
            )

    def _own(self, name: str, suffix: str) -> Any:
        return getattr(self, name + suffix, None)

    def extra_repr(self) -> str:
        """Say what is gated by how many."""
        return f"{super().extra_repr()}, num_hyper={self.num_hyper}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load; a checkpoint of the plain layer leaves the parameters that it does not know as they are."""
        extra = {prefix + name: p.detach() for name, p in self.named_parameters() if name.startswith(_EXTRA)}
        if not extra.keys() & state_dict.keys():
            state_dict.update(extra)  # `load_state_dict` hands a copy down, to the gate too
        super()._load_from_state_dict(state_dict, prefix, *rest)


def fuse(layer: Gated, h: Tensor | None) -> nn.Module:
    """Return the plain layer that a gated one is at fixed hyperparameters, with parameters of its own.

    Args:
        layer: A gated layer.
        h: What enters its gates, `[H]` or `[1, H]`; None for the elementary weights.

    Raises:
        ValueError: If the layer is not gated, or `h` has several rows.
    """
    if not isinstance(layer, Gated):
        raise ValueError(f"Expected `layer` of fuse to be a gated layer, but got {type(layer).__name__}.")
    if h is not None and h.numel() != layer.num_hyper:
        raise ValueError(f"Expected `h` of fuse to be one row of {layer.num_hyper}, but got shape {list(h.shape)}.")
    with torch.no_grad():
        effective = {suffix: layer.effective(h, suffix) for suffix in layer.suffixes}
    plain = copy.copy(layer)
    plain.__dict__.update({name: copy.copy(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    strip(plain)
    for suffix, (weight, bias) in effective.items():
        for name, value in ((f"weight{suffix}", weight), (f"bias{suffix}", bias)):
            if value is not None:
                setattr(plain, name, nn.Parameter(value.clone(), getattr(layer, name).requires_grad))
    return plain


def strip(layer: Gated) -> None:
    """Make the plain layer again of a gated one, in place, with its elementary weights."""
    for name in [name for name in layer._parameters if name.startswith(_EXTRA)]:
        del layer._parameters[name]
    for suffix in layer.suffixes:
        del layer._modules[f"gate{suffix}"]
    for name in ("num_hyper", "conditioning", "layout"):
        delattr(layer, name)
    layer.__class__ = layer.plain  # type: ignore[assignment]


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return the context in which nothing is cast."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
