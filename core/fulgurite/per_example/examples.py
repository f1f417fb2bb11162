# SPDX-License-Identifier: Apache-2.0
"""A batch as a list of tensors that have the examples along the first dimension, and how a model is called with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Examples:
    """Inputs and targets of `N` examples.

    Args:
        inputs: What the model is called with: a tensor, a tuple or list of arguments, or a dictionary of keyword arguments.
        targets: What the loss is called with besides the outputs. Tensors in both, nested too, are `[N, *]`; all else is
            passed on as it is.

    Raises:
        ValueError: If the tensors disagree about `N`, or there is none.
    """

    def __init__(self, inputs: Any, targets: Any = None) -> None:
        self.tensors: list[Tensor] = []
        self._build = _separate((inputs, targets), self.tensors)
        lengths = {len(tensor) if tensor.ndim else None for tensor in self.tensors}
        if len(lengths) != 1 or None in lengths:
            raise ValueError(
                f"Expected `inputs` and `targets` to be tensors with the same number of examples along dimension 0, but "
                f"got shapes {', '.join(str(list(tensor.shape)) for tensor in self.tensors) or 'of no tensor'}."
            )
        self.number = len(self.tensors[0])

    def part(self, start: int, stop: int) -> list[Tensor]:
        """Return the tensors of some of the examples; of inference tensors, copies that autograd may use."""
        parts = [tensor[start:stop] for tensor in self.tensors]
        return [part.clone() if part.is_inference() else part for part in parts]

    def call(self, model: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """Return what the model makes of the inputs among `tensors`, and the targets."""
        inputs, targets = self._build(iter(tensors))
        if isinstance(inputs, dict):
            return model(**inputs), targets
        if isinstance(inputs, tuple | list):
            return model(*inputs), targets
        return model(inputs), targets


def _separate(value: Any, tensors: list[Tensor]) -> Callable[[Any], Any]:
    """Append the tensors in `value` to a list, and return what builds `value` anew from an iterator over such tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return next
    if isinstance(value, dict):
        values = {key: _separate(item, tensors) for key, item in value.items()}
        return lambda found: {key: build(found) for key, build in values.items()}
    if isinstance(value, tuple | list):
        items = [_separate(item, tensors) for item in value]
        kind = tuple if isinstance(value, tuple) else list
        return lambda found: kind(build(found) for build in items)
    return lambda found: value
