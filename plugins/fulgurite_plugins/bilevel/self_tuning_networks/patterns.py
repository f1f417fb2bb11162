# SPDX-License-Identifier: Apache-2.0
"""Patterns of the names of layers and parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a qualified name fits one of the patterns, in which `*` stands for anything, dots included.

    Example:
        >>> matches("net.0.weight", ["net.*"])
        True
    """
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
