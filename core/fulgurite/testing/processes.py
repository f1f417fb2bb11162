# SPDX-License-Identifier: Apache-2.0
"""Two ranks on one machine: forked processes that find each other as under a cluster's launcher."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
from torch import distributed

from fulgurite.errors import RefusedError
from fulgurite.testing.check import CheckError, InapplicableError

TIME_LIMIT = 90.0
"""Seconds after which ranks that have not ended are killed."""

_GRACE = 3.0
"""Seconds that the others are given when one rank has failed: they may wait for it for ever."""

_Answer = tuple[Literal["value", "error", "refused", "inapplicable"], Any]


@contextmanager
def elsewhere(function: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Begin to compute what `function()` returns in a forked process; yield what waits for it, and returns or raises it.

    What the process has loaded or remembered since the fork is not known there. On a system that cannot fork, it is computed
    in this process when it is asked for.
    """
    try:
        _needs_fork()
    except InapplicableError:
        yield function
        return
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, writing), daemon=True)
    process.start()
    writing.close()
    try:
        yield lambda: _value(_receive([reading], TIME_LIMIT)[0])
    finally:
        process.kill()
        process.join()
        reading.close()


def _value(answer: _Answer) -> Any:
    kind, value = answer
    if kind != "value":
        raise {"refused": RefusedError, "inapplicable": InapplicableError}.get(kind, CheckError)(value)
    return value


def _needs_fork() -> None:
    """Raise InapplicableError if this system, or this process, cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise InapplicableError("this system cannot fork processes")
    if torch.cuda.is_initialized():
        raise InapplicableError("CUDA is in use in this process, which cannot be forked any more; check in a fresh one")
    if distributed.is_initialized():
        raise InapplicableError("a process group is open in this process, which the ranks would inherit")


def on_ranks(function: Callable[[int], Any], ranks: int = 2, seconds: float | None = None) -> list[Any]:
    """Return what `function(rank)` returns in each of several processes, which are forked and so need no pickling.

    Args:
        function: Called in each process with its rank; what it returns must be picklable.
        ranks: Number of processes.
        seconds: After this time they are killed, and the check has failed; None for `TIME_LIMIT`.

    Raises:
        CheckError: If one of them fails or they do not end in time.
        RefusedError: If it is raised on every rank.
        InapplicableError: If it is raised on a rank, or if this system, or this process, cannot fork.
    """
    _needs_fork()
    for _ in range(3):
        answers = _answers(function, ranks, TIME_LIMIT if seconds is None else seconds)
        if not any(kind == "error" and "EADDRINUSE" in text for kind, text in answers):
            break  # else somebody took the port between its choice and its use
    kinds = [kind for kind, _ in answers]
    if kinds == ["value"] * ranks:
        return [value for _, value in answers]
    if "inapplicable" in kinds:
        raise InapplicableError(answers[kinds.index("inapplicable")][1])
    if kinds == ["refused"] * ranks:
        raise RefusedError(answers[0][1])
    raise CheckError("; ".join(f"rank {rank}: {text}" for rank, (kind, text) in enumerate(answers) if kind != "value"))


def _answers(function: Callable[[int], Any], ranks: int, seconds: float) -> list[_Answer]:
    context = multiprocessing.get_context("fork")
    port = _free_port()
    processes, pipes = [], []
    for rank in range(ranks):
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(function, rank, ranks, port, writing), daemon=True)
        process.start()
        writing.close()  # so that the death of the process ends the pipe
        processes.append(process)
        pipes.append(reading)
    try:
        return _receive(pipes, seconds)
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _receive(pipes: list[Connection], seconds: float) -> list[_Answer]:
    """Return the answers; when one rank has failed, the others are waited for only a moment longer."""
    answers: dict[Connection, _Answer] = {}
    deadline = time.monotonic() + seconds
    while len(answers) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in answers], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            answers[pipe] = _read(pipe)
            if answers[pipe][0] != "value":
                deadline = min(deadline, time.monotonic() + _GRACE)
    late = "no answer in time: the ranks wait for each other"
    return [answers.get(pipe, ("error", late)) for pipe in pipes]


def _read(pipe: Connection) -> _Answer:
    try:
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        return "error", "the process died"


def _run(function: Callable[[int], Any], rank: int, ranks: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
    )
    _send(lambda: function(rank), pipe)


def _send(function: Callable[[], Any], pipe: Connection) -> None:
    torch.set_num_threads(1)  # a forked process must not use the thread pool of its parent
    try:
        answer: _Answer = ("value", function())
    except RefusedError as refusal:
        answer = ("refused", str(refusal))
    except InapplicableError as reason:
        answer = ("inapplicable", str(reason))
    except BaseException as error:
        lines = str(error).strip().splitlines() or [traceback.format_exc()]
        answer = ("error", f"{type(error).__name__}: {lines[0]}")
    buffer = io.BytesIO()  # tensors sent as they are would lie in shared memory that ends with this process
    torch.save(answer, buffer)
    pipe.send_bytes(buffer.getvalue())
    pipe.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
