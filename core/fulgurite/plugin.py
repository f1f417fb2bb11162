# SPDX-License-Identifier: Apache-2.0
"""The manifest of a plugin: what it is, as plain data that imports neither torch nor the plugin's code."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fulgurite.errors import check_argument

Kind = Literal[
    "intervention",
    "callback",
    "datamodule",
    "task",
    "module",
    "optimizer",
    "metric",
    "loss",
    "function",
    "strategy",
    "argument",
]
"""What a component is. An `argument` is a class whose objects others take as arguments; it is checked through them."""


@dataclass(frozen=True)
class Paper:
    """The publication that a plugin implements.

    Args:
        title: The title as printed.
        authors: Names in the order of the title page.
        venue: Where it appeared, for instance `"ICCV"`.
        year: The year of publication.
        identifier: A persistent identifier such as `"arXiv:2006.12000"` or a DOI.
        code: The authors' reference code, for instance `"github.com/owner/name"`; None if there is none.
        code_licence: The SPDX name of the licence of the reference code.
    """

    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    identifier: str
    code: str | None = None
    code_licence: str | None = None

    @property
    def citation(self) -> str:
        """One line: first author, year, venue."""
        first = self.authors[0].split()[-1]
        return f"{first}{' et al.' if len(self.authors) > 1 else ''}, {self.venue} {self.year}"


@dataclass(frozen=True)
class Component:
    """One public name of a plugin.

    Args:
        name: The name that people write: `"PSKD"`.
        target: Where it is defined, `"package.module:Name"`. It is imported when it is first used.
        kind: What it is; decides where the command line offers it and which conformance checks apply.
        summary: One line.
    """

    name: str
    target: str
    kind: Kind
    summary: str = ""

    def __post_init__(self) -> None:
        check_argument(self.name.isidentifier(), "name", "Component", "a Python identifier", self.name)
        check_argument(_is_target(self.target), "target", "Component", '"package.module:Name"', self.target)
        check_argument(
            self.kind in get_args(Kind), "kind", "Component", f"one of {', '.join(get_args(Kind))}", self.kind
        )

    def load(self) -> Any:
        """Import and return the object."""
        return load_target(self.target)


@dataclass(frozen=True)
class Plugin:
    """What a plugin offers.

    The entry point of a distribution in the group `fulgurite.plugins` names an object of this class. Building it must
    import nothing heavy: `fulgurite list` reads manifests, never components.

    Args:
        name: The slug, equal to the name of the entry point: `"ps_kd"`.
        family: The group of methods it belongs to: `"distillation"`.
        summary: One line on what a user gets.
        components: Everything public.
        paper: The publication, or None for components that belong to no paper.
        extras: Extras of the distribution that must be installed, for instance `("mnist1d",)`.
        capabilities: What the method asks of a training loop, in words, for `fulgurite show`.
        claim: `"package.module:NAME"` of the paper's `fulgurite.claims.Claim`, or None.
        bench: `"package.module:NAME"` of the plugin's `fulgurite.bench.Bench`, or None.
        conformance: `"package.module:NAME"` of a mapping from the names of components to a `fulgurite.testing.Case`
            or several, or None.
        card: File name of the method card, beside the manifest's package; None if there is none.

    Raises:
        ValueError: If a field is not of the form described.
    """

    name: str
    family: str
    summary: str
    components: tuple[Component, ...]
    paper: Paper | None = None
    extras: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    claim: str | None = None
    bench: str | None = None
    conformance: str | None = None
    card: str | None = None

    def __post_init__(self) -> None:
        check_argument(
            re.fullmatch(r"[a-z][a-z0-9_]*", self.name) is not None, "name", "Plugin", "a lower-case slug", self.name
        )
        for field in ("claim", "bench", "conformance"):
            value = getattr(self, field)
            check_argument(value is None or _is_target(value), field, "Plugin", '"package.module:NAME" or None', value)
        names = [component.name for component in self.components]
        check_argument(len(set(names)) == len(names), "components", "Plugin", "distinct names", names)

    def component(self, name: str) -> Component:
        """Return the component called `name`.

        Raises:
            KeyError: If there is none.
        """
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)

    def exports(self) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
        """Return the module-level `__getattr__` and `__dir__` (PEP 562) that export the components lazily.

        Example:
            >>> __getattr__, __dir__ = Plugin("demo", "probes", "A demo.", ()).exports()
        """

        def module_getattr(name: str) -> Any:
            try:
                component = self.component(name)
            except KeyError:
                raise AttributeError(f"plugin {self.name!r} has no attribute {name!r}") from None
            return component.load()

        def module_dir() -> list[str]:
            return sorted(["plugin", *(component.name for component in self.components)])

        return module_getattr, module_dir


def family_exports(package: str, path: Iterable[str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the module-level `__getattr__` and `__dir__` of a family: what the papers in its folder export, lazily.

    A family's `__init__.py` is this one line; a paper that is added to the folder is exported without naming it.

    Args:
        package: The family's `__name__`.
        path: The family's `__path__`.

    Example:
        >>> __getattr__, __dir__ = family_exports(__name__, __path__)  # doctest: +SKIP
    """

    def papers() -> dict[str, Any]:
        names = (module.name for module in pkgutil.iter_modules(path) if module.ispkg)
        return {name: importlib.import_module(f"{package}.{name}") for name in names}

    def module_getattr(name: str) -> Any:
        if not name.startswith("__"):
            found = papers()
            for paper in found.values():
                if name in dir(paper) and name != "plugin":
                    return getattr(paper, name)
            if name in found:
                return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def module_dir() -> list[str]:
        found = papers()
        return sorted({*found, *(name for paper in found.values() for name in dir(paper) if name != "plugin")})

    return module_getattr, module_dir


def load_target(target: str) -> Any:
    """Import `"package.module:Name"` and return the object."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _is_target(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[\w.]+:\w+", text) is not None
