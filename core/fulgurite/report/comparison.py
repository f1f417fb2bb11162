# SPDX-License-Identifier: Apache-2.0
"""Every variant beside the reference: rows of numbers, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fulgurite.grid import Grid
from fulgurite.records import RunRecord, select
from fulgurite.report.numbers import (
    STAGE,
    better_direction,
    format_bytes,
    format_interval,
    format_number,
    format_ratio,
    format_seconds,
    format_spread,
)
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
    from rich.table import Table

_COSTS = {"step_seconds": "step time", "peak_memory": "peak memory"}
_STYLES = {"better": "green", "worse": "red", "unclear": "dim", "": ""}


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
        match = STAGE.match(name)
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
    for setting in settings_of(records):
        variants = variants_of(records, setting, reference)
        for metric in metrics:
            rows += [_metric_row(records, setting, variant, reference, metric) for variant in variants]
        for cost in _COSTS:
            rows += [_cost_row(records, setting, variant, reference, cost) for variant in variants]
    return rows


def terminal_tables(rows: Sequence[Row]) -> list[Table]:
    """Return one `rich` table per setting."""
    from rich.table import Table
    from rich.text import Text

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
                Text(row.comparison, style="dim" if row.is_reference else _STYLES[row.effect]),
                Text(row.wins),
            )
            previous = row.measure
        tables.append(table)
    return tables


def grid_table(rows: Sequence[Row], grid: Grid) -> Table:
    """Return a `rich` table of means with a line per cell and variant, shorter than a table per cell."""
    from rich.table import Table
    from rich.text import Text

    caption = "Means; * where the 95 % interval of the paired difference to the reference excludes zero."
    table = Table(header_style="bold", caption=caption, caption_justify="left")
    metrics = list(dict.fromkeys(row.measure for row in rows if row.kind == "metric"))
    for name in (*grid.names.values(), "variant"):
        table.add_column(name, overflow="fold")
    for metric in metrics:
        table.add_column(metric, justify="right", overflow="fold")
    found = {(row.setting, row.variant, row.measure): row for row in rows}
    for name, cell in grid.cells.items():
        variants = dict.fromkeys(row.variant for row in rows if row.setting == name)
        for variant in variants:
            means = []
            for row in (found[name, variant, metric] for metric in metrics):
                mark = "*" if row.difference and row.difference.excludes_zero else ""
                text = format_number(row.summary.mean) + mark if row.summary else "-"
                means.append(Text(text, style=_STYLES[row.effect]))
            table.add_row(*map(str, cell.values()), Text(variant), *means)
        if len(variants) > 1:
            table.add_section()
    return table


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


def settings_of(records: Iterable[RunRecord]) -> list[str]:
    """Return the names of the settings, in the order of the records."""
    return list(dict.fromkeys(record.setting for record in records))


def variants_of(records: Iterable[RunRecord], setting: str, reference: str) -> list[str]:
    """Return the names of a setting's variants, the reference first."""
    names = list(dict.fromkeys(record.variant for record in records if record.setting == setting))
    return sorted(names, key=lambda name: name != reference)
