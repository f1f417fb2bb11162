# SPDX-License-Identifier: Apache-2.0
"""Messages for arguments that do not fit, out of the reports of jsonargparse, which tell everything but the reason.

Such a report is a tree: for each type that an argument may have, why the value is not of it. The texts are those of
jsonargparse 4.53; what is not recognised is passed on as it is.
"""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fulgurite.cli.arguments import Mentioned, owners
from fulgurite.errors import FulguriteError, nearest
from fulgurite.registry import registry

_NOISE = re.compile(
    r"$|Does not validate against any|Errors:$|Given value type:|Subclass types expect one of|a class path \(str\)"
    r"|a dict with|Expected a path but|Type \S*Callable\[.* expects a function|Expected a <class 'NoneType'>$"
)
_WEAK = re.compile(r"Not a valid subclass of |Import path .* does not correspond to a subclass")
_OURS = ("fulgurite", "lightning")
_LATER = "ckpt_path", "weights_only", "verbose", "return_predictions"
_TOP = "config", "print_config", "seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", *_LATER
_MODULES = {
    "callbacks": "lightning.pytorch.callbacks",
    "logger": "lightning.pytorch.loggers",
    "optimizer": "torch.optim",
    "lr_scheduler": "torch.optim.lr_scheduler",
    "network": "fulgurite.models",
    "model": "fulgurite.tasks",
    "criterion": "torch.nn.modules.loss",
}


@dataclass
class _Report:
    """The branch of a report that concerns what the user has written."""

    keys: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    types: str = ""
    value: str = ""

    @property
    def owner(self) -> str:
        return f" of {self.classes[-1].rpartition('.')[2]}" if self.classes else ""


def parsing_error(error: Exception, given: Mentioned) -> FulguriteError:
    """Return the error that says which argument does not fit, why, and what may have been meant."""
    report = _read(str(error))
    for pattern, explain in (
        (r"unrecognized arguments: (.*)", _unrecognised),
        (r"(?:Group|Subcommand) '(\w+)' does not accept option '(.+)'", _not_accepted),
        (r"Option '(.+)' is not accepted", _not_accepted),
        (r"the following arguments are required: (.*)", _required),
    ):
        for reason in report.reasons:
            match = re.match(pattern, reason)
            if match:
                return FulguriteError(explain(report, given, *match.groups()))
    unknown = [re.match(r"Expected a dot import path string: (.*)", reason) for reason in report.reasons]
    if unknown and unknown[0] and all(unknown):
        return FulguriteError(_unknown_class(report, given, unknown[0][1]))
    if report.keys and report.reasons and all(reason.startswith("Expected a ") for reason in report.reasons):
        return FulguriteError(_wrong_type(report, given))
    reasons = " ".join(dict.fromkeys(report.reasons)) or str(error)
    where = ": ".join([f"`{report.keys[0]}`", *report.classes, ""]) if report.keys else ""
    return FulguriteError(f"{where}{reasons}{_place(report, given)}")


def construction_error(error: Exception) -> FulguriteError:
    """Return the error that says what a constructor has against its arguments, without the ways that led there."""
    found = original(error)
    if isinstance(found, FulguriteError | MisconfigurationException) or _raised_in(found).startswith(_OURS):
        return FulguriteError(str(found))
    return FulguriteError(f"{type(found).__name__}: {found}{_place_in_file(found)}")


def original(error: BaseException) -> BaseException:
    """Return the exception that code other than the parser's raised, out of those that the parser made of it."""
    found: BaseException | None = error
    while found is not None and _raised_in(found).startswith("jsonargparse"):
        found = found.__cause__ or found.__context__
    return found or error


def users_mistake(error: BaseException) -> bool:
    """Return whether an exception in a running trainer is a message to the user, from Lightning or from Fulgurite."""
    if isinstance(error, ValueError | FileNotFoundError):
        return _raised_in(error).startswith(_OURS)
    return isinstance(error, MisconfigurationException) or str(error).startswith("Error(s) in loading state_dict")


def _raised_in(error: BaseException) -> str:
    """Return the name of the module in which an exception was raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _place_in_file(error: BaseException) -> str:
    """Return where the user's own code was when an exception was raised."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__", "")).startswith((*_OURS, "jsonargparse", "torch"))
    ]
    return f" ({frames[-1][0].f_code.co_filename}, line {frames[-1][1]})" if frames else ""


def _read(text: str) -> _Report:
    report = _Report()
    seen: set[int] = set()
    skipped, depth = 10**6, -1
    weak = []
    for line in text.splitlines():
        words = line.lstrip(" ")
        while words.startswith("- "):
            words = words[2:]
        indent = len(line) - len(words)
        if indent > skipped:
            continue
        skipped = 10**6
        if match := re.match(r"Problem with given class_path '(.+)':", words):
            if indent in seen:  # the same value, tried as another type
                skipped = indent
            else:
                report.classes.append(match[1])
            seen.add(indent)
        elif match := re.match(r'Parser key "(.+?)"(?: element \d+)?:\s*(.*)', words):
            report.keys.append(match[1])
            report.reasons += [match[2]] if match[2] else []
        elif match := re.match(r"(Subtypes|Given value): (.*)", words):
            if match[1] == "Subtypes" and indent > depth:
                depth, report.types = indent, match[2]
            elif match[1] == "Given value" and not report.value:
                report.value = match[2]
        elif _WEAK.match(words):
            weak.append(words)
        elif not _NOISE.match(words):
            report.reasons.append(words)
    report.reasons = report.reasons or weak
    return report


def _unrecognised(report: _Report, given: Mentioned, words: str) -> str:
    word = words.split()[0]
    if not word.startswith("-"):
        return f"Expected options such as --trainer.max_epochs=2, but got {word!r}."
    option = word.lstrip("-").partition("=")[0]
    return f"There is no option --{option}.{nearest(option, _options())}"


def _not_accepted(report: _Report, given: Mentioned, *names: str) -> str:
    if report.classes:
        known = _parameters(report.classes[-1])
        takes = f" It takes: {', '.join(known)}." if known else " It takes no arguments."
        return (
            f"There is no argument `{names[-1]}`{report.owner}{_place(report, given, names[-1])}."
            f"{nearest(names[-1], known)}{takes}"
        )
    key = f"{names[0]}.{names[1]}" if len(names) > 1 and names[0] in _TOP else names[-1]
    return f"There is no key `{key}`{_place(report, given, key)}.{nearest(key, _options())}"


def _required(report: _Report, given: Mentioned, names: str) -> str:
    key = f"--{report.keys[0]}.{names.split(', ')[0]}" if report.keys else ""
    return f"Expected a value for `{names}`{report.owner}{_place(report, given)}, but got none: give it with {key}."


def _unknown_class(report: _Report, given: Mentioned, name: str) -> str:
    key = report.keys[-1] if report.keys else "?"
    place = f"`{key}`{report.owner}{_place(report, given)}"
    found = owners(name)
    if len(found) > 1:
        paths = " or ".join(component.target.replace(":", ".") for _, component in found)
        return f"{name!r} for {place} is a component of several plugins: write {paths}."
    if found:
        return f"{name!r} is a component of the kind {found[0][1].kind!r}, which {place} does not take."
    parts = [part.name for plugin in registry().plugins() for part in plugin.components if part.kind != "function"]
    module = _MODULES.get(key.rpartition(".")[2])
    classes = (
        [n for n, value in vars(importlib.import_module(module)).items() if inspect.isclass(value)] if module else []
    )
    unusable = "".join(f"\nPlugin {plugin!r} cannot be used: {why}" for plugin, why in registry().problems().items())
    return (
        f"No class {name!r} is known for {place}.{nearest(name, [*parts, *classes])} Components of plugins go by short "
        f"names (`fulgurite list` shows what is installed), other classes by their full import path.{unusable}"
    )


def _wrong_type(report: _Report, given: Mentioned) -> str:
    match = re.match(r"Expected an? (.+?)(?:\. Got value: (.*))?$", report.reasons[0])
    types = report.types if report.types and report.value else ""
    if match and match[2] is not None:
        types, value = match[1], match[2]
    else:
        value = report.value
    return (
        f"Expected `{report.keys[-1]}`{report.owner} to be {_type_names(types)}, but got {value!r}"
        f"{_place(report, given, *report.keys[1:])}."
    )


def _type_names(types: str) -> str:
    """Write the types of a report as a person would: `int or None`."""
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types).replace("NoneType", "None")
    types = re.sub(r"\b(?:\w+\.)+(?=\w)", "", types)
    if types.startswith("[") and types.endswith("]"):
        types = " or ".join(re.split(r", (?![^\[]*\])", types[1:-1]))
    return re.sub(r"Literal\[(.*?)\]", r"\1", types)


def _place(report: _Report, given: Mentioned, *inner: str) -> str:
    """Name the configuration file, if the argument stands in one."""
    outer = [report.keys[0]] if report.keys else []
    for key in (".".join([*outer, *inner]), *outer, *inner):
        if key in given.files:
            return f" (in {given.files[key]})"
    return ""


def _options() -> Iterable[str]:
    return [*_TOP, *(f"trainer.{name}" for name in inspect.signature(pl.Trainer).parameters)]


def _parameters(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    target: Any = getattr(importlib.import_module(module), name, None)
    return [] if target is None else [n for n in inspect.signature(target).parameters if n not in ("args", "kwargs")]
