# SPDX-License-Identifier: Apache-2.0
"""Every intervention beside every other one, in both orders: both work, or the mixture is refused with both names."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fulgurite.errors import RefusedError
from fulgurite.intervention import HOOKS, Intervention
from fulgurite.plugin import Component, Plugin
from fulgurite.testing.case import Case
from fulgurite.testing.check import CheckError, Result, Status, expect
from fulgurite.testing.lab import EXAMPLES, Lab, Run
from fulgurite.testing.runner import cases_of
from fulgurite.testing.surroundings import preserved
from fulgurite.testing.watchdog import HangError, ended_after

_SMALL = 1e-6
"""A difference of parameters below which a method has not changed the training."""

_PRESENT = 1e-3
"""The part of its own effect that a method must still have beside another."""


@dataclass(frozen=True, eq=False)
class Member:
    """One intervention of the matrix.

    Args:
        name: What it is called in tables.
        make: Makes an instance.
        case: The training in which its effect shows.
    """

    name: str
    make: Callable[[], Intervention]
    case: Case


def members(subjects: Iterable[tuple[Plugin, Component]], every_case: bool = True) -> list[Member]:
    """Return the interventions among some components, by each of their cases or by the first one.

    Components that cannot be imported are left out; `check_component` reports them.
    """
    found = []
    for plugin, component in subjects:
        if component.kind != "intervention":
            continue
        try:
            target, cases = component.load(), cases_of(plugin, component)
        except (Exception, SystemExit):
            continue
        for case in cases if every_case else cases[:1]:
            name = f"{component.name} ({case.label})" if case.label else component.name
            found.append(Member(name, target if case.make is None else case.make, case))
    return found


def pairs(matrix: Sequence[Member], quick: bool = False) -> list[tuple[Member, Member]]:
    """Return the pairs to train with, in the order of the trainer's callbacks: of all, each pair in both orders.

    With `quick`, the number of pairs grows as that of the interventions does: for each two-way hook, those that implement it
    stand in a ring, and neighbours are paired; so are all of them, whatever they implement. Every intervention is tried
    beside others that act at the same place. Of each pair one order is taken, in turn this one and that.
    """
    if not quick:
        return [order for pair in itertools.combinations(matrix, 2) for order in (pair, pair[::-1])]
    rings = [list(range(len(matrix))), *_implementing(matrix).values()]
    found = {tuple(sorted(pair)): None for ring in rings for pair in zip(ring, ring[1:] + ring[:1], strict=True)}
    chosen = [(matrix[i], matrix[j]) for i, j in sorted(found) if i != j]
    return [pair if number % 2 == 0 else pair[::-1] for number, pair in enumerate(chosen)]


def _implementing(matrix: Sequence[Member]) -> dict[str, list[int]]:
    """Return which members implement each hook, or take something for themselves alone."""
    found: dict[str, list[int]] = {}
    for number, member in enumerate(matrix):
        try:
            instance = member.make()
        except Exception:  # the checks of the component, and its other pair, report it
            continue
        for name in (*filter(instance.overrides, HOOKS), *instance.capabilities.exclusive):
            found.setdefault(name, []).append(number)
    return found


def check_composition(matrix: Sequence[Member], quick: bool = False) -> Iterator[Result]:
    """Train with pairs of interventions, ten steps each, and yield a result for each; which ones, `pairs` says.

    A pair passes if nothing fails, parameters stay finite and both effects are there: where both change the training, the
    result is that of neither alone; where one only reads, it changes nothing beside the other; what one logs alone is
    logged. A pair that is refused before training is inapplicable if the message names both, and else a failure.
    """
    trainings = _Trainings()
    for first, second in pairs(matrix, quick):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield _compose(first, second, trainings)
        finally:
            torch.set_num_threads(threads)


def _compose(first: Member, second: Member, trainings: _Trainings) -> Result:
    begin = time.perf_counter()
    status: Status = "pass"
    reason = detail = ""
    try:
        with preserved(), ended_after(), contextlib.redirect_stdout(io.StringIO()):
            reason = _check(first, second, trainings)
        status = "inapplicable" if reason else "pass"
    except (CheckError, HangError) as error:
        status, reason, detail = "fail", str(error), traceback.format_exc()
    except (Exception, SystemExit) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        status, reason, detail = "fail", f"{type(error).__name__}: {line}", traceback.format_exc()
    seconds = time.perf_counter() - begin
    return Result("composition", f"{first.name} + {second.name}", "", "composes", status, reason, detail, seconds)


def _check(first: Member, second: Member, trainings: _Trainings) -> str:
    """Check one pair in one order; return why it does not apply, or an empty string."""
    case = _common(first.case, second.case)
    if case is None:
        return "each brings a module or data of its own"
    instances = first.make(), second.make()
    shared = sorted(set(instances[0].capabilities.exclusive) & set(instances[1].capabilities.exclusive))
    try:
        together = _train(case, list(instances))
    except RefusedError as refusal:
        said = str(refusal).lower()
        unnamed = [i.name for i in instances if i.name.lower() not in said and type(i).__name__.lower() not in said]
        for member in (first, second) if unnamed else ():
            reason = _refused_alone(case, member)
            if reason:
                return f"{member.name} refuses this training by itself: {reason}"
        expect(not unnamed, f"refused together, but the message does not name {' and '.join(unnamed)}: {refusal}")
        return f"refused together: {refusal}"
    expect(not shared, f"both take the {' and the '.join(shared)} for themselves, and are not refused together")
    expect(together.weights.isfinite().all(), "parameters are not finite")
    nothing, alone = trainings.of(case), (trainings.of(case, first), trainings.of(case, second))
    effects = [_apart(run, nothing) for run in alone]
    for name, run, other, effect in (
        (first.name, alone[0], alone[1], effects[0]),
        (second.name, alone[1], alone[0], effects[1]),
    ):
        change = _apart(together, other)
        if effect > _SMALL:
            least = max(_PRESENT * effect, _SMALL) if math.isfinite(effect) else _SMALL
            expect(change > least, f"{name} has no effect in this order")
        else:
            expect(change <= _SMALL, f"{name} changes nothing alone, but changes the training beside the other")
        missing = run.trainer.callback_metrics.keys() - together.trainer.callback_metrics.keys()
        expect(not missing, f"{name} does not log {', '.join(sorted(missing))} beside the other")
    return ""


def _refused_alone(case: Case, member: Member) -> str:
    """Return why an intervention refuses a training on its own; empty if it does not."""
    try:
        _train(case, [member.make()])
    except RefusedError as refusal:
        return str(refusal)
    return ""


def _common(first: Case, second: Case) -> Case | None:
    """Return the training that suits both; None if each brings its own."""
    for ours, theirs in ((first.module, second.module), (first.data, second.data)):
        if ours is not None and theirs is not None and ours is not theirs:
            return None
    return Case(module=first.module or second.module, data=first.data or second.data)


class _Trainings:
    """The trainings with one intervention or none, each run once."""

    def __init__(self) -> None:
        self._done: dict[Any, Run] = {}

    def of(self, case: Case, member: Member | None = None) -> Run:
        key = case.module, case.data, member
        if key not in self._done:
            self._done[key] = _train(case, [] if member is None else [member.make()])
        return self._done[key]


def _train(case: Case, interventions: list[Intervention]) -> Run:
    """Train for ten steps in two epochs, and validate after each on one batch."""
    lab = Lab(case, Intervention)
    loader = lab.loader(drop_last=True)  # five batches of eight
    validation = lab.loader(batch_size=EXAMPLES, shuffle=False)
    return lab.fit(
        interventions, loader=loader, validation=validation, max_epochs=2, max_steps=10, num_sanity_val_steps=0
    )


def _apart(a: Run, b: Run) -> float:
    """Return the largest difference of parameters; infinite if one model has others than the other."""
    return float((a.weights - b.weights).abs().max()) if a.has_the_weights_of(b) else math.inf
