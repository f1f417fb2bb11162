# SPDX-License-Identifier: Apache-2.0
"""`fulgurite list`: what is installed, from manifests alone; nothing here may import more than that needs."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from fulgurite.errors import PluginError
from fulgurite.plugin import Plugin
from fulgurite.registry import Entry, Registry, registry

Status = Literal["ok", "broken", "blocked", "not loaded"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: The slug of the plugin.
        status: `"ok"`, `"broken"` (with a reason), `"blocked"`, or `"not loaded"`: declared by another distribution, whose
            code a list does not execute.
        reason: Why it cannot be used, else None.
        family: The family, if the manifest was read.
        paper: The citation, if the manifest was read and is of a paper.
        kinds: Names of components by kind, if the manifest was read.
        distribution: The distribution that declares it.
        version: The version of the distribution.
        summary: One line: of the plugin, or of the distribution if the manifest was not read.
    """

    name: str
    status: Status
    reason: str | None
    family: str | None
    paper: str | None
    kinds: dict[str, list[str]]
    distribution: str
    version: str
    summary: str


def run(command: str, argv: Sequence[str]) -> int:
    """Run `fulgurite list` or `fulgurite show`."""
    if command == "show":
        from fulgurite.cli import show

        return show.run(argv)
    parser = argparse.ArgumentParser(prog="fulgurite list", description="Show what is installed.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--load", action="store_true", help="import the manifests of other distributions too")
    options = parser.parse_args(argv)
    rows = catalogue(registry(), load=options.load)
    if options.json:
        import json

        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        sys.stdout.write(_table(rows) + _notes(rows))
    return 0


def catalogue(plugins: Registry, load: bool = False) -> list[Row]:
    """Return a row for each entry; manifests of other distributions than Fulgurite are imported only with `load`."""
    return [_row(plugins, entry, load or entry.builtin) for entry in plugins.entries]


def _row(plugins: Registry, entry: Entry, load: bool) -> Row:
    manifest: Plugin | None = None
    if load:
        try:
            manifest = plugins.plugin(entry.name)
        except PluginError:
            manifest = None  # the reason is among the problems
    reason = plugins.problems().get(entry.name)
    status: Status = "ok" if manifest else "not loaded"
    if reason is not None:
        status = "blocked" if entry.name in plugins.blocked else "broken"
        reason = " ".join(reason.split())
    kinds: dict[str, list[str]] = {}
    for component in manifest.components if manifest else ():
        kinds.setdefault(component.kind, []).append(component.name)
    return Row(
        name=entry.name,
        status=status,
        reason=reason,
        family=manifest.family if manifest else None,
        paper=manifest.paper.citation if manifest and manifest.paper else None,
        kinds=kinds,
        distribution=entry.distribution,
        version=entry.version,
        summary=manifest.summary if manifest else entry.summary,
    )


_NARROW = 30
"""Characters that the last column needs beside the others."""


def _table(rows: list[Row]) -> str:
    """Lay the rows out in columns; in a terminal the last column is wrapped, or if there is no room stands below."""
    cells = [("PLUGIN", "FAMILY", "PAPER", "STATUS", "KINDS")]
    cells += [(row.name, row.family or "-", row.paper or "-", row.status, _kinds(row) or "-") for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(4)]
    indent = sum(widths) + 2 * len(widths)
    columns = 1000
    if sys.stdout.isatty():
        import shutil

        columns = shutil.get_terminal_size().columns - 1
    lines = []
    for cell in cells:
        start = "".join(f"{text:{width}}  " for text, width in zip(cell, widths, strict=False))
        if columns - indent < _NARROW:
            lines += [start.rstrip(), *textwrap.wrap(cell[4], columns, initial_indent="    ", subsequent_indent="    ")]
        else:
            lines += textwrap.wrap(cell[4], columns, initial_indent=start, subsequent_indent=" " * indent)
    return "\n".join(lines) + "\n"


def _kinds(row: Row) -> str:
    """Name what is used by name; functions and arguments of others are many, and only counted."""
    counted = ("function", "argument")
    parts = [f"{kind} {', '.join(names)}" for kind, names in row.kinds.items() if kind not in counted]
    numbers = {kind: len(row.kinds.get(kind, ())) for kind in counted}
    parts += [f"{number} {kind}{'s' if number > 1 else ''}" for kind, number in numbers.items() if number]
    return "; ".join(parts)


def _notes(rows: list[Row]) -> str:
    notes = [f"{row.name} is broken: {row.reason}" for row in rows if row.status == "broken"]
    notes += [f"{row.name} cannot be used: {row.reason}" for row in rows if row.status == "blocked"]
    foreign = [row for row in rows if row.status == "not loaded"]
    notes += [f"{row.name} is from {row.distribution} {row.version}: {row.summary}" for row in foreign]
    if foreign:
        notes.append(
            "What is not loaded is code of other distributions; `fulgurite list --load` reads their manifests."
        )
    return "".join(f"\n{note}\n" for note in dict.fromkeys(notes))
