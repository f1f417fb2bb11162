# SPDX-License-Identifier: Apache-2.0
"""Processes that are cheap to start, stop with their parent and cannot harm it. Imports no torch in the parent."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from fulgurite.errors import FulguriteError
from fulgurite.experiment.plan import Run
from fulgurite.records import RunRecord

_PRELOADED = ["fulgurite.experiment.worker", "fulgurite.tasks", "fulgurite_datamodules.digits", "sklearn.datasets"]
"""What every run needs; those that are not installed are left out."""


@dataclass(frozen=True)
class Slot:
    """The share of the machine that a run may use.

    Args:
        threads: Threads of torch on the CPU.
        cuda_device: The only CUDA device that the run sees, of those that are visible here; None for all.
    """

    threads: int
    cuda_device: int | None = None


@dataclass(frozen=True)
class Message:
    """What a child tells its parent.

    Args:
        kind: `"epoch"`: (epoch, planned epochs). `"done"`: the result. `"failed"`: a message for the user.
        content: See `kind`.
    """

    kind: Literal["epoch", "done", "failed"]
    content: Any


class Child:
    """A process with a pipe to it.

    The process writes what it prints to a log, and ends when its parent ends, however that happens.

    Args:
        target: Called in the process as `target(send, *arguments)`; a function of a module, whose result is sent.
        arguments: Its arguments.
        log: File for standard output and error.
        slot: The share of the machine.
    """

    def __init__(self, target: Callable[..., Any], arguments: Sequence[Any], log: Path, slot: Slot) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.connection, theirs = multiprocessing.Pipe()
        self.process: BaseProcess = _context().Process(  # type: ignore[attr-defined]
            target=_enter, args=(target, tuple(arguments), log, slot, theirs)
        )
        self.process.start()
        theirs.close()

    def receive(self) -> Message | None:
        """Return the next message; None if the process has ended without one."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def last_words(self) -> str:
        """Return how the process ended that could not say so itself."""
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            return "The process was killed; perhaps the memory was not enough."
        by = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"The process {by} before it had a result."

    def stop(self) -> None:
        """End the process, and wait until it has ended."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


def train_run(send: Callable[[Message], None], run: Run, work: Path, fingerprint: str) -> RunRecord:
    """Train one run; the target of a `Child`."""
    from fulgurite.experiment.worker import train

    return train(run, work, fingerprint, lambda epoch, epochs: send(Message("epoch", (epoch, epochs))))


def check_runs(
    send: Callable[[Message], None], runs: Sequence[Run], work: Path
) -> tuple[dict[tuple[str, str], str], int]:
    """Check all runs; the target of a `Child`."""
    from fulgurite.experiment.worker import check

    return check(runs, work)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _context() -> BaseContext:
    """Fork from a server that has imported everything and trained nothing; elsewhere start afresh."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # The server ignores Ctrl-C only when it has imported everything; it inherits from here that it does so at once.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return context


def _enter(
    target: Callable[..., Any], arguments: tuple[Any, ...], log: Path, slot: Slot, connection: Connection
) -> None:
    """Run inside the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    if slot.cuda_device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot.cuda_device] if visible else str(slot.cuda_device)
    try:
        import torch

        torch.set_num_threads(slot.threads)
        result = target(connection.send, *arguments)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        connection.send(Message("failed", _say(error)))
    else:
        connection.send(Message("done", result))
    sys.stdout.flush()
    sys.stderr.flush()


def _say(error: BaseException) -> str:
    """Return an error in a line: of a long one the beginning and the end, which is where causes stand."""
    if isinstance(error, FulguriteError):
        return str(error)
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1].strip()}"


def _end_with_parent(connection: Connection) -> None:
    """Wait for a message that never comes, but for the end of the parent."""
    with contextlib.suppress(EOFError, OSError):
        connection.poll(None)
    os._exit(1)
