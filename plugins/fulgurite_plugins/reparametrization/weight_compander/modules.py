# SPDX-License-Identifier: Apache-2.0
"""The companding function as a parametrisation for `torch.nn.utils.parametrize`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fulgurite_plugins.reparametrization.weight_compander.functional import (
    Companding,
    check_positive,
    check_width,
    compand,
    companding,
    expand,
)

_LARGEST_LOG = 20.0
"""Learned logarithms of `a` and `b` are kept within plus and minus this: float32 holds the exponential and its inverse."""


class Compander(nn.Module):
    r"""Compute a weight tensor from a free one: $w = a f(v / b)$.

    To be registered with `torch.nn.utils.parametrize.register_parametrization`; `WeightCompander` does this for a whole
    model. One instance may serve several tensors, which then share `a` and `b`.

    Fixed `a` and `b` are buffers `[1]`, part of every checkpoint. Learned ones are parameters `log_a` and `log_b` `[1]`, so
    that both stay positive: take them out of weight decay, which would pull `a` and `b` towards 1, and give them a
    smaller learning rate (`parameter_groups` does both).

    Args:
        a: Amplitude, positive: the weights stay below `fn.bound(a)`, for the arctangent $a \pi / 2$.
        b: Width, from 1e-18 to 1e18: the slope at zero is $a / b$.
        fn: The companding function: `"arctan"`, `"tanh"`, `"softsign"` or a `Companding`.
        learn: Whether `a` and `b` are learned; the values given are where they begin.

    Raises:
        ValueError: If `a` or `b` is not positive and finite, `b` not within these bounds, or `fn` is not known.

    Example:
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(3, 2), "weight", Compander(a=1.0, b=1.0))
        >>> bool((layer.weight.abs() < math.pi / 2).all())
        True
    """

    a: Tensor
    b: Tensor
    log_a: nn.Parameter
    log_b: nn.Parameter

    def __init__(self, a: float = 1.0, b: float = 1.0, fn: str | Companding = "arctan", learn: bool = False) -> None:
        super().__init__()
        self.companding = companding(fn)
        self.learn = learn
        for name, value in self.encoded(a, b).items():
            if learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def encoded(self, a: float, b: float) -> dict[str, Tensor]:
        """Return certain values of `a` and `b` as the entries of the state that hold them.

        Raises:
            ValueError: If one of them is not positive and finite, or `b` is not between 1e-18 and 1e18.
        """
        check_positive("Compander", "a", a)
        check_width("Compander", "b", b)
        if self.learn:
            return {"log_a": torch.tensor([math.log(a)]), "log_b": torch.tensor([math.log(b)])}
        return {"a": torch.tensor([float(a)]), "b": torch.tensor([float(b)])}

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return `a` and `b`, each `[1]`."""
        if self.learn:
            return scale_of(self.log_a), scale_of(self.log_b)
        return self.a, self.b

    def forward(self, v: Tensor) -> Tensor:
        """Return the weights `[...]` of a free tensor `[...]`, in the same precision."""
        return compand(v, *self.scales(), self.companding)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return the free tensor `[...]` of weights `[...]`, which are clipped to 0.99 of the bound.

        Raises:
            NotImplementedError: If the companding function has no inverse.
        """
        if self.companding.inverse is None:
            raise NotImplementedError("This companding function has no inverse.")
        return expand(w, *self.scales(), self.companding)

    def extra_repr(self) -> str:
        """Return the bound and the slope at zero, which nobody reads off `a` and `b`."""
        a, b = (float(value.detach()) for value in self.scales())
        return f"bound={self.companding.bound(a):.3g}, slope={a / b:.3g}{', learned' if self.learn else ''}"


def scale_of(logarithm: Tensor) -> Tensor:
    """Return the positive number `[1]` of a learned logarithm `[1]`."""
    return logarithm.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
