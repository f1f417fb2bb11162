# SPDX-License-Identifier: Apache-2.0
"""`fulgurite bench`: what plugins cost, measured side by side on this machine."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulgurite.environment import refuse_if_set
from fulgurite.errors import FulguriteError, nearest
from fulgurite.files import write_whole
from fulgurite.plugin import load_target
from fulgurite.registry import registry
from fulgurite.report import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from fulgurite.bench import Bench, Case, Estimate, Row

_CORE = "core"
_TIMES = "\N{MULTIPLICATION SIGN}"


def run(command: str, argv: list[str]) -> int:
    """Measure the benches of the named plugins; return 1 if a target is missed, else 0."""
    parser = argparse.ArgumentParser(
        prog=f"fulgurite {command}",
        description="Measure what plugins cost, side by side and interleaved in one process, with 95 % intervals. "
        "Run it on a quiet machine. Exit status 1: some target is missed.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="plugins, or 'core'; by default all that have a bench")
    parser.add_argument("--rounds", type=_positive, help="rounds of each timed case (default: what the case says)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    parser.add_argument("--list", action="store_true", help="list the cases and measure nothing")
    arguments = parser.parse_args(argv)
    benches = _benches(arguments.names)
    if arguments.list:
        for name, bench in benches.items():
            for case in bench.cases:
                print(f"{name}: {case.name}")
        return 0

    refuse_if_set()
    from rich.console import Console

    from fulgurite.bench import machine

    facts = {"command": shlex.join(["fulgurite", command, *argv]), **machine()}
    console = Console(stderr=arguments.json)
    measured = []
    for case, rows in _measure(benches, arguments.rounds, console):
        measured.append((case, rows))
        if arguments.markdown:  # after each case, so that none is lost
            write_whole(arguments.markdown, markdown(facts, measured))
        if not arguments.json:
            console.print(_table(case, rows))
    if arguments.json:
        json.dump(_as_data(facts, measured), sys.stdout, indent=1)
        print()
    else:
        console.print(", ".join(f"{name}: {value}" for name, value in facts.items()), style="dim", highlight=False)
    return int(any(verdict == "missed" for case, rows in measured for verdict in _verdicts(case, rows).values()))


def _benches(names: Sequence[str]) -> dict[str, Bench]:
    """Return the benches of the named plugins; of core and all plugins if none is named."""
    if not names:
        names = [_CORE, *(plugin.name for plugin in registry().plugins() if plugin.bench)]
    targets = {}
    for name in names:
        if name == _CORE:
            targets[name] = "fulgurite.bench:BENCH"
            continue
        plugin = registry().plugin(name)
        if plugin.bench is None:
            known = [_CORE, *(plugin.name for plugin in registry().plugins() if plugin.bench)]
            raise FulguriteError(
                f"Expected NAME to be one of {', '.join(known)}, but {name!r} has no bench.{nearest(name, known)}"
            )
        targets[name] = plugin.bench
    return {name: load_target(target) for name, target in targets.items()}


def _measure(benches: dict[str, Bench], rounds: int | None, console: Console) -> Iterator[tuple[Case, list[Row]]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fulgurite.bench import run_case

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for case in (case for bench in benches.values() for case in bench.cases):
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(case.name, total=None)

            def advance(progress: Progress = progress, task: Any = task) -> None:
                progress.advance(task)

            rows = run_case(case, rounds, after_block=advance)
        yield case, rows


def _verdicts(case: Case, rows: Sequence[Row]) -> dict[str, str]:
    by_name = {row.variant: row for row in rows}
    return {target.variant: target.judge(by_name[target.variant]) for target in case.targets}


def _cells(case: Case, row: Row) -> list[str]:
    """Return variant, value, ratio, difference and target as text."""
    show = format_seconds if case.unit == "seconds" else format_bytes
    if row.missing is not None:
        return [row.variant, "", "", "", f"not measured: {row.missing}"]
    if row.variant == case.reference:
        compared = ["reference", ""]
    else:
        ratio, difference = row.ratio, row.difference
        compared = [
            _interval(ratio, lambda value: f"{_TIMES}{value:.3g}" if value >= 10 else f"{_TIMES}{value:.3f}"),
            _interval(difference, lambda value: f"{'-' if value < 0 else '+'}{show(abs(value))}"),
        ]
    goal = ""
    for target in case.targets:
        if target.variant == row.variant:
            bound, side = (
                (target.at_most, "at most") if target.at_most < float("inf") else (target.at_least, "at least")
            )
            goal = (
                f"{side} {f'{_TIMES}{bound:g}' if target.comparison == 'ratio' else show(bound)}: {target.judge(row)}"
            )
    return [row.variant, show(row.value.median), *compared, goal]


def _interval(estimate: Estimate, show: Any) -> str:
    if estimate.low == estimate.high:
        return show(estimate.median)
    return f"{show(estimate.median)} [{show(estimate.low)}, {show(estimate.high)}]"


def _head(case: Case) -> list[str]:
    what = "time" if case.unit == "seconds" else "bytes"
    return ["variant", f"{what} (median)", "ratio [95 %]", "difference [95 %]", "target"]


def _table(case: Case, rows: Sequence[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(case.name), title_justify="left", header_style="bold")
    for number, name in enumerate(_head(case)):
        table.add_column(name, justify="left" if number in (0, 4) else "right")
    styles = {"met": "green", "missed": "red", "unclear": "yellow"}
    verdicts = _verdicts(case, rows)
    for row in rows:
        *cells, goal = map(Text, _cells(case, row))
        goal.stylize(styles.get(verdicts.get(row.variant, ""), ""))
        table.add_row(*cells, goal)
    return table


def markdown(facts: dict[str, str], measured: Sequence[tuple[Case, Sequence[Row]]]) -> str:
    """Return the tables as Markdown, with the command that made them and the machine on which it ran."""
    command, *others = facts.items()
    parts = [f"```console\n{command[1]}\n```", "; ".join(f"{name}: {value}" for name, value in others) + "."]
    for case, rows in measured:
        lines = [f"**{case.name}**", "", f"| {' | '.join(_head(case))} |", "|---|---:|---:|---:|---|"]
        for row in rows:
            cells = _cells(case, row)
            lines.append(f"| `{cells[0]}` | {' | '.join(cells[1:])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _as_data(facts: dict[str, str], measured: Sequence[tuple[Case, Sequence[Row]]]) -> dict[str, Any]:
    return {
        "facts": facts,
        "cases": [
            {
                "name": case.name,
                "unit": case.unit,
                "reference": case.reference,
                "rows": [
                    {"variant": row.variant, "missing": row.missing}
                    if row.missing is not None
                    else {
                        "variant": row.variant,
                        "value": asdict(row.value),
                        "ratio": asdict(row.ratio),
                        "difference": asdict(row.difference),
                        "target": verdicts.get(row.variant),
                    }
                    for row in rows
                ],
            }
            for case, rows in measured
            for verdicts in [_verdicts(case, rows)]
        ],
    }


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, but got {text}")
    return number
