# SPDX-License-Identifier: Apache-2.0
"""A comparison for programs and for documents: CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fulgurite.claims import Claim, Verdict
from fulgurite.records import RunRecord
from fulgurite.report.comparison import Row
from fulgurite.report.numbers import format_interval


def as_csv(records: Sequence[RunRecord]) -> str:
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


def as_json(
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


def as_markdown(rows: Sequence[Row], facts: Mapping[str, str], verdict: Verdict | None) -> str:
    """Return verdict, expectations and tables, in the form of a documentation page."""
    parts = []
    if verdict:
        lines = [f"**{verdict.outcome.capitalize()}.** {verdict.reason}", ""]
        lines += ["| expectation | status | paired difference [95 %] | wins |", "|---|---|---:|---:|"]
        for result in verdict.results:
            found = result.difference
            measured = (
                f"{format_interval(found.mean, found.low, found.high)} | {found.wins}/{found.n}" if found else "- | -"
            )
            lines.append(f"| {result.expectation.description or result.expectation} | {result.status} | {measured} |")
        parts.append("\n".join(lines))
    for setting in dict.fromkeys(row.setting for row in rows):
        mine = [row for row in rows if row.setting == setting]
        measures = list(dict.fromkeys(row.measure for row in mine))
        lines = [f"*{setting}*", ""] if setting != "main" else []
        lines += [f"| variant | {' | '.join(measures)} |", f"|---|{'---:|' * len(measures)}"]
        for variant in dict.fromkeys(row.variant for row in mine):
            cells = [f"{row.value}<br>{row.comparison} {row.wins}".strip() for row in mine if row.variant == variant]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    parts.append("; ".join(f"{name}: {value}" for name, value in facts.items()) + ".")
    return "\n\n".join(parts) + "\n"
