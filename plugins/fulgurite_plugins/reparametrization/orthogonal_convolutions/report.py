# SPDX-License-Identifier: Apache-2.0
"""What is said about the layers before training: which can be orthogonal, and how near to an isometry they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from fulgurite.errors import RefusedError
from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import lorth
from fulgurite_plugins.reparametrization.orthogonal_convolutions.layers import Layer
from fulgurite_plugins.reparametrization.orthogonal_convolutions.theory import isometry_bounds

_HEAD = ("layer", "kernel", "stride", "case", "L_orth", "eps", "Lipschitz <=", "")


def write_report(layers: Sequence[Layer], skipped: Sequence[Layer], scale: float = 1.0) -> str:
    """Return a table in plain text: shape, case, residual and isometry bounds of each layer, and what is left out.

    Args:
        layers: Layers that are penalised.
        skipped: Layers of which no orthogonal convolution exists.
        scale: The `scale_target`.

    Raises:
        RefusedError: If a weight is not finite.
    """
    rows = [_row(layer, scale) for layer in layers]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (_HEAD, *rows)]
    left_out = [f"{layer.name} is left out: {layer.existence().reason}." for layer in skipped]
    title = f"Orthogonal convolutions: {len(layers)} layers before training"
    return "\n".join(line.rstrip() for line in (title, *lines, *left_out))


@torch.no_grad()
def _row(layer: Layer, scale: float) -> tuple[str, ...]:
    weight = layer.weight() / scale
    if not weight.isfinite().all():
        raise RefusedError(
            f"OrthogonalConvPenalty: the weight of {layer.name} is not finite. Look at its initialisation."
        )
    value = lorth(weight, layer.stride, layer.dilation, layer.groups)
    eps, upper = isometry_bounds(weight, layer.stride, layer.dilation, layer.groups)
    notes = (
        None if layer.learns else "frozen",
        "square: hard to bring to 0" if _square(layer) else None,
        layer.border(),
    )
    return (
        layer.name,
        "x".join(map(str, weight.shape)) + (f" /{layer.groups}" if layer.groups > 1 else ""),
        "x".join(map(str, layer.stride)),
        "column" if layer.columns else "row",
        f"{value:.3g}",
        f"{eps:.2g}",
        f"{scale * float(upper):.3g}",
        ", ".join(note for note in notes if note),
    )


def warnings_about(layers: Sequence[Layer]) -> Iterator[str]:
    """Yield one warning for all layers whose border the theory is not about, and one for those before a batch norm."""
    at_border = [f"{layer.name} ({layer.border()})" for layer in layers if layer.border()]
    if at_border:
        yield (
            f"OrthogonalConvPenalty: the theory is about circular padding. These layers become isometries inside the image, "
            f"not at its border: {', '.join(at_border)}. ConvOrthogonality measures the gap."
        )
    normed = [f"{layer.name} (before {layer.norm})" for layer in layers if layer.norm]
    if normed:
        yield (
            f"OrthogonalConvPenalty: a batch norm rescales the channels of {', '.join(normed)}, which undoes most of what "
            f"the penalty does there. Orthogonal layers need no batch norm."
        )


def _square(layer: Layer) -> bool:
    """Whether M = C S^n, and the taps are more than the stride: the landscape has poor minima there."""
    filters, channels = layer.channels
    overlap = any(k > s for k, s in zip(layer.kernel_size, layer.stride, strict=True))
    return filters == channels * math.prod(layer.stride) and overlap
