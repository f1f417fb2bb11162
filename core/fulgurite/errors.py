# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on."""

from __future__ import annotations

import difflib
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
