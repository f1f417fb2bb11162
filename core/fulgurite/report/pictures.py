# SPDX-License-Identifier: Apache-2.0
"""Curves with bands, final values by seed, and an overview of both, drawn with matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fulgurite.records import RunRecord
from fulgurite.report.numbers import STAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a page: light or dark."""

    text: str
    grid: str
    background: str
    colours: tuple[str, ...]


# The reference is a dashed neutral line; the others follow Okabe and Ito, lightened for a dark page.
LIGHT = Theme(
    "#24292f", "#d9dde2", "none", ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#b5559a", "#c98a00", "#3aa0d8")
)
DARK = Theme(
    "#d5d9de", "#3a4149", "none", ("#aab1ba", "#4aa8e0", "#ff8a4a", "#2cc79a", "#e592c8", "#f0b93a", "#a5dcff")
)
DASHES = ("none", "6 2", "2 2", "8 2 2 2")


@dataclass(frozen=True)
class Line:
    """How a variant is drawn: index into the colours and dashes."""

    variant: str
    colour: int
    dash: int

    @property
    def linestyle(self) -> Any:
        """The dashes as matplotlib takes them."""
        pattern = DASHES[self.dash]
        return "-" if pattern == "none" else (0, tuple(float(length) / 1.6 for length in pattern.split()))


def lines_of(variants: Sequence[str], reference: str) -> list[Line]:
    """Return how each variant is drawn; the same in every picture of a setting."""
    others = [variant for variant in variants if variant != reference]
    hues = len(LIGHT.colours) - 1
    lines = [Line(variant, 1 + i % hues, i // hues % len(DASHES)) for i, variant in enumerate(others)]
    return [Line(reference, 0, 1), *lines] if reference in variants else lines


def _curve_name(metric: str, records: Iterable[RunRecord]) -> str | None:
    """Return the curve that belongs to a final metric: its own, else that of validation for a test metric."""
    lengths: dict[str, int] = {}
    for record in records:
        for name, points in record.curves.items():
            lengths[name] = max(lengths.get(name, 0), len(points))
    candidates = [metric, *(STAGE.sub(rf"{stage}\g<separator>", metric) for stage in ("val", "valid", "validation"))]
    known = [name for name in candidates if name in lengths]
    return max(known, key=lambda name: lengths[name] > 1) if known else None


def _band(curves: Sequence[Mapping[float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, mean and sample standard deviation of curves y(x), interpolated over the range that all cover."""
    arrays = [np.array(sorted(curve.items())) for curve in curves]
    start, end = max(a[0, 0] for a in arrays), min(a[-1, 0] for a in arrays)
    if start < end:
        x = np.unique(np.concatenate([a[:, 0] for a in arrays]))
        x = x[(x >= start) & (x <= end)]
        values = np.stack([np.interp(x, a[:, 0], a[:, 1]) for a in arrays])
    else:
        x = np.mean([a[-1:, 0] for a in arrays], axis=0)
        values = np.stack([a[-1:, 1] for a in arrays])
    return x, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(x)


def _draw_curves(
    axes: Axes, theme: Theme, lines: Sequence[Line], records: Sequence[RunRecord], metric: str, view: str
) -> None:
    """Draw mean and band over seeds against optimizer steps or seconds of training."""
    name = _curve_name(metric, records)
    if name is None:
        raise ValueError(f"Expected a curve of {metric!r}, but got none.")
    latest = max((p.seconds for record in records for p in record.curves.get(name, ())), default=0.0)
    scale, unit = (60.0, "minutes") if latest > 300 else (1.0, "seconds")
    for line in lines:
        runs = [
            r.curves[name] for r in records if r.variant == line.variant and r.status == "ok" and r.curves.get(name)
        ]
        if not runs:
            continue
        curves = [{p.step if view == "step" else p.seconds / scale: p.value for p in points} for points in runs]
        x, mean, std = _band(curves)
        colour = theme.colours[line.colour]
        marker = "o" if len(x) <= 10 else None
        axes.plot(x, mean, color=colour, linestyle=line.linestyle, linewidth=1.7, marker=marker, markersize=3.5)
        if len(runs) > 1:
            axes.fill_between(
                x, mean - std, mean + std, color=colour, alpha=0.18 if len(lines) <= 4 else 0.09, linewidth=0
            )
    _skip_transient(axes)
    axes.set_xlabel("optimizer steps" if view == "step" else f"{unit} of training, validation not counted")
    axes.set_ylabel(plain_name(name))
    dress(axes, theme)


def _skip_transient(axes: Axes) -> None:
    """Leave the first tenth of training out of the range of y if that at least halves it."""
    axes.margins(x=0.02)
    axes.autoscale_view()
    first, last = axes.get_xlim()
    points = np.concatenate([line.get_xydata() for line in axes.get_lines()] or [np.empty((0, 2))])
    later = points[points[:, 0] > first + 0.1 * (last - first), 1]
    later = later[np.isfinite(later)]
    if not len(later):
        return
    low, high = later.min(), later.max()
    margin = 0.25 * (high - low)
    bottom, top = axes.get_ylim()
    if 0 < high - low + 2 * margin < (top - bottom) / 2:
        axes.set_ylim(max(bottom, low - margin), min(top, high + margin))


def _draw_finals(axes: Axes, theme: Theme, lines: Sequence[Line], records: Sequence[RunRecord], metric: str) -> None:
    """Draw the final value of every seed, one row per variant, values of one seed connected."""
    finals = {
        line.variant: {
            r.seed: r.metrics[metric]
            for r in records
            if r.variant == line.variant and r.status == "ok" and metric in r.metrics
        }
        for line in lines
    }
    for seed in sorted({seed for values in finals.values() for seed in values}):
        across = [finals[line.variant].get(seed, math.nan) for line in lines]
        axes.plot(across, range(len(lines)), color=theme.text, alpha=0.22, linewidth=0.8, zorder=1)
    for row, line in enumerate(lines):
        values = list(finals[line.variant].values())
        if values:
            colour = theme.colours[line.colour]
            axes.scatter(values, [row] * len(values), s=22, color=colour, alpha=0.85, linewidths=0, zorder=2)
            mean = sum(values) / len(values)
            axes.plot(
                [mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2.6, solid_capstyle="butt", zorder=3
            )
    axes.set_yticks(range(len(lines)), [plain_name(line.variant) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(plain_name(metric))
    axes.locator_params(axis="x", nbins=5)
    dress(axes, theme)
    axes.grid(axis="y", visible=False)


def dress(axes: Axes, theme: Theme = LIGHT) -> None:
    """Give axes a quiet grid and small labels in the theme's colours."""
    axes.set_facecolor("none")
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=8.5, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.text, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=theme.grid)


def plain_name(name: str, limit: int = 26) -> str:
    """Return a name that fits beside a plot and is not read as mathematics."""
    short = name if len(name) <= limit else name[: limit - 1] + "…"
    return short.replace("$", r"\$")


def new_figure(width: float, height: float, background: str) -> Figure:
    """Return an empty figure, without touching the state of `matplotlib.pyplot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=background)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def views_of(records: Sequence[RunRecord], metric: str) -> dict[str, Callable[..., None]]:
    """Return the pictures that can be drawn of a metric: caption -> function of axes, theme and lines."""
    views: dict[str, Callable[..., None]] = {}
    ok = [record for record in records if record.status == "ok"]
    if _curve_name(metric, ok):
        views["Equal steps"] = lambda axes, theme, lines: _draw_curves(axes, theme, lines, ok, metric, "step")
        views["Equal compute"] = lambda axes, theme, lines: _draw_curves(axes, theme, lines, ok, metric, "seconds")
    if any(metric in record.metrics for record in ok):
        views["Final values"] = lambda axes, theme, lines: _draw_finals(axes, theme, lines, ok, metric)
    return views


def overview(setting: str, records: Sequence[RunRecord], metrics: Sequence[str], lines: Sequence[Line]) -> bytes | None:
    """Return one PNG with a row of pictures per metric, for use outside the page."""
    from matplotlib.lines import Line2D

    drawn = {metric: views for metric in metrics if (views := views_of(records, metric))}
    if not drawn:
        return None
    columns = max(map(len, drawn.values()))
    cells = [list(views.items()) for views in drawn.values()]
    if columns == 1:  # no curves: the final values of two metrics side by side
        columns, single = min(len(cells), 2), [picture for row in cells for picture in row]
        cells = [single[start : start + columns] for start in range(0, len(single), columns)]
    figure = new_figure(4.6 * columns, 3.1 * len(cells) + 0.6, "white")
    grid = figure.subplots(len(cells), columns, squeeze=False)
    for row, pictures in zip(grid, cells, strict=True):
        for axes in row[len(pictures) :]:
            axes.set_axis_off()
        for axes, (caption, draw) in zip(row, pictures, strict=False):
            draw(axes, LIGHT, lines)
            axes.set_title(caption, fontsize=9.5, color=LIGHT.text, loc="left")
    handles = [Line2D([], [], color=LIGHT.colours[x.colour], linestyle=x.linestyle, linewidth=1.9) for x in lines]
    labels = [plain_name(line.variant, 40) for line in lines]
    across = min(2 * columns, 4, len(lines))
    figure.legend(handles, labels, loc="outside upper center", ncols=across, frameon=False, fontsize=9.5)
    return png(figure, 110)
