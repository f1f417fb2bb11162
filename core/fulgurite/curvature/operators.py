# SPDX-License-Identifier: Apache-2.0
r"""Products of curvature matrices with vectors: exact, without the matrix, over batches and ranks.

Vectors are flat, `[P]`, in the order of the parameters. All matrices are means over examples: over the batches of the
source, weighted by their examples, and over all ranks, in one collective per product.

Example:
    >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> def source():
    ...     loss = weight.pow(3).sum()
    ...     yield Evaluation(loss, weight, loss, 1, lambda: loss[None])
    >>> Hessian(source, [weight]) @ torch.tensor([1.0, 1.0])
    tensor([ 6., 12.])
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fulgurite import distributed
from fulgurite.curvature.sources import Evaluation, Source
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.per_example.choice import is_sharded
from fulgurite.per_example.recording import graph_of

_COLUMNS = 16
"""Vectors that are multiplied at once: each takes the memory of a backward pass."""

Product = Callable[[Tensor], Tensor]
"""Multiplies vectors `[K, P]` by the matrix of one batch."""

_T = TypeVar("_T")


class Operator(ABC):
    """A symmetric matrix `[P, P]` that is known by its products.

    Args:
        source: Where the loss comes from.
        parameters: The parameters; those that do not require gradients are left out.
        keep_graphs: Whether the graphs of all batches stay in memory for the next product, until `close`. Without, they are
            made anew for each product, one after the other.

    Raises:
        ValueError: If no parameter requires gradients.
        RefusedError: If a parameter is sharded.
    """

    def __init__(self, source: Source, parameters: Iterable[nn.Parameter], keep_graphs: bool = True) -> None:
        self.source = source
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("Expected `parameters` to hold some that require gradients, but there are none.")
        if any(is_sharded(parameter) for parameter in self.parameters):
            raise RefusedError(
                "Products with curvature need whole parameters, but they are sharded here. Measure on one device, or under "
                "DDP."
            )
        self.keep_graphs = keep_graphs
        self._kept: list[tuple[int, Product]] | None = None
        dtypes = [parameter.dtype for parameter in self.parameters]
        self.dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        self.device = self.parameters[0].device
        self._sizes = [parameter.numel() for parameter in self.parameters]

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, P)`."""
        return (sum(self._sizes), sum(self._sizes))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with one vector `[P]` or several `[P, K]`, detached.

        Raises:
            ValueError: If the shape does not fit.
            FulguriteError: If some operation of the model cannot be differentiated twice.
        """
        if vectors.shape[:1] != self.shape[:1] or vectors.ndim not in (1, 2):
            raise ValueError(
                f"Expected vectors of shape [{self.shape[0]}] or [{self.shape[0]}, K], but got {list(vectors.shape)}."
            )
        rows = vectors.detach().to(self.device, self.dtype).reshape(self.shape[0], -1).mT
        total = torch.zeros_like(rows)
        examples = 0
        with torch.inference_mode(False), torch.enable_grad():
            for number, product in self._products():
                for start in range(0, len(rows), _COLUMNS):
                    part = slice(start, start + _COLUMNS)
                    total[part] += number * product(rows[part])
                examples += number
        flat = distributed.average_(torch.cat([total.reshape(-1), total.new_tensor([float(examples)])]))
        return (flat[:-1] / flat[-1]).view_as(rows).mT.reshape(vectors.shape)

    def close(self) -> None:
        """Free the graphs; the next product makes them anew, from the parameters as they are then."""
        self._kept = None

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _products(self) -> Iterator[tuple[int, Product]]:
        if not self.keep_graphs:
            for evaluation in self.source():
                yield evaluation.examples, self._product(evaluation)
            return
        if self._kept is None:
            self._kept = [(evaluation.examples, self._product(evaluation)) for evaluation in self.source()]
        yield from self._kept

    @abstractmethod
    def _product(self, evaluation: Evaluation) -> Product:
        """Return the product with the matrix of one batch."""

    def _flat(self, tensors: Sequence[Tensor], number: int) -> Tensor:
        """`K` values of all parameters -> `[K, P]`."""
        return torch.cat([tensor.detach().reshape(number, -1).to(self.dtype) for tensor in tensors], dim=1)

    def _split(self, rows: Tensor) -> list[Tensor]:
        """`[K, P]` -> `K` values of all parameters."""
        parts = rows.split(self._sizes, dim=1)
        return [
            part.reshape(len(rows), *parameter.shape).to(parameter.dtype)
            for part, parameter in zip(parts, self.parameters, strict=True)
        ]


class Hessian(Operator):
    """The Hessian of the loss."""

    def _product(self, evaluation: Evaluation) -> Product:
        _refuse_once(evaluation.loss)
        with _twice():
            gradients = _grad([evaluation.loss], self.parameters, create_graph=True)
        back = _Backward(gradients, self.parameters)

        def product(rows: Tensor) -> Tensor:
            return self._flat(back(self._split(rows)), len(rows))

        return product


class GaussNewton(Operator):
    r"""The generalised Gauss-Newton matrix $J^\top H_z J$ of outputs $z$ and the criterion's Hessian $H_z$ in them."""

    def _product(self, evaluation: Evaluation) -> Product:
        outputs = evaluation.outputs
        if not outputs.requires_grad:
            raise FulguriteError("The criterion's outputs carry no gradient; a Gauss-Newton matrix is made of it.")
        _refuse_once(evaluation.criterion_loss)
        with _twice():
            of_outputs = _grad([evaluation.criterion_loss], [outputs], create_graph=True)
        curvature = _Backward(of_outputs, [outputs])
        jacobian = _Jacobian([outputs], self.parameters)

        def product(rows: Tensor) -> Tensor:
            return self._flat(jacobian.transposed(curvature(jacobian(self._split(rows)))), len(rows))

        return product


class EmpiricalFisher(Operator):
    r"""The mean of $g_i g_i^\top$ over examples, $g_i$ the gradient of the loss of one of them."""

    def _product(self, evaluation: Evaluation) -> Product:
        losses = evaluation.losses()
        _refuse_once(losses)
        jacobian = _Jacobian([losses], self.parameters)

        def product(rows: Tensor) -> Tensor:
            along = jacobian(self._split(rows))
            return self._flat(jacobian.transposed(along), len(rows)) / len(losses)

        return product


class FiniteDifferenceHessian(Operator):
    r"""The Hessian by central differences of gradients, for models that cannot be differentiated twice.

    $(g(w + h v) - g(w - h v)) / 2h$ with $h = \epsilon\, |w| / |v|$. The parameters are changed for the time of a product,
    and put back bit for bit.

    Args:
        source: Where the loss comes from.
        parameters: The parameters.
        epsilon: The relative step.
    """

    def __init__(self, source: Source, parameters: Iterable[nn.Parameter], epsilon: float = 1e-3) -> None:
        super().__init__(source, parameters, keep_graphs=False)
        self.epsilon = epsilon

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with one vector `[P]` or several `[P, K]`, detached."""
        rows = vectors.detach().to(self.device, self.dtype).reshape(self.shape[0], -1).mT
        found = [parameter.detach().clone() for parameter in self.parameters]
        length = self._flat([parameter.unsqueeze(0) for parameter in found], 1).norm()
        products = []
        try:
            for row in rows:
                step = (
                    self.epsilon
                    * torch.where(length > 0, length, 1.0)
                    / row.norm().clamp_min(torch.finfo(self.dtype).tiny)
                )
                ends = []
                for sign in (1, -1):
                    with torch.no_grad():
                        moved = self._split((sign * step * row).unsqueeze(0))
                        for parameter, start, move in zip(self.parameters, found, moved, strict=True):
                            parameter.copy_(start + move[0])
                    ends.append(self._gradient())
                products.append((ends[0] - ends[1]) / (2 * step))
        finally:
            with torch.no_grad():
                for parameter, start in zip(self.parameters, found, strict=True):
                    parameter.copy_(start)
        return torch.stack(products, dim=1).reshape(vectors.shape)

    def _gradient(self) -> Tensor:
        total = torch.zeros(self.shape[0] + 1, dtype=self.dtype, device=self.device)
        with torch.inference_mode(False), torch.enable_grad():
            for evaluation in self.source():
                gradients = _grad([evaluation.loss], self.parameters)
                total[:-1] += evaluation.examples * self._flat([g.unsqueeze(0) for g in gradients], 1)[0]
                total[-1] += evaluation.examples
        distributed.average_(total)
        return total[:-1] / total[-1]

    def _product(self, evaluation: Evaluation) -> Product:
        raise NotImplementedError


class _Backward:
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
        with _twice():
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
        return _grad(self._outputs, self._inputs, vectors, retain_graph=True, **options)


class _Jacobian:
    """Products with the Jacobian `J` of outputs, by differentiating the vector-Jacobian product in its vector."""

    def __init__(self, outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        with _twice():
            self._probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
            pulled = _grad(outputs, parameters, self._probes, create_graph=True)
        self._forward = _Backward(pulled, self._probes)
        self.transposed = _Backward(outputs, parameters)

    def __call__(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._forward(vectors)


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor] | None = None, **options: Any
) -> Sequence[Tensor]:
    return torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, materialize_grads=True, **options)


_ONCE = once_differentiable(lambda *_: None).__code__
"""All functions that this decorator has made share it."""


def _refuse_once(loss: Tensor) -> None:
    """Refuse a graph with functions that are marked as differentiable once: torch takes them for constant gradients."""
    for node in graph_of(loss)[0]:
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE:
            raise _not_twice(f"{node.name()} is marked with once_differentiable.")


@contextlib.contextmanager
def _twice() -> Iterator[None]:
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
