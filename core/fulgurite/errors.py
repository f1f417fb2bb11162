# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class FulguriteError(Exception):
    """Something that the user asked for cannot be done; the message says what was found and what to do."""


class PluginError(FulguriteError):
    """A plugin is unknown, broken or blocked."""


class RefusedError(FulguriteError):
    """A plugin would train wrongly in this trainer, and says so before the first step."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'a' or 'b'?"` for the known names that look like `name`, else an empty string.

    Example:
        >>> nearest("PSDK", ["PSKD", "MFAC"])
        " Did you mean 'PSKD'?"
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(by_lower[c]) for c in close)}?"


def check_argument(condition: object, name: str, owner: str, expected: str, found: object) -> None:
    """Raise `ValueError` in the form that all arguments have, unless a condition holds.

    Example:
        >>> check_argument(False, "alpha", "PSKD", "in [0, 1]", 1.2)
        Traceback (most recent call last):
        ValueError: Expected `alpha` of PSKD to be in [0, 1], but got 1.2.
    """
    if not condition:
        raise ValueError(f"Expected `{name}` of {owner} to be {expected}, but got {found!r}.")


def check_choice(value: object, choices: Iterable[object], name: str, owner: str) -> None:
    """Raise `ValueError` unless an argument is one of certain values."""
    choices = list(choices)
    check_argument(value in choices, name, owner, f"one of {', '.join(map(repr, choices))}", value)


def is_number(value: object) -> bool:
    """Return whether an argument is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
