# SPDX-License-Identifier: Apache-2.0
"""Which checks apply to which component, and running them."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fulgurite.errors import FulguriteError, nearest
from fulgurite.plugin import Component, Plugin
from fulgurite.registry import registry
from fulgurite.testing.case import Case
from fulgurite.testing.check import CHECKS, Check, Result, expect, run_check
from fulgurite.testing.lab import Lab
from fulgurite.testing.trainers import trainer_settings

_CHECK_MODULES = ("datamodules", "functions", "interventions", "metrics", "modules", "optimizers", "tasks")
MANIFEST = "manifest"
"""What is reported instead of checks, if what a manifest says is not true."""


def all_checks() -> dict[str, Check]:
    """Return every check by name, in the order in which they are run."""
    for name in _CHECK_MODULES:
        importlib.import_module(f"fulgurite.testing.{name}")
    return CHECKS


def cases_of(plugin: Plugin, component: Component) -> list[Case]:
    """Return the cases that a manifest names for a component, or the one of its constructor without arguments.

    Raises:
        FulguriteError: If the cases are not usable, or name a component that the plugin does not have.
    """
    named: Mapping[str, Case | tuple[Case, ...]] = {}
    if plugin.conformance is not None:
        named = registry().load(plugin, plugin.conformance)
    components = [some.name for some in plugin.components]
    for unknown in set(named) - set(components):
        raise FulguriteError(
            f"{plugin.name}: {plugin.conformance} has cases of {unknown!r}, which is no component of the plugin."
            f"{nearest(unknown, components)}"
        )
    found = named.get(component.name, Case())
    cases = [found] if isinstance(found, Case) else list(found)
    _refuse_unusable(cases, f"{plugin.name}.{component.name}")
    return cases


def _refuse_unusable(cases: Sequence[Case], subject: str) -> None:
    """Raise FulguriteError if there is no case, or one excuses a check that does not exist or gives no reason."""
    known = all_checks()
    if not cases:
        raise FulguriteError(f"{subject}: expected at least one case, but got none: nothing would be checked.")
    for case in cases:
        for name, reason in case.inapplicable.items():
            if name not in known:
                raise FulguriteError(
                    f"{subject}: the case excuses a check {name!r} that does not exist.{nearest(name, known)}"
                )
            if not reason.strip():
                raise FulguriteError(
                    f"{subject}: the case excuses {name!r} without a reason. Say why it does not apply."
                )


def check_component(
    component: Component | type,
    plugin: Plugin | None = None,
    *,
    cases: Sequence[Case] | None = None,
    names: Sequence[str] | None = None,
    quick: bool = False,
    strategy: str | None = None,
    precision: str | None = None,
) -> Iterator[Result]:
    """Run every check that applies to a component, one after the other, and yield the results.

    A component that cannot be imported, or is not what its manifest says, gives one failure instead.

    Args:
        component: A component of a manifest, or a class that has none yet.
        plugin: The component's plugin.
        cases: How to make instances; None takes what the manifest says.
        names: Names of the checks to run; None for all.
        quick: Whether to leave out the checks that take long.
        strategy: The strategy of every training, `"ddp"` for instance, on one device; by default Lightning's.
        precision: The precision of every training, for instance `"bf16-mixed"`.

    Raises:
        FulguriteError: If a name is that of no check, the cases that were passed are not usable, or the kit cannot train
            with this strategy and precision.
    """
    settings = trainer_settings(strategy, precision)
    if plugin is None or isinstance(component, type):
        plugin, component = _describe(component)
    for name in set(names or ()) - set(all_checks()):
        raise FulguriteError(f"No check {name!r}.{nearest(name, all_checks())}")
    if cases is not None:
        _refuse_unusable(cases, f"{plugin.name}.{component.name}")
    kind_checks = [
        found
        for found in all_checks().values()
        if component.kind in found.kinds and (names is None or found.name in names) and not (quick and not found.quick)
    ]
    try:
        target = component.load()
        expect_kind(component, target)
        cases = cases_of(plugin, component) if cases is None else cases
    except (Exception, SystemExit) as error:
        line = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {line}{registry().missing_extras(plugin, error)}"
        yield Result(plugin.name, component.name, "", MANIFEST, "fail", reason, traceback.format_exc())
        return
    for case in cases:
        lab = Lab(case, target if case.make is None else _instances_of(target, case.make), target, settings)
        for wanted in kind_checks:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield run_check(wanted, lab, plugin, component, case)
            finally:
                torch.set_num_threads(threads)


def _instances_of(target: Any, make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `make`, held to making instances of the component and of nothing else."""

    def made(*arguments: Any) -> Any:
        instance = make(*arguments)
        if isinstance(target, type):
            what = type(instance).__name__
            expect(isinstance(instance, target), f"`make` of the case makes a {what}, not a {target.__name__}")
        return instance

    return made


def expect_kind(component: Component, target: Any) -> None:
    """Raise `CheckError` unless a component is of the kind that its manifest names."""
    kinds = {kind: base for base, kind in _bases().items()}
    if component.kind in kinds:
        base = kinds[component.kind]
        inherits = isinstance(target, type) and issubclass(target, base)
        expect(inherits, f"the manifest calls it a {component.kind}, but it is no subclass of {base.__name__}")
        found = kind_of(target)
        expect(found == component.kind, f"the manifest calls it a {component.kind}, but it is a {found}")
    elif component.kind in ("function", "loss"):
        expect(callable(target), f"the manifest calls it a {component.kind}, but it cannot be called")


def _bases() -> dict[type, str]:
    """Return the class that components of a kind inherit from; the more special ones first."""
    import lightning.pytorch as pl
    from torchmetrics import Metric

    from fulgurite.intervention import Intervention

    return {
        Intervention: "intervention",
        pl.Callback: "callback",
        pl.LightningDataModule: "datamodule",
        pl.LightningModule: "task",
        Metric: "metric",
        torch.optim.Optimizer: "optimizer",
        torch.nn.Module: "module",
    }


def _describe(component: Any) -> tuple[Plugin, Component]:
    """Return a manifest for a class that has none."""
    if isinstance(component, Component):
        described = component
    else:
        described = Component(component.__name__, f"{component.__module__}:{component.__name__}", kind_of(component))
        object.__setattr__(described, "load", lambda: component)
    return Plugin("unnamed", "unnamed", "A class without a manifest.", (described,)), described


def kind_of(component: Any) -> Any:
    """Return the kind of component that a class is, judged by what it inherits, or a function.

    Raises:
        FulguriteError: If it is none that the kit knows.
    """
    bases = _bases()
    if not isinstance(component, type) and callable(component):
        return "function"
    for base, kind in bases.items():
        if isinstance(component, type) and issubclass(component, base):
            return kind
    raise FulguriteError(
        f"Expected a class that inherits from one of {', '.join(base.__name__ for base in bases)}, but got {component!r}."
    )
