# SPDX-License-Identifier: Apache-2.0
"""No check accuses an honest method because of its form: surgery, a held-out part, another training set, a plain penalty."""

from __future__ import annotations

import pytest

from fulgurite.testing import check_component
from fulgurite.testing.composition import Member, check_composition
from tests.conformance.forms import FORMS


@pytest.mark.parametrize("form", FORMS)
def test_an_honest_method_passes_every_check(form):
    """Fails if a check takes what belongs to the form of a method for a fault."""
    component, case = FORMS[form]
    results = list(check_component(component, cases=[case], quick=True))
    assert {r.check: r.reason for r in results if r.status == "fail"} == {}
    excused = {"identity_when_off"} if case.off is None else set()
    needs_gpu = {"no_synchronisation_on_a_gpu"}
    assert {r.check for r in results if r.status == "inapplicable"} - needs_gpu == excused | set(case.inapplicable)


def test_they_compose_or_are_refused_with_both_names():
    """Fails if surgery beside surgery, or a choice of examples beside another one, goes wrong in silence."""
    matrix = [Member(name, case.make, case) for name, (_, case) in FORMS.items()]
    results = {result.component: result for result in check_composition(matrix)}
    assert {name: r.reason for name, r in results.items() if r.status == "fail"} == {}
    assert {name for name, r in results.items() if r.status == "inapplicable"} == {
        "compands + gates",  # gates replaces nothing that is parametrised, and says so
        "keeps_hardest + tunes_on_held_out",
        "tunes_on_held_out + keeps_hardest",
    }
    assert "The model had been changed by compands" in results["compands + gates"].reason


@pytest.mark.parametrize(("strategy", "precision"), [("ddp", None), (None, "bf16-mixed")])
def test_another_strategy_or_precision_makes_no_honest_method_fail(strategy, precision):
    """Fails if a check compares two trainings more closely than this precision allows, or one leaves its process group."""
    component, case = FORMS["compands"]
    names = [
        "accumulation",
        "empty_batch",
        "nothing_left_after_exception",
        "resume_in_mid_epoch",
        "spellings_of_the_module",
        "two_ranks_equal_one",
    ]
    results = list(check_component(component, cases=[case], names=names, strategy=strategy, precision=precision))
    assert {r.check: (r.status, r.reason) for r in results} == dict.fromkeys(names, ("pass", ""))
