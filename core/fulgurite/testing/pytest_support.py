# SPDX-License-Identifier: Apache-2.0
"""The conformance kit under pytest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fulgurite.errors import FulguriteError
from fulgurite.plugin import Component, Plugin
from fulgurite.registry import registry
from fulgurite.testing.case import Case
from fulgurite.testing.runner import all_checks, cases_of, check_component
from fulgurite.testing.trainers import trainer_settings


def parametrize_with_checks(
    *plugins: str, quick: bool = False, strategy: str | None = None, precision: str | None = None
) -> pytest.MarkDecorator:
    """Return the pytest decorator that gives a test the argument `check`: each check of each component, to be called.

    A check that does not apply is skipped with its reason.

    Args:
        *plugins: Slugs of installed plugins.
        quick: Whether to leave out the checks that take long.
        strategy: The strategy of every training, `"ddp"` for instance, on one device; by default Lightning's.
        precision: The precision of every training, for instance `"bf16-mixed"`.

    Raises:
        FulguriteError: If no plugin is named, or the kit cannot train with this strategy and precision.
        PluginError: If a plugin is not installed or broken.
    """
    if not plugins:
        raise FulguriteError("Expected the slug of at least one plugin, but got none: nothing would be checked.")
    found = [
        pytest.param(call, id=name)
        for plugin in plugins
        for name, call in calls(plugin, quick=quick, strategy=strategy, precision=precision).items()
    ]
    return pytest.mark.parametrize("check", found)


def calls(slug: str, *, quick: bool, strategy: str | None, precision: str | None) -> dict[str, Callable[[], None]]:
    """Return what runs each check of a plugin as a test, by component, case and check.

    Raises:
        FulguriteError: If the kit cannot train with this strategy and precision.
        PluginError: If the plugin is not installed or broken.
    """
    trainer_settings(strategy, precision)
    chosen = {"strategy": strategy, "precision": precision}
    plugin = registry().plugin(slug)
    found: dict[str, Callable[[], None]] = {}
    for component in plugin.components:
        for case in cases_of(plugin, component):
            for wanted in all_checks().values():
                if component.kind in wanted.kinds and (wanted.quick or not quick):
                    name = "-".join(filter(None, (component.name, case.label, wanted.name)))
                    found[name] = functools.partial(_run, component, plugin, case, wanted.name, chosen)
    return found


def _run(component: Component, plugin: Plugin, case: Case, name: str, chosen: Mapping[str, Any]) -> None:
    for result in check_component(component, plugin, cases=[case], names=[name], **chosen):
        if result.status == "inapplicable":
            pytest.skip(result.reason)
        if result.status == "fail":
            pytest.fail(f"{result.subject}: {result.check}: {result.reason}\n{result.detail}", pytrace=False)
