# SPDX-License-Identifier: Apache-2.0
"""`fulgurite new NAME`: the skeleton of a distribution with one plugin, which installs and passes its tests."""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import keyword
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

import fulgurite
from fulgurite.errors import FulguriteError
from fulgurite.registry import registry

_SUFFIX = ".tmpl"  # so that no tool takes a template for source code


def run(command: str, argv: Sequence[str]) -> int:
    """Run `fulgurite new`."""
    parser = argparse.ArgumentParser(
        prog="fulgurite new", description="Write the skeleton of a distribution with a plugin of your own."
    )
    parser.add_argument("name", help="what people will call the method, such as my_method")
    parser.add_argument("--dir", default=".", type=Path, help="where the folder of that name is made (default: here)")
    options = parser.parse_args(argv)
    folder = scaffold(options.name, options.dir)
    sys.stdout.write(
        f"Wrote {folder}, with a small method that works as a start. Next:\n\n"
        f"  cd {folder}\n  pip install -e '.[test]'\n  pytest\n  fulgurite show {options.name}\n"
    )
    return 0


def scaffold(name: str, directory: Path) -> Path:
    """Write the skeleton of the plugin `name` into a new folder of that name, and return the folder.

    Raises:
        FulguriteError: If the name cannot be that of a new plugin, or the folder exists.
    """
    words = {
        "__slug__": name,
        "__distribution__": name.replace("_", "-"),
        "__Class__": "".join(part.capitalize() for part in name.split("_")),
        "__lower__": name.replace("_", ""),  # the prefix of what an intervention logs
        "__version__": fulgurite.__version__,
    }
    _check_name(name, words["__Class__"])
    folder = directory / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FulguriteError(
            f"Expected {folder} to be new, but it exists. Nothing was written; choose another."
        ) from None
    except OSError as error:
        raise FulguriteError(f"The folder {folder} cannot be made: {error.strerror}.") from error
    for path, template in _templates(importlib.resources.files("fulgurite") / "templates" / "plugin"):
        target = folder / _fill(path.removesuffix(_SUFFIX), words)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_fill(template.read_text(encoding="utf-8"), words), encoding="utf-8")
    return folder


def _check_name(name: str, component: str) -> None:
    if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) is None:
        expected, found = "a lower-case slug such as my_method", repr(name)
    elif any(map(keyword.iskeyword, (name, component))) or keyword.issoftkeyword(name):
        expected, found = "usable as the name of a module and a class", f"{name!r}, a keyword of Python"
    elif any(entry.name == name for entry in registry().entries):
        expected, found = "new", f"{name!r}, a plugin that is installed"
    elif importlib.util.find_spec(name) is not None:
        expected, found = "new", f"{name!r}, a module that is installed"
    elif any(part.name == component for plugin in registry().plugins() for part in plugin.components):
        expected, found = "new", f"{name!r}, whose class would be {component}, a component that is installed"
    else:
        return
    raise FulguriteError(f"Expected the name of the plugin to be {expected}, but got {found}. Choose another.")


def _templates(folder: Traversable, above: str = "") -> Iterator[tuple[str, Traversable]]:
    """Yield the path below the template's folder, and the file, of each template."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        path = f"{above}{item.name}"
        if item.is_dir():
            yield from _templates(item, f"{path}/")
        elif path.endswith(_SUFFIX):
            yield path, item


def _fill(text: str, words: dict[str, str]) -> str:
    for placeholder, word in words.items():
        text = text.replace(placeholder, word)
    return text
