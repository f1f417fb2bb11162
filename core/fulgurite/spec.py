# SPDX-License-Identifier: Apache-2.0
"""Components as text, written as in Python: `PSKD(alpha=Schedule.constant(0.5), teacher="snapshot")`.

A text is parsed, not evaluated. It may hold names of components (short, `ps_kd.PSKD`, or the full import path of any
class), plain values, and calls of components and of `Schedule` as arguments; everything else is refused. Like a
configuration file it names classes that are imported and constructed: take it from people whom you trust.

Example:
    >>> short_name("ps_kd.PSKD(alpha=0.8)")
    'PSKD'
    >>> build("Schedule.constant(0.5)").at(3, 10)
    0.5
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from fulgurite.errors import FulguriteError, nearest
from fulgurite.plugin import Plugin
from fulgurite.registry import registry

_ALLOWED = (
    "plain values in quotes, numbers, True, False, None, lists, tuples, dictionaries, and calls such as Schedule(0.8)"
)


def build(text: str) -> Any:
    """Construct the one component that a text describes.

    Raises:
        FulguriteError: If the text cannot be read, names what is not installed, or has arguments that do not fit.
    """
    return _construct(_only(text))


def build_all(text: str) -> list[Any]:
    """Construct the components that a text describes, separated by commas.

    Raises:
        FulguriteError: As `build` does.
    """
    return [_construct(node) for node in _parse(text)]


def short_name(text: str) -> str:
    """Return the name of the component in a text, without its arguments and where it comes from.

    Raises:
        FulguriteError: If the text cannot be read.
    """
    node = _only(text)
    return _dotted(node.func if isinstance(node, ast.Call) else node).rpartition(".")[2]


def _parse(text: str) -> list[ast.expr]:
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise FulguriteError(
            f"Expected components as in Python, such as PSKD(alpha=0.8), but got {text!r}: {reason}."
        ) from None
    return body.elts if isinstance(body, ast.Tuple) and body.elts else [body]


def _only(text: str) -> ast.expr:
    nodes = _parse(text)
    if len(nodes) > 1:
        raise FulguriteError(f"Expected one component such as PSKD(alpha=0.8), but got {len(nodes)} in {text!r}.")
    return nodes[0]


def _construct(node: ast.expr) -> Any:
    """Construct from a call, or from a name alone."""
    if isinstance(node, ast.Call):
        return _call(node)
    return _call(ast.Call(func=node, args=[], keywords=[]))


def _call(node: ast.Call) -> Any:
    text = ast.unparse(node)
    plugin, target = _resolve(_dotted(node.func))
    positional = [_value(argument) for argument in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _refused(keyword.value, f"**{ast.unparse(keyword.value)}")
        if keyword.arg in named:
            raise FulguriteError(f"{text}: argument `{keyword.arg}` is given twice.")
        named[keyword.arg] = _value(keyword.value)
    _check_arguments(text, target, positional, named)
    try:
        return target(*positional, **named)
    except Exception as error:
        hint = registry().missing_extras(plugin, error) if plugin else ""
        reason = str(error) if isinstance(error, FulguriteError | ValueError) else f"{type(error).__name__}: {error}"
        raise FulguriteError(f"{text}: {reason}{hint}") from error


def _resolve(name: str) -> tuple[Plugin | None, Callable[..., Any]]:
    """Find what a dotted name means: `Schedule`, a component of a plugin, or a class anywhere."""
    if name in ("Schedule", "Schedule.constant"):
        from fulgurite.schedule import Schedule

        return None, Schedule if name == "Schedule" else Schedule.constant
    first, _, last = name.rpartition(".")
    known = [entry.name for entry in registry().entries]
    if first and first not in known:
        return None, _import_class(first, last, known)
    plugin, component = registry().find(name)
    target = registry().load(plugin, component.target)
    if not callable(target):
        raise FulguriteError(f"Expected {name} to be a class, but it is an object of type {type(target).__name__}.")
    return plugin, target


def _import_class(module: str, name: str, plugins: list[str]) -> type:
    try:
        imported = importlib.import_module(module)
        found = getattr(imported, name, None)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise FulguriteError(
                f"{module}.{name} is neither a component of a plugin nor an import path: no plugin and no module is "
                f"called {error.name!r}.{nearest(module, plugins)}"
            ) from None
        raise FulguriteError(f"{module}.{name} cannot be imported: {type(error).__name__}: {error}.") from error
    if found is None:
        hint = nearest(name, [public for public in dir(imported) if not public.startswith("_")])
        raise FulguriteError(f"Module {module!r} has no class {name!r}.{hint}")
    if not isinstance(found, type):
        raise FulguriteError(
            f"Expected {module}.{name} to be a class, but got an object of type {type(found).__name__}."
        )
    return found


def _check_arguments(text: str, target: Callable[..., Any], positional: list[Any], named: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError:  # a class written in C says nothing about its arguments; it checks them itself
        return
    parameters = signature.parameters.values()
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes = f" It takes: {', '.join(known)}." if known else " It takes no arguments."
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in named:
            if name not in known:
                raise FulguriteError(f"{text}: there is no argument `{name}`.{nearest(name, known)}{takes}")
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        raise FulguriteError(f"{text}: {error}.{takes}") from None


def _value(node: ast.expr) -> Any:
    """Read the value of an argument."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as value)) if (
            not isinstance(value, bool)
        ):
            return -value if isinstance(node.op, ast.USub) else value
        case ast.List():
            return [_value(element) for element in node.elts]
        case ast.Tuple():
            return tuple(_value(element) for element in node.elts)
        case ast.Dict() if None not in node.keys:
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        case ast.Call():
            return _call(node)
    raise _refused(node, ast.unparse(node))


def _dotted(node: ast.expr) -> str:
    """Return the dotted name that a node spells."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise FulguriteError(
        f"Expected the name of a component, such as PSKD, ps_kd.PSKD or package.module.Class, but got `{ast.unparse(node)}`."
    )


def _refused(node: ast.expr, piece: str) -> FulguriteError:
    hint = f" Write names in quotes: {node.attr!r}." if isinstance(node, ast.Attribute) else ""
    if isinstance(node, ast.Name):
        hint = f" Write {node.id!r} for the text, or {node.id}() for a component."
    return FulguriteError(f"Expected an argument to be made of {_ALLOWED}, but got `{piece}`.{hint}")
