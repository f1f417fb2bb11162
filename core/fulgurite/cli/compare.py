# SPDX-License-Identifier: Apache-2.0
"""`fulgurite compare`: does a method help my model? `fulgurite reproduce`: does the paper's claim hold?"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from fulgurite.claims import Claim, Outcome, Setting, Variant, Verdict, judge, summarised
from fulgurite.environment import refuse_if_set
from fulgurite.errors import FulguriteError, nearest
from fulgurite.experiment import Checked, check_plan, finished_records, plan, run_plan
from fulgurite.experiment.process import cores
from fulgurite.files import write_whole
from fulgurite.grid import Grid
from fulgurite.records import RunRecord
from fulgurite.registry import registry

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE: dict[str, Any] = {
    "model": {
        "class_path": "Classification",
        "init_args": {
            "optimizer": {
                "class_path": "torch.optim.SGD",
                "init_args": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            },
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.MultiStepLR",
                "init_args": {"milestones": [30, 45], "gamma": 0.1},
            },
        },
    },
    "data": {"class_path": "Digits", "init_args": {"label_noise": 0.2}},
    "trainer": {"max_epochs": 60, "accelerator": "cpu"},
}
"""What `compare` trains without `--config`: a small network on real digits, a fifth of whose labels are wrong."""

_EXAMPLE_NAME = "the embedded example: 1200 handwritten digits, a fifth of the training labels wrong"

_STATUS: dict[Outcome, int] = {"reproduced": 0, "not reproduced": 1, "inconclusive": 2}
_USAGE_ERROR = {"compare": 2, "reproduce": 3}
_INTERRUPTED = 130


def run(command: str, argv: list[str]) -> int:
    """Run a command; return its exit status."""
    return _compare(argv) if command == "compare" else _reproduce(argv)


class _Parser(argparse.ArgumentParser):
    """Ends with the status that the command has for wrong usage."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"fulgurite {command}", description=description)
        self.usage_error = _USAGE_ERROR[command]

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(self.usage_error, f"{self.prog}: {message}\n")


def _compare(argv: list[str]) -> int:
    parser = _Parser(
        "compare",
        "Train your configuration with and without additions, over seeds, and compare; with --grid for every combination of "
        "values. Results are kept as runs end: after an interruption the same command goes on. Exit status: 0; 1 if a run "
        "failed; 2 if a configuration or an addition is wrong.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="what `fulgurite fit` takes; by default an example")
    parser.add_argument(
        "--add", action="append", default=[], metavar="TEXT", help="a variant, such as 'PSKD(alpha=0.8)'; repeatable"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values of an argument, such as data.label_noise=0,0.2,0.4; repeatable: every combination is trained",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a logged metric to show, such as val/nll; repeatable (default: those of the test, else of validation)",
    )
    parser.add_argument("--seeds", type=_positive, default=5, metavar="N", help="seeds per variant (default: 5)")
    _add_common(parser, "./fulgurite-compare")
    arguments = parser.parse_args(argv)
    if not (arguments.add or arguments.grid):
        parser.error("nothing to compare with; give at least one --add, such as --add PSKD, or --grid")
    config = EXAMPLE if arguments.config is None else _read_config(arguments.config)
    variants = [Variant("baseline"), *(Variant(text.strip(), add=(text,)) for text in arguments.add)]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise FulguriteError(f"Expected every --add to be another variant, but got {', '.join(names[1:])}.")
    directory = arguments.out or Path("fulgurite-compare")
    console = _console()
    grid = Grid.parse(arguments.grid) if arguments.grid else None
    settings = grid.settings(config, variants) if grid else [Setting("main", config, tuple(variants))]
    records = _execute(console, settings, arguments.seeds, arguments.jobs, directory)
    if records is None:
        return _INTERRUPTED

    from fulgurite.report import comparison_table, grid_table, terminal_tables, write_report

    _check_metrics(arguments.metric, records)
    rows = comparison_table(records, metrics=arguments.metric)
    for table in [grid_table(rows, grid)] if grid else terminal_tables(rows):
        console.print(table)
    title = f"{', '.join(names[1:])} compared with the baseline" if names[1:] else "The baseline"
    if grid:
        title += f" over {' and '.join(grid.names.values())}"
    facts = _facts("compare", argv, {"configuration": str(arguments.config or _EXAMPLE_NAME)})
    page = write_report(directory, title, records, facts=facts, metrics=arguments.metric, grid=grid)
    _finish(console, records, page)
    return int(any(record.status == "failed" for record in records))


def _check_metrics(metrics: Sequence[str], records: Sequence[RunRecord]) -> None:
    known = sorted({name for record in records for name in record.metrics})
    for metric in metrics:
        if known and metric not in known:
            raise FulguriteError(
                f"No run has logged {metric!r}; these were logged: {', '.join(known)}.{nearest(metric, known)} The runs are "
                f"kept: the same command with another --metric trains nothing anew."
            )


def _reproduce(argv: list[str]) -> int:
    parser = _Parser(
        "reproduce",
        "Test the claim of a plugin's paper, at a scale that runs in minutes. After an interruption the same command goes "
        "on. Exit status: 0 reproduced, 1 not reproduced, 2 inconclusive, 3 wrong usage.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a plugin that has a claim")
    parser.add_argument("--list", action="store_true", help="list the plugins that have a claim, and run nothing")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="seeds (default: those of the claim)")
    _add_common(parser, "./fulgurite-reproduce-NAME")
    arguments = parser.parse_args(argv)
    try:
        if arguments.list:
            return _list_claims()
        if arguments.name is None:
            parser.error("give the name of a plugin; --list shows those that have a claim")
        claim = _claim(arguments.name)
        directory = arguments.out or Path(f"fulgurite-reproduce-{arguments.name}")
        console = _console()
        records = _execute(console, claim.settings, arguments.seeds or claim.seeds, arguments.jobs, directory)
    except FulguriteError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return _USAGE_ERROR["reproduce"]
    if records is None:
        return _INTERRUPTED

    from fulgurite.report import comparison_table, terminal_tables, write_report

    records = summarised(claim.settings, records)
    verdict = judge(claim, records)
    for table in terminal_tables(comparison_table(records, metrics=claim.measures)):
        console.print(table)
    _print_verdict(console, claim, verdict)
    facts = _facts("reproduce", argv, {})
    title = f"Reproduction of {arguments.name}"
    _finish(console, records, write_report(directory, title, records, facts=facts, claim=claim, verdict=verdict))
    return _STATUS[verdict.outcome]


def _add_common(parser: argparse.ArgumentParser, out: str) -> None:
    jobs = "runs at the same time (default: one per core, or per CUDA device)"
    parser.add_argument("--jobs", type=_positive, metavar="J", help=jobs)
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where results go (default: {out})")


def _execute(
    console: Console, settings: Sequence[Setting], seeds: int, jobs: int | None, directory: Path
) -> list[RunRecord] | None:
    """Check and run everything; return the records, or None after Ctrl-C."""
    refuse_if_set()
    directory = directory.absolute()
    runs = plan(settings, range(seeds))
    try:
        with console.status("Checking the configuration and the additions ..."):
            checked = check_plan(runs, directory)
        shared = all(setting.config == settings[0].config for setting in settings)
        for setting in settings[:1] if shared else settings:
            name = "config.yaml" if shared else f"config-{setting.name}.yaml"
            write_whole(directory / name, yaml.safe_dump(dict(setting.config), sort_keys=False))
        return _run(console, checked, jobs or checked.default_jobs, directory)
    except KeyboardInterrupt:
        kept = f"What is finished is kept in {directory / 'runs.jsonl'}; the same command goes on from there."
        console.print(f"\nStopped. {kept}", soft_wrap=True, markup=False, highlight=False)
        return None


def _run(console: Console, checked: Checked, jobs: int, directory: Path) -> list[RunRecord]:
    from fulgurite.cli.progress import ProgressDisplay

    total, done = len(checked.runs), len(finished_records(checked, directory / "runs.jsonl"))
    jobs = max(1, min(jobs, total - done))
    resumed = f" {done} are finished already." if done else ""
    console.print(f"{total} runs, {jobs} at a time.{resumed}", highlight=False)
    with ProgressDisplay(console, total - done) as display:
        return run_plan(checked, directory, jobs, display)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FulguriteError(
            f"Expected --config to be a file that can be read, but {path}: {error.strerror}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FulguriteError(f"Expected {path} to be YAML, but it cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise FulguriteError(
            f"Expected {path} to hold sections such as model, data and trainer, but got {type(config).__name__}."
        )
    return config


def _claim(name: str) -> Claim:
    plugin = registry().plugin(name)
    if plugin.claim is None:
        known = [other.name for other in registry().plugins() if other.claim]
        raise FulguriteError(f"Plugin {name!r} has no claim; these have one: {', '.join(known)}.{nearest(name, known)}")
    claim = registry().load(plugin, plugin.claim)
    if not isinstance(claim, Claim):
        raise FulguriteError(f"Expected {plugin.claim} to be a Claim, but got {type(claim).__name__}.")
    return claim


def _list_claims() -> int:
    for plugin in registry().plugins():
        if plugin.claim:
            claim = _claim(plugin.name)
            runs = claim.seeds * sum(len(setting.variants) for setting in claim.settings)
            print(f"{plugin.name}: {claim.statement} ({runs} runs)")
    return 0


def _print_verdict(console: Console, claim: Claim, verdict: Verdict) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    colours = {"held": "green", "refuted": "red", "undecided": "yellow"}
    table = Table(header_style="bold")
    for heading in ("expected", "", "found"):
        table.add_column(heading)
    for result in verdict.results:
        status = Text(result.status, style=colours[result.status])
        table.add_row(Text(str(result.expectation)), status, Text(result.reason))
    console.print(table)
    colour = {"reproduced": "green", "not reproduced": "red", "inconclusive": "yellow"}[verdict.outcome]
    text = Text.assemble((verdict.outcome.upper(), f"bold {colour}"), f"\n{claim.statement}\n{verdict.reason}")
    console.print(Panel(text, border_style=colour, expand=False))


def _facts(command: str, argv: Sequence[str], more: Mapping[str, str]) -> dict[str, str]:
    versions = ("fulgurite", "torch", "lightning", "torchmetrics")
    return {
        "command": shlex.join(["fulgurite", command, *argv]),
        **more,
        **{name: importlib.metadata.version(name) for name in versions},
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cores()} cores",
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _finish(console: Console, records: Sequence[RunRecord], page: Path) -> None:
    failed = [record for record in records if record.status == "failed"]
    for record in failed:
        setting = "" if record.setting == "main" else f"{record.setting}, "
        text = f"failed: {setting}{record.variant}, seed {record.seed}: {record.error}"
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {page.absolute()}", markup=False, highlight=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, but got {text}")
    return number
