# SPDX-License-Identifier: Apache-2.0
"""Run a plan in parallel processes; keep what is finished, go on where an earlier attempt stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from fulgurite.errors import FulguriteError
from fulgurite.experiment.plan import Run
from fulgurite.experiment.process import Child, Message, Slot, check_runs, cores, train_run
from fulgurite.records import RunRecord, append_record, read_records


class Listener(Protocol):
    """What is told how a comparison goes on."""

    def started(self, run: Run) -> None:
        """A run has been started."""

    def epoch(self, run: Run, epoch: int, epochs: int | None) -> None:
        """A run has begun an epoch, counted from 1."""

    def finished(self, run: Run, record: RunRecord) -> None:
        """A run has ended."""


@dataclass(frozen=True)
class Checked:
    """A plan that has been found to work.

    Args:
        runs: All runs.
        fingerprints: The hash of what determines each run, by its key.
        cuda_devices: Number of CUDA devices that the runs are spread over; 0 if they train elsewhere.
    """

    runs: tuple[Run, ...]
    fingerprints: dict[tuple[str, str, int], str]
    cuda_devices: int = 0

    @property
    def default_jobs(self) -> int:
        """One run per CUDA device if they train there, else one per core."""
        return self.cuda_devices or cores()


def check_plan(runs: Sequence[Run], directory: Path) -> Checked:
    """Build every variant of every setting once, in a process of its own, before anything is trained.

    Raises:
        FulguriteError: If a configuration or an addition is wrong.
    """
    child = Child(check_runs, (runs, directory / "work"), directory / "logs" / "check.log", Slot(threads=1))
    try:
        message = child.receive()
        if message is None or message.kind != "done":
            raise FulguriteError(child.last_words() if message is None else message.content)
    finally:
        child.stop()
    sources, cuda_devices = message.content
    fingerprints = {run.key: run.fingerprint(sources[run.setting, run.variant]) for run in runs}
    return Checked(tuple(runs), fingerprints, cuda_devices)


def finished_records(plan: Checked, path: Path) -> dict[tuple[str, str, int], RunRecord]:
    """Return the records that need no further run: successful, and with nothing changed since."""
    return {
        record.key: record
        for record in read_records(path)
        if record.status == "ok" and plan.fingerprints.get(record.key) == record.fingerprint
    }


@dataclass
class _Pool:
    """The runs in progress."""

    plan: Checked
    directory: Path
    slots: list[Slot]
    running: dict[int, tuple[Run, Child]] = field(default_factory=dict)

    def start(self, run: Run) -> None:
        index = next(index for index in range(len(self.slots)) if index not in self.running)
        arguments = (run, self.directory / "work" / run.slug, self.plan.fingerprints[run.key])
        log = self.directory / "logs" / f"{run.slug}.log"
        self.running[index] = (run, Child(train_run, arguments, log, self.slots[index]))

    def next_messages(self) -> list[tuple[int, Message | None]]:
        connections = {child.connection: index for index, (_, child) in self.running.items()}
        ready = wait(list(connections))
        return [(connections[c], self.running[connections[c]][1].receive()) for c in ready]  # type: ignore[index]

    def record(self, index: int, message: Message | None) -> RunRecord:
        """End a run and return what came of it."""
        run, child = self.running[index]
        if message is not None and message.kind == "done":
            child.process.join(timeout=5.0)
            record: RunRecord = message.content
        else:
            reason = child.last_words() if message is None else message.content
            error = f"{reason} The log is {child.log}."
            record = RunRecord(*run.key, status="failed", error=error, fingerprint=self.plan.fingerprints[run.key])
        child.stop()
        del self.running[index]
        return record

    def stop(self) -> None:
        for _, child in self.running.values():
            child.stop()
        self.running.clear()


def run_plan(plan: Checked, directory: Path, jobs: int, listener: Listener) -> list[RunRecord]:
    """Run what is not yet done; return the records of all runs, in the order of the plan.

    Every run trains in a fresh process; its record is appended to `runs.jsonl` in `directory` when it ends. A run that
    fails, or whose process dies, is recorded as failed and does not stop the others. An exception, Ctrl-C among them,
    ends the processes; a later call goes on from the records.

    Args:
        plan: What `check_plan` has returned.
        directory: Output folder.
        jobs: Number of processes at the same time.
        listener: Told how it goes on.
    """
    path = directory / "runs.jsonl"
    records = finished_records(plan, path)
    waiting = [run for run in plan.runs if run.key not in records]
    threads = max(1, cores() // jobs)
    devices = plan.cuda_devices
    slots = [Slot(threads, index % devices if devices else None) for index in range(jobs)]
    pool = _Pool(plan, directory, slots)
    try:
        while waiting or pool.running:
            while waiting and len(pool.running) < jobs:
                run = waiting.pop(0)
                pool.start(run)
                listener.started(run)
            for index, message in pool.next_messages():
                run = pool.running[index][0]
                if message is not None and message.kind == "epoch":
                    listener.epoch(run, *message.content)
                    continue
                record = pool.record(index, message)
                append_record(path, record)
                records[record.key] = record
                listener.finished(run, record)
    finally:
        pool.stop()
    if all(record.status == "ok" for record in records.values()):
        shutil.rmtree(directory / "work", ignore_errors=True)
    return [records[run.key] for run in plan.runs]
