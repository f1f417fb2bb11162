# SPDX-License-Identifier: Apache-2.0
"""The pairwise matrix: mixtures that go wrong are caught, declared conflicts are refused with both names, the rest pass."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn import functional as F

from fulgurite import Capabilities, Intervention
from fulgurite.errors import RefusedError
from fulgurite.registry import registry
from fulgurite.testing import Case
from fulgurite.testing.composition import Member, check_composition, members, pairs
from fulgurite.testing.lab import CLASSES, Plain


class Smooth(Intervention):
    """Right: softens whatever targets it is given."""

    def on_loss(self, call):
        soft = call.soften()
        return soft.replace(targets=0.8 * soft.targets + 0.2 / CLASSES)


class Penalty(Intervention):
    def penalty(self, step):
        return 0.1 * sum(parameter.square().sum() for parameter in step.module.parameters())


class IndicesOnly(Intervention):
    """Wrong: takes the targets for class indices, whatever comes before it."""

    def on_loss(self, call):
        return call.replace(targets=call.targets.roll(1) % CLASSES, arguments={**call.arguments, "ignore_index": -1})


class Overwrites(Intervention):
    """Wrong: makes its targets from the batch, and forgets those of the call."""

    def on_loss(self, call):
        targets = F.one_hot(call.step.batch[1], CLASSES).float()
        return call.soften().replace(targets=0.5 * targets + 0.5 / CLASSES)


class Mixes(Intervention):
    """The honest twin of both: works on the targets that it is given."""

    def on_loss(self, call):
        soft = call.soften()
        return soft.replace(targets=0.5 * soft.targets + 0.5 / CLASSES)


class Explodes(Intervention):
    """Wrong only beside soft targets: divides by what they lack."""

    def on_loss(self, call):
        outputs = call.outputs / (not call.targets.is_floating_point())
        return call.replace(outputs=outputs)


class Logs(Intervention):
    """Only watches."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("watched", 1.0)


class Meddles(Logs):
    """Wrong: changes nothing alone, but something beside others."""

    def transform_gradients(self, module, optimizer):
        if len(self.others(module)):
            optimizer.param_groups[0]["lr"] = 0.01

    def others(self, module):
        return [c for c in module.trainer.callbacks if isinstance(c, Intervention) and c is not self]


class LogsAlone(Logs):
    """Wrong: gives up its value when it is not alone."""

    def on_train_epoch_end(self, trainer, pl_module):
        if sum(isinstance(c, Intervention) for c in trainer.callbacks) == 1:
            pl_module.log("watched", 1.0)


class _TakesTheHead(Intervention):
    def operate(self, module):
        module.network[-1] = nn.Linear(12, CLASSES, bias=False)


class Head(_TakesTheHead):
    capabilities = Capabilities(exclusive=("head",))


class OtherHead(_TakesTheHead):
    capabilities = Capabilities(exclusive=("head",))


class UndeclaredHead(_TakesTheHead):
    """Wrong: says nothing of the head that it takes, and so undoes whatever another has made of it."""


class ScalesTheHead(Intervention):
    """Parametrises the head that it finds."""

    def operate(self, module):
        nn.init.constant_(module.network[-1].bias, 3.0)
        nn.utils.parametrize.register_parametrization(module.network[-1], "weight", _Half())


class _Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class RefusesWithoutNames(Intervention):
    """Wrong: does not say who cannot go with whom."""

    def on_train_start(self, trainer, pl_module):
        if sum(isinstance(c, Intervention) for c in trainer.callbacks) > 1:
            raise RefusedError("RefusesWithoutNames must be alone.")


class RefusesWithNames(Intervention):
    def on_train_start(self, trainer, pl_module):
        others = [c.name for c in trainer.callbacks if isinstance(c, Intervention) and c is not self]
        if others:
            raise RefusedError(f"{self.name} cannot be used together with {', '.join(others)}.")


def compose(*kinds, **cases):
    matrix = [Member(kind.__name__, kind, cases.get(kind.__name__, Case())) for kind in kinds]
    return {result.component: result for result in check_composition(matrix)}


def test_honest_pairs_pass_in_both_orders():
    """Fails if a mixture that works is accused, or an order is left out."""
    kinds = (Smooth, Penalty, Mixes, Logs)
    results = compose(*kinds)
    expected = {f"{a.__name__} + {b.__name__}" for a, b in itertools.permutations(kinds, 2)}
    assert set(results) == expected
    assert {result.status for result in results.values()} == {"pass"}, [r for r in results.values() if r.reason]
    assert {(result.plugin, result.check) for result in results.values()} == {("composition", "composes")}


def test_one_that_cannot_take_soft_targets():
    """Fails if a crash that depends on the order is missed, or blamed on the order that works."""
    results = compose(Smooth, IndicesOnly)
    assert results["Smooth + IndicesOnly"].status == "fail"
    assert "Traceback" in results["Smooth + IndicesOnly"].detail
    assert results["IndicesOnly + Smooth"].status == "pass"


def test_one_that_overwrites_the_change_of_another():
    """Fails if one method may silently undo the other."""
    results = compose(Smooth, Overwrites)
    found = results["Smooth + Overwrites"]
    assert (found.status, found.reason) == ("fail", "Smooth has no effect in this order")
    assert results["Overwrites + Smooth"].status == "pass"


def test_parameters_that_are_not_finite():
    """Fails if a mixture may diverge where both train alone."""
    results = compose(Smooth, Explodes)
    assert results["Smooth + Explodes"].status == "fail"
    assert "not finite" in results["Smooth + Explodes"].reason or "ZeroDivision" in results["Smooth + Explodes"].reason


def test_one_that_changes_something_only_in_company():
    """Fails if a watcher may change the training beside another method, or lose what it logs."""
    results = compose(Meddles, Penalty)
    for result in results.values():
        assert (result.status, result.reason) == (
            "fail",
            "Meddles changes nothing alone, but changes the training beside the other",
        )
    results = compose(LogsAlone, Penalty)
    assert {result.reason for result in results.values()} == {"LogsAlone does not log watched beside the other"}


def test_two_that_take_the_head():
    """Fails if a declared conflict is not refused with both names, or an undeclared one passes."""
    results = compose(Head, OtherHead)
    for result in results.values():
        assert result.status == "inapplicable"
        names = result.component.lower().replace(" + ", " and ")
        assert f"{names} both take the head" in result.reason
    results = compose(ScalesTheHead, UndeclaredHead)
    found = results["ScalesTheHead + UndeclaredHead"]
    assert (found.status, found.reason) == ("fail", "ScalesTheHead has no effect in this order")


def test_a_refusal_names_both():
    """Fails if a user may be told that two cannot go together without being told which two."""
    (first, second) = compose(RefusesWithoutNames, Penalty).values()
    assert {first.status, second.status} == {"fail"}
    assert "the message does not name penalty" in first.reason
    (first, second) = compose(RefusesWithNames, Penalty).values()
    assert {first.status, second.status} == {"inapplicable"}


class Own(Plain):
    pass


class Other(Plain):
    pass


def test_cases_with_modules_of_their_own():
    """Fails if a case is trained in another's training, or one that brings a module cannot be mixed at all."""
    both = compose(Smooth, Penalty, Smooth=Case(module=Own), Penalty=Case(module=Other))
    assert {result.status for result in both.values()} == {"inapplicable"}
    one = compose(Smooth, Penalty, Smooth=Case(module=Own))
    assert {result.status for result in one.values()} == {"pass"}


def test_quick_takes_neighbours_of_each_hook():
    """Fails if the quick matrix grows with the square of the plugins, leaves one out, or never tries two at one place."""
    kinds = [Smooth, Penalty, Mixes, Logs, Head, OtherHead, ScalesTheHead, Overwrites]
    matrix = [Member(f"{kind.__name__} {i}", kind, Case()) for i in range(10) for kind in kinds]
    chosen = pairs(matrix, quick=True)
    assert len(pairs(matrix)) == 80 * 79
    assert len(chosen) <= 2 * len(matrix) + len(matrix)  # all of them in one ring, and each in at most two more
    assert {member for pair in chosen for member in pair} == set(matrix)
    for hook in ("on_loss", "penalty", "operate"):
        both = [pair for pair in chosen if all(member.make().overrides(hook) for member in pair)]
        assert {m for pair in both for m in pair} == {m for m in matrix if m.make().overrides(hook)}
    seen = {frozenset(pair) for pair in chosen}
    assert len(seen) == len(chosen)
    ahead = sum(matrix.index(first) < matrix.index(second) for first, second in chosen)
    assert 0.4 < ahead / len(chosen) < 0.6


def test_quick_finds_what_goes_wrong_between_neighbours():
    """Fails if the quick matrix takes an order in which nothing is seen for both."""
    matrix = [Member(kind.__name__, kind, Case()) for kind in (Head, OtherHead)]
    (result,) = check_composition(matrix, quick=True)
    assert result.status == "inapplicable"
    assert pairs(matrix[:1], quick=True) == []


def test_the_matrix_of_what_is_installed():
    """Fails if an installed intervention is left out, or two of them do not work together."""
    subjects = [(plugin, component) for plugin in registry().plugins() for component in plugin.components]
    matrix = members(subjects, every_case=False)
    names = {member.name.partition(" (")[0] for member in matrix}
    assert names == {c.name for _, c in subjects if c.kind == "intervention"}
    results = list(
        check_composition(matrix, quick=True)
    )  # all pairs, in both orders, are for `fulgurite check`: minutes
    assert len(results) == len(pairs(matrix, quick=True)) >= len(matrix)
    assert not [result for result in results if result.status == "fail"]
