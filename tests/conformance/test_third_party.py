# SPDX-License-Identifier: Apache-2.0
"""A distribution of somebody else, as `fulgurite new` makes it, from installation to training; and others that are at fault.

Each runs in a process of its own that finds the distributions on its path, as it would find installed ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fulgurite import cli
from tests.cli.test_new import install
from tests.third_party.install import fulgurite, installed


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    """The folder of a distribution that `new` has just made, and what must be on the path to have it installed."""
    root = tmp_path_factory.mktemp("third_party")
    assert cli.main(["new", "my_method", "--dir", str(root)]) == 0
    return root / "my_method", install(root / "my_method", root / "site")


def test_it_is_discovered_and_listed(example):
    """Fails if an installed distribution is not in the catalogue."""
    _, path = example
    rows = {row["name"]: row for row in json.loads(fulgurite("list", "--json", "--load", path=path).stdout)}
    assert rows["my_method"]["status"] == "ok"
    assert rows["my_method"]["kinds"] == {"intervention": ["MyMethod"], "function": ["entropy"]}


def test_it_passes_every_check(example):
    """Fails if a check accuses the skeleton, or one that applies is not run."""
    _, path = example
    found = fulgurite("check", "my_method", "--quick", "--json", path=path, OMP_NUM_THREADS="1")
    results = json.loads(found.stdout)
    assert [result for result in results if result["status"] == "fail"] == []
    assert found.returncode == 0
    inapplicable = {(result["component"], result["check"]) for result in results if result["status"] == "inapplicable"}
    uninstalled = ("resume_in_mid_epoch", "resume_with_accumulation", "no_synchronisation_on_a_gpu")
    assert inapplicable <= {("MyMethod", name) for name in uninstalled}
    passed = {(result["component"], result["check"]) for result in results if result["status"] == "pass"}
    assert {("MyMethod", "identity_when_off"), ("MyMethod", "two_ranks_equal_one"), ("entropy", "gradient")} <= passed


def test_it_trains_by_its_short_name(example, tmp_path):
    """Fails if the command line does not know the component of a third party, or it has no effect there."""
    _, path = example
    options = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]
    options += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    words = ["--trainer.callbacks+=MyMethod", "--trainer.callbacks.weight=0.5", "--trainer.logger=CSVLogger"]
    log = [f"--trainer.logger.save_dir={tmp_path}", "--trainer.log_every_n_steps=1"]
    found = fulgurite("fit", *options, *words, *log, path=path, OMP_NUM_THREADS="1")
    assert found.returncode == 0, found.stderr
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "mymethod/negative_entropy" in metrics.read_text().splitlines()[0]


def test_those_at_fault_are_reported_and_harm_nobody(tmp_path, capsys):
    """Fails if a plugin that is broken, clashes or lies is passed over, or keeps the others from being checked."""
    report = tmp_path / "report.xml"
    with installed("broken", "clash_a", "clash_b", "lying", "good"):
        status = cli.main(["check", "--only", "state_key", "--json", "--junit", str(report)])
        results = json.loads(capsys.readouterr().out)
    assert status == 1
    failures = {(result["plugin"], result["component"]): result for result in results if result["check"] == "manifest"}
    assert {result["status"] for result in failures.values()} == {"fail"}
    assert set(failures) == {
        ("broken", "broken"),
        ("twice", "twice"),
        ("lying", "There"),
        ("lying", "NoModule"),
        ("lying", "NoName"),
        ("acme", "Digits"),
    }
    for (plugin, component), says in {
        ("broken", "broken"): "RuntimeError: acme needs a device that is not there",
        ("twice", "twice"): "declared by acme-clash-a 1.0 and by acme-clash-b 2.0",
        ("lying", "There"): "the manifest calls it a module, but it is no subclass of Module",
        ("lying", "NoModule"): "No module named 'acme_lying.nowhere'",
        ("lying", "NoName"): "no attribute 'NoName'",
        ("acme", "Digits"): "the manifest calls it a datamodule, but it is no subclass of LightningDataModule",
    }.items():
        assert says in failures[plugin, component]["reason"]
    assert ("ps_kd", "PSKD", "pass") in {(r["plugin"], r["component"], r["status"]) for r in results}
    assert "acme needs a device" in report.read_text()


def test_one_at_fault_by_its_name(capsys):
    """Fails if naming a broken plugin is an error of the command instead of a failure of the plugin."""
    with installed("broken", "clash_a", "clash_b"):
        assert cli.main(["check", "broken", "twice", "--json"]) == 1
        results = json.loads(capsys.readouterr().out)
    assert [(result["plugin"], result["status"]) for result in results] == [("broken", "fail"), ("twice", "fail")]


def test_what_a_component_prints_stays_out_of_the_json(capsys):
    """Fails if a callback that prints, as StepCost does its table, makes the results unreadable for programs."""
    assert cli.main(["check", "StepCost", "--only", "random_streams", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["component"] == "StepCost"


def test_a_blocked_plugin_is_left_out(capsys):
    """Fails if blocking a broken plugin does not make the check of all others pass again."""
    with installed("broken") as found:
        found.block("broken")
        assert cli.main(["check", "--only", "state_key", "--json"]) == 0
        assert {result["plugin"] for result in json.loads(capsys.readouterr().out)} >= {"ps_kd", "callbacks"}
        assert cli.main(["check", "broken"]) == 2
        assert "blocked" in capsys.readouterr().err
