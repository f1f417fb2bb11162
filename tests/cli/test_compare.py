# SPDX-License-Identifier: Apache-2.0
"""`fulgurite compare` and `fulgurite reproduce`: tables, reports, messages and exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from fulgurite.claims import Claim, Expectation, Setting, Variant
from fulgurite.cli import compare, main
from fulgurite.experiment import check_plan, plan
from fulgurite.records import RunRecord, read_records
from fulgurite_plugins.distillation.ps_kd.claim import CLAIM

CONFIG = {
    "data": {"class_path": "Digits", "init_args": {"train_size": 100, "val_size": 50, "test_size": 100}},
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_compare_ends_with_a_table_and_a_report_and_then_has_nothing_left_to_do(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["compare", "--config", str(config), "--add", "PSKD(alpha=0.8)", "--seeds", "2"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    page = tmp_path / "fulgurite-compare" / "report.html"
    assert shown.rstrip().endswith(f"Report: {page}")
    assert "4 runs" in shown
    assert "test/nll" in shown
    assert "PSKD(alpha=0.8), seed 1:" in shown
    assert "--seeds 2" in page.read_text()
    names = {path.name for path in page.parent.iterdir()}
    assert {"report.html", "curves.png", "results.csv", "results.json", "runs.jsonl", "config.yaml"} <= names
    assert yaml.safe_load((page.parent / "config.yaml").read_text()) == CONFIG
    assert len(json.loads((page.parent / "results.json").read_text())["runs"]) == 4

    before = (page.parent / "runs.jsonl").read_text()
    assert main([*argv, "--jobs", "1"]) == 0
    assert "4 are finished already" in capsys.readouterr().out
    assert (page.parent / "runs.jsonl").read_text() == before


def test_a_sweep_shows_a_metric_over_a_grid_and_names_one_that_nobody_logged(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["compare", "--config", str(config), "--grid", "data.label_noise=0,0.4", "--seeds", "1"]
    assert main([*argv, "--metric", "val/nll"]) == 0
    out = tmp_path / "fulgurite-compare"
    assert {record.setting for record in read_records(out / "runs.jsonl")} == {"label_noise=0", "label_noise=0.4"}
    assert (out / "map-1-val-nll.png").exists()
    assert yaml.safe_load((out / "config.yaml").read_text()) == CONFIG
    assert "test/nll" not in capsys.readouterr().out
    before = (out / "runs.jsonl").read_text()
    assert main([*argv, "--metric", "val/nnl"]) == 2
    assert "Did you mean 'val/nll'" in capsys.readouterr().err
    assert (out / "runs.jsonl").read_text() == before
    assert main([*argv, "--grid", "data.label_nose=0,1"]) == 2
    assert "Did you mean 'label_noise'" in capsys.readouterr().err


def test_a_failed_run_gives_status_1_and_the_rest_is_reported(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "fulgurite_test_broken.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Broken(pl.Callback):\n"
        "    def on_fit_start(self, trainer, module):\n"
        "        raise RuntimeError('broken on purpose')\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)  # where one's own modules are found
    out = tmp_path / "out"
    add = "fulgurite_test_broken.Broken"
    assert main(["compare", "--config", str(config), "--add", add, "--seeds", "1", "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "seed 0: RuntimeError: broken on purpose" in shown
    assert "broken on purpose" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ("PSDK", r"Did you mean 'PSKD'"),
        ("PSKD(alpah=0.8)", "alpha"),
        ("PSKD(alpha=1.2)", "in [0, 1]"),
        ("PSKD(", "PSKD("),
        ("AURC", "AURC"),
        ("fulgurite.metrics.AURC", "callback such as PSKD, but AURC is none"),
    ],
)
def test_an_addition_that_cannot_be_built_is_refused_at_once(config, tmp_path, capsys, add, message):
    assert main(["compare", "--config", str(config), "--add", add, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_epoch: 3}", "max_epoch"),
        ("model: {class_path: Clasification}", "Clasification"),
        ("data: {class_path: Digits, init_args: {val_size: -1}}", "`val_size` of Digits"),
        ("a: [", "to be YAML"),
        ("- 1", "to hold sections such as model, data and trainer, but got list"),
        (None, "can be read"),
    ],
)
def test_a_configuration_with_a_mistake_is_refused_at_once(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["compare", "--config", str(path), "--add", "PSKD", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs.jsonl").exists()


def test_equal_additions_are_refused(config, capsys):
    assert main(["compare", "--config", str(config), "--add", "PSKD", "--add", " PSKD"]) == 2
    assert "another variant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["compare"], 2, "--add PSKD"),
        (["compare", "--add", "PSKD", "--seeds", "0"], 2, "positive"),
        (["reproduce"], 3, "--list"),
        (["reproduce", "ps_kd", "--sedes", "3"], 3, "--sedes"),
    ],
)
def test_wrong_usage(argv, status, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("ps_dk", "Did you mean 'ps_kd'"), ("callbacks", "has no claim")])
def test_what_cannot_be_reproduced_is_no_verdict(name, message, capsys):
    assert main(["reproduce", name]) == 3
    assert message in capsys.readouterr().err


def test_the_list_of_claims_imports_no_torch():
    code = "import sys; from fulgurite.cli import main; main(['reproduce', '--list']); sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "ps_kd" in ended.stdout
    assert "64 runs" in ended.stdout


def claim(seeds=3):
    return Claim(
        "The method has a lower NLL.",
        (Setting("digits", CONFIG, (Variant("baseline"), Variant("method", add=("PSKD",)))),),
        seeds,
        (Expectation("digits", "method", "baseline", "test/nll", "lower", wins=3),),
        measures=("test/nll",),
    )


@pytest.mark.parametrize(
    ("difference", "status", "verdict"),
    [(-0.1, 0, "REPRODUCED"), (0.1, 1, "NOT REPRODUCED"), (None, 2, "INCONCLUSIVE")],
)
def test_the_verdict_is_the_status(tmp_path, monkeypatch, capsys, difference, status, verdict):
    monkeypatch.setenv("COLUMNS", "200")

    def execute(console, settings, seeds, jobs, directory):
        assert (settings, seeds, jobs, directory) == (claim().settings, 3, 2, tmp_path)
        return [
            RunRecord("digits", name, seed, "ok", metrics={"test/nll": 1.0 + 0.01 * seed + (difference or 0.0) * place})
            for place, name in enumerate(("baseline", "method"))
            for seed in range(seeds if difference else 1)
        ]

    monkeypatch.setattr(compare, "_claim", lambda name: claim())
    monkeypatch.setattr(compare, "_execute", execute)
    assert main(["reproduce", "ps_kd", "--jobs", "2", "--out", str(tmp_path)]) == status
    shown = capsys.readouterr().out
    assert f"│ {verdict} " in shown
    assert "digits: test/nll of method lower than of baseline" in shown
    assert "The method has a lower NLL." in (tmp_path / "report.html").read_text()


def test_reproduce_runs_every_variant_of_every_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "_claim", lambda name: claim())
    assert main(["reproduce", "ps_kd", "--seeds", "1"]) == 2  # one seed decides nothing
    capsys.readouterr()
    records = read_records(tmp_path / "fulgurite-reproduce-ps_kd" / "runs.jsonl")
    assert {record.key for record in records} == {("digits", "baseline", 0), ("digits", "method", 0)}


def test_the_claim_of_ps_kd_can_start_and_has_the_sizes_it_states(tmp_path):
    runs = plan(CLAIM.settings, range(CLAIM.seeds))
    assert len(check_plan(runs, tmp_path).fingerprints) == len(runs) == 64
    smoothed = next(run for run in runs if run.variant == "label smoothing 0.1")
    assert smoothed.config["model"]["init_args"]["label_smoothing"] == 0.1
    assert (CLAIM.settings[1].config["data"]["init_args"]["train_size"], CLAIM.expectations[0].wins) == (300, 7)


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt, as in a terminal; a suite started in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(config, tmp_path, capsys):
    config.write_text(yaml.safe_dump({**CONFIG, "trainer": {"max_epochs": 100, "accelerator": "cpu"}}))
    path = tmp_path / "out" / "runs.jsonl"
    ended = threading.Event()

    def interrupt():
        while not ((path.exists() and path.read_text().endswith("\n")) or ended.is_set()):
            time.sleep(0.01)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        status = main(
            ["compare", "--config", str(config), "--add", "PSKD", "--jobs", "2", "--out", str(tmp_path / "out")]
        )
    finally:
        ended.set()
        thread.join()
    assert status == 130
    assert f"kept in {path}; the same command goes on" in capsys.readouterr().out
    assert 1 <= len(read_records(path)) < 10


@pytest.mark.parametrize(
    "words", [["compare", "--add", "PSKD"], ["reproduce", "ps_kd"], ["bench", "core", "--rounds", "1"]]
)
def test_a_variable_that_would_be_added_to_the_baseline_too_is_refused(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FULGURITE", "PSKD")
    assert main(words) == (3 if words[0] == "reproduce" else 2)
    assert "FULGURITE='PSKD' would be added to every training" in capsys.readouterr().err
