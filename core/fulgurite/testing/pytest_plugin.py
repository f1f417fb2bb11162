# SPDX-License-Identifier: Apache-2.0
"""The kit's pytest plugin: `pytest --fulgurite-check my_plugin` makes every check of a plugin a test, without a test file.

pytest loads this module whenever it starts, wherever Fulgurite is installed: nothing heavy is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("fulgurite", "conformance of Fulgurite plugins")
    group.addoption(
        "--fulgurite-check",
        action="append",
        default=[],
        metavar="PLUGIN",
        help="also run the conformance kit on this installed plugin; may be repeated",
    )
    group.addoption("--fulgurite-quick", action="store_true", help="leave out the checks that take long")
    group.addoption("--fulgurite-strategy", metavar="NAME", help="train with this strategy, for instance ddp")
    group.addoption("--fulgurite-precision", metavar="NAME", help="train in this precision, for instance bf16-mixed")


@pytest.hookimpl(tryfirst=True)  # before -k, -m and --deselect choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test per check."""
    plugins = config.getoption("fulgurite_check")
    if not plugins:
        return
    from fulgurite.errors import FulguriteError
    from fulgurite.testing.pytest_support import calls

    settings = {name: config.getoption(f"fulgurite_{name}") for name in ("quick", "strategy", "precision")}
    for plugin in dict.fromkeys(plugins):
        parent = _Plugin.from_parent(session, name=plugin, nodeid=f"fulgurite::{plugin}")
        try:
            found = calls(plugin, **settings)
        except FulguriteError as error:
            raise pytest.UsageError(f"--fulgurite-check: {error}") from error
        items += [_Check.from_parent(parent, name=name, call=call) for name, call in found.items()]


class _Plugin(pytest.Collector):
    """Stands for a plugin in the tree of tests."""

    def collect(self) -> list[pytest.Item]:
        return []


class _Check(pytest.Item):
    """One check of one case of a component."""

    def __init__(self, *, call: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.call = call

    def runtest(self) -> None:
        self.call()

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.parent.name if self.parent else ''}: {self.name}"
