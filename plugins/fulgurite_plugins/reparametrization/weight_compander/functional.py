# SPDX-License-Identifier: Apache-2.0
r"""Cakaj, Mehnert, Yang (2023), Weight Compander: the companding function, its inverse and its derivatives.

| symbol | meaning |
|---|---|
| $v$, $w$ | free tensor; weight computed from it |
| $a$, $b$ | amplitude and width, both positive |
| $f$ | companding function of a plain number: odd, strictly increasing, bounded, $f'(0) = 1$ |
| $\Psi$ | $\Psi(v) = a f(v / b)$ |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulgurite.errors import check_argument, is_number, nearest

EDGE = 0.99
"""Part of the bound up to which weights are inverted: beyond it a small change of $w$ is a huge one of $v$."""


@dataclass(frozen=True)
class Companding:
    """A companding function, from which the whole family `a * function(v / b)` is made.

    Args:
        function: Elementwise on tensors of any shape: odd, strictly increasing, bounded, with slope 1 at zero.
        limit: The bound of its values, not reached.
        inverse: Its inverse on the open interval of its values; None if there is none to be had.
        derivative: Its derivative; None leaves it to autograd, which keeps more tensors for the backward pass.

    Raises:
        ValueError: If the functions, tried at some points, are not what is said here.

    Example:
        >>> c = math.pi**0.5 / 2
        >>> Companding(lambda x: torch.erf(c * x), 1.0, inverse=lambda y: torch.erfinv(y) / c).bound(2.0)
        2.0
    """

    function: Callable[[Tensor], Tensor]
    limit: float
    inverse: Callable[[Tensor], Tensor] | None = None
    derivative: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        points = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)
        with torch.no_grad():
            values = self.function(points)
        _expect(values.shape == points.shape and bool(values.isfinite().all()), "function", "finite and elementwise")
        _expect(bool((values + values.flip(0)).abs().max() < 1e-6), "function", "odd")
        _expect(bool((values.diff() > 0).all()), "function", "strictly increasing")
        top = float(values.max())
        _expect(top < self.limit < math.inf, "limit", f"finite and above the values of `function` ({top:.3g} at 4)")
        slope = float(self.function(torch.tensor(1e-4, dtype=torch.float64))) / 1e-4
        _expect(abs(slope - 1) < 1e-3, "function", "of slope 1 at zero", f"{slope:.4g}")
        if self.inverse is not None:
            back = self.inverse(values)
            _expect(bool(((back - points).abs() < 1e-4).all()), "inverse", "the inverse of `function`")
        if self.derivative is not None:
            with torch.enable_grad():
                leaf = points.clone().requires_grad_()
                (exact,) = torch.autograd.grad(self.function(leaf).sum(), leaf)
            _expect(torch.allclose(self.derivative(points), exact), "derivative", "the derivative of `function`")

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function's values `[...]` at `x` `[...]`."""
        return self.function(x)

    def at_ratio(self, v: Tensor, b: Tensor) -> Tensor:
        """Return the values at `v / b`, `[...]`, as a new tensor."""
        return self.function(v / b)

    def slope(self, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope in `v` of the values at `v / b` as two factors: a new tensor `[...]`, and one of `b`'s shape."""
        x = v / b
        if self.derivative is not None:
            return self.derivative(x), b.reciprocal()
        slope: Tensor = torch.func.jvp(self.function, (x,), (torch.ones_like(x),))[1]
        return slope, b.reciprocal()

    def bound(self, a: float) -> float:
        """Return the bound of the weights of amplitude `a`."""
        return a * self.limit


def _expect(condition: bool, name: str, expected: str, found: str = "one that is not") -> None:
    if not condition:
        raise ValueError(f"Expected `{name}` of Companding to be {expected}, but got {found}.")


class _Arctan(Companding):
    """The method's function, in fewer passes over the weights than by way of `v / b`."""

    def at_ratio(self, v: Tensor, b: Tensor) -> Tensor:
        return torch.atan2(v, b)

    def slope(self, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(b * b, v, v).reciprocal_(), b


class _Softsign(Companding):
    """The cheapest of them, likewise."""

    def at_ratio(self, v: Tensor, b: Tensor) -> Tensor:
        return v / (v.abs() + b)

    def slope(self, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (v.abs() + b).pow(-2), b


def _arctan_slope(x: Tensor) -> Tensor:
    return (1 + x.square()).reciprocal()


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


def _softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


def _softsign_inverse(y: Tensor) -> Tensor:
    return y / (1 - y.abs())


def _softsign_slope(x: Tensor) -> Tensor:
    return (1 + x.abs()).pow(-2)


FUNCTIONS = {
    "arctan": _Arctan(torch.atan, math.pi / 2, torch.tan, _arctan_slope),
    "tanh": Companding(torch.tanh, 1.0, torch.atanh, _tanh_slope),
    "softsign": _Softsign(_softsign, 1.0, _softsign_inverse, _softsign_slope),
}
"""The functions that have a name. `arctan` is the method's."""


def companding(fn: str | Companding) -> Companding:
    """Return the companding function that a name stands for; a `Companding` is returned as it is.

    Raises:
        ValueError: If there is none of that name.
    """
    if isinstance(fn, Companding):
        return fn
    if not isinstance(fn, str) or fn not in FUNCTIONS:
        raise ValueError(
            f"Expected `fn` to be one of {', '.join(map(repr, FUNCTIONS))} or a Companding (a callable with its limit and "
            f"its inverse), but got {fn!r}.{nearest(str(fn), FUNCTIONS)}"
        )
    return FUNCTIONS[fn]


def compand(v: Tensor, a: float | Tensor, b: float | Tensor, fn: str | Companding = "arctan") -> Tensor:
    r"""Return the weights $w = a f(v / b)$, with $f = \arctan$ unless another is named.

    Computed in float32 or better, and returned in the precision of `v`. The backward pass keeps `v`, `a` and `b` only and
    computes the slope anew; it can be differentiated again.

    Args:
        v: Free tensor `[...]`.
        a: Amplitude, positive; a number, or a tensor that broadcasts to `v`.
        b: Width, from 1e-18 to 1e18; a number, or a tensor that broadcasts to `v`.
        fn: The companding function.

    Returns:
        Weights `[...]`, strictly within the bound up to rounding.

    Raises:
        ValueError: If `a` is a number that is not positive and finite, `b` one that is not between 1e-18 and 1e18, or `fn`
            is not known.

    Example:
        >>> compand(torch.tensor([0.0, 1.0, 1e9]), a=2.0, b=1.0)
        tensor([0.0000, 1.5708, 3.1416])
    """
    chosen = companding(fn)
    x, amplitude, width = _prepared("compand", v, a, b)
    if chosen.derivative is None or torch.compiler.is_compiling():  # a compiler fuses, and decides what to keep
        return (amplitude * chosen.function(x / width)).to(v.dtype)
    return _Compand.apply(x, amplitude, width, chosen).to(v.dtype)


def expand(w: Tensor, a: float | Tensor, b: float | Tensor, fn: str | Companding = "arctan") -> Tensor:
    r"""Return the free tensor $v = b f^{-1}(w / a)$ from which `compand` makes the weights `w`.

    $w / a$ is clipped to 0.99 of the limit of $f$.

    Args:
        w: Weights `[...]`.
        a: Amplitude, positive; a number, or a tensor that broadcasts to `w`.
        b: Width, from 1e-18 to 1e18; a number, or a tensor that broadcasts to `w`.
        fn: The companding function; it must have an inverse.

    Returns:
        Free tensor `[...]`.

    Raises:
        ValueError: If `a` is a number that is not positive and finite, `b` one that is not between 1e-18 and 1e18, or `fn`
            is not known or has no inverse.

    Example:
        >>> expand(compand(torch.tensor([0.3, -2.0]), a=2.0, b=1.0), a=2.0, b=1.0)
        tensor([ 0.3000, -2.0000])
    """
    chosen = companding(fn)
    if chosen.inverse is None:
        raise ValueError("Expected `fn` of expand to have an inverse, but got a Companding without one.")
    y, amplitude, width = _prepared("expand", w, a, b)
    edge = EDGE * chosen.limit
    return (width * chosen.inverse((y / amplitude).clamp(-edge, edge))).to(w.dtype)


def compand_grad_scale(v: Tensor, a: float | Tensor, b: float | Tensor, fn: str | Companding = "arctan") -> Tensor:
    r"""Return $\partial w / \partial v = (a / b) f'(v / b)$, by which a gradient for $w$ becomes one for $v$.

    For the arctangent it is $a b / (b^2 + v^2)$. A step of gradient descent on $v$ moves $w$, to first order, by its square.

    Args:
        v: Free tensor `[...]`.
        a: Amplitude, positive; a number, or a tensor that broadcasts to `v`.
        b: Width, from 1e-18 to 1e18; a number, or a tensor that broadcasts to `v`.
        fn: The companding function.

    Returns:
        The slope `[...]`, positive, `a / b` at zero.

    Raises:
        ValueError: If `a` is a number that is not positive and finite, `b` one that is not between 1e-18 and 1e18, or `fn`
            is not known.

    Example:
        >>> compand_grad_scale(torch.tensor([0.0, 1.0]), a=2.0, b=1.0)
        tensor([2., 1.])
    """
    x, amplitude, width = _prepared("compand_grad_scale", v, a, b)
    slope, factor = companding(fn).slope(x, width)
    return (slope * (amplitude * factor)).to(v.dtype)


def _prepared(owner: str, v: Tensor, a: float | Tensor, b: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three in float32, or in float64 if the tensor is."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    scalars = []
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            (check_width if name == "b" else check_positive)(owner, name, value)
            value = torch.full((), value, dtype=dtype, device=v.device)
        scalars.append(value.to(dtype))
    return v.to(dtype), scalars[0], scalars[1]


def check_positive(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless a value is a positive, finite number."""
    fits = is_number(value) and value > 0.0  # type: ignore[operator]
    check_argument(fits, name, owner, "a positive, finite number", value)


def check_width(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless a value is a positive number, and its square one that float32 holds."""
    check_positive(owner, name, value)
    check_argument(1e-18 <= value <= 1e18, name, owner, "between 1e-18 and 1e18", value)


class _Compand(torch.autograd.Function):
    """Keeps its arguments, of which the free tensor is alive anyway, and the weights if `a` is learned.

    It makes one tensor of the weights' size forward and one backward, and does the rest in place: fresh memory costs more
    than the arithmetic. Adding zeros to `b` lets that tensor have all dimensions of what it is multiplied by, also those
    of `torch.vmap`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, a: Tensor, b: Tensor, chosen: Companding) -> Tensor:
        return chosen.at_ratio(v, b + torch.zeros_like(a)).mul_(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, a, b, ctx.chosen = inputs
        weights = output if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(v, a, b, weights)
        ctx.save_for_forward(v, a, b, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, a, b, weights = ctx.saved_tensors
        needs_v, needs_a, needs_b, _ = ctx.needs_input_grad
        times = torch.mul if torch.is_grad_enabled() else Tensor.mul_  # a graph of this pass needs what is overwritten
        slope, factor = ctx.chosen.slope(v, b + torch.zeros_like(a) + grad.new_zeros(()))
        grad_v = times(times(slope, grad), a * factor)
        grad_a = (grad * weights).sum_to_size(a.shape) / a if needs_a else None
        grad_b = (grad_v * v).sum_to_size(b.shape) / -b if needs_b else None
        return grad_v if needs_v else None, grad_a, grad_b, None

    @staticmethod
    def jvp(ctx: Any, dv: Tensor | None, da: Tensor | None, db: Tensor | None, _: None) -> Tensor:
        v, a, b, _weights = ctx.saved_tensors
        slope, factor = ctx.chosen.slope(v, b)
        slope = slope * (a * factor)
        moved = torch.zeros_like(slope)
        if dv is not None:
            moved = moved + slope * dv
        if da is not None:
            moved = moved + ctx.chosen.at_ratio(v, b) * da
        if db is not None:
            moved = moved - slope * (v / b) * db
        return moved
