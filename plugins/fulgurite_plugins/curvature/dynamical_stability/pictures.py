# SPDX-License-Identifier: Apache-2.0
"""The picture of a training's way along its stability limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from fulgurite.report.pictures import LIGHT, dress, new_figure, png

_RATIOS = {
    "lr_exact": "SGD, exact",
    "lr_refined": "SGD, refined bound",
    "lr_trace": "SGD, trace",
    "lr_lambda": "gradient descent",
}
_MEASURES = {"trace": "trace", "frobenius": "Frobenius norm", "lambda_max": "largest eigenvalue"}


def stability_over_training(history: Sequence[Mapping[str, float]]) -> bytes:
    """Draw the learning rate over its limits, and the curvature with error bars and the loss, over epochs; a PNG file.

    Args:
        history: What `StabilityMonitor.history` holds, at least one measurement.
    """
    figure = new_figure(9, 3.6, "white")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    _lines(left, history, epochs, _RATIOS)
    left.axhline(1.0, color=LIGHT.text, linewidth=1.0, linestyle=":")
    left.text(epochs[-1], 1.0, "unstable above", fontsize=8, ha="right", va="bottom", color=LIGHT.text)
    left.set(xlabel="epoch", ylabel="learning rate / limit")
    _lines(right, history, epochs, _MEASURES)
    losses = [row["loss"] for row in history]
    if min(losses) > 0:
        right.plot(epochs, losses, color=LIGHT.colours[0], linewidth=1.3, linestyle="--", label="loss")
    right.set(xlabel="epoch", ylabel="curvature and loss")
    for axes in (left, right):
        axes.set_yscale("log")
        dress(axes)
        axes.legend(frameon=False, fontsize=8.5)
    return png(figure, 150)


def _lines(
    axes: Axes, history: Sequence[Mapping[str, float]], epochs: Sequence[float], names: Mapping[str, str]
) -> None:
    colours = iter(LIGHT.colours[1:])
    for name, label in names.items():
        colour = next(colours)
        points = [(epoch, row[name], row.get(f"{name}_error", 0.0)) for epoch, row in zip(epochs, history, strict=True)
                  if row.get(name, 0.0) > 0]  # fmt: skip
        if points:
            x, y, errors = zip(*points, strict=True)
            axes.errorbar(x, y, errors, color=colour, marker="o", markersize=3, linewidth=1.6, capsize=2, label=label)
