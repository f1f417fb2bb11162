# SPDX-License-Identifier: Apache-2.0
"""Pictures of a sweep: one key as curves over its values, two as maps, further ones as columns of maps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulgurite.grid import Grid
from fulgurite.report.comparison import Row
from fulgurite.report.numbers import format_number
from fulgurite.report.pictures import Line, Theme, dress, new_figure, plain_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WRITTEN = 80
"""Cells of a map up to which each has its number written in."""


def draw_map(grid: Grid, rows: Sequence[Row], lines: Sequence[Line], metric: str, theme: Theme) -> Figure:
    """Draw one metric over a grid: the reference's values, and the others' paired differences to it.

    A dot marks where the 95 % interval of a difference excludes zero.

    Args:
        grid: The grid, whose cells are the settings of the rows.
        rows: The comparison.
        lines: How each variant is drawn.
        metric: Logged name of the metric.
        theme: Colours.
    """
    found = {(row.setting, row.variant): row for row in rows if row.measure == metric}
    return (_curves if len(grid.axes) == 1 else _maps)(grid, found, lines, metric, theme)


def _curves(
    grid: Grid, found: Mapping[tuple[str, str], Row], lines: Sequence[Line], metric: str, theme: Theme
) -> Figure:
    ((key, values),) = grid.axes.items()
    figure = new_figure(5.6, 3.4, theme.background)
    axes = figure.subplots()
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    places = np.array(values, float) if numeric else np.arange(len(values), dtype=float)
    for line in lines:
        summaries = [row.summary if (row := found.get((cell, line.variant))) else None for cell in grid.cells]
        mean = np.array([s.mean if s else np.nan for s in summaries])
        std = np.nan_to_num([s.std if s else 0.0 for s in summaries])
        colour = theme.colours[line.colour]
        style = {"linestyle": line.linestyle, "linewidth": 1.7, "marker": "o", "markersize": 4, "capsize": 2}
        axes.errorbar(places, mean, std, color=colour, label=plain_name(line.variant, 40), **style)
    if not numeric:
        axes.set_xticks(places, [plain_name(str(value)) for value in values])
    elif places.min() > 0 and places.max() / places.min() >= 50:
        axes.set_xscale("log")
    axes.set_xlabel(plain_name(grid.names[key]))
    axes.set_ylabel(plain_name(metric))
    dress(axes, theme)
    if len(lines) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=theme.text)
    return figure


def _maps(grid: Grid, found: Mapping[tuple[str, str], Row], lines: Sequence[Line], metric: str, theme: Theme) -> Figure:
    (across, x), (up, y), *rest = grid.axes.items()
    panels = [
        dict(zip([key for key, _ in rest], values, strict=True))
        for values in itertools.product(*(values for _, values in rest))
    ]
    names = {tuple(cell.items()): name for name, cell in grid.cells.items()}
    width, height = max(2.6, 0.52 * len(x) + 1.1), max(2.2, 0.42 * len(y) + 0.9)
    figure = new_figure(width * len(panels) + 0.9, height * len(lines) + 0.3, theme.background)
    grids = figure.subplots(len(lines), len(panels), squeeze=False, sharex=True, sharey=True)
    for line, row in zip(lines, grids, strict=True):
        cells = [
            [[found.get((names[tuple({across: a, up: b, **panel}.items())], line.variant)) for a in x] for b in y]
            for panel in panels
        ]
        differs = any(cell and cell.difference for table in cells for line_of in table for cell in line_of)
        values = np.array([[[_value(cell, differs) for cell in line_of] for line_of in table] for table in cells])
        colours = _colours(values, differs, cells)
        for axes, panel, table, marks in zip(row, panels, values, cells, strict=True):
            _write(axes, table, marks, axes.imshow(table, origin="lower", aspect="auto", **colours))
            axes.set_xticks(range(len(x)), [_short(value) for value in x], rotation=90 if len(x) > 8 else 0)
            axes.set_yticks(range(len(y)), [_short(value) for value in y])
            where = ", ".join(f"{grid.names[key]} {_short(value)}" for key, value in panel.items())
            title = f"{line.variant}: difference" if differs else line.variant
            title = f"{title}, {where}" if where else title
            axes.set_title(plain_name(title, 44), fontsize=9, color=theme.text)
            dress(axes, theme)
            axes.grid(visible=False)
        bar = figure.colorbar(row[0].images[0], ax=list(row), pad=0.01)
        bar.ax.tick_params(colors=theme.text, labelsize=8, length=0)
        bar.outline.set_visible(False)
        bar.set_label(plain_name(metric), color=theme.text, fontsize=8.5)
        row[0].set_ylabel(plain_name(grid.names[up]))
    for axes in grids[-1]:
        axes.set_xlabel(plain_name(grid.names[across]))
    return figure


def _value(row: Row | None, differs: bool) -> float:
    if row is None:
        return float("nan")
    if differs:
        return row.difference.mean if row.difference else float("nan")
    return row.summary.mean if row.summary else float("nan")


def _colours(values: np.ndarray, differs: bool, cells: Sequence[Sequence[Sequence[Row | None]]]) -> dict[str, Any]:
    """Return colours that all panels of a row share; of differences blue is better, if that is known, else higher."""
    finite = values[np.isfinite(values)]
    if not differs:
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        return {"cmap": "viridis", "vmin": low, "vmax": high if high > low else low + 1}
    largest = (np.abs(finite).max() if len(finite) else 0.0) or 1.0
    direction = next((cell.direction for table in cells for row in table for cell in row if cell), None)
    return {"cmap": "RdBu_r" if direction == "lower" else "RdBu", "vmin": -largest, "vmax": largest}


def _write(axes: Axes, table: np.ndarray, rows: Sequence[Sequence[Row | None]], drawn: Any) -> None:
    """Write the numbers into a map that is not too large, and mark differences whose interval excludes zero."""
    for (up, across), value in np.ndenumerate(table):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = drawn.cmap(drawn.norm(value))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
        row = rows[up][across]
        if table.size <= _WRITTEN:
            axes.text(across, up, format_number(float(value), 3), ha="center", va="center", fontsize=6.5, color=ink)
        if row and row.difference and row.difference.excludes_zero:
            axes.plot(across, up + 0.36, ".", color=ink, markersize=3.5)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else plain_name(str(value), 12)
