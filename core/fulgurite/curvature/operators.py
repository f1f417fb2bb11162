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

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fulgurite import distributed
from fulgurite.curvature.derivatives import Backward, Jacobian, grad, refuse_once, twice
from fulgurite.curvature.sources import Evaluation, Source
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.per_example.choice import is_sharded

_COLUMNS = 16
"""Vectors that are multiplied at once: each takes the memory of a backward pass."""

Product = Callable[[Tensor], Tensor]
"""Multiplies vectors `[K, P]` by the matrix of one batch."""

_T = TypeVar("_T")


class Operator(ABC):
    """A symmetric matrix `[P, P]` that is known by its products.

    Args:
        parameters: The parameters; those that do not require gradients are left out.

    Raises:
        ValueError: If no parameter requires gradients.
        RefusedError: If a parameter is sharded.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("Expected `parameters` to hold some that require gradients, but there are none.")
        if any(is_sharded(parameter) for parameter in self.parameters):
            raise RefusedError(
                "Products with curvature need whole parameters, but they are sharded here. Measure on one device, or under "
                "DDP."
            )
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
            FulguriteError: If some operation of the model cannot be differentiated as often as the product needs.
        """
        if vectors.shape[:1] != self.shape[:1] or vectors.ndim not in (1, 2):
            raise ValueError(
                f"Expected vectors of shape [{self.shape[0]}] or [{self.shape[0]}, K], but got {list(vectors.shape)}."
            )
        rows = vectors.detach().to(self.device, self.dtype).reshape(self.shape[0], -1).mT
        return self._multiply(rows).mT.reshape(vectors.shape)

    @abstractmethod
    def _multiply(self, rows: Tensor) -> Tensor:
        """Return the products with vectors `[K, P]`, in that shape."""

    def close(self) -> None:
        """Free what is kept from one product to the next; the next makes it anew, from the parameters as they are then."""
        return

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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


class GraphOperator(Operator):
    """A matrix whose products are made on the graph of each evaluation of a loss, and averaged over all of them.

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
        super().__init__(parameters)
        self.source = source
        self.keep_graphs = keep_graphs
        self._kept: list[tuple[int, Product]] | None = None

    def close(self) -> None:
        """Free the graphs; the next product makes them anew, from the parameters as they are then."""
        self._kept = None

    def _multiply(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        examples = 0
        with torch.inference_mode(False), torch.enable_grad():
            for number, product in self._products():
                for start in range(0, len(rows), _COLUMNS):
                    part = slice(start, start + _COLUMNS)
                    total[part] += number * product(rows[part])
                examples += number
        flat = distributed.average_(torch.cat([total.reshape(-1), total.new_tensor([float(examples)])]))
        return (flat[:-1] / flat[-1]).view_as(rows)

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


class Hessian(GraphOperator):
    """The Hessian of the loss."""

    def _product(self, evaluation: Evaluation) -> Product:
        refuse_once(evaluation.loss)
        with twice():
            gradients = grad([evaluation.loss], self.parameters, create_graph=True)
        back = Backward(gradients, self.parameters)

        def product(rows: Tensor) -> Tensor:
            return self._flat(back(self._split(rows)), len(rows))

        return product


class GaussNewton(GraphOperator):
    r"""The generalised Gauss-Newton matrix $J^\top H_z J$ of outputs $z$ and the criterion's Hessian $H_z$ in them."""

    def _product(self, evaluation: Evaluation) -> Product:
        outputs = evaluation.outputs
        if not outputs.requires_grad:
            raise FulguriteError("The criterion's outputs carry no gradient; a Gauss-Newton matrix is made of it.")
        refuse_once(evaluation.criterion_loss)
        with twice():
            of_outputs = grad([evaluation.criterion_loss], [outputs], create_graph=True)
        curvature = Backward(of_outputs, [outputs])
        jacobian = Jacobian([outputs], self.parameters)

        def product(rows: Tensor) -> Tensor:
            return self._flat(jacobian.transposed(curvature(jacobian(self._split(rows)))), len(rows))

        return product


class EmpiricalFisher(GraphOperator):
    r"""The mean of $g_i g_i^\top$ over examples, $g_i$ the gradient of the loss of one of them."""

    def _product(self, evaluation: Evaluation) -> Product:
        losses = evaluation.losses()
        refuse_once(losses)
        jacobian = Jacobian([losses], self.parameters)

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
        super().__init__(parameters)
        self.source = source
        self.epsilon = epsilon

    def _multiply(self, rows: Tensor) -> Tensor:
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
        return torch.stack(products)

    def _gradient(self) -> Tensor:
        total = torch.zeros(self.shape[0] + 1, dtype=self.dtype, device=self.device)
        with torch.inference_mode(False), torch.enable_grad():
            for evaluation in self.source():
                gradients = grad([evaluation.loss], self.parameters)
                total[:-1] += evaluation.examples * self._flat([g.unsqueeze(0) for g in gradients], 1)[0]
                total[-1] += evaluation.examples
        distributed.average_(total)
        return total[:-1] / total[-1]
