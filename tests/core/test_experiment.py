# SPDX-License-Identifier: Apache-2.0
"""Comparisons: what is planned, what determines a run, what is recorded, and what an interruption leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from fulgurite import Classification
from fulgurite.claims import Setting, Variant
from fulgurite.cli import main
from fulgurite.errors import FulguriteError
from fulgurite.experiment import check_plan, plan, run_plan, with_overrides
from fulgurite.experiment.plan import Run
from fulgurite.experiment.worker import quiet
from fulgurite.records import read_records
from fulgurite_datamodules import Digits

CONFIG = {
    "data": {"class_path": "Digits", "init_args": {"train_size": 100, "val_size": 50, "test_size": 100}},
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}

BOMBS = """
import os, signal, pathlib
import torch
import lightning.pytorch as pl

class Raises(pl.Callback):
    def __init__(self, unless: str = "/nowhere"):
        self.unless = unless
    def on_train_epoch_end(self, trainer, module):
        if not pathlib.Path(self.unless).exists():
            raise RuntimeError("boom")

class Killed(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        os.kill(os.getpid(), signal.SIGKILL)

class Diverges(pl.Callback):
    def on_train_end(self, trainer, module):
        with torch.no_grad():
            next(module.parameters()).fill_(float("nan"))

class Exits(pl.Callback):
    def on_fit_start(self, trainer, module):
        os._exit(5)
"""


class Events:
    def __init__(self):
        self.started_runs, self.epochs, self.ended = [], [], []

    def started(self, run):
        self.started_runs.append(run.key)

    def epoch(self, run, epoch, epochs):
        self.epochs.append((*run.key, epoch, epochs))

    def finished(self, run, record):
        self.ended.append((*run.key, record.status))


def settings(*adds, config=CONFIG):
    return [Setting("main", config, (Variant("baseline"), *(Variant(text, add=(text,)) for text in adds)))]


def execute(directory, *adds, seeds=1, config=CONFIG, jobs=2):
    events = Events()
    checked = check_plan(plan(settings(*adds, config=config), range(seeds)), directory)
    return run_plan(checked, directory, jobs, events), events


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    records, events = execute(directory, "PSKD(alpha=0.8)", seeds=2)
    return directory, {record.key[1:]: record for record in records}, events


@pytest.fixture
def bombs(tmp_path, monkeypatch):
    (tmp_path / "fulgurite_test_bombs.py").write_text(BOMBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "fulgurite_test_bombs"


def test_plan_holds_all_variants_of_a_seed_together():
    runs = plan(settings("PSKD"), [3, 1])
    assert [run.key for run in runs] == [
        ("main", "baseline", 3),
        ("main", "PSKD", 3),
        ("main", "baseline", 1),
        ("main", "PSKD", 1),
    ]
    assert len({run.slug for run in plan(settings("A(-1)", "A(1)", "A[1]"), range(3))}) == 12


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        ({}, "model.x", {"model": {"init_args": {"x": 7}}}),
        ({"model": None}, "model.x", {"model": {"init_args": {"x": 7}}}),
        ({"model": {"x": 1}}, "model.x", {"model": {"x": 7}}),
        ({"model": "A"}, "model.x", {"model": {"class_path": "A", "init_args": {"x": 7}}}),
        ({"model": {"class_path": "A"}}, "model.init_args.x", {"model": {"class_path": "A", "init_args": {"x": 7}}}),
        ({"model": {"class_path": "A"}}, "model.class_path", {"model": {"class_path": 7}}),
        ({"trainer": {"y": 1}}, "trainer.x", {"trainer": {"y": 1, "x": 7}}),
        (
            {"model": {"class_path": "A", "init_args": {"net": {"class_path": "B"}}}},
            "model.net.x",
            {"model": {"class_path": "A", "init_args": {"net": {"class_path": "B", "init_args": {"x": 7}}}}},
        ),
    ],
)
def test_overrides_reach_the_arguments(config, key, expected):
    before = yaml.safe_dump(config)
    assert with_overrides(config, {key: 7}) == expected
    assert yaml.safe_dump(config) == before


def test_an_override_through_a_number_is_refused():
    with pytest.raises(FulguriteError, match=r"'trainer.max_epochs.x'.*'max_epochs' is 2"):
        with_overrides(CONFIG, {"trainer.max_epochs.x": 1})


def test_the_fingerprint_covers_what_determines_a_run(monkeypatch):
    run = Run("main", "v", 0, CONFIG, ("A", "B"))
    prints = [
        run.fingerprint(),
        run.fingerprint("changed source"),
        Run("main", "v", 1, CONFIG, ("A", "B")).fingerprint(),
        Run("main", "v", 0, CONFIG, ("B", "A")).fingerprint(),
        Run("main", "v", 0, CONFIG, ("A",)).fingerprint(),
        Run("main", "v", 0, with_overrides(CONFIG, {"trainer.max_epochs": 3}), ("A", "B")).fingerprint(),
    ]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    prints.append(run.fingerprint())
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_does_not_depend_on_the_order_of_keys():
    turned = {"trainer": CONFIG["trainer"], "data": CONFIG["data"]}
    assert Run("main", "v", 0, CONFIG).fingerprint() == Run("main", "v", 0, turned).fingerprint()


def test_variant_and_baseline_see_the_same_weights_and_the_same_order(finished):
    _, records, _ = finished
    for seed in range(2):
        baseline, variant = (records[name, seed].curves["train/loss"] for name in ("baseline", "PSKD(alpha=0.8)"))
        assert baseline[0].value == variant[0].value  # PS-KD changes nothing in the first epoch
        assert baseline[1].value != variant[1].value
    assert records["baseline", 0].curves["train/loss"] != records["baseline", 1].curves["train/loss"]


def test_metrics_are_those_of_a_plain_training(finished, tmp_path):
    _, records, _ = finished
    pl.seed_everything(1, workers=True, verbose=False)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    module = Classification(10, (1, 8, 8))
    data = Digits(train_size=100, val_size=50, test_size=100)
    trainer.fit(module, data)
    by_hand = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, data, verbose=False)
    by_hand |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"train/loss", "val/nll", "test/nll"} <= by_hand.keys()
    assert records["baseline", 1].metrics == by_hand


def test_curves_costs_and_progress_are_recorded(finished):
    directory, records, events = finished
    record = records["PSKD(alpha=0.8)", 0]
    for name in ("train/loss", "val/nll", "pskd/alpha"):
        points = record.curves[name]
        assert [(point.step, point.epoch) for point in points] == [(2, 0), (4, 1)], name
        assert 0 < points[0].seconds < points[1].seconds < record.seconds
        assert record.metrics[name] == points[-1].value
    assert 0 < record.step_seconds < record.seconds
    assert record.peak_memory >= 0
    assert ("main", "baseline", 1, 2, 2) in events.epochs
    assert len(events.ended) == 4
    assert not (directory / "work").exists()
    assert len(list((directory / "logs").glob("*.log"))) == 5


def test_a_value_is_a_point_only_in_the_epoch_that_measured_it(tmp_path):
    config = with_overrides(CONFIG, {"trainer.max_epochs": 3, "trainer.check_val_every_n_epoch": 2})
    [record] = execute(tmp_path, config=config)[0]
    assert [point.epoch for point in record.curves["val/nll"]] == [1]
    assert [point.epoch for point in record.curves["train/loss"]] == [0, 1, 2]


def test_nothing_that_is_finished_is_run_again(finished):
    directory, records, _ = finished
    lines = (directory / "runs.jsonl").read_text()
    again, events = execute(directory, "PSKD(alpha=0.8)", seeds=2, jobs=1)
    assert events.started_runs == []
    assert {record.key[1:]: record for record in again} == records
    assert (directory / "runs.jsonl").read_text() == lines


def test_a_torn_line_costs_one_run(finished, tmp_path):
    source, records, _ = finished
    lines = (source / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    again, events = execute(tmp_path, "PSKD(alpha=0.8)", seeds=2)
    assert len(events.started_runs) == 1
    assert len(read_records(tmp_path / "runs.jsonl")) == 4
    assert {record.key[1:]: record.metrics for record in again} == {key: r.metrics for key, r in records.items()}


def test_another_configuration_is_run_again(finished, tmp_path):
    source, _, _ = finished
    (tmp_path / "runs.jsonl").write_text((source / "runs.jsonl").read_text())
    _, events = execute(tmp_path, config=with_overrides(CONFIG, {"data.batch_size": 50}))
    assert events.started_runs == [("main", "baseline", 0)]


def test_runs_that_fail_do_not_stop_the_others_and_are_tried_again(tmp_path, bombs):
    switch = tmp_path / "repaired"
    adds = [f"{bombs}.Raises(unless={str(switch)!r})", f"{bombs}.Killed", f"{bombs}.Diverges", f"{bombs}.Exits"]
    records, _ = execute(tmp_path / "out", *adds)
    assert [record.status for record in records] == ["ok", "failed", "failed", "failed", "failed"]
    reasons = ["RuntimeError: boom", "was killed; perhaps the memory", "Training diverged: 1 of 6", "exit status 5"]
    for record, reason in zip(records[1:], reasons, strict=True):
        assert reason in record.error
    log = Path(records[1].error.rpartition("The log is ")[2].removesuffix("."))
    assert "RuntimeError: boom" in log.read_text()
    switch.touch()
    records, events = execute(tmp_path / "out", adds[0])
    assert [record.status for record in records] == ["ok", "ok"]
    assert [key[1] for key in events.started_runs] == [adds[0]]


def test_a_change_in_ones_own_code_is_noticed(tmp_path, bombs):
    runs = plan(settings(f"{bombs}.Killed"), [0])
    before = check_plan(runs, tmp_path / "out").fingerprints
    assert check_plan(runs, tmp_path / "out").fingerprints == before
    with open(tmp_path / "fulgurite_test_bombs.py", "a") as file:
        file.write("# changed\n")
    after = check_plan(runs, tmp_path / "out").fingerprints
    assert before[runs[0].key] == after[runs[0].key]  # the baseline does not use it
    assert before[runs[1].key] != after[runs[1].key]


def test_code_that_changes_in_the_middle_is_not_recorded_as_what_was_checked(tmp_path, bombs):
    """Every run imports the user's code afresh: without a check, an edit would mix two models in one table."""
    checked = check_plan(plan(settings(f"{bombs}.Raises(unless={str(tmp_path)!r})"), [0]), tmp_path / "out")
    with open(tmp_path / "fulgurite_test_bombs.py", "a") as file:
        file.write("# changed\n")
    baseline, variant = run_plan(checked, tmp_path / "out", 1, Events())
    assert baseline.status == "ok"
    assert "has changed since the comparison was started" in variant.error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainer.devices": 2, "trainer.strategy": "ddp"}, r"DDPStrategy in 2 processes.*trainer.devices to 1"),
        ({"trainer.max_epoch": 2}, "max_epoch"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_runs(tmp_path, overrides, message):
    with pytest.raises(FulguriteError, match=message):
        execute(tmp_path, config=with_overrides(CONFIG, overrides))
    assert not (tmp_path / "runs.jsonl").exists()


def test_checkpoints_and_terminal_output_of_a_configuration(tmp_path):
    given = {
        "trainer": {
            "callbacks": [
                {"class_path": "RichProgressBar"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
            ]
        }
    }
    trainer = quiet(given, tmp_path)["trainer"]
    assert trainer["enable_checkpointing"] is True
    assert trainer["callbacks"] == given["trainer"]["callbacks"][1:]
    assert quiet({"trainer": {"enable_checkpointing": True}}, tmp_path)["trainer"]["enable_checkpointing"] is False


def test_a_checkpoint_callback_writes_into_the_folder_of_the_run(tmp_path, bombs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = with_overrides(
        CONFIG,
        {"trainer.callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "mine")}}]},
    )
    records, _ = execute(tmp_path / "out", f"{bombs}.Diverges", config=config)
    assert [record.status for record in records] == ["ok", "failed"]
    assert not (tmp_path / "mine").exists()
    assert [path.parent.name for path in (tmp_path / "out" / "work").rglob("*.ckpt")] == ["checkpoints"]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc to find processes")
def test_a_killed_comparison_leaves_no_process_and_goes_on(tmp_path):
    """The parent is killed, which runs nothing of its own; the children must notice, and the records must do."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(with_overrides(CONFIG, {"trainer.max_epochs": 20})))
    argv = ["compare", "--config", str(tmp_path / "mine.yaml"), "--add", "PSKD", "--jobs", "1", "--seeds", "1"]
    argv += ["--out", str(tmp_path / "out")]
    code = "import sys; from fulgurite.cli import main; sys.exit(main(sys.argv[1:]))"
    path = tmp_path / "out" / "runs.jsonl"
    parent = subprocess.Popen([sys.executable, "-c", code, *argv], start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size) and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    group = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and group_of(int(pid)) == parent.pid]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    done = {record.key for record in read_records(path)}
    assert len(group) >= 3
    assert done == {("main", "baseline", 0)}
    while any(map(alive, group)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, group))
    kept = path.read_text()
    assert main(argv) == 0
    assert path.read_text().startswith(kept)
    assert len(path.read_text().splitlines()) == 2


def group_of(pid):
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def test_torch_is_not_needed_in_the_calling_process():
    code = "import sys, fulgurite.experiment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert torch.get_num_threads() >= 1
