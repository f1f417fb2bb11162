# SPDX-License-Identifier: Apache-2.0
"""The conformance kit: what every plugin must survive, ours or a stranger's.

In a repository of your own, this is a whole test file:

    from fulgurite.testing import parametrize_with_checks

    @parametrize_with_checks("my_plugin")
    def test_conformance(check):
        check()
"""

from fulgurite.testing.case import Case
from fulgurite.testing.check import CheckError, InapplicableError, Result, check, expect
from fulgurite.testing.pytest_support import parametrize_with_checks
from fulgurite.testing.runner import all_checks, check_component

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
