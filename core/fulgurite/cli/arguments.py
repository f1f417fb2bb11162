# SPDX-License-Identifier: Apache-2.0
"""What a command line and its configuration files mention: keys, and words that may be names of components."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fulgurite.plugin import Component, Plugin
from fulgurite.registry import registry

_FILES = (".yaml", ".yml", ".json")


@dataclass
class Mentioned:
    """What arguments mention.

    Attributes:
        values: Value by dotted key: `model.network` also for `model.init_args.network`, `model` also for
            `model.class_path`.
        files: The configuration file that a key stands in, by dotted key.
        words: All texts that are identifiers.
    """

    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)

    def under(self, key: str) -> bool:
        """Return whether a key, or some key inside it, is given."""
        return any(given == key or given.startswith(f"{key}.") for given in self.values)

    def add(self, key: str, value: Any, file: Path | None = None) -> None:
        """Add a value: a scalar, a nested mapping, a list, or a text that is the path of a configuration file."""
        folder = file.parent if file else Path()
        if isinstance(value, str) and value.endswith(_FILES) and (folder / value).is_file():
            file = folder / value
            value = _load(file.read_text(encoding="utf-8"))
        elif isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            value = _load(value)
        if file:
            self.files.setdefault(key, file)
        if isinstance(value, Mapping):
            for name, part in value.items():
                inside = name in ("init_args", "class_path", "dict_kwargs")
                self.add(key if inside else f"{key}.{name}".lstrip("."), part, file)
        elif isinstance(value, list | tuple):
            for part in value:
                self.add(key, part, file)
        else:
            self.values[key] = value
            if isinstance(value, str) and value.isidentifier():
                self.words.add(value)


def mentioned(args: Sequence[str] | Mapping[str, Any]) -> Mentioned:
    """Read the words of a command line, or a nested configuration, and the configuration files that they name."""
    found = Mentioned()
    if isinstance(args, Mapping):
        found.add("", args)
        return found
    key = ""
    for word in args:
        option, equals, value = word.partition("=")
        if word.startswith("-"):
            key = option.lstrip("-").removesuffix("+").replace(".init_args", "").removesuffix(".class_path")
        if equals or not word.startswith("-"):
            found.add("" if key in ("config", "c") else key, value if equals else word)
    return found


def _load(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # the parser reports it
        return None


def owners(name: str) -> list[tuple[Plugin, Component]]:
    """Return the components of that name, with their plugins."""
    return [(plugin, part) for plugin in registry().plugins() for part in plugin.components if part.name == name]


def import_components(words: set[str]) -> None:
    """Import the components that are among the words, so that Lightning finds them by their short names.

    Raises:
        PluginError: If one of them cannot be imported.
    """
    for word in sorted(words):
        found = owners(word)
        if len(found) == 1:
            registry().load(found[0][0], found[0][1].target)


def find_class(name: str, base: type) -> Any:
    """Return the class, or the function that makes an object, of an import path or a short name; None if there is none."""
    module, _, last = name.rpartition(".")
    if not module:
        return next((found for found in _subclasses(base) if found.__name__ == last), None)
    try:
        return getattr(importlib.import_module(module), last, None)
    except ImportError:  # the parser reports it
        return None


def overrides(target: Any, base: type, method: str) -> bool:
    """Return whether a class has a method that is not that of `base`."""
    return getattr(target, method, None) not in (None, getattr(base, method))


def takes(target: Any, name: str) -> bool:
    """Return whether a class, or a function, has an argument, be it by handing `**kwargs` on to its base class."""
    makers = [target]
    if inspect.isclass(target):
        makers = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    for maker in filter(None, makers):
        parameters = inspect.signature(maker).parameters
        if name in parameters:
            return True
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False


def _subclasses(base: type) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
