# SPDX-License-Identifier: Apache-2.0
"""The kit's own machinery: whatever a component does, the result is a row, and nothing is passed over in silence."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torchmetrics import Metric

from fulgurite.cli import main
from fulgurite.cli.check import junit, markdown
from fulgurite.errors import FulguriteError
from fulgurite.intervention import Intervention
from fulgurite.plugin import Component, Plugin
from fulgurite.registry import registry
from fulgurite.testing import Case, CheckError, InapplicableError, all_checks, check_component, parametrize_with_checks
from fulgurite.testing.check import CHECKS, Check, Result, check, run_check
from fulgurite.testing.runner import cases_of, kind_of

COMPONENT = Component("Thing", "somewhere:Thing", "callback")
PLUGIN = Plugin("things", "probes", "Things.", (COMPONENT,))


def outcome(function: Any, case: Case = Case(), lab: Any = None) -> Result:  # noqa: B008
    return run_check(Check("promise", ("callback",), function, True, "..."), lab, PLUGIN, COMPONENT, case)


def raising(error: BaseException) -> Any:
    def run(lab: Any) -> None:
        raise error

    return run


def test_a_check_that_returns_passes():
    result = outcome(lambda lab: None)
    assert (result.plugin, result.component, result.check, result.status) == ("things", "Thing", "promise", "pass")
    assert result.reason == result.detail == ""


def test_a_broken_promise_fails_with_one_line_and_the_traceback():
    result = outcome(raising(CheckError("\nit moves\nand more")))
    assert (result.status, result.reason) == ("fail", "it moves")
    assert "CheckError" in result.detail


def test_a_declared_excuse_is_not_run_and_keeps_its_reason():
    result = outcome(raising(AssertionError("was run")), Case(inapplicable={"promise": "it has no weight"}))
    assert (result.status, result.reason) == ("inapplicable", "it has no weight")


def test_an_excuse_found_out_by_the_check_keeps_its_reason():
    result = outcome(raising(InapplicableError("this system cannot fork")))
    assert (result.status, result.reason) == ("inapplicable", "this system cannot fork")


def test_a_component_cannot_excuse_itself():
    namespace: dict[str, Any] = {"__name__": "somebody.elses", "InapplicableError": InapplicableError}
    exec("def hook():\n    raise InapplicableError('not today')", namespace)
    result = outcome(lambda lab: namespace["hook"]())
    assert (result.status, result.reason) == ("fail", "the component itself raises InapplicableError: not today")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (ZeroDivisionError(), "ZeroDivisionError:"),
        (SystemExit(0), "SystemExit: 0"),
        (GeneratorExit(), "GeneratorExit:"),
        (pytest.skip.Exception("quiet, please"), "Skipped: quiet, please"),
    ],
)
def test_a_crash_is_a_failure(error, reason):
    result = outcome(raising(error))
    assert (result.status, result.reason) == ("fail", reason)


def test_the_users_interrupt_goes_through():
    with pytest.raises(KeyboardInterrupt):
        outcome(raising(KeyboardInterrupt()))


def test_what_a_component_prints_does_not_mix_with_the_results(capsys):
    assert outcome(lambda lab: print("{noise")).status == "pass"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [None, CheckError("it fails")])
def test_what_a_component_leaves_in_the_process_is_put_back(error):
    def run(lab: Any) -> None:
        torch.set_default_dtype(torch.float64)
        os.environ["LEFT_BEHIND"] = "1"
        if error is not None:
            raise error

    outcome(run)
    assert torch.get_default_dtype() is torch.float32
    assert "LEFT_BEHIND" not in os.environ


# --- the list of checks


def test_every_check_says_what_would_break():
    for name, found in all_checks().items():
        assert found.name == name
        assert found.promise, name
        assert found.promise.endswith("."), name
        assert found.run.__name__ == f"check_{name}"
        assert found.kinds, name


def test_no_two_checks_have_one_name():
    """A second check of the same name would take the place of the first without a word."""
    files = {Path(str(sys.modules[found.run.__module__].__file__)) for found in all_checks().values()}
    defined = [name for file in files for name in re.findall(r"^def check_(\w+)", file.read_text(), re.MULTILINE)]
    assert sorted(defined) == sorted(set(defined))
    assert set(defined) == set(all_checks())


def test_a_check_of_ones_own_is_registered_and_run():
    @check("callback", quick=False)
    def check_of_my_own(lab: Any) -> None:
        """Something would break."""
        raise CheckError(type(lab.make()).__name__)

    try:
        assert CHECKS["of_my_own"].promise == "Something would break."
        (result,) = check_component(pl.Callback, cases=[Case()], names=["of_my_own"])
        assert (result.status, result.reason) == ("fail", "Callback")
        assert list(check_component(pl.Callback, cases=[Case()], names=["of_my_own"], quick=True)) == []
    finally:
        del CHECKS["of_my_own"]


# --- which checks are run on what


class AnIntervention(Intervention):
    pass


@pytest.mark.parametrize(
    ("component", "kind"),
    [
        (AnIntervention, "intervention"),
        (pl.Callback, "callback"),
        (pl.LightningDataModule, "datamodule"),
        (pl.LightningModule, "task"),
        (Metric, "metric"),
        (torch.optim.SGD, "optimizer"),
        (nn.Linear, "module"),
        (torch.nn.functional.relu, "function"),
    ],
)
def test_the_kind_of_a_class(component, kind):
    assert kind_of(component) == kind


@pytest.mark.parametrize("component", [dict, 3])
def test_what_is_of_no_kind_is_refused(component):
    with pytest.raises(FulguriteError, match=r"Expected a class that inherits from one of Intervention, .*, but got"):
        kind_of(component)


def test_a_class_without_a_manifest_is_checked():
    (result,) = check_component(
        nn.Linear, cases=[Case(make=lambda: nn.Linear(2, 2))], names=["module_state_round_trip"]
    )
    assert (result.plugin, result.component, result.check) == ("unnamed", "Linear", "module_state_round_trip")


def test_the_filter_by_name_keeps_the_order_of_the_checks_and_their_kinds():
    names = ["random_streams", "constructor_draws_nothing", "module_gradient"]
    found = [result.check for result in check_component(pl.Callback, cases=[Case()], names=names)]
    assert found == [name for name in all_checks() if name in names[:2]]


def test_an_unknown_check_is_refused_and_not_passed_over():
    with pytest.raises(FulguriteError, match=r"No check 'random_stream'\. Did you mean 'random_streams'"):
        list(check_component(pl.Callback, cases=[Case()], names=["random_stream"]))


def test_quick_leaves_out_what_takes_long():
    slow = {name for name, found in all_checks().items() if not found.quick and "module" in found.kinds}
    excuses = dict.fromkeys(all_checks(), "only counted here")
    whole, quick = (
        {result.check for result in check_component(nn.Identity, cases=[Case(inapplicable=excuses)], quick=some)}
        for some in (False, True)
    )
    assert slow
    assert whole - quick == slow


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([], "expected at least one case, but got none"),
        ([Case(inapplicable={"random_stream": "why"})], "excuses a check 'random_stream' that does not exist. Did you"),
        ([Case(inapplicable={"random_streams": " "})], "excuses 'random_streams' without a reason"),
    ],
)
def test_cases_that_would_hide_something_are_refused(cases, message):
    with pytest.raises(FulguriteError, match=re.escape(message)):
        list(check_component(pl.Callback, cases=cases, names=["random_streams"]))


def test_a_case_that_makes_something_else_fails():
    """Else a plugin could show the kit a well-behaved class that is not the one that it offers."""
    case = Case(make=lambda: pl.Callback())
    (result,) = check_component(AnIntervention, cases=[case], names=["constructor_draws_nothing"])
    assert (result.status, result.reason) == ("fail", "`make` of the case makes a Callback, not a AnIntervention")


def test_several_cases_are_told_apart():
    cases = [Case(label="one"), Case(label="other")]
    found = [
        result.subject for result in check_component(pl.Callback, cases=cases, names=["constructor_draws_nothing"])
    ]
    assert found == ["Callback (one)", "Callback (other)"]


# --- an installed plugin: manifest, command line, reports, pytest

MODULE = '''
import torch

from fulgurite.plugin import Component, Plugin
from fulgurite.testing import Case

plugin = Plugin(
    name="kit",
    family="probes",
    summary="Two functions.",
    components=(
        Component("square", "acme_kit:square", "function"),
        Component("noisy", "acme_kit:noisy", "function"),
    ),
    conformance="acme_kit:CASES",
)


def square(x):
    return x * x


def noisy(x):
    """Is random, and fails in colours."""
    if torch.rand(()) < 2:
        raise ValueError("\\x1b[31mred\\x1b[0m & <angry>")


def _arguments():
    return (torch.ones(3, 2, dtype=torch.float64),)


CASES = {
    "square": Case(arguments=_arguments, inapplicable={"gradient": "it is known"}),
    "noisy": Case(label="loud", arguments=_arguments),
}
'''
TEST = """
from fulgurite.testing import parametrize_with_checks


@parametrize_with_checks("kit", quick=True)
def test_conformance(check):
    check()
"""
ONLY = ("--only", "pure", "--only", "gradient")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("kit")
    (made / "acme_kit.py").write_text(MODULE)
    information = made / "acme_kit-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kit\nVersion: 1.0\nSummary: Two.\n")
    (information / "entry_points.txt").write_text("[fulgurite.plugins]\nkit = acme_kit:plugin\n")
    (made / "test_kit.py").write_text(TEST)
    return made


@contextmanager
def installed(folder: Any) -> Iterator[Any]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    registry.cache_clear()
    try:
        yield registry().plugin("kit")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("acme_kit", None)
        registry.cache_clear()


@pytest.fixture
def kit(folder):
    with installed(folder) as plugin:
        yield plugin


@pytest.fixture(scope="module")
def results(folder):
    with installed(folder) as plugin:
        return [
            result
            for component in plugin.components
            for result in check_component(component, plugin, names=["pure", "gradient"])
        ]


def test_the_manifest_names_the_cases(kit):
    assert [case.label for case in cases_of(kit, kit.component("noisy"))] == ["loud"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"squares": Case()}, "has cases of 'squares', which is no component of the plugin. Did you mean 'square'?"),
        ({"square": ()}, "kit.square: expected at least one case"),
        ({"square": Case(inapplicable={"gradients": "why"})}, "excuses a check 'gradients' that does not exist. Did"),
    ],
)
def test_mistakes_in_the_cases_of_a_manifest_are_failures(kit, monkeypatch, named, message):
    monkeypatch.setattr("acme_kit.CASES", named)
    with pytest.raises(FulguriteError, match=re.escape(message)):
        cases_of(kit, kit.component("square"))
    (result,) = check_component(kit.component("square"), kit, names=["pure"])
    assert result.status == "fail"
    assert message in result.reason


def test_the_command_fails_if_a_check_fails(kit, capsys):
    assert main(["check", "kit", *ONLY]) == 1
    shown = capsys.readouterr().out
    assert "it is known" in shown
    assert "4 checks on 2 subjects" in shown
    assert "1 passed, 2 failed, 1 inapplicable." in shown


def test_the_command_succeeds_if_none_fails(kit, capsys):
    assert main(["check", "square", *ONLY]) == 0
    assert "1 passed, 0 failed, 1 inapplicable." in capsys.readouterr().out


def test_a_mistyped_check_stops_the_command(kit, capsys):
    assert main(["check", "kit", "--only", "gradints"]) == 2
    assert "Did you mean 'gradient'" in capsys.readouterr().err


def test_json_has_every_result(kit, capsys):
    assert main(["check", "kit", "--json", *ONLY]) == 1
    rows = json.loads(capsys.readouterr().out)
    statuses = {(row["component"], row["check"]): row["status"] for row in rows}
    assert statuses == {
        ("square", "pure"): "pass",
        ("square", "gradient"): "inapplicable",
        ("noisy", "pure"): "fail",
        ("noisy", "gradient"): "fail",
    }
    assert all(row["reason"] for row in rows if row["status"] != "pass")
    assert "\n" not in "".join(row["reason"] for row in rows)


def test_list_shows_every_promise(capsys):
    assert main(["check", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} (" in shown and found.promise in shown for name, found in all_checks().items())


def test_junit_can_be_parsed_and_counts_right(kit, tmp_path, capsys):
    """A failure's colours are no legal XML; a file with them could not be read by anything."""
    assert main(["check", "kit", "--junit", str(tmp_path / "kit.xml"), *ONLY]) == 1
    (suite,) = ElementTree.parse(tmp_path / "kit.xml").getroot()
    assert suite.attrib == {"name": "kit", "tests": "4", "failures": "2", "skipped": "1"}
    cases = {(case.get("classname"), case.get("name")): case for case in suite}
    assert cases["kit.square", "gradient"].find("skipped").get("message") == "it is known"
    failure = cases["kit.noisy (loud)", "pure"].find("failure")
    assert "red" in failure.get("message")
    assert "<angry>" in failure.get("message")
    assert "ValueError" in failure.text


def test_junit_has_a_suite_per_plugin():
    rows = [Result(plugin, "Thing", "", "pure", "pass") for plugin in ("one", "other", "one")]
    suites = ElementTree.fromstring(junit(rows))
    assert [(suite.get("name"), suite.get("tests")) for suite in suites] == [("one", "2"), ("other", "1")]


def test_markdown_has_a_column_per_subject_and_the_reasons(results):
    text = markdown("fulgurite check kit", results)
    assert "fulgurite check kit" in text
    assert "| check | `kit.square` | `kit.noisy (loud)` |" in text
    assert "| pure | ✓ | ✗ |" in text
    assert "| gradient | \N{EN DASH} | ✗ |" in text
    assert "- gradient, `square`: it is known" in text


def test_markdown_has_a_matrix_of_the_pairs_of_interventions():
    """A column per pair would be thousands of columns."""
    rows = [
        Result("composition", "A + B", "", "composes", "pass"),
        Result("composition", "B + A", "", "composes", "fail", "no"),
    ]
    text = markdown("fulgurite check", rows)
    assert "| 1 `A` |  | ✓ |" in text
    assert "| 2 `B` | ✗ |  |" in text
    assert "- composes, `B + A`: no" in text


class Reports:
    """What another pytest says of its tests."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.texts: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            name = re.search(r"\[(.*)\]", report.nodeid).group(1)  # type: ignore[union-attr]
            self.outcomes[name], self.texts[name] = report.outcome, str(report.longrepr)


def test_under_pytest_each_check_is_a_test(folder, kit):
    """One test per check, named after component, case and check; excuses are skips with their reason."""
    reports = Reports()
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull, "--rootdir", str(folder)]
    assert pytest.main([*options, str(folder / "test_kit.py")], plugins=[reports]) == pytest.ExitCode.TESTS_FAILED
    names = [name for name, found in all_checks().items() if "function" in found.kinds and found.quick]
    expected = {f"square-{name}": "passed" for name in names} | {f"noisy-loud-{name}": "failed" for name in names}
    assert reports.outcomes == {**expected, "square-gradient": "skipped"}
    assert "it is known" in reports.texts["square-gradient"]
    assert "noisy (loud): pure: ValueError" in reports.texts["noisy-loud-pure"]


def test_parametrize_without_a_plugin_is_refused():
    """pytest would skip a test without parameters, and a repository would believe itself checked."""
    with pytest.raises(FulguriteError, match="at least one plugin"):
        parametrize_with_checks()


def test_a_check_that_is_not_executed_any_more_is_a_failure(kit, tmp_path, capsys):
    """A suite that shrinks unnoticed protects from nothing."""
    path = tmp_path / "executed.json"
    assert main(["check", "square", *ONLY, "--record", str(path)]) == 0
    assert main(["check", "square", *ONLY, "--against", str(path)]) == 0
    before = json.loads(path.read_text())
    (subject,) = before
    before[subject].append("resume_at_epoch_end")
    path.write_text(json.dumps(before))
    capsys.readouterr()
    assert main(["check", "square", *ONLY, "--against", str(path), "--json"]) == 1
    failed = [result for result in json.loads(capsys.readouterr().out) if result["status"] == "fail"]
    assert [(result["check"], "is not now" in result["reason"]) for result in failed] == [("resume_at_epoch_end", True)]
    assert main(["check", "square", *ONLY, "--against", str(tmp_path / "nowhere.json")]) == 2
