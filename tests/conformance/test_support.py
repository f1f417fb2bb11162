# SPDX-License-Identifier: Apache-2.0
"""What a plugin supports: a table that is written from the results, and shown where its card is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fulgurite.cli import main
from fulgurite.cli.show import support_path
from fulgurite.errors import PluginError
from fulgurite.registry import registry
from fulgurite.testing import all_checks
from fulgurite.testing.check import REFUSED, Result
from fulgurite.testing.support import ROWS, support
from tests.conformance.test_runner import installed

MODULE = '''
from fulgurite import Intervention
from fulgurite.plugin import Component, Plugin

plugin = Plugin(
    name="kit",
    family="probes",
    summary="One intervention.",
    components=(Component("Nothing", "acme_kit:Nothing", "intervention"),),
)


class Nothing(Intervention):
    """Does nothing."""
'''


def found(check, status="pass", reason="", label=""):
    return Result("kit", "Thing", label, check, status, reason)


def rows(text):
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {cell[0].strip(): [one.strip() for one in cell[1:]] for cell in cells}


def test_every_line_stands_for_checks_that_exist():
    """Fails if a check is renamed, and its line says for ever that it is not applicable."""
    known = all_checks()
    for names in ROWS.values():
        for name in names:
            assert "intervention" in known[name].kinds


def test_each_outcome_has_its_word():
    results = [
        found("accumulation"),
        found("short_last_window"),
        found("compile", "fail", "compiled again"),
        found("sharded_parameters", reason=f"{REFUSED}: thing needs whole weights"),
        found("two_ranks_equal_one", "inapplicable", "its draws differ"),
        found("uneven_shards"),
        found("manual_optimization", "inapplicable", "it steps itself"),
        found("bf16"),
        found("accumulation", label="other"),
    ]
    text = support("kit", results)
    table = rows(text)
    assert table[""] == ["`Thing`", "`Thing (other)`"]
    assert table["gradient accumulation"] == ["✓", "✓"]
    assert table["torch.compile"] == ["fails", "\N{EN DASH}"]
    assert table["sharded parameters (FSDP2)"][0] == "refused"
    assert table["several devices (DDP)"][0] == "✓"
    assert table["manual optimization"][0] == "\N{EN DASH}"
    assert "- `Thing`, sharded parameters (FSDP2): thing needs whole weights" in text
    assert "- `Thing`, several devices (DDP): two_ranks_equal_one is not applicable: its draws differ" in text
    assert "- `Thing`, torch.compile: compiled again" in text


def test_a_refusal_under_ddp_is_a_refusal():
    """Fails if a user reads that several devices do not matter to a method that refuses them."""
    results = [found("accumulation"), found("two_ranks_equal_one", "inapplicable", f"{REFUSED}: thing runs alone")]
    assert rows(support("kit", results))["several devices (DDP)"] == ["refused"]


def test_without_interventions_there_is_no_table():
    assert support("kit", [found("pure"), found("gradient")]) is None


@pytest.fixture
def package(tmp_path):
    """An installed plugin that is a package."""
    (tmp_path / "acme_kit").mkdir()
    (tmp_path / "acme_kit" / "__init__.py").write_text(MODULE)
    information = tmp_path / "acme_kit-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kit\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[fulgurite.plugins]\nkit = acme_kit:plugin\n")
    with installed(tmp_path):
        yield tmp_path / "acme_kit"


def test_it_is_shown_with_the_card(package, capsys):
    """Fails if what the kit found is written and nobody gets to see it."""
    assert support_path("kit") == package / "SUPPORT.md"
    assert main(["show", "kit"]) == 0
    assert "Support" not in capsys.readouterr().out
    (package / "SUPPORT.md").write_text(support("kit", [found("accumulation"), found("bf16")]))
    assert main(["show", "kit"]) == 0
    shown = capsys.readouterr().out
    assert "Support" in shown
    assert "bf16-mixed" in shown
    assert "not to be edited" not in shown


@pytest.mark.parametrize("option", [["--quick"], ["--only", "bf16"], ["--precision", "bf16-mixed"]])
def test_a_part_of_the_checks_is_not_written_as_all(package, capsys, option):
    """Fails if a hasty run takes checks out of the table that it has not made."""
    assert main(["check", "kit", "--support", *option]) == 2
    assert "leave out --only, --quick" in capsys.readouterr().err
    assert not (package / "SUPPORT.md").exists()


def test_a_manifest_without_a_folder_of_its_own_is_refused(package):
    """Fails if the table of a single module is put among everybody's packages."""
    module = sys.modules["acme_kit"]
    path = module.__dict__.pop("__path__")
    try:
        with pytest.raises(PluginError, match="single module. Make it a package"):
            support_path("kit")
    finally:
        module.__path__ = path


def test_the_tables_that_are_shipped_have_the_lines_of_today():
    """Fails if a line was added to the table, and the plugins' own have not been written again."""
    for entry in registry().entries:
        path = support_path(entry.name)
        if path.is_file():
            assert set(rows(Path(path).read_text())) - {""} == set(ROWS), f"run: fulgurite check {entry.name} --support"
