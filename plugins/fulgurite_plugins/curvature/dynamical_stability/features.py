# SPDX-License-Identifier: Apache-2.0
r"""The features $g_i = J_i^\top R_i$ of a model's examples: their squared lengths, their products, their kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.errors import FulguriteError, check_argument, check_choice
from fulgurite.landscape import ntk_gram
from fulgurite.measurement import undisturbed
from fulgurite.per_example import per_example_squares
from fulgurite.per_example.examples import Examples
from fulgurite.per_example.recording import at_least_float32

Loss = Literal["half_squared", "mse", "cross_entropy"]


class NonFiniteError(FulguriteError):
    """A measurement is not finite; the message says where."""


@dataclass(frozen=True)
class OutputCurvature:
    r"""The second derivative $A_i = R_i R_i^\top$ of an example's loss for its output.

    Args:
        kind: `"squared"` ($A_i$ is a multiple of the identity) or `"cross_entropy"` ($\mathrm{diag}(p) - p p^\top$).
        scale: By what it is multiplied. Half the squared error and plain cross entropy have 1.
    """

    kind: Literal["squared", "cross_entropy"]
    scale: float = 1.0

    @classmethod
    def of(cls, loss: Loss, outputs: int) -> OutputCurvature:
        r"""Return that of a named loss: $\frac12 |f - y|^2$, the mean of $(f_c - y_c)^2$ over outputs, or cross entropy."""
        check_choice(loss, ("half_squared", "mse", "cross_entropy"), "loss", "gauss_newton_trace")
        if loss == "cross_entropy":
            return cls("cross_entropy")
        return cls("squared", 1.0 if loss == "half_squared" else 2.0 / outputs)

    def rank(self, outputs: int) -> int:
        """Return the largest possible rank of $A_i$."""
        return max(1, outputs - 1) if self.kind == "cross_entropy" else outputs

    def times_root(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Return $R_i v_i$ for `outputs` `[N, C]` and `vectors` `[N, C]` (or `[C]`, the same for all examples)."""
        if self.kind == "squared":
            return self.scale**0.5 * vectors.expand_as(outputs)
        p, root = _probabilities(outputs)
        return self.scale**0.5 * (root * vectors - p * (root * vectors).sum(dim=1, keepdim=True))

    def times_transposed_root(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        r"""Return $R_i^\top v_i$, for vectors `[N, C]`."""
        if self.kind == "squared":
            return self.scale**0.5 * vectors
        p, root = _probabilities(outputs)
        return self.scale**0.5 * root * (vectors - (p * vectors).sum(dim=1, keepdim=True))

    def roots(self, outputs: Tensor) -> Tensor:
        """Return $R_i$, `[N, C, C]`."""
        eye = torch.eye(outputs.shape[1]).to(outputs)
        return torch.stack([self.times_root(outputs, column) for column in eye], dim=2)


def gauss_newton_trace(
    model: nn.Module,
    inputs: Any,
    loss: Loss = "half_squared",
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return $\mathrm{Tr}(H) = \frac1n \sum_i |J_i^\top R_i|_F^2$, the trace of the Gauss-Newton matrix.

    The columns of $R_i$ are pushed back through the model, each in one backward pass over all examples, of which the
    squared length of every example's gradient follows in closed form (`fulgurite.per_example`): no gradient of a single
    example is ever in memory. With `probes`, random combinations $R_i \varepsilon$ of the columns take their place,
    with signs $\varepsilon$: unbiased, at the cost of one pass per probe instead of one per output.

    Args:
        model: Maps inputs to `[N, C]` (or `[N]`), used in evaluation mode; its parameters that require gradients count.
        inputs: Inputs of `N` examples, as for `fulgurite.per_example.per_example_squares`.
        loss: `"half_squared"`, half the squared error; `"mse"`, the mean of the squares over outputs, as
            `torch.nn.functional.mse_loss` has it; `"cross_entropy"`.
        probes: Number of random combinations; None for the exact trace.
        generator: Where the signs come from.

    Returns:
        A float32 or float64 scalar, detached.

    Raises:
        ValueError: If there are no examples, `probes` is not positive, or the loss is unknown.
        RefusedError: If examples are coupled, or parameters are sharded.
        NonFiniteError: If a gradient is not finite; the message names the parameter.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> gauss_newton_trace(model, torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor(13.)
    """
    check_argument(probes is None or probes >= 1, "probes", "gauss_newton_trace", "positive or None", probes)
    with undisturbed(model) as network:
        outputs = evaluated(network, inputs)
        curvature = OutputCurvature.of(loss, outputs.shape[1])
        drawn = None if probes is None else signs(probes, len(outputs), outputs.shape[1], generator).to(outputs)
        lengths = squared_lengths(network, inputs, outputs, curvature, None, drawn)
        return lengths.mean(dim=1).sum() / (probes or 1)


def evaluated(network: nn.Module, inputs: Any) -> Tensor:
    """Return the outputs of a model, `[N, C]`, without a graph.

    Raises:
        ValueError: If there are no examples, or the outputs are not one row for each.
    """
    examples = Examples(inputs)
    if not examples.number:
        raise ValueError("Expected `inputs` of at least one example, but got none.")
    with torch.no_grad():
        outputs, _ = examples.call(network, examples.part(0, examples.number))
    if not isinstance(outputs, Tensor) or len(outputs) != examples.number:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"Expected outputs of shape [{examples.number}, C], but the model gives {got}.")
    return outputs.reshape(examples.number, -1)


def squared_lengths(
    network: nn.Module,
    inputs: Any,
    outputs: Tensor,
    curvature: OutputCurvature,
    weights: Mapping[str, float] | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    r"""Return the squared length of each column of each $g_i$, `[C, N]`, or estimates of $|g_i|_F^2$, `[probes, N]`.

    Args:
        network: The model, in evaluation mode.
        inputs: Its inputs.
        outputs: What it makes of them, `[N, C]`.
        curvature: The second derivative of the loss.
        weights: The weight of each parameter, by name; None for 1.
        drawn: Signs `[probes, N, C]`, by which columns are combined at random; None takes each column.
    """
    directions = torch.eye(outputs.shape[1]).to(outputs) if drawn is None else drawn
    pushed = [curvature.times_root(outputs, direction) for direction in directions]
    return torch.stack([sum_weighted(pushed_squares(network, inputs, vectors), weights) for vectors in pushed])


def squared_products(
    network: nn.Module,
    inputs: Any,
    outputs: Tensor,
    curvature: OutputCurvature,
    weights: Mapping[str, float] | None,
    drawn: Tensor,
) -> Tensor:
    r"""Return an unbiased estimate of $|g_i^\top g_i|_F^2$ for each example, `[N]`.

    It is the mean of $(\varepsilon^\top g_i^\top g_i\, \varepsilon')^2$ over pairs of independent signs; the product
    follows from two squared lengths, $4 \langle a, b \rangle = |a + b|^2 - |a - b|^2$. Of a single output it is exact.

    Args:
        network: The model, in evaluation mode.
        inputs: Its inputs.
        outputs: What it makes of them, `[N, C]`.
        curvature: The second derivative of the loss.
        weights: The weight of each parameter in the product.
        drawn: Independent signs `[2 k, N, C]`, for `k` pairs; of a single output one pair is enough.
    """
    found = []
    for first, second in drawn.unflatten(0, (-1, 2)):
        lengths = []
        for direction in (first + second, first - second):
            pushed = curvature.times_root(outputs, direction)
            squares = pushed_squares(network, inputs, pushed)
            lengths.append(sum_weighted(squares, weights))
        found.append(((lengths[0] - lengths[1]) / 4).square())
    return torch.stack(found).mean(dim=0)


def pushed_squares(network: nn.Module, inputs: Any, vectors: Tensor) -> dict[str, Tensor]:
    r"""Return $|J_i^\top v_i|^2$ by parameter name, `[N]`, for vectors `[N, C]`.

    Raises:
        NonFiniteError: If one is not finite.
    """
    squares = per_example_squares(network, inputs, vectors, _inner_product)
    for name, values in squares.items():
        if not bool(values.isfinite().all()):
            raise NonFiniteError(
                f"The gradients of the outputs with respect to {name!r} are not finite for example "
                f"{int((~values.isfinite()).nonzero()[0])}. Look for a division by zero, or a weight that has overflowed."
            )
    return squares


def sum_weighted(squares: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> Tensor:
    """Return the weighted sum over parameters, `[N]`."""
    return torch.stack([(weights[n] if weights else 1.0) * values for n, values in squares.items()]).sum(dim=0)


def feature_kernel(
    network: nn.Module, inputs: Any, outputs: Tensor, curvature: OutputCurvature, weights: Mapping[str, float]
) -> Tensor:
    """Return the kernel of the features, `[N, C, N, C]` in float64.

    Args:
        network: The model, in evaluation mode.
        inputs: Its inputs.
        outputs: What it makes of them, `[N, C]`.
        curvature: The second derivative of the loss.
        weights: The weight of each parameter.

    Raises:
        NonFiniteError: If it is not finite.
    """
    kernel = torch.zeros((), dtype=torch.float64, device=outputs.device)
    for weight, names in _by_weight(weights):
        kernel = kernel + weight * ntk_gram(network, inputs, parameters=names).double()
    if not bool(kernel.isfinite().all()):
        pushed_squares(network, inputs, torch.ones_like(outputs))  # names the parameter
        raise NonFiniteError("The tangent kernel is not finite.")
    roots = curvature.roots(outputs.double())
    return torch.einsum("nck,ncmd,mdl->nkml", roots, kernel, roots)


def _probabilities(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and its root, in float32 at least; the root's derivative is finite also where a probability is 0."""
    logs = at_least_float32(outputs).log_softmax(dim=1)
    return logs.exp(), (logs / 2).exp()


def _by_weight(weights: Mapping[str, float]) -> Iterator[tuple[float, list[str]]]:
    for weight in sorted({w for w in weights.values() if w}):
        yield weight, [name for name, own in weights.items() if own == weight]


def _inner_product(outputs: Tensor, vectors: Tensor) -> Tensor:
    return (outputs.reshape(len(outputs), -1) * vectors).sum(dim=1)


def signs(number: int, examples: int, outputs: int, generator: torch.Generator | None) -> Tensor:
    """Return random signs `[number, N, C]`, drawn on the CPU, so that they are the same on every device."""
    return torch.randint(0, 2, (number, examples, outputs), generator=generator) * 2.0 - 1
