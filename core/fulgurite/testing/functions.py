# SPDX-License-Identifier: Apache-2.0
"""The checks of pure functions and of losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from fulgurite.testing.check import CheckError, InapplicableError, check, expect
from fulgurite.testing.lab import Lab, RandomStreams, equal_states
from fulgurite.testing.modules import scattered


def _arguments(lab: Lab) -> tuple[Any, ...]:
    if lab.case.arguments is None:
        raise InapplicableError("the case names no `arguments` for a call")
    return lab.case.arguments()


def _function(lab: Lab) -> Any:
    return lab.make() if isinstance(lab.target, type) else lab.target


def _cast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments with their floating-point tensors in another precision.

    Raises:
        InapplicableError: If there are none.
    """
    if not any(isinstance(a, Tensor) and a.is_floating_point() for a in arguments):
        raise InapplicableError("no argument is a floating-point tensor")
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return _tensors(list(values.values()))
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []


@check("function", "loss")
def check_arguments_are_left_alone(lab: Lab) -> None:
    """It writes into its arguments, which are the caller's."""
    arguments = _arguments(lab)
    before = [t.clone() for t in _tensors(arguments)]
    _function(lab)(*arguments)
    expect(equal_states(before, _tensors(arguments)), "an argument was changed in place")


@check("function", "loss")
def check_pure(lab: Lab) -> None:
    """Two calls with equal arguments give different results, or draw from the global random streams."""
    function = _function(lab)
    streams = RandomStreams.now()
    first, second = function(*_arguments(lab)), function(*_arguments(lab))
    expect(RandomStreams.now().same_as(streams), "it draws from the global random streams")
    expect(equal_states(first, second), "two calls give different results")


@check("function", "loss")
def check_precision_is_kept(lab: Lab) -> None:
    """float64 in gives float32 out, so that exactness cannot be tested."""
    for result in _tensors(_function(lab)(*_cast(_arguments(lab), torch.float64))):
        expect(not result.is_floating_point() or result.dtype is torch.float64, f"float64 in gives {result.dtype} out")


@check("function", "loss")
def check_half_precision(lab: Lab) -> None:
    """What a mixed-precision model gives it is an error, or infinite."""
    exact = _tensors(_function(lab)(*_arguments(lab)))
    for whole, half in zip(exact, _tensors(_function(lab)(*_cast(_arguments(lab), torch.bfloat16))), strict=True):
        expect(
            not half.is_floating_point() or bool((half.isfinite() | ~whole.isfinite()).all()),
            "bfloat16 arguments give results that are not finite",
        )


@check("function", "loss")
def check_gradient(lab: Lab) -> None:
    """Its gradient is not that of the function."""
    arguments = _cast(_arguments(lab), torch.float64)
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    for tensor in inputs:
        tensor.requires_grad_()
    if not any(result.requires_grad for result in _tensors(_function(lab)(*arguments))):
        raise InapplicableError("its result carries no gradient")
    try:
        torch.autograd.gradcheck(lambda *_: _function(lab)(*arguments), inputs)
    except GradcheckError as error:
        raise CheckError(f"backward is not the derivative of forward: {str(error).splitlines()[0]}") from error


@check("loss")
def check_loss_has_a_gradient(lab: Lab) -> None:
    """Nothing can be trained with it: its value is detached from the outputs, or its gradient is zero or not finite."""
    arguments = _cast(_arguments(lab), torch.float32)
    outputs = next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()).requires_grad_()
    (value,) = _tensors(_function(lab)(*arguments))
    expect(value.requires_grad, "the loss carries no gradient")
    (gradient,) = torch.autograd.grad(value.sum(), outputs)
    expect(bool(gradient.isfinite().all()), "the gradient is not finite")
    expect(bool(gradient.any()), "the gradient is zero")


@check("function", "loss")
def check_non_contiguous(lab: Lab) -> None:
    """A transposed or sliced argument gives another result or an error."""
    if not _tensors(_arguments(lab)):
        raise InapplicableError("no argument is a tensor")
    strided = tuple(scattered(a) if isinstance(a, Tensor) else a for a in _arguments(lab))
    first, second = _tensors(_function(lab)(*_arguments(lab))), _tensors(_function(lab)(*strided))
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in zip(first, second, strict=True))
    expect(same, "arguments that are not contiguous give another result")
