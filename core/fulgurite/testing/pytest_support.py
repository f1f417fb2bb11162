# SPDX-License-Identifier: Apache-2.0
"""The conformance kit under pytest."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fulgurite.errors import FulguriteError
from fulgurite.registry import registry
from fulgurite.testing.runner import all_checks, cases_of, check_component

if TYPE_CHECKING:
    import pytest


def parametrize_with_checks(*plugins: str, quick: bool = False) -> pytest.MarkDecorator:
    """Return the pytest decorator that gives a test the argument `check`: each check of each component, to be called.

    A check that does not apply is skipped with its reason.

    Args:
        *plugins: Slugs of installed plugins.
        quick: Whether to leave out the checks that take long.

    Raises:
        FulguriteError: If no plugin is named.
        PluginError: If a plugin is not installed or broken.
    """
    import pytest

    if not plugins:
        raise FulguriteError("Expected the slug of at least one plugin, but got none: nothing would be checked.")
    found = []
    for plugin in map(registry().plugin, plugins):
        for component in plugin.components:
            for case in cases_of(plugin, component):
                for wanted in all_checks().values():
                    if component.kind not in wanted.kinds or (quick and not wanted.quick):
                        continue
                    identity = "-".join(filter(None, (component.name, case.label, wanted.name)))
                    call = functools.partial(_run, component, plugin, case, wanted.name)
                    found.append(pytest.param(call, id=identity))
    return pytest.mark.parametrize("check", found)


def _run(component: Any, plugin: Any, case: Any, name: str) -> None:
    import pytest

    for result in check_component(component, plugin, cases=[case], names=[name]):
        if result.status == "inapplicable":
            pytest.skip(result.reason)
        if result.status == "fail":
            pytest.fail(f"{result.subject}: {result.check}: {result.reason}\n{result.detail}", pytrace=False)
