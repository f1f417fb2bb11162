# SPDX-License-Identifier: Apache-2.0
"""`fulgurite check`: the conformance kit on installed plugins."""

from __future__ import annotations

import argparse
import io
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fulgurite.errors import FulguriteError, PluginError, nearest
from fulgurite.files import write_whole
from fulgurite.plugin import Component, Plugin
from fulgurite.registry import registry

if TYPE_CHECKING:
    from rich.console import Console

    from fulgurite.testing.check import Check, Result

_STYLES = {"pass": "green", "fail": "bold red", "inapplicable": "dim"}


def run(command: str, argv: list[str]) -> int:
    """Run every applicable check on every component of the named plugins; return 1 if one fails, else 0."""
    parser = argparse.ArgumentParser(
        prog=f"fulgurite {command}",
        description="Hold plugins to what users of Lightning expect of them. Exit status 1: some check failed.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="plugins or components; by default all plugins")
    parser.add_argument("--quick", action="store_true", help="leave out the checks that take long")
    parser.add_argument("--only", action="append", metavar="CHECK", help="run this check only; may be repeated")
    parser.add_argument(
        "--strategy", metavar="NAME", help="train with this strategy on one device, for instance ddp; not composition"
    )
    parser.add_argument(
        "--precision", metavar="NAME", help="train in this precision, for instance bf16-mixed; not composition"
    )
    parser.add_argument(
        "--support", action="store_true", help="write what is supported to SUPPORT.md, beside each manifest"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write which checks were executed")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="fail if a check that --record wrote is not executed"
    )
    parser.add_argument("--list", action="store_true", help="list the checks, and what each protects from")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write a JUnit XML file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    arguments = parser.parse_args(argv)

    from rich.console import Console

    from fulgurite.testing import all_checks
    from fulgurite.testing.trainers import trainer_settings

    console = Console(file=sys.stderr if arguments.json else sys.stdout)
    known = all_checks()
    if arguments.list:
        for found in known.values():
            print(
                f"{found.name} ({', '.join(found.kinds)}{'' if found.quick else '; not in --quick'}): {found.promise}"
            )
        return 0
    for name in set(arguments.only or ()) - set(known):
        raise FulguriteError(f"No check {name!r}.{nearest(name, known)} `fulgurite check --list` shows all.")
    chosen = {"strategy": arguments.strategy, "precision": arguments.precision}
    if arguments.support and (arguments.only or arguments.quick or any(chosen.values())):
        raise FulguriteError(
            "--support says what all checks have found: leave out --only, --quick, --strategy, --precision."
        )
    trainer_settings(**chosen)
    subjects, unusable = _subjects(arguments.names)
    results = [*unusable, *_check(subjects, arguments.only, arguments.quick, chosen, console)]
    if arguments.against:
        results += _dropped(results, arguments.against, None if not arguments.quick else known)
    failures = [result for result in results if result.status == "fail"]
    if arguments.json:
        json.dump([asdict(result) for result in results], sys.stdout, indent=1)
        print()
    else:
        _print(console, results)
    if arguments.support:
        _write_support(results)
    if arguments.record:
        lines = [f" {json.dumps(subject)}: {json.dumps(checks)}" for subject, checks in executed(results).items()]
        write_whole(arguments.record, "{\n" + ",\n".join(lines) + "\n}\n")  # a line each: differences can be read
    if arguments.junit:
        write_whole(arguments.junit, junit(results))
    if arguments.markdown:
        words = " ".join(["fulgurite", command, *argv])
        write_whole(arguments.markdown, markdown(words, results))
    return int(bool(failures))


def _subjects(names: Sequence[str]) -> tuple[list[tuple[Plugin, Component]], list[Result]]:
    """Return the components of the named plugins, or named components; those of all plugins if none is named.

    A plugin that is broken or declared twice is a failure, and the others are checked all the same. One that is blocked
    is left out, unless it is named.

    Raises:
        FulguriteError: If a name is neither, or that of a blocked plugin.
    """
    slugs = dict.fromkeys(entry.name for entry in registry().entries)
    found: list[tuple[Plugin, Component]] = []
    unusable = []
    for name in names or [slug for slug in slugs if slug not in registry().blocked]:
        if name not in slugs:
            found.append(registry().find(name))
            continue
        try:
            plugin = registry().plugin(name)
        except PluginError as error:
            if name in registry().blocked:
                raise
            unusable.append(_unusable(name, error))
        else:
            found += [(plugin, component) for component in plugin.components]
    return found, unusable


def _unusable(name: str, error: PluginError) -> Result:
    """Return the failure of a plugin without a manifest."""
    from fulgurite.testing import Result
    from fulgurite.testing.runner import MANIFEST

    detail = "".join(traceback.format_exception(error))
    return Result(name, name, "", MANIFEST, "fail", " ".join(str(error).split()), detail)


def _check(
    subjects: Sequence[tuple[Plugin, Component]],
    only: Sequence[str] | None,
    quick: bool,
    chosen: Mapping[str, Any],
    console: Console,
) -> Iterator[Result]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fulgurite.testing import check_component
    from fulgurite.testing.composition import check_composition, members, pairs

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(subjects))
        with redirect_stdout(io.StringIO()):  # of what components print, nothing may get into the JSON
            for plugin, component in subjects:
                progress.update(task, description=f"{plugin.name}.{component.name}")
                for result in check_component(component, plugin, names=only, quick=quick, **chosen):
                    progress.update(task, description=f"{plugin.name}.{result.subject}: {result.check}")
                    yield result
                progress.advance(task)
            if only is None and not any(chosen.values()):
                matrix = members(subjects, every_case=not quick)
                task = progress.add_task("pairs of interventions", total=len(pairs(matrix, quick)))
                for result in check_composition(matrix, quick):
                    progress.update(task, advance=1, description=result.component)
                    yield result


def _write_support(results: Sequence[Result]) -> None:
    """Write the support of each plugin that has interventions beside its manifest."""
    from fulgurite.cli.show import support_path
    from fulgurite.testing.support import support

    for plugin in dict.fromkeys(result.plugin for result in results):
        text = support(plugin, [result for result in results if result.plugin == plugin])
        if text:
            write_whole(support_path(plugin), text)


def executed(results: Sequence[Result]) -> dict[str, list[str]]:
    """Return the names of the checks that were executed, by subject."""
    found: dict[str, list[str]] = {}
    for result in results:
        if result.status != "inapplicable":
            found.setdefault(f"{result.plugin}.{result.subject}", []).append(result.check)
    return found


def _dropped(results: Sequence[Result], path: Path, quick: Mapping[str, Check] | None) -> list[Result]:
    """Return a failure for each check of the present subjects that was executed earlier and is not now."""
    from fulgurite.testing import Result

    try:
        before: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FulguriteError(
            f"Expected --against to be a file that --record has written, but {path}: {error}"
        ) from error
    now = executed(results)
    dropped = []
    for result in {f"{one.plugin}.{one.subject}": one for one in results}.values():
        subject = f"{result.plugin}.{result.subject}"
        for name in before.get(subject, []):
            left_out = quick is not None and name in quick and not quick[name].quick
            if name not in now.get(subject, []) and not left_out:
                why = f"it was executed when {path.name} was written, and is not now"
                dropped.append(Result(result.plugin, result.component, result.label, name, "fail", why))
    return dropped


def _print(console: Console, results: Sequence[Result]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for name in ("component", "check", "result", "why"):
        table.add_column(name, overflow="fold")
    previous = ""
    for result in results:
        subject = f"{result.plugin}.{result.subject}"
        if subject != previous:
            table.add_section()
        shown = "" if subject == previous else subject
        table.add_row(Text(shown), result.check, Text(result.status, _STYLES[result.status]), Text(result.reason))
        previous = subject
    console.print(table)
    for result in results:
        if result.status == "fail":
            console.print(f"\n{result.plugin}.{result.subject}, {result.check}:", style="bold", markup=False)
            console.print(result.detail, markup=False, highlight=False)
    console.print(_counts(results))


def _counts(results: Sequence[Result]) -> str:
    counts = Counter(result.status for result in results)
    subjects = len({(result.plugin, result.subject) for result in results})
    seconds = sum(result.seconds for result in results)
    return (
        f"{len(results)} checks on {subjects} subjects in {seconds:.0f} s: {counts['pass']} passed, "
        f"{counts['fail']} failed, {counts['inapplicable']} inapplicable."
    )


def junit(results: Sequence[Result]) -> str:
    """Return the results as JUnit XML: a suite per plugin, a case per check of a component."""
    suites = ElementTree.Element("testsuites")
    for plugin in dict.fromkeys(result.plugin for result in results):
        mine = [result for result in results if result.plugin == plugin]
        suite = ElementTree.SubElement(suites, "testsuite", name=plugin, tests=str(len(mine)))
        suite.set("failures", str(sum(result.status == "fail" for result in mine)))
        suite.set("skipped", str(sum(result.status == "inapplicable" for result in mine)))
        for result in mine:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{plugin}.{result.subject}",
                name=result.check,
                time=f"{result.seconds:.3f}",
            )
            if result.status == "fail":
                ElementTree.SubElement(case, "failure", message=result.reason).text = result.detail
            elif result.status == "inapplicable":
                ElementTree.SubElement(case, "skipped", message=result.reason)
    return ElementTree.tostring(suites, encoding="unicode") + "\n"


def markdown(command: str, results: Sequence[Result]) -> str:
    """Return a table per kind of component, checks by subjects, and the reasons below it."""
    parts = [f"```console\n{command}\n```", _counts(results)]
    groups: dict[tuple[str, ...], list[str]] = {}
    by_subject: dict[str, dict[str, Result]] = {}
    pairs = {}
    for result in results:
        if result.plugin == "composition" and " + " in result.subject:
            pairs[tuple(result.subject.split(" + ", 1))] = result
        else:
            by_subject.setdefault(f"{result.plugin}.{result.subject}", {})[result.check] = result
    for subject, mine in by_subject.items():
        groups.setdefault(tuple(mine), []).append(subject)
    for checks, subjects in groups.items():
        lines = [f"| check | {' | '.join(f'`{subject}`' for subject in subjects)} |", f"|---|{':-:|' * len(subjects)}"]
        lines += [f"| {name} | {' | '.join(_MARKS[by_subject[s][name].status] for s in subjects)} |" for name in checks]
        parts.append("\n".join(lines))
    if pairs:
        parts.append(_pairs(pairs))
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.reason:
            reasons.setdefault((result.check, result.reason), []).append(f"`{result.subject}`")
    if reasons:
        lines = [f"- {name}, {', '.join(who)}: {why}" for (name, why), who in reasons.items()]
        parts.append("\n".join(["Why they failed (✗) or are inapplicable (–), or how they passed:", "", *lines]))  # noqa: RUF001
    return "\n\n".join(parts) + "\n"


_MARKS = {"pass": "✓", "fail": "✗", "inapplicable": "–"}  # noqa: RUF001


def _pairs(results: Mapping[tuple[str, ...], Result]) -> str:
    """Return a table of interventions by interventions: the row stands before the column in the trainer's callbacks."""
    names = list(dict.fromkeys(name for pair in results for name in pair))
    lines = [f"| before \\ after | {' | '.join(str(number + 1) for number in range(len(names)))} |"]
    lines.append(f"|---|{':-:|' * len(names)}")
    for number, first in enumerate(names):
        marks = [_MARKS[results[first, second].status] if (first, second) in results else "" for second in names]
        lines.append(f"| {number + 1} `{first}` | {' | '.join(marks)} |")
    return "\n".join(lines)
