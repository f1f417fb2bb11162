# SPDX-License-Identifier: Apache-2.0
"""How a comparison goes on, in the terminal: bars, or plain lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fulgurite.experiment import Run
from fulgurite.records import RunRecord


class ProgressDisplay:
    """A listener of `run_plan` that shows one bar for the whole and one for each running run.

    Args:
        console: Where to.
        total: Number of runs that will be run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._overall = self._progress.add_task("runs", total=total)
        self._tasks: dict[tuple[str, str, int], Any] = {}

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, run: Run) -> None:
        """Add a bar."""
        self._tasks[run.key] = self._progress.add_task(escape(describe(run)), total=None)

    def epoch(self, run: Run, epoch: int, epochs: int | None) -> None:
        """Move the bar: the epochs before this one are done."""
        self._progress.update(self._tasks[run.key], completed=epoch - 1, total=epochs)

    def finished(self, run: Run, record: RunRecord) -> None:
        """Remove the bar; write a line if there are no bars, or if the run has failed."""
        self._done += 1
        self._progress.remove_task(self._tasks.pop(run.key))
        self._progress.update(self._overall, completed=self._done)
        if record.status == "failed":
            self._line(run, f"failed: {record.error}", "red")
        elif not self._console.is_terminal:
            self._line(run, f"{record.seconds:.1f} s", None)

    def _line(self, run: Run, text: str, style: str | None) -> None:
        line = f"[{self._done}/{self._total}] {describe(run)}: {text}"
        self._progress.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def describe(run: Run) -> str:
    """Name a run for a reader."""
    setting = "" if run.setting == "main" else f"{run.setting}, "
    return f"{setting}{run.variant}, seed {run.seed}"
