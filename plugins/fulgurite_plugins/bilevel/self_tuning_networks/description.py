# SPDX-License-Identifier: Apache-2.0
"""Targets as plain data, as configuration files spell them: an import path and arguments."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from fulgurite_plugins.bilevel.self_tuning_networks import targets
from fulgurite_plugins.bilevel.self_tuning_networks.targets import InputFunction, Target


def describe_target(target: Target) -> dict[str, Any]:
    """Return the `class_path` and the `init_args` of a target, whose arguments are its attributes of the same names."""
    kind = type(target)
    arguments = {name: getattr(target, name) for name in inspect.signature(kind).parameters}
    if isinstance(target, InputFunction):
        function: Any = target.function
        arguments = {"function": f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def build_target(description: Any) -> Target:
    """Return the target that plain data describe: `class_path` and `init_args`, or the import path of a function.

    Raises:
        ValueError: If it cannot be imported, or is none.
    """
    if isinstance(description, str):
        description = {"class_path": "InputFunction", "init_args": {"function": description}}
    path, arguments = description["class_path"], dict(description.get("init_args") or {})
    kind = _imported(path)
    if not (isinstance(kind, type) and issubclass(kind, Target)):
        raise ValueError(f"Expected `class_path` to name a target, but got {path!r}.")
    if kind is InputFunction:
        arguments["function"] = _imported(arguments["function"])
    return kind(**arguments)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module or targets.__name__), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"Expected {path!r} to be the import path of a class or function: {error}.") from error
