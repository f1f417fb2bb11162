# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: tables for the terminal, one HTML page that opens offline, PNG, CSV and JSON.

Nothing is written piecemeal: every file is complete or not there.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fulgurite.claims import Claim, Verdict
from fulgurite.records import RunRecord, select
from fulgurite.statistics import (
    Direction,
    PairedDifference,
    PairedRatio,
    Summary,
    paired_difference,
    paired_ratio,
    paired_values,
    summary,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# fmt: off
_LOWER = frozenset((
    "ace", "aurc", "brier", "ce", "cer", "eaurc", "ece", "err", "error", "fid", "loss", "mae", "mce", "mse", "nll",
    "nrmse", "perplexity", "ppl", "regret", "rmse", "wer",
))
_HIGHER = frozenset((
    "acc", "accuracy", "ap", "auc", "auprc", "auroc", "dice", "f1", "iou", "map", "miou", "precision", "psnr", "r2",
    "recall", "ssim", "top1", "top5",
))
# fmt: on
_PREFIX = re.compile(r"^(?P<stage>train|val|valid|validation|test)(?P<separator>[/_.\-])")
_COSTS = {"step_seconds": "step time", "peak_memory": "peak memory"}
_TIMES = "\N{MULTIPLICATION SIGN}"


# ---------------------------------------------------------------------------------------------------------- numbers


def better_direction(metric: str) -> Direction | None:
    """Return whether lower or higher values of a metric are better, judged by its name; None if it does not tell.

    The last telling word decides: `val/f1_loss` is a loss.

    Example:
        >>> better_direction("val/MulticlassF1Score"), better_direction("test_nll"), better_direction("norm")
        ('higher', 'lower', None)
    """
    for word in reversed(re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", metric)):
        if word.lower() in _LOWER:
            return "lower"
        if word.lower() in _HIGHER:
            return "higher"
    return None


def format_number(value: float, digits: int = 4) -> str:
    """Return a number to so many significant digits, with an exponent only below 0.001 and from a million up.

    Example:
        >>> format_number(0.123456), format_number(97.5), format_number(1.5e-7)
        ('0.1235', '97.50', '1.500e-07')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def format_spread(mean: float, std: float) -> str:
    """Return `mean ± std`, both to the second significant digit of the spread.

    Example:
        >>> format_spread(0.68312, 0.01234), format_spread(0.5, float("nan"))
        ('0.683 ± 0.012', '0.5000')
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        return format_number(mean)
    return " ± ".join(_aligned((mean, std), std))


def format_interval(mean: float, low: float, high: float) -> str:
    """Return `mean [low, high]` with signs, to the second significant digit of half the interval's width.

    Example:
        >>> format_interval(-0.065, -0.0832, -0.0468)
        '-0.065 [-0.083, -0.047]'
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{'+' * (mean > 0)}{format_number(mean)}"
    centre, *ends = _aligned((mean, low, high), (high - low) / 2, sign="+")
    return f"{centre} [{', '.join(ends)}]"


def format_ratio(ratio: PairedRatio) -> str:
    """Return the ratio after a multiplication sign, and its interval, with two or three decimals."""
    if not math.isfinite(ratio.high):
        return f"{_TIMES}{ratio.ratio:.2f}"
    decimals = 2 if ratio.high - ratio.low >= 0.02 else 3
    return f"{_TIMES}{ratio.ratio:.{decimals}f} [{ratio.low:.{decimals}f}, {ratio.high:.{decimals}f}]"


def format_seconds(seconds: float) -> str:
    """Return a duration in µs, ms, s, min or h to three significant digits."""
    for limit, scale, unit in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < limit:
            return f"{format_number(seconds / scale, 3)} {unit}"
    return f"{format_number(seconds / 3600, 3)} h"


def format_bytes(size: float) -> str:
    """Return a size in KiB, MiB or GiB to three significant digits."""
    power = 1 if size < 2**20 else 2 if size < 2**30 else 3
    return f"{format_number(size / 1024**power, 3)} {'KMG'[power - 1]}iB"


def _aligned(values: Sequence[float], uncertainty: float, sign: str = "") -> list[str]:
    """Return the values with as many decimals as the uncertainty justifies, and with one exponent if any."""
    size = max(map(abs, values))
    power = math.floor(math.log10(size)) if size and not 1e-3 <= size < 1e6 else 0
    uncertainty, values = uncertainty / 10.0**power, [value / 10.0**power for value in values]
    decimals = min(max(1 - math.floor(math.log10(uncertainty)), 0), 8) if uncertainty > 0 else 4
    exponent = f"e{power:+03d}" if power else ""
    return [f"{value:{sign}.{decimals}f}{exponent}" for value in values]


# ------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Row:
    """One variant in one measure: a metric, compared by difference, or a cost, compared by ratio.

    Args:
        setting: Name of the setting.
        measure: Logged name of the metric, or `"step time"` or `"peak memory"`.
        kind: `"metric"`, or the unit of a cost: `"seconds"` or `"bytes"`.
        variant: Name of the variant.
        is_reference: Whether the others are compared with it.
        direction: Which values are better; None if unknown.
        summary: Mean and spread over the successful runs; None if there are none.
        difference: Metric minus the reference's over common seeds; None for the reference, costs and no such seeds.
        ratio: Cost divided by the reference's over common seeds; None for the reference, metrics and no such seeds.
    """

    setting: str
    measure: str
    kind: Literal["metric", "seconds", "bytes"]
    variant: str
    is_reference: bool
    direction: Direction | None
    summary: Summary | None
    difference: PairedDifference | None = None
    ratio: PairedRatio | None = None

    @property
    def value(self) -> str:
        """Mean and spread as text."""
        if self.summary is None:
            return "-"
        if self.kind == "metric":
            return format_spread(self.summary.mean, self.summary.std)
        return (format_seconds if self.kind == "seconds" else format_bytes)(self.summary.mean)

    @property
    def comparison(self) -> str:
        """The paired difference or ratio with its interval, as text."""
        if self.is_reference:
            return "reference"
        if self.difference:
            return format_interval(self.difference.mean, self.difference.low, self.difference.high)
        return format_ratio(self.ratio) if self.ratio else "-"

    @property
    def wins(self) -> str:
        """In how many pairs the variant is better, as text."""
        if self.difference is None:
            return ""
        prefix = "" if self.direction else f"{self.difference.better} in "
        return f"{prefix}{self.difference.wins}/{self.difference.n}"

    @property
    def effect(self) -> Literal["better", "worse", "unclear", ""]:
        """What the interval says; empty if there is nothing to compare or no known direction."""
        if self.difference is None or self.direction is None:
            return ""
        if not self.difference.excludes_zero:
            return "unclear"
        return "better" if (self.difference.mean < 0) == (self.direction == "lower") else "worse"


def default_metrics(records: Iterable[RunRecord]) -> list[str]:
    """Return the final metrics to show: those of the test stage, else of validation, else all but training's."""
    names = dict.fromkeys(name for record in records for name in record.metrics)
    stages: dict[str, list[str]] = {}
    for name in names:
        match = _PREFIX.match(name)
        stages.setdefault(match["stage"] if match else "", []).append(name)
    validation = [*stages.get("val", []), *stages.get("valid", []), *stages.get("validation", [])]
    return stages.get("test") or validation or stages.get("") or list(names)


def comparison_table(
    records: Iterable[RunRecord], reference: str = "baseline", metrics: Sequence[str] | None = None
) -> list[Row]:
    """Compare every variant with the reference, in every metric and cost of every setting.

    Differences and ratios are taken over the seeds for which both runs succeeded.

    Args:
        records: The runs.
        reference: Name of the variant that the others are compared with.
        metrics: Logged names of final metrics; None takes `default_metrics`.

    Returns:
        Rows in the order setting, measure, variant; the reference is the first variant.
    """
    records = list(records)
    metrics = list(metrics) if metrics else default_metrics(records)
    rows = []
    for setting in _settings(records):
        variants = _variants(records, setting, reference)
        for metric in metrics:
            rows += [_metric_row(records, setting, variant, reference, metric) for variant in variants]
        for cost in _COSTS:
            rows += [_cost_row(records, setting, variant, reference, cost) for variant in variants]
    return rows


def terminal_tables(rows: Sequence[Row]) -> list[Table]:
    """Return one `rich` table per setting."""
    from rich.table import Table
    from rich.text import Text

    styles = {"better": "green", "worse": "red", "unclear": "dim", "": ""}
    tables = []
    for setting in dict.fromkeys(row.setting for row in rows):
        table = Table(title=Text(setting) if setting != "main" else None, title_justify="left", header_style="bold")
        for name in ("measure", "variant", "mean ± sd", "paired difference [95 % interval]", "better in"):
            table.add_column(name, justify="left" if name in ("measure", "variant") else "right")
        previous = None
        for row in (row for row in rows if row.setting == setting):
            if previous not in (None, row.measure):
                table.add_section()
            arrow = {"lower": " ↓", "higher": " ↑", None: ""}[row.direction]
            table.add_row(
                Text("" if row.measure == previous else row.measure + arrow, style="bold"),
                Text(row.variant),
                Text(row.value),
                Text(row.comparison, style="dim" if row.is_reference else styles[row.effect]),
                Text(row.wins),
            )
            previous = row.measure
        tables.append(table)
    return tables


def _metric_row(records: Sequence[RunRecord], setting: str, variant: str, reference: str, metric: str) -> Row:
    direction = better_direction(metric)
    runs = select(records, setting, variant).values()
    values = [run.metrics[metric] for run in runs if metric in run.metrics]
    pairs = {} if variant == reference else paired_values(records, setting, variant, reference, metric)
    difference = None
    if pairs:
        ours, theirs = zip(*pairs.values(), strict=True)
        difference = paired_difference(ours, theirs, better=direction or "lower")
    described = summary(values) if values else None
    return Row(setting, metric, "metric", variant, variant == reference, direction, described, difference)


def _cost_row(records: Sequence[RunRecord], setting: str, variant: str, reference: str, cost: str) -> Row:
    ours, theirs = select(records, setting, variant), select(records, setting, reference)
    values = [value for run in ours.values() if (value := getattr(run, cost)) is not None]
    pairs = [(getattr(ours[seed], cost), getattr(theirs[seed], cost)) for seed in sorted(ours.keys() & theirs.keys())]
    pairs = [pair for pair in pairs if all(pair)]
    ratio = None
    if pairs and variant != reference:
        ratio = paired_ratio([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    described = summary(values) if values else None
    kind: Literal["seconds", "bytes"] = "bytes" if cost == "peak_memory" else "seconds"
    return Row(setting, _COSTS[cost], kind, variant, variant == reference, "lower", described, None, ratio)


def _settings(records: Iterable[RunRecord]) -> list[str]:
    return list(dict.fromkeys(record.setting for record in records))


def _variants(records: Iterable[RunRecord], setting: str, reference: str) -> list[str]:
    names = list(dict.fromkeys(record.variant for record in records if record.setting == setting))
    return sorted(names, key=lambda name: name != reference)


# --------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class _Theme:
    text: str
    grid: str
    background: str
    colours: tuple[str, ...]


# The reference is a dashed neutral line; the others follow Okabe and Ito, lightened for a dark page.
_LIGHT = _Theme(
    "#24292f", "#d9dde2", "none", ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#b5559a", "#c98a00", "#3aa0d8")
)
_DARK = _Theme(
    "#d5d9de", "#3a4149", "none", ("#aab1ba", "#4aa8e0", "#ff8a4a", "#2cc79a", "#e592c8", "#f0b93a", "#a5dcff")
)
_DASHES = ("none", "6 2", "2 2", "8 2 2 2")


@dataclass(frozen=True)
class _Line:
    """How a variant is drawn: index into the colours and dashes."""

    variant: str
    colour: int
    dash: int

    @property
    def linestyle(self) -> Any:
        pattern = _DASHES[self.dash]
        return "-" if pattern == "none" else (0, tuple(float(length) / 1.6 for length in pattern.split()))


def _lines(variants: Sequence[str], reference: str) -> list[_Line]:
    others = [variant for variant in variants if variant != reference]
    hues = len(_LIGHT.colours) - 1
    lines = [_Line(variant, 1 + i % hues, i // hues % len(_DASHES)) for i, variant in enumerate(others)]
    return [_Line(reference, 0, 1), *lines] if reference in variants else lines


def _curve_name(metric: str, records: Iterable[RunRecord]) -> str | None:
    """Return the curve that belongs to a final metric: its own, else that of validation for a test metric."""
    lengths: dict[str, int] = {}
    for record in records:
        for name, points in record.curves.items():
            lengths[name] = max(lengths.get(name, 0), len(points))
    candidates = [metric, *(_PREFIX.sub(rf"{stage}\g<separator>", metric) for stage in ("val", "valid", "validation"))]
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
    axes: Axes, theme: _Theme, lines: Sequence[_Line], records: Sequence[RunRecord], metric: str, view: str
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
    axes.set_ylabel(_plain(name))
    _dress(axes, theme)


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


def _draw_finals(axes: Axes, theme: _Theme, lines: Sequence[_Line], records: Sequence[RunRecord], metric: str) -> None:
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
    axes.set_yticks(range(len(lines)), [_plain(line.variant) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(_plain(metric))
    axes.locator_params(axis="x", nbins=5)
    _dress(axes, theme)
    axes.grid(axis="y", visible=False)


def _dress(axes: Axes, theme: _Theme) -> None:
    axes.set_facecolor("none")
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=8.5, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.text, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=theme.grid)


def _plain(name: str, limit: int = 26) -> str:
    """Return a name that fits beside a plot and is not read as mathematics."""
    short = name if len(name) <= limit else name[: limit - 1] + "…"
    return short.replace("$", r"\$")


def _figure(width: float, height: float, background: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=background)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def _views(records: Sequence[RunRecord], metric: str) -> dict[str, Callable[..., None]]:
    """Return the pictures that can be drawn of a metric: caption -> function of axes, theme and lines."""
    views: dict[str, Callable[..., None]] = {}
    ok = [record for record in records if record.status == "ok"]
    if _curve_name(metric, ok):
        views["Equal steps"] = lambda axes, theme, lines: _draw_curves(axes, theme, lines, ok, metric, "step")
        views["Equal compute"] = lambda axes, theme, lines: _draw_curves(axes, theme, lines, ok, metric, "seconds")
    if any(metric in record.metrics for record in ok):
        views["Final values"] = lambda axes, theme, lines: _draw_finals(axes, theme, lines, ok, metric)
    return views


def _overview(
    setting: str, records: Sequence[RunRecord], metrics: Sequence[str], lines: Sequence[_Line]
) -> bytes | None:
    """Return one PNG with a row of pictures per metric, for use outside the page."""
    from matplotlib.lines import Line2D

    drawn = {metric: views for metric in metrics if (views := _views(records, metric))}
    if not drawn:
        return None
    columns = max(map(len, drawn.values()))
    figure = _figure(4.6 * columns, 3.1 * len(drawn) + 0.6, "white")
    grid = figure.subplots(len(drawn), columns, squeeze=False)
    for row, views in zip(grid, drawn.values(), strict=True):
        for axes in row[len(views) :]:
            axes.set_axis_off()
        for axes, (caption, draw) in zip(row, views.items(), strict=False):
            draw(axes, _LIGHT, lines)
            axes.set_title(caption, fontsize=9.5, color=_LIGHT.text, loc="left")
    handles = [Line2D([], [], color=_LIGHT.colours[x.colour], linestyle=x.linestyle, linewidth=1.9) for x in lines]
    labels = [_plain(line.variant, 40) for line in lines]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(lines)), frameon=False, fontsize=9.5)
    return _png(figure, 110)


# ------------------------------------------------------------------------------------------------------------- page


def write_report(
    directory: Path | str,
    title: str,
    records: Iterable[RunRecord],
    *,
    facts: Mapping[str, str],
    reference: str = "baseline",
    claim: Claim | None = None,
    verdict: Verdict | None = None,
    metrics: Sequence[str] | None = None,
) -> Path:
    """Write `report.html`, `results.csv`, `results.json` and the pictures of the curves, and return the page's path.

    Args:
        directory: Output folder; made if it does not exist.
        title: Title of the page.
        records: The runs; failed ones are listed with their reason.
        facts: What the reader must know to repeat it: command line, versions, machine.
        reference: Name of the variant that the others are compared with.
        claim: The claim that was tested, if one was.
        verdict: What `judge` made of it.
        metrics: Logged names of final metrics; None takes the claim's measures, else `default_metrics`.
    """
    records = list(records)
    directory = Path(directory)
    metrics = list(metrics or (claim.measures if claim else ()) or default_metrics(records))
    rows = comparison_table(records, reference, metrics)
    sections = [_section(setting, records, rows, reference, metrics, claim) for setting in _settings(records)]
    for index, section in enumerate(sections):
        if section["overview"] is not None:
            slug = re.sub(r"[^a-z0-9]+", "-", section["name"].lower()).strip("-") or str(index)
            suffix = "" if len(sections) == 1 else f"-{index + 1}-{slug}"
            _write(directory / f"curves{suffix}.png", section["overview"])
    _write(directory / "results.csv", _csv(records).encode())
    _write(directory / "results.json", _json(title, records, rows, reference, facts, claim, verdict).encode())
    context = {
        "title": title,
        "claim": claim,
        "verdict": verdict,
        "sections": sections,
        "failed": [record for record in records if record.status == "failed"],
        "notes": _notes(records, rows, reference),
        "facts": dict(facts),
        "palettes": (_LIGHT.colours, _DARK.colours),
        "dashes": _DASHES,
    }
    page = directory / "report.html"
    _write(page, _render(context).encode())
    return page


def _section(
    setting: str,
    records: Sequence[RunRecord],
    rows: Sequence[Row],
    reference: str,
    metrics: Sequence[str],
    claim: Claim | None,
) -> dict[str, Any]:
    """Return what the template shows of one setting."""
    mine = [record for record in records if record.setting == setting]
    lines = _lines(_variants(records, setting, reference), reference)
    own = [row for row in rows if row.setting == setting]
    planned = {known.name: known for known in claim.settings}.get(setting) if claim else None
    return {
        "name": setting,
        "summary": planned.summary if planned else "",
        "planned": planned,
        "lines": lines,
        "measures": [row for row in own if row.variant == own[0].variant],
        "cells": {line.variant: [row for row in own if row.variant == line.variant] for line in lines},
        "runs": {line.variant: len(select(mine, setting, line.variant)) for line in lines},
        "total": {line.variant: sum(record.variant == line.variant for record in mine) for line in lines},
        "figures": [figure for metric in metrics if (figure := _metric_figures(metric, mine, lines))],
        "overview": _overview(setting, mine, metrics, lines),
    }


def _metric_figures(metric: str, records: Sequence[RunRecord], lines: Sequence[_Line]) -> dict[str, Any] | None:
    images = []
    for caption, draw in _views(records, metric).items():
        encoded = []
        for theme in (_LIGHT, _DARK):
            figure = _figure(4.5, 3.0, theme.background)
            draw(figure.subplots(), theme, lines)
            encoded.append(base64.b64encode(_png(figure, 160)).decode())
        images.append({"caption": caption, "light": encoded[0], "dark": encoded[1]})
    return {"metric": metric, "direction": better_direction(metric), "images": images} if images else None


def _notes(records: Sequence[RunRecord], rows: Sequence[Row], reference: str) -> list[str]:
    """Return what an honest reader should bear in mind."""
    notes = []
    seeds = max((row.summary.n for row in rows if row.summary), default=0)
    if seeds == 1:
        notes.append("One seed: no interval can be given, and any difference may be chance. Run more seeds.")
    elif 1 < seeds < 5:
        notes.append(f"Only {seeds} seeds: the intervals are wide, and rest on the differences being roughly normal.")
    notes.append(
        "Differences are paired by seed, with 95 % Student's t intervals. They are not corrected for the number of "
        "comparisons: of twenty intervals for differences that do not exist, about one excludes zero. “Unclear” means "
        "that the interval contains zero; a count such as 7/8 is of the seeds in which the variant is better."
    )
    without = [name for name in _settings(records) if not any(select(records, name, reference))]
    if without:
        notes.append(
            f"No successful run of the reference “{reference}” in {', '.join(without)}: nothing is compared there."
        )
    short = any(row.difference and row.summary and row.difference.n < row.summary.n for row in rows)
    if short or any(record.status == "failed" for record in records):
        notes.append("Failed runs are left out; a difference counts only the seeds for which both runs succeeded.")
    notes.append(
        "Curves show the mean over seeds and a band of one standard deviation, up to the end of the shortest run; "
        "the steep first tenth of training may lie outside the picture. "
        "Step time is the mean over runs of their median step; its ratio is a geometric mean. Other load on the "
        "machine shows in it, so measure cost with few jobs at a time."
    )
    return notes


def _render(context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fulgurite"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda text: text.replace("-", "\N{MINUS SIGN}")
    environment.globals["format_interval"] = format_interval
    return environment.get_template("report.html").render(context)


def _csv(records: Sequence[RunRecord]) -> str:
    """Return one line per run, numbers in full precision."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    fields = ["step_seconds", "seconds", "peak_memory", "error"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["setting", "variant", "seed", "status", *names, *fields])
    for record in records:
        metrics = [record.metrics.get(name) for name in names]
        rest = [getattr(record, name) for name in fields]
        writer.writerow([record.setting, record.variant, record.seed, record.status, *metrics, *rest])
    return buffer.getvalue()


def _json(
    title: str,
    records: Sequence[RunRecord],
    rows: Sequence[Row],
    reference: str,
    facts: Mapping[str, str],
    claim: Claim | None,
    verdict: Verdict | None,
) -> str:
    """Return everything but the curves as JSON; what is not finite becomes null."""
    data = {
        "title": title,
        "reference": reference,
        "facts": dict(facts),
        "claim": claim.statement if claim else None,
        "verdict": asdict(verdict) if verdict else None,
        "comparison": [asdict(row) for row in rows],
        "runs": [{name: value for name, value in asdict(record).items() if name != "curves"} for record in records],
    }
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: bytes) -> None:
    """Replace a file at once, so that no reader meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
