# SPDX-License-Identifier: Apache-2.0
r"""The landscape around trained models: barriers between them, and the tangent kernel and how fast it turns.

Example:
    >>> first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(first.weight, -1.0), nn.init.constant_(second.weight, 1.0)
    >>> error_barrier(first, second, lambda model: 1.0 - model.weight.item() ** 2, points=3).height
    1.0
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from fulgurite.measurement import undisturbed
from fulgurite.per_example.choice import choose, refuse_coupled, substituted
from fulgurite.per_example.examples import Examples
from fulgurite.per_example.gradients import Gradient, Outer, Rows
from fulgurite.per_example.recording import at_least_float32, output_gradients, recorded

_BLOCK_NUMBERS = 1 << 26
"""Numbers of a Jacobian that are in memory at once: 256 MiB of float32."""


@dataclass(frozen=True)
class Barrier:
    """What was measured on the straight line between two models.

    Args:
        positions: Places on the line, from 0 (the first model) to 1 (the second).
        values: What was measured there.
    """

    positions: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def height(self) -> float:
        r"""The barrier, $\max_\alpha\, [e(\alpha) - (1 - \alpha)\, e(0) - \alpha\, e(1)]$; NaN if any value is.

        It is never negative: at both ends it is zero. Equal ends give the same as the maximum above their mean.
        """
        first, last = self.values[0], self.values[-1]
        above = [v - (1 - a) * first - a * last for a, v in zip(self.positions, self.values, strict=True)]
        return math.nan if any(math.isnan(value) for value in above) else max(0.0, *above)


def error_barrier(
    model_a: nn.Module, model_b: nn.Module, evaluate: Callable[[nn.Module], float], points: int = 11
) -> Barrier:
    r"""Measure models on the straight line $(1 - \alpha)\, w_a + \alpha\, w_b$ between two models.

    Parameters and floating-point buffers are interpolated; other buffers are those of `model_a`. The running statistics of
    batch normalisation are therefore interpolated too, and are not those of the interpolated network: they hide how well it
    could do, and make barriers look higher. For barriers without this effect let `evaluate` first recompute them on
    training data, for instance by `torch.optim.swa_utils.update_bn`.

    Args:
        model_a: The model at $\alpha = 0$.
        model_b: The model at $\alpha = 1$, of the same architecture.
        evaluate: Gives the error, or the loss, of a model. It is called on a copy in evaluation mode, always with the same
            random state, and may change the copy's mode and buffers.
        points: Equidistant places on the line, both ends included; at least 3.

    Raises:
        ValueError: If `points` is below 3, or the models have different parameters or buffers.
    """
    if points < 3:
        raise ValueError(f"Expected `points` to be at least 3, both ends and one between them, but got {points!r}.")
    first, second = (getattr(model, "_orig_mod", model) for model in (model_a, model_b))
    tensors_a, tensors_b = _interpolated(first), _interpolated(second)
    shapes_a, shapes_b = ({name: list(t.shape) for name, t in tensors.items()} for tensors in (tensors_a, tensors_b))
    if shapes_a != shapes_b:
        name = next(n for n in (shapes_a | shapes_b) if shapes_a.get(n) != shapes_b.get(n))
        raise ValueError(
            f"Expected two models of one architecture, but {name!r} has shape {shapes_a.get(name, 'none')} in `model_a` and "
            f"{shapes_b.get(name, 'none')} in `model_b`."
        )
    between = copy.deepcopy(first).requires_grad_(False)
    inside = _interpolated(between)
    positions = tuple(point / (points - 1) for point in range(points))
    values = []
    for position in positions:
        with torch.no_grad():
            for name, tensor in inside.items():
                torch.lerp(tensors_a[name], tensors_b[name].to(tensor.device), position, out=tensor)
        with undisturbed(between) as network:
            values.append(float(evaluate(network)))
    return Barrier(positions, tuple(values))


def _interpolated(model: nn.Module) -> dict[str, Tensor]:
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {**{name: parameter.detach() for name, parameter in model.named_parameters()}, **buffers}


def ntk_gram(model: nn.Module, inputs: Any, *, parameters: str | Sequence[str] = "all", trace: bool = False) -> Tensor:
    r"""Return the empirical neural tangent kernel, $K_{ncme} = \langle \partial_w f_c(x_n), \partial_w f_e(x_m) \rangle$.

    One backward pass per output gives the gradients of all layers' outputs, from which the Jacobians follow. Parameter by
    parameter they are contracted at once: of a linear layer, as the product of the Gram matrices of its inputs and of the
    gradients of its outputs; of others with a closed form, in blocks of 256 MiB. So neither `[NC, P]` nor `[N, N, P]` is
    ever in memory, but `C` gradients of each layer's outputs are. The rest goes through `vmap` of `jacrev`, one parameter
    at a time.

    Args:
        model: The model; it is used in the mode that it is in.
        inputs: Inputs of `N` examples, as for `fulgurite.per_example.per_example_squares`.
        parameters: With respect to which parameters, likewise.
        trace: Whether to sum over the outputs, $\sum_c K_{ncmc}$. Outputs are then treated one after the other, so that
            neither `[NC, NC]` nor gradients of several outputs are in memory.

    Returns:
        `[N, C, N, C]` in float32 or float64, detached, or `[N, N]` if it is summed. `K.flatten(2).flatten(0, 1)` is the
        matrix `[NC, NC]`.

    Raises:
        ValueError: If the model's outputs are not `[N, C]` or carry no gradient, or `parameters` matches none that requires
            gradients.
        RefusedError: If examples are coupled (batch normalisation in training mode), or parameters are sharded.
    """
    examples = Examples(inputs)
    with undisturbed(model, training=None) as network:
        refuse_coupled(network)
        chosen = choose(network, parameters, examples)
        uncovered: set[nn.Parameter] = set()
        for number in sorted({1, examples.number}):  # one example shows which layers have examples first
            with recorded(network, chosen, number) as recording:
                outputs, _ = examples.call(network, examples.part(0, number))
            if not isinstance(outputs, Tensor) or outputs.shape[:1] != (number,) or outputs.ndim != 2:
                got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise ValueError(f"Expected outputs of shape [{number}, C], but {type(network).__name__} gives {got}.")
            recording.settle(outputs)
            uncovered |= recording.uncovered
        recording.uncovered = uncovered
        classes = outputs.shape[1]
        size = examples.number if trace else outputs.numel()
        gram = at_least_float32(outputs.detach()).new_zeros(size, size)
        for part in [[c] for c in range(classes)] if trace else [range(classes)]:
            of_outputs = [output_gradients(outputs[:, c], recording, keep_graph=True) for c in part]
            with torch.no_grad():
                for name, gradients in recording.gradients(of_outputs):
                    gram += _gram(gradients, chosen[name].shape)
        with torch.no_grad():
            for name in (name for name, parameter in chosen.items() if parameter in uncovered):
                jacobian = _jacobian(network, name, examples)
                gram += _square(jacobian.unsqueeze(0) if trace else jacobian.movedim(1, 0))
    return gram if trace else gram.unflatten(1, (classes, -1)).unflatten(0, (classes, -1)).permute(1, 0, 3, 2)


def _gram(gradients: Sequence[Gradient], shape: torch.Size) -> Tensor:
    """Return the products `[CN, CN]` of the gradients of `C` outputs with respect to one parameter."""
    if isinstance(gradients[0], Rows):
        present, index = gradients[0].index.unique(return_inverse=True)
        gradients = [Rows(index, g.gradient).outer(len(present)) for g in gradients if isinstance(g, Rows)]
    if isinstance(gradients[0], Outer):
        lefts, rights = zip(*((g.left, g.right) for g in gradients if isinstance(g, Outer)), strict=True)
        return _outer_gram(lefts, rights)
    return _square(torch.stack([g.dense(shape) for g in gradients]))


def _outer_gram(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    examples, groups, outputs, positions = lefts[0].shape
    if positions == 1:
        left, right = (torch.cat(list(tensors)).squeeze(3).transpose(0, 1) for tensors in (lefts, rights))
        return ((left @ left.mT) * (right @ right.mT)).sum(dim=0)
    rows = max(1, _BLOCK_NUMBERS // (len(lefts) * examples * groups * rights[0].shape[2]))
    gram = lefts[0].new_zeros(2 * [len(lefts) * examples])
    for start in range(0, outputs, rows):
        block = [left[:, :, start : start + rows] @ right.mT for left, right in zip(lefts, rights, strict=True)]
        gram += _square(torch.stack(block))
    return gram


def _square(jacobian: Tensor) -> Tensor:
    """`[C, N, *]` -> `[CN, CN]`."""
    rows = at_least_float32(jacobian).flatten(0, 1).flatten(1)
    return rows @ rows.mT


def _jacobian(model: nn.Module, name: str, examples: Examples) -> Tensor:
    """Return the Jacobian `[N, C, *]` with respect to one parameter, by `vmap`."""

    def outputs(parameter: Tensor, *tensors: Tensor) -> Tensor:
        call = substituted(model, {name: parameter})
        return examples.call(call, [tensor.unsqueeze(0) for tensor in tensors])[0].squeeze(0)

    parameter = model.get_parameter(name).detach()
    return vmap(jacrev(outputs), in_dims=(None, *[0] * len(examples.tensors)))(
        parameter, *examples.part(0, examples.number)
    )


def kernel_velocity(kernel: Tensor, later: Tensor, steps: int = 1) -> Tensor:
    r"""Return how fast a kernel turns, $v = (1 - \langle K, K' \rangle_F / (|K|_F\, |K'|_F)) / d$.

    It is computed as half the squared distance of the normalised kernels, which small changes do not cancel in.

    Args:
        kernel: The kernel $K$, of any shape.
        later: The kernel $K'$ after $d$ steps, of the same shape.
        steps: Steps $d$ between them, positive.

    Returns:
        A scalar in [0, 2 / d], 0 for kernels that differ by a positive factor only; NaN if one of them is zero.

    Raises:
        ValueError: If the shapes differ or `steps` is not positive.

    Example:
        >>> kernel_velocity(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]), steps=2)
        tensor(0.5000)
    """
    if kernel.shape != later.shape:
        raise ValueError(f"Expected two kernels of one shape, but got {list(kernel.shape)} and {list(later.shape)}.")
    if steps <= 0:
        raise ValueError(f"Expected `steps` to be positive, but got {steps!r}.")
    difference = kernel / kernel.norm() - later / later.norm()
    return difference.square().sum() / (2 * steps)
