# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report on scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fulgurite.records import RunRecord
from fulgurite.report import default_metrics
from fulgurite.report.pictures import LIGHT, dress, new_figure, plain_name
from fulgurite_plugins.data_selection.data_diet.statistics import auc

_RIGHT, _WRONG, _RANDOM = LIGHT.colours[1], LIGHT.colours[2], LIGHT.colours[0]


def histograms(scores: Mapping[str, Tensor], wrong: Tensor | None) -> Figure:
    """Draw the distribution of each score; of right and wrong labels apart if they are known."""
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure = new_figure(3.9 * columns, 2.7 * rows, "white")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for place, (name, values) in zip(axes, scores.items(), strict=False):
        finite = values.isfinite()
        groups = [values[finite]] if wrong is None else [values[finite & ~wrong], values[finite & wrong]]
        labels = ["all examples"] if wrong is None else ["right label", "wrong label"]
        place.hist(
            [g.numpy() for g in groups], bins=40, stacked=True, color=[_RIGHT, _WRONG][: len(groups)], label=labels
        )
        infinite = int((~finite).sum())
        place.set_title(f"{name}{f'  ({infinite} infinite)' if infinite else ''}", loc="left", fontsize=9.5)
        place.set_yscale("symlog", linthresh=10)
        place.set_ylim(bottom=0)
        place.set_ylabel("examples")
        dress(place)
        if wrong is not None and place is figure.axes[0]:
            place.legend(frameon=False, fontsize=8.5)
    for place in figure.axes[len(scores) :]:
        place.set_axis_off()
    return figure


def examples(dataset: Any, scores: Tensor, labels: Tensor | None, clean: Tensor | None, number: int) -> Figure | None:
    """Draw the hardest and the easiest examples with their labels; None if the inputs are no images."""
    order = scores.sort(stable=True).indices
    rows = {"hardest": order.flip(0)[:number].tolist(), "easiest": order[:number].tolist()}
    if image_of(dataset[rows["hardest"][0]]) is None:
        return None
    names = getattr(dataset, "classes", None)
    figure = new_figure(1.0 * number, 3.1, "white")
    axes = figure.subplots(2, len(rows["hardest"]), squeeze=False)
    for places, (kind, indices) in zip(axes, rows.items(), strict=True):
        places[0].set_ylabel(kind, fontsize=10)
        for place, index in zip(places, indices, strict=True):
            picture = image_of(dataset[index])
            assert picture is not None
            place.imshow(picture, cmap="gray_r" if picture.ndim == 2 else None, interpolation="nearest")
            place.set(xticks=[], yticks=[])
            text, colour = f"{scores[index]:.2f}", LIGHT.text
            if labels is not None:
                text = f"{_name(labels[index], names)}\n{text}"
                if clean is not None and int(clean[index]) != int(labels[index]):
                    text, colour = (
                        f"{_name(labels[index], names)}, is {_name(clean[index], names)}\n{scores[index]:.2f}",
                        _WRONG,
                    )
            place.set_title(text, fontsize=8, color=colour)
            for spine in place.spines.values():
                spine.set(color=colour if colour == _WRONG else LIGHT.grid, linewidth=1.6 if colour == _WRONG else 0.8)
    return figure


def image_of(item: Any) -> np.ndarray | None:
    """Return the input of an example as `[H, W]` or `[H, W, 3]` with values in [0, 1]; None if it is no image."""
    values = (
        item[0] if isinstance(item, tuple | list) else next(iter(item.values())) if isinstance(item, dict) else item
    )
    if not isinstance(values, Tensor) or values.ndim not in (2, 3) or min(values.shape[-2:]) < 4:
        return None
    if values.ndim == 3 and values.shape[0] not in (1, 3):
        return None
    picture = values.float()
    picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp_min(1e-9)
    return (
        picture.squeeze(0)
        if picture.ndim == 3 and len(picture) == 1
        else picture.movedim(0, -1)
        if picture.ndim == 3
        else picture
    ).numpy()


def wrong_labels(scores: Mapping[str, Tensor], wrong: Tensor | None) -> Figure | None:
    """Draw precision against recall of suspecting the highest scores; None if no wrong labels are known."""
    if wrong is None or not bool(wrong.any()):
        return None
    figure = new_figure(5.4, 3.8, "white")
    axes = figure.subplots()
    for (name, values), colour in zip(scores.items(), _cycle(len(scores)), strict=True):
        hits = wrong[values.sort(stable=True).indices.flip(0)].double().cumsum(0)
        flagged = torch.arange(1, len(values) + 1)
        axes.plot(
            hits / wrong.sum(),
            hits / flagged,
            color=colour,
            linewidth=1.8,
            label=f"{name}, AUC {auc(values, wrong):.3f}",
        )
    share = float(wrong.double().mean())
    axes.axhline(share, color=_RANDOM, linestyle="--", linewidth=1.4, label="random, AUC 0.5")
    axes.set(xlabel="recall: wrong labels that are found", ylabel="precision: suspects that are wrong", ylim=(0, 1.03))
    dress(axes)
    axes.legend(frameon=False, fontsize=8.5, loc="center left")
    return figure


def accuracy(records: Sequence[RunRecord]) -> Figure | None:
    """Draw the final accuracy against the fraction kept, for each score and random; None without such trainings."""
    means = mean_accuracies(records)
    if not means:
        return None
    figure = new_figure(5.8, 3.9, "white")
    axes = figure.subplots()
    whole, spread = means.pop("baseline")[1.0]
    axes.axhline(100 * whole, color=LIGHT.text, linewidth=1.0, linestyle=":", label="all data")
    axes.axhspan(100 * (whole - spread), 100 * (whole + spread), color=LIGHT.text, alpha=0.08, linewidth=0)
    colours = _cycle(len(means))
    for name, points in means.items():
        colour, style = (_RANDOM, "--") if name == "random" else (colours.pop(0), "-")
        kept = sorted(points)
        axes.errorbar(
            [100 * k for k in kept], [100 * points[k][0] for k in kept], [100 * points[k][1] for k in kept],
            color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.7, capsize=2, label=name,
        )  # fmt: skip
    axes.set(xlabel="training examples kept [%]", ylabel=f"{_metric(records)} [%]")
    dress(axes)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def mean_accuracies(records: Sequence[RunRecord]) -> dict[str, dict[float, tuple[float, float]]]:
    """Return mean and standard error over seeds, by score and fraction kept; that of all data under `"baseline"`."""
    groups: dict[tuple[str, float], list[float]] = {}
    for record in records:
        match = re.fullmatch(r"(.+) ([\d.]+)", record.variant)
        key = (match[1], float(match[2])) if match else (record.variant, 1.0)
        groups.setdefault(key, []).append(record.metrics[_metric(records)])
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for (name, keep), values in groups.items():
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        found.setdefault(name, {})[keep] = (float(np.mean(values)), error)
    return found


def _metric(records: Sequence[RunRecord]) -> str:
    metrics = default_metrics(records)
    return next((name for name in metrics if re.search(r"(^|[/_])acc", name)), metrics[0])


def _cycle(number: int) -> list[str]:
    return [LIGHT.colours[1 + i % (len(LIGHT.colours) - 1)] for i in range(number)]


def _name(label: Any, names: Any) -> str:
    return plain_name(str(names[int(label)]) if names is not None else str(int(label)), 9)
