# SPDX-License-Identifier: Apache-2.0
"""`fulgurite show NAME`: the card of a plugin, its paper, its components with their arguments, and how to use them."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text

from fulgurite.errors import PluginError, nearest
from fulgurite.plugin import Component, Paper, Plugin
from fulgurite.registry import Entry, registry


def run(argv: Sequence[str]) -> int:
    """Run `fulgurite show`."""
    parser = argparse.ArgumentParser(prog="fulgurite show", description="Show a plugin, or one of its components.")
    parser.add_argument("name", help="a plugin such as ps_kd, or a component such as PSKD")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    plugin, components = look_up(options.name)
    facts = describe(plugin, components)
    if options.json:
        import json

        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        _print(facts)
    return 0


def look_up(name: str) -> tuple[Plugin, tuple[Component, ...]]:
    """Return the plugin that a name means, and those of its components that are asked for.

    Raises:
        PluginError: If nothing is called so, several components are, or the plugin cannot be used.
    """
    plugins = registry()
    slugs = [entry.name for entry in plugins.entries]
    if name in slugs:
        plugin = plugins.plugin(name)
        return plugin, plugin.components
    names = [component.name for plugin in plugins.plugins() for component in plugin.components]
    if "." not in name and name not in names:
        unusable = "".join(f"\nPlugin {key!r}: {why}" for key, why in plugins.problems().items())
        raise PluginError(
            f"No plugin and no component is called {name!r}.{nearest(name, [*slugs, *names])} `fulgurite list` shows what "
            f"is installed.{unusable}"
        )
    plugin, component = plugins.find(name)
    return plugin, (component,)


def describe(plugin: Plugin, components: Sequence[Component]) -> dict[str, Any]:
    """Return everything that is shown, as plain data."""
    entry = next(entry for entry in registry().entries if entry.name == plugin.name)
    return {
        "name": plugin.name,
        "family": plugin.family,
        "summary": plugin.summary,
        "distribution": entry.distribution,
        "version": entry.version,
        "paper": {**asdict(plugin.paper), "citation": plugin.paper.citation} if plugin.paper else None,
        "extras": list(plugin.extras),
        "capabilities": list(plugin.capabilities),
        "claim": plugin.claim,
        "bench": plugin.bench,
        "card": _card(plugin, entry),
        "support": _support(plugin.name),
        "components": [_component(plugin, component, entry) for component in components],
    }


def arguments(target: Any) -> list[dict[str, Any]]:
    """Return name, type, default and meaning of each argument, from the signature and the docstring's `Args`."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    meanings = _meanings(inspect.getdoc(target) or "")
    if isinstance(target, type):
        meanings = {**_meanings(inspect.getdoc(target.__init__) or ""), **meanings}  # type: ignore[misc]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        {
            "name": stars.get(parameter.kind, "") + parameter.name,  # type: ignore[call-overload]
            "type": "" if parameter.annotation is parameter.empty else _type(parameter.annotation, target),
            "required": parameter.default is parameter.empty and parameter.kind not in stars,
            "default": None if parameter.default is parameter.empty else _default(parameter.default),
            "meaning": meanings.get(parameter.name, ""),
        }
        for parameter in parameters
    ]


def _type(annotation: Any, target: Any) -> str:
    """Spell a type; names for a `Literal` of the target's module are written out as their choices."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    known = getattr(inspect.getmodule(target), "__dict__", {})

    def spell(word: re.Match[str]) -> str:
        meaning = known.get(word[0])
        return " | ".join(map(repr, get_args(meaning))) if get_origin(meaning) is Literal else word[0]

    return re.sub(r"(?<![\w.'\"])[A-Za-z_]\w*(?![\w.'\"\[])", spell, text)


def _default(value: Any) -> str:
    return value.__qualname__ if inspect.isroutine(value) or isinstance(value, type) else repr(value)


def _meanings(docstring: str) -> dict[str, str]:
    """Read the section `Args` of a Google docstring."""
    _, found, section = docstring.partition("\nArgs:\n")
    found_arguments: dict[str, str] = {}
    name = ""
    for line in section.splitlines() if found else ():
        if line.strip() and not line.startswith("    "):
            break
        match = re.match(r"    \*{0,2}(\w+)(?: \([^)]*\))?: *(.*)", line)
        if match:
            name = match[1]
            found_arguments[name] = match[2].strip()
        elif name:
            found_arguments[name] = f"{found_arguments[name]} {line.strip()}".strip()
    return found_arguments


def _component(plugin: Plugin, component: Component, entry: Entry) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": component.name, "kind": component.kind, "summary": component.summary}
    try:
        target = registry().load(plugin, component.target)
    except PluginError as error:
        return {**facts, "problem": str(error), "arguments": [], "use": {}}
    known = arguments(target)
    return {**facts, "problem": None, "arguments": known, "use": _use(component, _exporter(component, entry), known)}


def _exporter(component: Component, entry: Entry) -> str:
    """Return the module to import from: that of the manifest if it exports the component, else where it is defined."""
    manifest = importlib.import_module(entry.target.partition(":")[0])
    return manifest.__name__ if hasattr(manifest, component.name) else component.target.partition(":")[0]


def _use(component: Component, module: str, known: list[dict[str, Any]]) -> dict[str, str]:
    """Return one line of use per way that fits the kind of component."""
    required = [argument["name"] for argument in known if argument["required"]]
    call = f"{component.name}({', '.join(f'{name}=...' for name in required)})"
    use = {"import": f"from {module} import {component.name}", "python": call}
    if component.kind in ("intervention", "callback"):
        use["python"] = f"Trainer(callbacks=[{call}])"
        given = "".join(f" --trainer.callbacks.{name}=..." for name in required)
        use["command line"] = f"fulgurite fit --trainer.callbacks+={component.name}{given}"
        use["environment"] = f'FULGURITE="{call}" python train.py'
    elif component.kind == "datamodule":
        use["python"] = f"trainer.fit(module, {call})"
        given = "".join(f" --data.{name}=..." for name in required)
        use["command line"] = f"fulgurite fit --data={component.name}{given}"
    elif component.kind == "task":
        use["python"] = f"trainer.fit({call})"
        given = "".join(f" --model.{name}=..." for name in required)
        use["command line"] = f"fulgurite fit --model={component.name}{given}"
    return use


def _plain_equations(card: str) -> str:
    """Show equations as code, which a terminal can print, and leave comments out."""
    card = re.sub(r"<!--.*?-->", "", card, flags=re.DOTALL)
    card = re.sub(r"\$\$\n?(.+?)\n?\$\$", r"```\n\1\n```", card, flags=re.DOTALL)
    return _INLINE_EQUATION.sub(r"`\1`", card)


_INLINE_EQUATION = re.compile(r"(?<![\w$])\$([^$\n]+?)\$(?![\w$])")


def _card(plugin: Plugin, entry: Entry) -> str | None:
    if plugin.card is None:
        return None
    module = importlib.import_module(entry.target.partition(":")[0])
    path = Path(module.__file__ or "").parent / plugin.card
    return path.read_text(encoding="utf-8") if path.is_file() else None


def support_path(slug: str) -> Path:
    """Return where `fulgurite check SLUG --support` writes what a plugin supports: beside its manifest.

    Raises:
        PluginError: If the manifest stands in no package, whose folder is its own.
    """
    entry = next(entry for entry in registry().entries if entry.name == slug)
    module = importlib.import_module(entry.target.partition(":")[0])
    if not hasattr(module, "__path__"):
        raise PluginError(
            f"Plugin {slug!r}: SUPPORT.md stands beside the manifest, in the folder of its package, but {module.__name__} "
            f"is a single module. Make it a package."
        )
    return Path(module.__path__[0]) / "SUPPORT.md"


def _support(slug: str) -> str | None:
    try:
        path = support_path(slug)
    except PluginError:
        return None
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if facts["card"]:
        console.print(Markdown(_plain_equations(facts["card"])))
    else:
        console.print(Text(facts["name"], style="bold"), Text(facts["summary"]), sep="\n")
    if facts["support"]:
        console.print(Markdown(_plain_equations(facts["support"])))
    console.print()
    if facts["paper"]:
        _print_paper(console, Paper(**{key: value for key, value in facts["paper"].items() if key != "citation"}))
    _print_line(
        console, "plugin", f"{facts['name']} ({facts['family']}), from {facts['distribution']} {facts['version']}"
    )
    if facts["extras"]:
        _print_line(console, "extras", f"pip install '{facts['distribution']}[{','.join(facts['extras'])}]'")
    for capability in facts["capabilities"]:
        _print_line(console, "needs, does", capability)
    for component in facts["components"]:
        _print_component(console, component)


def _print_paper(console: Console, paper: Paper) -> None:
    _print_line(console, "paper", f"{', '.join(paper.authors)}. {paper.title}. {paper.venue} {paper.year}.")
    _print_line(console, "identifier", paper.identifier)
    if paper.code:
        _print_line(console, "authors' code", f"{paper.code} (licence: {paper.code_licence or 'not known'})")


def _print_component(console: Console, component: dict[str, Any]) -> None:
    title = f"{component['name']} ({component['kind']})"
    console.print()
    console.print(Text(title, style="bold"), Text(component["summary"]))
    if component["problem"]:
        console.print(Text(f"  broken: {component['problem']}", style="red"))
    for way, line in component["use"].items():
        _print_line(console, f"  {way}", line)
    console.print()
    for one in component["arguments"]:
        default = "" if one["default"] is None else f" = {one['default']}"
        type_ = f": {one['type']}" if one["type"] else ""
        required = "  (required)" if one["required"] else ""
        console.print(
            Text.assemble("  ", (one["name"], "bold"), f"{type_}{default}", (required, "dim")), soft_wrap=True
        )
        if one["meaning"]:
            console.print(Padding(Text(_INLINE_EQUATION.sub(r"\1", one["meaning"])), (0, 0, 0, 6)))


def _print_line(console: Console, label: str, text: str) -> None:
    """Print a label and a text, unwrapped: lines of use are there to be copied."""
    console.print(Text(f"{label:15}", style="dim"), Text(text), soft_wrap=True)
