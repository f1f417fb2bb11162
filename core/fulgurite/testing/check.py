# SPDX-License-Identifier: Apache-2.0
"""What a check is, how checks are found and run, and what comes out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fulgurite.plugin import Component, Plugin
from fulgurite.testing.case import Case

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
        run: Called with the laboratory; raises `CheckError` or `InapplicableError`.
        quick: Whether `--quick` runs it.
        promise: The first line of the function's docstring: what would break for a user.
    """

    name: str
    kinds: tuple[str, ...]
    run: Callable[[Any], None]
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
        reason: One line: why it failed or does not apply.
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

    @property
    def subject(self) -> str:
        """The component, and which case of it."""
        return f"{self.component} ({self.label})" if self.label else self.component


CHECKS: dict[str, Check] = {}
"""Every check by name, in the order in which they are run."""


def check(*kinds: str, quick: bool = True) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function `check_<name>(lab)` as a check of components of certain kinds."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        name = function.__name__.removeprefix("check_")
        promise = (function.__doc__ or "").strip().split("\n")[0]
        CHECKS[name] = Check(name, kinds, function, quick, promise)
        return function

    return register


def run_check(wanted: Check, lab: Any, plugin: Plugin, component: Component, case: Case) -> Result:
    """Run one check on one case, and turn whatever happens into a result."""

    def result(status: Status, reason: str = "", detail: str = "") -> Result:
        seconds = time.perf_counter() - start
        return Result(plugin.name, component.name, case.label, wanted.name, status, reason, detail, seconds)

    start = time.perf_counter()
    if wanted.name in case.inapplicable:
        return result("inapplicable", case.inapplicable[wanted.name])
    try:
        wanted.run(lab)
    except InapplicableError as reason:
        return result("inapplicable", str(reason))
    except CheckError as error:
        return result("fail", str(error), traceback.format_exc())
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        return result("fail", f"{type(error).__name__}: {line}", traceback.format_exc())
    return result("pass")


def expect(condition: object, reason: str) -> None:
    """Raise `CheckError(reason)` unless the condition holds."""
    if not condition:
        raise CheckError(reason)
