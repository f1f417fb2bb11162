# SPDX-License-Identifier: Apache-2.0
"""`fulgurite`, `fulgurite list` and `fulgurite show`: what they print, and what they must not execute."""

from __future__ import annotations

import json
import types

import pytest

import fulgurite
from fulgurite import cli
from fulgurite.cli.show import arguments
from fulgurite.errors import FulguriteError
from fulgurite_plugins.distillation import PSKD
from tests.third_party.install import fulgurite as run
from tests.third_party.install import installed

EVERYTHING_WRONG = ("broken", "clash_a", "clash_b", "misnamed", "untyped", "lying", "extras", "good")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory):
    """What `list` prints where everything that can be wrong is installed, in both forms."""
    marker = tmp_path_factory.mktemp("marker") / "imported"
    blocked = {"THIRD_PARTY_MARKER": str(marker), "FULGURITE_BLOCK": "datamodules"}
    table, as_json = (run("list", *options, path=EVERYTHING_WRONG, **blocked) for options in ((), ("--json",)))
    executed = marker.exists()
    load = run("list", "--json", "--load", path=EVERYTHING_WRONG, THIRD_PARTY_MARKER=str(marker))
    return types.SimpleNamespace(table=table, json=as_json, load=load, executed=executed, marker=marker)


def rows(result, name: str) -> list[dict]:
    return [row for row in json.loads(result.stdout) if row["name"] == name]


def test_list_executes_no_code_of_others_and_imports_no_torch(listed):
    """Fails if listing imports somebody's module, or pays for torch."""
    assert not listed.executed
    assert (listed.table.returncode, listed.table.stderr) == (0, "")
    assert (listed.json.returncode, listed.json.stderr) == (0, "")


def test_list_says_what_is_built_in(listed):
    """Fails if the table loses what people look for: the family, the paper, the names that they write."""
    (line,) = (line for line in listed.table.stdout.splitlines() if line.startswith("ps_kd "))
    assert line.split(maxsplit=2)[:2] == ["ps_kd", "distillation"]
    assert "Kim et al., ICCV 2021" in line
    assert "ok" in line.split()
    assert line.endswith("intervention PSKD; 3 functions")
    (row,) = rows(listed.json, "ps_kd")
    assert row["kinds"]["intervention"] == ["PSKD"]
    assert (row["status"], row["reason"], row["distribution"]) == ("ok", None, "fulgurite")


def test_list_shows_others_from_their_metadata(listed):
    """Fails if a plugin that was not loaded is left out, or looks as if it had been tried."""
    (row,) = rows(listed.json, "acme")
    assert (row["status"], row["family"], row["summary"]) == ("not loaded", None, "A plugin that works.")
    assert "acme is from acme-good 1.2: A plugin that works." in listed.table.stdout
    assert [row["status"] for row in rows(listed.json, "broken")] == ["not loaded"], "nobody has tried it"


def test_list_shows_clashing_and_blocked_plugins(listed):
    """Fails if a clash is not seen without executing anything, or what is blocked looks usable."""
    assert [row["status"] for row in rows(listed.json, "twice")] == ["broken", "broken"]
    assert listed.table.stdout.count("twice is broken: it is declared by acme-clash-a 1.0 and by acme-clash-b 2.0") == 1
    assert [row["status"] for row in rows(listed.json, "datamodules")] == ["blocked"]
    assert "datamodules cannot be used: it is blocked" in listed.table.stdout


def test_list_load_reads_the_manifests_of_others(listed):
    """Fails if `--load` does not load, or one that breaks hides the others or changes the exit status."""
    assert listed.load.returncode == 0
    assert listed.marker.exists()
    (row,) = rows(listed.load, "acme")
    assert (row["status"], row["family"]) == ("ok", "probes")
    for name, reason in {
        "broken": "RuntimeError: acme needs a device that is not there",
        "misnamed": "is called 'other_name'",
        "untyped": "an object of type dict",
    }.items():
        (row,) = rows(listed.load, name)
        assert row["status"] == "broken"
        assert reason in row["reason"]
    assert [row["status"] for row in rows(listed.load, "lying")] == ["ok"], "components are not loaded for a list"


def test_the_table_fits_a_narrow_terminal(monkeypatch, capsys):
    """Fails if long lists of components run over the edge of a terminal."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "90")
    assert cli.main(["list"]) == 0
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert "CIFAR100" in table
    assert max(map(len, table.splitlines())) <= 90


@pytest.fixture
def show(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def show_(*argv: str) -> str:
        assert cli.main(["show", *argv]) == 0
        return capsys.readouterr().out

    return show_


def test_show_prints_card_paper_arguments_and_use(show):
    """Fails if any part of what a user needs before the first use is missing."""
    text = show("ps_kd")
    assert "When to use it, and when not" in text
    assert "Kyungyul Kim, ByeongMoon Ji, Doyoung Yoon, Sangheum Hwang" in text
    assert "arXiv:2006.12000" in text
    assert "licence: MIT" in text
    assert "alpha: float | Schedule = 0.8" in text
    assert "storage: 'auto' | 'device' | 'cpu' | 'memmap' = 'auto'" in text
    assert "Trust in the past prediction" in text
    assert "from fulgurite_plugins.distillation.ps_kd import PSKD" in text
    assert "Trainer(callbacks=[PSKD()])" in text
    assert "fulgurite fit --trainer.callbacks+=PSKD" in text
    assert 'FULGURITE="PSKD()" python train.py' in text
    assert "refine_targets (function)" in text


def test_show_takes_a_component(show):
    """Fails if a component's name does not lead to it, or brings all others with it."""
    assert "refine_targets (function)" not in show("PSKD")
    assert show("ps_kd.PSKD") == show("PSKD")


def test_use_fits_the_kind(show):
    """Fails if data is offered as a callback, or required arguments are left out of the line that is to be copied."""
    (data,) = json.loads(show("datamodules.Digits", "--json"))["components"]
    assert data["use"] == {
        "import": "from fulgurite_datamodules import Digits",
        "python": "trainer.fit(module, Digits())",
        "command line": "fulgurite fit --data=Digits",
    }
    with installed("good"):
        (counter,) = json.loads(show("Counter", "--json"))["components"]
    assert counter["use"] == {
        "import": "from acme_good.parts import Counter",
        "python": "Trainer(callbacks=[Counter(every=...)])",
        "command line": "fulgurite fit --trainer.callbacks+=Counter --trainer.callbacks.every=...",
        "environment": 'FULGURITE="Counter(every=...)" python train.py',
    }


def test_show_json_has_everything(show):
    """Fails if programs get less than people."""
    facts = json.loads(show("ps_kd", "--json"))
    assert facts["paper"]["title"].startswith("Self-Knowledge Distillation")
    assert facts["card"].startswith("# PS-KD")
    pskd = facts["components"][0]
    assert (pskd["name"], pskd["kind"], pskd["problem"]) == ("PSKD", "intervention", None)
    alpha = pskd["arguments"][0]
    assert alpha.pop("meaning").startswith("Trust in the past prediction")
    assert alpha == {"name": "alpha", "type": "float | Schedule", "required": False, "default": "0.8"}


def test_show_of_a_plugin_of_another_distribution(show):
    """Fails if only built-in plugins have cards."""
    with installed("good"):
        text = show("acme")
    assert "Batches can be counted." in text
    assert "every: int  (required)" in text
    assert "What is counted: batches or epochs." in text
    assert "**options: object" in text


def test_show_tells_which_component_is_missing(show):
    """Fails if a manifest that promises too much breaks the page, or a missing card does."""
    with installed("lying"):
        text = show("lying")
    assert "Promises too much." in text
    assert "There (module)" in text
    assert "broken: Plugin 'lying': acme_lying.nowhere:NoModule cannot be imported" in text


def test_arguments_are_read_from_the_docstring():
    """Fails if a continuation line, a type in brackets or the section that follows is misread."""
    known = {one["name"]: one for one in arguments(PSKD)}
    assert known["criterion"]["meaning"].endswith("by default the only one that the training step calls.")
    with installed("good"):
        from acme_good.parts import Counter

        meanings = {one["name"]: one["meaning"] for one in arguments(Counter)}
    assert meanings["names"] == "Names of the counters."
    assert arguments(3) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lst"], "No command 'lst'. Did you mean 'list'?"),
        (["xyz"], "No command 'xyz'. `fulgurite --help` shows all."),
        (["show", "ps_kdd"], "fulgurite show: No plugin and no component is called 'ps_kdd'. Did you mean 'ps_kd'"),
        (["show", "PSDK"], "Did you mean 'PSKD'"),
        (["show", "ps_kd.PSDK"], "Plugin 'ps_kd' has no component 'PSDK'. Did you mean 'PSKD'"),
        (["show", "broken"], "RuntimeError: acme needs a device"),
        (["show", "twice"], "acme-clash-a 1.0 and by acme-clash-b 2.0"),
        (["show", "PartOfBroken"], "Plugin 'broken': importing 'acme_broken:plugin'"),
    ],
)
def test_errors_are_clean_messages_with_status_2(argv, message, capsys):
    """Fails if a user's error ends in a traceback or in success."""
    with installed("broken", "clash_a", "clash_b"):
        assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_help_and_version(capsys):
    """Fails if a command is missing from the help, or the help needs a command to be chosen."""
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        for command in ("list", "show", "explain", "fit", "validate", "test", "predict", "compare", "reproduce", "new"):
            assert f"\n  {command} " in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fulgurite {fulgurite.__version__}"


@pytest.mark.parametrize(
    ("raised", "status"), [(FulguriteError("no"), 2), (KeyboardInterrupt(), 130), (None, 1), (None, 0)]
)
def test_exit_status_of_a_command(raised, status, monkeypatch, capsys):
    """Fails if a command is called otherwise than agreed, or its own exit status is lost."""
    calls = []

    def run_command(command: str, argv: list[str]) -> int:
        calls.append((command, argv))
        if raised is not None:
            raise raised
        return status

    monkeypatch.setitem(cli._COMMANDS, "probe", ("probe", "a command"))
    monkeypatch.setitem(__import__("sys").modules, "fulgurite.cli.probe", types.SimpleNamespace(run=run_command))
    assert cli.main(["probe", "--jobs", "2"]) == status
    assert calls == [("probe", ["--jobs", "2"])]


def test_equations_of_a_card_are_readable_in_a_terminal(capsys):
    """Fails if the terminal shows the dollars and comments that only the documentation page needs."""
    assert cli.main(["show", "ps_kd"]) == 0
    shown = capsys.readouterr().out
    assert "$" not in shown
    assert "<!--" not in shown
    assert r"q_i = (1 - \alpha_t) y_i + \alpha_t M_i" in shown
