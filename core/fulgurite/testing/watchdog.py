# SPDX-License-Identifier: Apache-2.0
"""What hangs is ended, said to hang where it hung, and the checks after it are run."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TIME_LIMIT = 300.0
"""Seconds that a check may take; what the kit trains takes a few, and more only if something waits for ever."""

GRACE = 60.0
"""Seconds after the limit at which the process is ended, if what hangs could not be."""

_AGAIN = 5.0
"""Seconds after which what hangs once more while it is being ended is interrupted again."""


class HangError(BaseException):
    """Raised inside what hangs; no `Exception`, which components catch."""


@contextmanager
def ended_after(seconds: float | None = None) -> Iterator[None]:
    """Raise `HangError` in the block if it takes longer than `seconds`, by default `TIME_LIMIT`.

    In the main thread of a system with SIGALRM, an alarm interrupts Python code, also while it sleeps or waits for a lock, a
    queue, a file or a process. Where that does not reach (compiled code that never returns, another thread, Windows),
    the process prints where it hangs and ends with status 70 after `GRACE` seconds more: a build must not wait for ever.
    """
    limit = TIME_LIMIT if seconds is None else seconds
    last = threading.Timer(limit + GRACE, _end_process, (limit,))
    last.daemon = True
    last.start()
    try:
        if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
            with _alarm(limit):
                yield
        else:
            yield
    finally:
        last.cancel()
        last.join()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise in the block by SIGALRM; an alarm that somebody else has set goes on afterwards."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise HangError(f"it did not end in {seconds:g} s, and hung in {_where(frame)}")

    handler: Any = signal.signal(signal.SIGALRM, interrupt)
    begin = time.monotonic()
    others, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if others > 0.0:
            signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - begin), 0.001), interval)


def _where(frame: FrameType | None) -> str:
    """Return function, file and line of a frame, passing over what the standard library waits in."""
    standard = os.path.dirname(os.__file__)
    found = frame
    while found is not None and _is_standard(found.f_code.co_filename, standard):
        found = found.f_back
    found = found or frame
    return (
        "an unknown place" if found is None else f"{found.f_code.co_name} ({found.f_code.co_filename}:{found.f_lineno})"
    )


def _is_standard(file: str, standard: str) -> bool:
    return file.startswith((standard, "<frozen")) and "site-packages" not in file


def _end_process(seconds: float) -> None:
    sys.__stderr__.write(f"\nA check did not end in {seconds:g} s and cannot be interrupted. It hangs here:\n")  # type: ignore[union-attr]
    faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]
    os._exit(70)
