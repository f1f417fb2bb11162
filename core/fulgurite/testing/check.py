# SPDX-License-Identifier: Apache-2.0
"""What a check is, how checks are found and run, and what comes out."""

from __future__ import annotations

import contextlib
import io
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fulgurite.plugin import Component, Plugin
from fulgurite.testing.case import Case

_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

Status = Literal["pass", "fail", "inapplicable"]


class CheckError(AssertionError):
    """The component broke the promise that the check is about; the message says how, in one line."""


class InapplicableError(Exception):
    """The check does not apply to this component, found out while it was being set up; the message says why."""


@dataclass(frozen=True)
class Check:
    """One promise that components of certain kinds are held to.

    Args:
        name: The name in tables, that of the function without `check_`.
        kinds: The kinds of components that it applies to.
        run: Called with the laboratory; raises `CheckError` or `InapplicableError`. What it returns is a note to the pass.
        quick: Whether `--quick` runs it.
        promise: The first line of the function's docstring: what would break for a user.
    """

    name: str
    kinds: tuple[str, ...]
    run: Callable[[Any], str | None]
    quick: bool
    promise: str


@dataclass(frozen=True)
class Result:
    """The outcome of one check on one case of a component.

    Args:
        plugin: Slug of the plugin.
        component: Name of the component.
        label: Which of its cases.
        check: Name of the check.
        status: `"pass"`, `"fail"` or `"inapplicable"`.
        reason: One line: why it failed or does not apply, or how it passed: by a refusal. Colours and other control
            characters, which XML forbids and a terminal obeys, are taken out of it and of `detail`.
        detail: The traceback of a failure.
        seconds: How long it took.
    """

    plugin: str
    component: str
    label: str
    check: str
    status: Status
    reason: str = ""
    detail: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("reason", "detail"):
            object.__setattr__(self, name, _CONTROL.sub("", getattr(self, name)))

    @property
    def subject(self) -> str:
        """The component, and which case of it."""
        return f"{self.component} ({self.label})" if self.label else self.component


REFUSED = "refused by name"
"""How the note to a pass begins, if the component refuses to train so, and says so before training."""

CHECKS: dict[str, Check] = {}
"""Every check by name, in the order in which they are run."""


def check(*kinds: str, quick: bool = True) -> Callable[[Callable[[Any], str | None]], Callable[[Any], str | None]]:
    """Register a function `check_<name>(lab)` as a check of components of certain kinds."""

    def register(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        name = function.__name__.removeprefix("check_")
        promise = (function.__doc__ or "").strip().split("\n")[0]
        CHECKS[name] = Check(name, kinds, function, quick, promise)
        return function

    return register


def run_check(wanted: Check, lab: Any, plugin: Plugin, component: Component, case: Case) -> Result:
    """Run one check on one case, and turn whatever happens into a result.

    What the component prints is not shown, and the settings of the process that it leaves changed are put back, so that
    the next check and the next component find the same process. Only a KeyboardInterrupt, which is the user's, goes
    through.
    """
    from fulgurite.testing.surroundings import preserved
    from fulgurite.testing.watchdog import HangError, ended_after

    def result(status: Status, reason: object = "", detail: str = "") -> Result:
        seconds = time.perf_counter() - start
        line = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
        return Result(plugin.name, component.name, case.label, wanted.name, status, line, detail, seconds)

    start = time.perf_counter()
    if wanted.name in case.inapplicable:
        return result("inapplicable", case.inapplicable[wanted.name])
    try:
        with preserved(), ended_after(), contextlib.redirect_stdout(io.StringIO()):
            note = wanted.run(lab)
    except InapplicableError as reason:
        if _raised_by_the_kit(reason, wanted):
            return result("inapplicable", reason)
        return result("fail", f"the component itself raises InapplicableError: {reason}", traceback.format_exc())
    except (CheckError, HangError) as error:
        return result("fail", error, traceback.format_exc())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and what test runners raise to skip a test, silence nothing
        return result("fail", f"{type(error).__name__}: {str(error).strip()}", traceback.format_exc())
    return result("pass", note or "")


def _raised_by_the_kit(error: InapplicableError, wanted: Check) -> bool:
    """Return whether the error comes from the check, not from the component that is being checked."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    origin = str(frames[-1].f_globals.get("__name__", ""))
    return origin == wanted.run.__module__ or f"{origin}.".startswith(f"{__package__}.")


def refused(component: Any, refusal: Exception) -> str:
    """Return the note that a component refused to train so; it must have said its name.

    Raises:
        CheckError: If the message does not name it.
    """
    expect(component.name.lower() in str(refusal).lower(), f"refused without its name: {refusal}")
    return f"{REFUSED}: {refusal}"


def expect(condition: object, reason: str) -> None:
    """Raise `CheckError(reason)` unless the condition holds."""
    if not condition:
        raise CheckError(reason)
