# SPDX-License-Identifier: Apache-2.0
"""Vector-Jacobian and Jacobian-vector products, several at once, on a graph that is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulgurite.errors import FulguriteError
from fulgurite.per_example.recording import graph_of


class Backward:
    """`K` vector-Jacobian products at once, of some tensors with respect to others; the graph is kept."""

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._used = [number for number, output in enumerate(outputs) if output.requires_grad]
        self._outputs = [outputs[number] for number in self._used]
        self._inputs = inputs
        self._batched = True

    def __call__(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `[K, *input]` per input, of `[K, *output]` per output."""
        number = len(vectors[0])
        if not self._outputs:
            return [tensor.new_zeros(number, *tensor.shape) for tensor in self._inputs]
        used = [vectors[n] for n in self._used]
        with twice():
            if number > 1 and self._batched:
                try:
                    batched = self._grad(used, is_grads_batched=True)
                    return [  # zeros for what is not used have no rows
                        g if g.ndim > i.ndim else g.expand(number, *i.shape)
                        for g, i in zip(batched, self._inputs, strict=True)
                    ]
                except RuntimeError:
                    self._batched = False  # vmap cannot carry some operation's backward pass
            rows = [self._grad([vector[k] for vector in used]) for k in range(number)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _grad(self, vectors: Sequence[Tensor], **options: Any) -> Sequence[Tensor]:
        return grad(self._outputs, self._inputs, vectors, retain_graph=True, **options)


class Jacobian:
    """Products with the Jacobian `J` of outputs, by differentiating the vector-Jacobian product in its vector."""

    def __init__(self, outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        with twice():
            self._probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
            pulled = grad(outputs, parameters, self._probes, create_graph=True)
        self._forward = Backward(pulled, self._probes)
        self.transposed = Backward(outputs, parameters)

    def __call__(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `[K, *output]` per output, of `[K, *parameter]` per parameter."""
        return self._forward(vectors)


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor] | None = None, **options: Any
) -> Sequence[Tensor]:
    """Differentiate, with zeros for what is not used."""
    return torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, materialize_grads=True, **options)


_ONCE = once_differentiable(lambda *_: None).__code__
"""All functions that this decorator has made share it."""


def refuse_once(loss: Tensor) -> None:
    """Refuse a graph with functions that are marked as differentiable once: torch takes them for constant gradients."""
    for node in graph_of(loss)[0]:
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE:
            raise _not_twice(f"{node.name()} is marked with once_differentiable.")


@contextlib.contextmanager
def twice() -> Iterator[None]:
    """Name the operation that cannot be differentiated twice."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("is not implemented", "differentiate twice")):
            raise
        raise _not_twice(str(error)) from error


def _not_twice(reason: str) -> FulguriteError:
    return FulguriteError(
        f"The model cannot be differentiated twice, as products with its curvature need: {reason} Replace the operation, or "
        f"take FiniteDifferenceHessian."
    )
