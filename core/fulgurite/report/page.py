# SPDX-License-Identifier: Apache-2.0
"""The files of a report: one HTML page that opens offline, PNG, CSV, JSON and Markdown; each is complete or not there."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fulgurite.claims import Claim, Verdict
from fulgurite.files import write_whole
from fulgurite.grid import Grid
from fulgurite.records import RunRecord, select
from fulgurite.report.comparison import Row, comparison_table, default_metrics, settings_of, variants_of
from fulgurite.report.data import as_csv, as_json, as_markdown
from fulgurite.report.maps import draw_map
from fulgurite.report.numbers import better_direction, format_interval
from fulgurite.report.pictures import DARK, DASHES, LIGHT, Line, Theme, lines_of, new_figure, overview, png, views_of


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
    grid: Grid | None = None,
) -> Path:
    """Write `report.html`, the results as CSV, JSON and Markdown, and pictures of the curves; return the page's path.

    Args:
        directory: Output folder; made if it does not exist.
        title: Title of the page.
        records: The runs; failed ones are listed with their reason.
        facts: What the reader must know to repeat it: command line, versions, machine.
        reference: Name of the variant that the others are compared with.
        claim: The claim that was tested, if one was.
        verdict: What `judge` made of it.
        metrics: Logged names of final metrics; None takes the claim's measures, else `default_metrics`.
        grid: The grid whose cells are the settings: the page then has maps over it, and a table per cell.
    """
    records = list(records)
    directory = Path(directory)
    metrics = list(metrics or (claim.measures if claim else ()) or default_metrics(records))
    rows = comparison_table(records, reference, metrics)
    drawn = [] if grid else metrics
    sections = [_section(setting, records, rows, reference, drawn, claim) for setting in settings_of(records)]
    maps = _maps(grid, records, rows, reference, metrics) if grid else []
    for index, image in enumerate(maps):
        write_whole(directory / f"map-{index + 1}-{_slug(image['metric'])}.png", image["file"])
    for index, section in enumerate(sections):
        if section["overview"] is not None:
            suffix = "" if len(sections) == 1 else f"-{index + 1}-{_slug(section['name'])}"
            write_whole(directory / f"curves{suffix}.png", section["overview"])
    write_whole(directory / "results.csv", as_csv(records))
    write_whole(directory / "results.json", as_json(title, records, rows, reference, facts, claim, verdict))
    write_whole(directory / "results.md", as_markdown(rows, facts, verdict))
    context = {
        "title": title,
        "claim": claim,
        "verdict": verdict,
        "sections": sections,
        "maps": maps,
        "failed": [record for record in records if record.status == "failed"],
        "notes": _notes(records, rows, reference, grid),
        "facts": dict(facts),
        "palettes": (LIGHT.colours, DARK.colours),
        "dashes": DASHES,
    }
    page = directory / "report.html"
    write_whole(page, _render(context))
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
    lines = lines_of(variants_of(records, setting, reference), reference)
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
        "overview": overview(setting, mine, metrics, lines),
    }


def _maps(
    grid: Grid, records: Sequence[RunRecord], rows: Sequence[Row], reference: str, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what the template shows of a grid: a picture per metric."""
    names = dict.fromkeys(name for setting in grid.cells for name in variants_of(records, setting, reference))
    lines = lines_of(list(names), reference)

    def drawn(metric: str, theme: Theme, dpi: int) -> bytes:
        return png(draw_map(grid, rows, lines, metric, theme), dpi)

    return [
        {
            "metric": metric,
            "direction": better_direction(metric),
            "light": base64.b64encode(drawn(metric, LIGHT, 160)).decode(),
            "dark": base64.b64encode(drawn(metric, DARK, 160)).decode(),
            "file": drawn(metric, replace(LIGHT, background="white"), 110),
        }
        for metric in metrics
    ]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def _metric_figures(metric: str, records: Sequence[RunRecord], lines: Sequence[Line]) -> dict[str, Any] | None:
    images = []
    for caption, draw in views_of(records, metric).items():
        encoded = []
        for theme in (LIGHT, DARK):
            figure = new_figure(4.5, 3.0, theme.background)
            draw(figure.subplots(), theme, lines)
            encoded.append(base64.b64encode(png(figure, 160)).decode())
        images.append({"caption": caption, "light": encoded[0], "dark": encoded[1]})
    return {"metric": metric, "direction": better_direction(metric), "images": images} if images else None


def _notes(records: Sequence[RunRecord], rows: Sequence[Row], reference: str, grid: Grid | None) -> list[str]:
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
    without = [name for name in settings_of(records) if not any(select(records, name, reference))]
    if without:
        notes.append(
            f"No successful run of the reference “{reference}” in {', '.join(without)}: nothing is compared there."
        )
    short = any(row.difference and row.summary and row.difference.n < row.summary.n for row in rows)
    if short or any(record.status == "failed" for record in records):
        notes.append("Failed runs are left out; a difference counts only the seeds for which both runs succeeded.")
    if grid:
        notes.append(
            "Maps show means over seeds: values of the reference, and paired differences of the others, with a dot where "
            "the interval excludes zero. Bars are one standard deviation."
        )
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
