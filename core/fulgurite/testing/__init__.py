# SPDX-License-Identifier: Apache-2.0
"""The conformance kit: what every plugin must survive, ours or a stranger's.

In a repository of your own, this is a whole test file:

    from fulgurite.testing import parametrize_with_checks

    @parametrize_with_checks("my_plugin")
    def test_conformance(check):
        check()

or, without a file, `pytest --fulgurite-check my_plugin`. What imports torch is imported when it is first used: pytest loads
the plugin of this package whenever it starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fulgurite.testing.case import Case
from fulgurite.testing.check import CheckError, InapplicableError, Result, check, expect

if TYPE_CHECKING:
    from fulgurite.testing.pytest_support import parametrize_with_checks
    from fulgurite.testing.runner import all_checks, check_component

_HEAVY = {"all_checks": "runner", "check_component": "runner", "parametrize_with_checks": "pytest_support"}

__all__ = [
    "Case",
    "CheckError",
    "InapplicableError",
    "Result",
    "all_checks",
    "check",
    "check_component",
    "expect",
    "parametrize_with_checks",
]


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(importlib.import_module(f"fulgurite.testing.{_HEAVY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
