# SPDX-License-Identifier: Apache-2.0
"""What is installed: the plugins that distributions declare in the entry-point group `fulgurite.plugins`.

Entry points are read once per process, from the metadata of distributions; a manifest is imported when it is first asked
for, a component when it is first used. A plugin that cannot be imported, is declared twice or is blocked has a reason,
and the others work. Nothing here imports torch.

Example:
    >>> plugin, component = registry().find("PSKD")
    >>> plugin.name, component.kind
    ('ps_kd', 'intervention')
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fulgurite.errors import PluginError, nearest
from fulgurite.plugin import Component, Plugin, load_target

GROUP = "fulgurite.plugins"
BLOCK = "FULGURITE_BLOCK"


@dataclass(frozen=True)
class Entry:
    """One line of a distribution's entry points; reading it has executed none of the distribution's code.

    Args:
        name: The slug of the plugin.
        target: Where its manifest is: `"package:plugin"`.
        distribution: The distribution that declares it.
        version: The version of the distribution.
        summary: The summary line of the distribution.
    """

    name: str
    target: str
    distribution: str
    version: str
    summary: str

    @property
    def builtin(self) -> bool:
        """Whether Fulgurite itself declares it."""
        return self.distribution == "fulgurite"


class Registry:
    """The plugins of a process.

    Args:
        entries: What distributions declare, for instance the result of `discover`.
        blocked: Names of plugins that shall not be used.
    """

    def __init__(self, entries: Iterable[Entry], blocked: Iterable[str] = ()) -> None:
        self.entries: tuple[Entry, ...] = tuple(sorted(entries, key=lambda entry: (entry.name, entry.distribution)))
        self.blocked: frozenset[str] = frozenset(blocked)
        self._loaded: dict[str, Plugin] = {}
        self._broken: dict[str, str] = {}
        self._causes: dict[str, BaseException] = {}

    def block(self, name: str) -> None:
        """Refuse a plugin from now on, whether it is installed or not."""
        self.blocked |= {name}

    def problems(self) -> dict[str, str]:
        """Return the reason, by name, for each entry that cannot be used: broken, clashing or blocked.

        A manifest that nobody has asked for yet has not been tried; `plugins` tries all.
        """
        reasons = {entry.name: self._reason(entry.name) for entry in self.entries}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def plugin(self, name: str) -> Plugin:
        """Return the manifest called `name`, importing it the first time.

        Raises:
            PluginError: If it is not installed, cannot be imported, is declared by two distributions or is blocked.
        """
        found = [entry for entry in self.entries if entry.name == name]
        if not found:
            known = [entry.name for entry in self.entries]
            raise PluginError(f"No plugin {name!r} is installed.{nearest(name, known)} `fulgurite list` shows all.")
        if self._reason(name) is None and name not in self._loaded:
            self._load(found[0])
        reason = self._reason(name)
        if reason is not None:
            raise PluginError(f"Plugin {name!r} cannot be used: {reason}") from self._causes.get(name)
        return self._loaded[name]

    def plugins(self) -> list[Plugin]:
        """Return every manifest that can be imported, by name; this executes the manifests of all distributions."""
        found = []
        for name in dict.fromkeys(entry.name for entry in self.entries):
            try:
                found.append(self.plugin(name))
            except PluginError:
                continue  # the reason is among the problems
        return found

    def find(self, name: str) -> tuple[Plugin, Component]:
        """Return a component and its plugin, by short name (`"PSKD"`) or qualified name (`"ps_kd.PSKD"`).

        Raises:
            PluginError: If no plugin has it, or several have a component of that short name.
        """
        slug, _, short = name.rpartition(".")
        plugins = [self.plugin(slug)] if slug else self.plugins()
        found = [(plugin, part) for plugin in plugins for part in plugin.components if part.name == short]
        if len(found) == 1:
            return found[0]
        if found:
            choices = " or ".join(f"`{plugin.name}.{short}`" for plugin, _ in found)
            raise PluginError(f"Several plugins have a component {short!r}: write {choices}.")
        owner = f"Plugin {slug!r} has no component" if slug else "No plugin has a component"
        hint = nearest(short, [part.name for plugin in plugins for part in plugin.components])
        unusable = "" if slug else "".join(f"\nPlugin {key!r}: {why}" for key, why in self.problems().items())
        raise PluginError(f"{owner} {short!r}.{hint} `fulgurite list` shows what is installed.{unusable}")

    def load(self, plugin: Plugin, target: str) -> Any:
        """Import what a manifest names: the target of a component, the claim, the bench.

        Raises:
            PluginError: If it cannot be imported; the message names the plugin, and the extras that it needs.
        """
        try:
            return load_target(target)
        except (Exception, SystemExit) as error:
            hint = self.missing_extras(plugin, error)
            raise PluginError(f"Plugin {plugin.name!r}: {target} cannot be imported: {_say(error)}.{hint}") from error

    def missing_extras(self, plugin: Plugin, error: BaseException) -> str:
        """Return how to install the extras of a plugin if `error` is about an import, else an empty string."""
        if not isinstance(error, ImportError) or not plugin.extras:
            return ""
        distribution = next((entry.distribution for entry in self.entries if entry.name == plugin.name), "fulgurite")
        return f" It needs an extra: pip install '{distribution}[{','.join(plugin.extras)}]'."

    def _reason(self, name: str) -> str | None:
        """Why a plugin cannot be used, as far as is known."""
        if name in self.blocked:
            return f"it is blocked, by the environment variable {BLOCK} or by `Registry.block`."
        owners = [f"{entry.distribution} {entry.version}" for entry in self.entries if entry.name == name]
        if len(owners) > 1:
            return f"it is declared by {' and by '.join(owners)}. Uninstall all but one."
        return self._broken.get(name)

    def _load(self, entry: Entry) -> None:
        where = f"{entry.target!r} of {entry.distribution} {entry.version}"
        try:
            manifest = importlib.metadata.EntryPoint(entry.name, entry.target, GROUP).load()
        except (Exception, SystemExit) as error:
            self._causes[entry.name] = error
            self._broken[entry.name] = f"importing {where} failed: {_say(error)}."
            return
        if not isinstance(manifest, Plugin):
            self._broken[entry.name] = (
                f"expected {where} to be a fulgurite.Plugin, but got an object of type {type(manifest).__name__}."
            )
        elif manifest.name != entry.name:
            self._broken[entry.name] = (
                f"the manifest {where} is called {manifest.name!r}, but its entry point {entry.name!r}."
            )
        else:
            self._loaded[entry.name] = manifest


def discover() -> tuple[Entry, ...]:
    """Read the entry points of all installed distributions; none of their code is executed."""
    section = f"[{GROUP}]"
    names = {
        distribution.name
        for distribution in importlib.metadata.distributions()
        if section in (distribution.read_text("entry_points.txt") or "")
    }
    return tuple(entry for name in names for entry in _declared(name))


def _declared(distribution: str) -> list[Entry]:
    """Return the entries of a distribution; by its name, so that of two versions on the path the one in use counts."""
    try:
        found = importlib.metadata.distribution(distribution)
        metadata = found.metadata.json  # parsed once: `found.name` and `found.version` would each parse it again
        name, version, summary = (str(metadata.get(key, "")) for key in ("name", "version", "summary"))
        points = [point for point in found.entry_points if point.group == GROUP]
    except Exception as error:
        warnings.warn(f"The plugins of distribution {distribution!r} cannot be read: {_say(error)}.", stacklevel=2)
        return []
    return [Entry(point.name, point.value, name, version, summary) for point in points]


@functools.cache
def registry() -> Registry:
    """Return the registry of the process; the environment variable `FULGURITE_BLOCK="a,b"` blocks plugins by name."""
    blocked = (name.strip() for name in os.environ.get(BLOCK, "").split(","))
    return Registry(discover(), blocked=[name for name in blocked if name])


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ")
