# SPDX-License-Identifier: Apache-2.0
r"""The norm of each example's own gradient, exactly, without computing the gradients one by one or all at once.

For a linear map $z_t = W a_t$ the gradient of one example's loss is $\sum_t \delta_t a_t^\top$ with
$\delta_t = \partial \ell / \partial z_t$, of which one backward pass over the whole batch gives all; norms follow from
$\delta$ and $a$ (Goodfellow 2015; Rochette et al. 2019). That covers linear, convolutional and embedding layers; of
normalisation layers the gradient itself is small. Gradients of tied weights and reused layers are added before the norm
is taken. Everything else goes through `torch.func`: `vmap` of `grad`, in chunks.

Example:
    >>> model = nn.Linear(2, 2)
    >>> _ = nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    >>> per_example_norms(model, torch.tensor([[0.0, 0.0], [2.0, 2.0]]), torch.tensor([0, 1]))
    tensor([0.7071, 2.1213])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulgurite.errors import RefusedError
from fulgurite.measurement import model_device, undisturbed
from fulgurite.per_example.choice import choose, refuse_coupled, substituted
from fulgurite.per_example.examples import Examples
from fulgurite.per_example.recording import at_least_float32, output_gradients, recorded

__all__ = ["Loss", "cross_entropy", "per_example_norms", "per_example_squares"]

Loss = Callable[[Any, Any], Tensor]
"""`loss(outputs, targets)` gives a loss per example, `[B]`."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each example, `[B]`.

    Args:
        outputs: Logits `[B, C]`.
        targets: Class indices `[B]`, or probabilities `[B, C]`.
    """
    return F.cross_entropy(outputs, targets, reduction="none")


def per_example_norms(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: Loss = cross_entropy,
    *,
    parameters: str | Sequence[str] = "all",
    chunk: int | Literal["auto"] = "auto",
) -> Tensor:
    """Return the Euclidean norm of each example's gradient, all chosen parameters taken as one vector.

    Arguments and errors are those of `per_example_squares`.

    Returns:
        `[B]`, detached, on the model's device.
    """
    squares = per_example_squares(model, inputs, targets, loss, parameters=parameters, chunk=chunk)
    return torch.stack(list(squares.values())).sum(dim=0).sqrt()


def per_example_squares(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: Loss = cross_entropy,
    *,
    parameters: str | Sequence[str] = "all",
    chunk: int | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """Return the squared norm of each example's gradient with respect to each chosen parameter.

    Those of disjoint groups add up. The model is used in the mode that it is in, outside autocast; random state, buffers,
    modes and `.grad` stay what they are. The first example is a chunk of its own, which shows what a chunk costs, and which
    layers have the examples along their first dimension. In these, row `i` is taken for example `i`: a model that sorts
    the batch on its way is measured wrongly unless `chunk` is 1.

    Args:
        model: The model: called as `model(inputs)`, `model(*inputs)` for a tuple or list, `model(**inputs)` for a dict.
        inputs: Tensors `[B, *]`, possibly nested; what is no tensor is passed on as it is.
        targets: Likewise.
        loss: The loss per example, `[B]`.
        parameters: `"all"` that require gradients; `"last_layer"`, those of the module that is called last among the ones
            that own some; or one or several `fnmatch` patterns of their names.
        chunk: Examples per pass; by default as many as lie in the cache of a CPU, but not fewer than 16, or as many as take
            1 GiB on an accelerator.

    Returns:
        By parameter name, `[B]` in float32 or float64, detached, on the model's device.

    Raises:
        ValueError: If `chunk` is not positive, tensors or losses are not one per example, or `parameters` matches none that
            requires gradients; if the losses carry no gradient.
        RefusedError: If examples are coupled (batch normalisation in training mode), parameters are sharded, or `vmap`
            cannot carry what has no closed form.
    """
    if chunk != "auto" and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"Expected `chunk` to be 'auto' or a positive number of examples, but got {chunk!r}.")
    examples = Examples(inputs, targets)
    with undisturbed(model, training=None) as network:
        refuse_coupled(network)
        chosen = choose(network, parameters, examples)
        if not examples.number:
            return {name: at_least_float32(parameter.detach()).new_zeros(0) for name, parameter in chosen.items()}
        measure = _Squares(network, chosen, loss, examples)
        parts = [measure(0, 1)]
        size = _automatic_chunk(measure.numbers, model_device(network)) if chunk == "auto" else chunk
        parts += [measure(start, min(start + size, examples.number)) for start in range(1, examples.number, size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _automatic_chunk(numbers: int, device: torch.device) -> int:
    """Return how many examples to take at once, if one takes so many numbers in memory."""
    fit = (1 << 28) // max(1, numbers)
    if device.type == "cpu":
        fit = min(fit, max(16, (1 << 22) // max(1, numbers)))
    return max(1, fit)


class _Squares:
    """Squared norms for one chunk of the examples after another."""

    def __init__(self, model: nn.Module, chosen: Mapping[str, nn.Parameter], loss: Loss, examples: Examples) -> None:
        self.model = model
        self.chosen = chosen
        self.loss = loss
        self.examples = examples
        self.numbers = 0
        """Numbers that the last chunk took."""
        self._uncovered: set[nn.Parameter] = set()

    def __call__(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return the squares of the examples from `start` to `stop`, by parameter name."""
        tensors = self.examples.part(start, stop)
        self.numbers = 0
        found = self._by_closed_forms(tensors, stop - start)
        rest = {name: p.detach() for name, p in self.chosen.items() if p in self._uncovered}
        if rest:
            found |= self._by_vmap(rest, tensors)
            self.numbers += 2 * sum(p.numel() for p in rest.values())
        return {name: found[name] for name in self.chosen}

    def _by_closed_forms(self, tensors: Sequence[Tensor], number: int) -> dict[str, Tensor]:
        """Return the squares for parameters of layers with a closed form; note what the others are."""
        hopeful = {name: p for name, p in self.chosen.items() if p not in self._uncovered}
        if not hopeful:
            return {}
        with recorded(self.model, hopeful, number) as recording:
            losses = self._losses(self.model, tensors, number)
        recording.settle(losses)
        self._uncovered |= recording.uncovered
        squares = {name: at_least_float32(losses).new_zeros(number) for name in hopeful}  # of parameters without use
        of_outputs = output_gradients(losses, recording)
        with torch.no_grad():
            for name, (gradient,) in recording.gradients([of_outputs]):
                squares[name] = gradient.squared_norm()
                self.numbers += gradient.numbers
        return squares

    def _losses(self, model: Callable[..., Any], tensors: Sequence[Tensor], number: int) -> Tensor:
        losses = self.loss(*self.examples.call(model, tensors))
        if not isinstance(losses, Tensor) or losses.shape != (number,):
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"Expected `loss` to return one loss per example, [{number}], but got {got}. Use reduction='none', and "
                f"reduce all dimensions but the first."
            )
        return losses

    def _by_vmap(self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the squares for parameters without a closed form."""

        def loss(parameters: dict[str, Tensor], *tensors: Tensor) -> Tensor:
            model = substituted(self.model, parameters)
            return self._losses(model, [tensor.unsqueeze(0) for tensor in tensors], 1).squeeze(0)

        def squares(*tensors: Tensor) -> dict[str, Tensor]:
            gradients = grad(loss)(dict(parameters), *tensors)
            return {name: at_least_float32(g).square().sum() for name, g in gradients.items()}

        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # of the fused ones, vmap makes a loop over examples
                return vmap(squares)(*tensors)
        except RuntimeError as error:
            raise RefusedError(
                f"The gradients of {', '.join(map(repr, parameters))} of {type(self.model).__name__} have no closed form "
                f"here, and torch.func.vmap cannot carry the model: {error} Choose other `parameters`, for instance "
                f"'last_layer'."
            ) from error
