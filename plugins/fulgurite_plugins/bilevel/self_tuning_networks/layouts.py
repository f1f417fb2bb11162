# SPDX-License-Identifier: Apache-2.0
"""Where the examples of a batch stand in the tensors inside a model."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Layout = Literal["batch", "time,batch", "batch*time", "time*batch"]
"""What the leading dimensions of a layer's input are: `[B, ...]`, `[T, B, ...]`, or both in one dimension, the first the
slower (`batch*time` is what `x.flatten(0, 1)` makes of `[B, T, ...]`)."""


def check_layout(layout: object, owner: str) -> None:
    """Raise a `ValueError` if a layout is unknown."""
    if layout not in get_args(Layout):
        raise ValueError(f"Expected `layout` of {owner} to be one of {get_args(Layout)}, but got {layout!r}.")


def locate(shape: tuple[int, ...], examples: int, layout: Layout, inner: int, owner: object) -> tuple[int, int]:
    """Return which dimension numbers the examples, once a folded leading dimension is unfolded, and the time steps in it.

    Args:
        shape: The shape of a tensor inside the model.
        examples: The number of examples `B` of the step.
        layout: What its leading dimensions are.
        inner: How many dimensions at its end belong to one position.
        owner: What the tensor belongs to, for the message.

    Returns:
        The dimension of the examples, 0 or 1, and the number of time steps folded into the leading dimension, 1 for none.

    Raises:
        ValueError: If the shape does not fit.
    """
    dim = 0 if layout.startswith("batch") else 1
    folded = "*" in layout
    if len(shape) - inner > (0 if folded else dim):
        if folded and shape[0] % examples == 0:
            return dim, shape[0] // examples
        if not folded and shape[dim] == examples:
            return dim, 1
    raise ValueError(
        f"{owner} expects tensors laid out as {layout!r} in a step of {examples} examples, but got the shape {list(shape)}. "
        f"Declare with `layout` how its leading dimensions hold the examples, one of "
        f"{', '.join(map(repr, get_args(Layout)))}, or leave it out."
    )


def spread(values: Tensor, shape: tuple[int, ...], layout: Layout, inner: int, owner: object) -> Tensor:
    """Return one value per example so that it broadcasts over a tensor inside the model.

    Args:
        values: Values `[B]`, or `[1]` for all examples alike.
        shape: The shape of the tensor.
        layout: What its leading dimensions are.
        inner: How many dimensions at its end belong to one position.
        owner: What the tensor belongs to, for the message.

    Raises:
        ValueError: If the shape does not fit.
    """
    if len(values) > 1:
        dim, times = locate(shape, len(values), layout, inner, owner)
        if "*" in layout:
            values = values.repeat_interleave(times) if dim == 0 else values.repeat(times)
            dim = 0
    else:
        dim = 0
    view = [1] * len(shape)
    if shape:
        view[dim] = -1
    return values.view(view)
