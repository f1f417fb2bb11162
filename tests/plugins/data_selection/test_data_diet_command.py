# SPDX-License-Identifier: Apache-2.0
"""`fulgurite score`: runs in processes of their own, the file of scores, the sweep and the report."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import yaml
from scipy.stats import spearmanr

from fulgurite.errors import FulguriteError
from fulgurite.records import RunRecord
from fulgurite_datamodules import Digits
from fulgurite_plugins.data_selection import load_scores
from fulgurite_plugins.data_selection.data_diet import pictures
from fulgurite_plugins.data_selection.data_diet.claim import CLAIM
from fulgurite_plugins.data_selection.data_diet.claim_data import SplitDigits
from fulgurite_plugins.data_selection.data_diet.command import run
from fulgurite_plugins.data_selection.data_diet.files import Scores, average, save_scores
from fulgurite_plugins.data_selection.data_diet.statistics import auc, precision_and_recall, rank_agreement
from fulgurite_plugins.data_selection.data_diet.summary import as_csv, cells, summarise

ROOT = Path(__file__).parents[3]

DATA = {"train_size": 120, "val_size": 0, "test_size": 100, "label_noise": 0.2, "noise_kind": "symmetric"}

OPTIMIZER = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two runs of three epochs, two scores, and trainings on half of the data."""
    folder = tmp_path_factory.mktemp("score")
    config = {
        "model": {"class_path": "Classification", "init_args": {"optimizer": OPTIMIZER}},
        "data": {"class_path": "Digits", "init_args": DATA},
        "trainer": {"max_epochs": 3, "accelerator": "cpu"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", str(folder / "mine.yaml"), "--runs", "2", "--epochs", "2", "--scores", "el2n", "forgetting"]
    words += ["--keep", "0.5", "--seeds", "1", "--jobs", "1", "--out", str(folder / "s.safetensors")]
    assert run(words) == 0
    return folder, {"words": words}


def test_the_file_holds_the_mean_of_the_runs(scored):
    folder, _ = scored
    scores = load_scores(folder / "s.safetensors")
    assert set(scores.values) == {"el2n@2", "forgetting@2"}
    for name, prefix in (("el2n@2", "seed"), ("forgetting@2", "forgetting-seed")):
        parts = [load_scores(folder / "s" / "runs" / f"{prefix}={seed}-epoch=2.safetensors") for seed in (0, 1)]
        torch.testing.assert_close(scores.values[name], (parts[0].values[name] + parts[1].values[name]) / 2)
        assert not torch.equal(parts[0].values[name], parts[1].values[name])
    data = Digits(**DATA)
    data.setup()
    assert torch.equal(scores.targets, data.train_targets)
    assert {run["seed"] for run in scores.provenance["runs"]} == {0, 1}
    assert scores.provenance["dataset"]["size"] == 120
    assert scores.provenance["presentations"] == {"forgetting@2": 2}


def test_what_is_finished_is_not_run_again_and_the_table_is_printed(scored, capsys):
    folder, more = scored
    before = (folder / "s" / "runs.jsonl").stat().st_mtime_ns
    (folder / "s.safetensors").unlink()
    assert run(more["words"]) == 0
    printed = capsys.readouterr().out
    assert "2 are finished already" in printed
    assert "GPU available" not in printed
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in printed.splitlines()]
    shown = {line[0]: line[1:] for line in lines if len(line) == 3}
    rows = table(folder)
    assert shown["score"] == [row["score"] for row in rows] == ["el2n@2", "forgetting@2"]
    assert shown["AUC for wrong labels"] == [f"{float(row['labels_auc']):.3f}" for row in rows]
    assert shown["precision of the 24 highest"] == [f"{100 * float(row['labels_precision']):.1f} %" for row in rows]
    assert shown["their recall"] == [f"{100 * float(row['labels_recall']):.1f} %" for row in rows]
    assert shown["rank correlation with el2n@2"] == [f"{float(row['rank_el2n@2']):.2f}" for row in rows]
    assert (folder / "s" / "runs.jsonl").stat().st_mtime_ns == before
    (folder / "s" / "runs" / "seed=1-epoch=2.safetensors").rename(folder / "away")
    with pytest.raises(FulguriteError, match="seed=1-epoch=2.safetensors is missing. Remove the folder"):
        run(more["words"])
    (folder / "away").rename(folder / "s" / "runs" / "seed=1-epoch=2.safetensors")


def test_the_sweep_trains_on_all_on_random_and_on_scored_halves(scored):
    folder, _ = scored
    (records_file,) = folder.glob("s/keep-*/runs.jsonl")
    records = [RunRecord.from_json(line) for line in records_file.read_text().splitlines()]
    assert {record.variant for record in records} == {"baseline", "random 0.5", "el2n@2 0.5", "forgetting@2 0.5"}
    assert len(records) == 4
    for record in records:
        assert record.metrics.get("prunetrainingset/kept", 1.0) == (1.0 if record.variant == "baseline" else 0.5)


def test_accuracies_are_means_with_standard_errors():
    values = {0: 0.8, 1: 0.9}
    records = [RunRecord("main", "random 0.5", seed, "ok", metrics={"test/acc": v}) for seed, v in values.items()]
    records += [RunRecord("main", "baseline", 0, "ok", metrics={"test/acc": 0.95})]
    means = pictures.mean_accuracies(records)
    assert means["random"][0.5] == (pytest.approx(0.85), pytest.approx(0.05))
    assert means["baseline"][1.0] == (0.95, 0.0)


def test_the_report_is_one_page_with_its_pictures(scored):
    folder, _ = scored
    page = (folder / "s.html").read_text()
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(found) == 4
    for encoded in found:
        picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded)))
        assert picture.shape[0] > 200
        assert float(picture[..., :3].std()) > 0.02
    names = {"s-histogram.png", "s-examples.png", "s-wrong-labels.png", "s-accuracy.png"}
    assert {file.name for file in folder.glob("s-*.png")} == names
    assert "src=" not in re.sub(r'src="data:', "", page)
    assert "href=" not in page
    scores = load_scores(folder / "s.safetensors").values["el2n@2"]
    assert f"{int(scores.argmax())}: {float(scores.max()):.3f}" in page
    data = Digits(**DATA)
    data.setup()
    assert f"{auc(scores, data.train_targets != data.train_clean_targets):.3f}" in page
    assert "24 labels are known to be wrong" in page


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "s-summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_what_the_scores_of_the_runs_say(scored):
    folder, _ = scored
    scores = load_scores(folder / "s.safetensors").values
    data = Digits(**DATA)
    data.setup()
    wrong = data.train_targets != data.train_clean_targets
    for row, (name, prefix) in zip(
        table(folder), {"el2n": "seed", "forgetting": "forgetting-seed"}.items(), strict=True
    ):
        values = scores[f"{name}@2"]
        runs = [load_scores(folder / "s" / "runs" / f"{prefix}={seed}-epoch=2.safetensors") for seed in (0, 1)]
        single = spearmanr(*(part.values[f"{name}@2"] for part in runs)).statistic
        found = int(wrong[values.topk(24).indices].sum()) / 24
        expected = {
            "single_runs": single,
            "halves": single,  # of two runs each half is one
            "labels_wrong": 24,
            "labels_auc": auc(values, wrong),
            "rank_el2n@2": spearmanr(values, scores["el2n@2"]).statistic,
            "rank_forgetting@2": spearmanr(values, scores["forgetting@2"]).statistic,
        }
        if name == "el2n":  # equal counts may be cut off elsewhere
            expected |= {"labels_precision": found, "labels_recall": found}
        assert row["score"] == f"{name}@2"
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected)


def test_the_table_of_one_run_without_known_wrong_labels_says_only_what_is_known():
    scores = Scores({"el2n@1": torch.rand(9)})
    for wrong in (None, torch.zeros(9, dtype=torch.bool)):
        rows = summarise(scores, [scores], wrong)
        assert cells(rows) == [
            ["score", "two single runs agree", "two halves of the runs agree"],
            ["el2n@1", "-", "-"],
        ]
        heading, row, end = as_csv(rows).split("\n")
        assert dict(zip(heading.split(","), row.split(","), strict=True)) == {
            **dict.fromkeys(heading.split(","), ""),
            "score": "el2n@1",
            "rank_el2n@1": "1.0",
        }
        assert end == ""


def test_the_command_of_the_card_scores_the_training_of_the_claim(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the first split
    config = yaml.safe_load((ROOT / "docs" / "measured" / "data_diet-noisy.yaml").read_text())
    setting = next(setting for setting in CLAIM.settings if setting.name == "noisy")
    assert {key: config[key] for key in ("model", "trainer")} == {k: setting.config[k] for k in ("model", "trainer")}
    data, claimed = Digits(**config["data"]["init_args"]), SplitDigits(**setting.config["data"]["init_args"])
    for each in (data, claimed):
        each.setup()
    assert torch.equal(data.train_targets, claimed.train_targets)
    assert torch.equal(data.train_indices, claimed.train_indices)
    assert (data.batch_size, data.drop_last) == (claimed.batch_size, claimed.drop_last)
    assert int((data.train_targets != data.train_clean_targets).sum()) == 109


def test_files_can_be_averaged_later(scored, capsys):
    folder, _ = scored
    files = [folder / "s" / "runs" / f"seed={seed}-epoch=2.safetensors" for seed in (0, 1)]
    assert run(["--average", *map(str, files), "--out", str(folder / "mean.safetensors")]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "mean.safetensors")
    assert load_scores(folder / "mean.safetensors") == average([load_scores(file) for file in files])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nothing.yaml"], "--config to be a YAML file, but nothing.yaml cannot be read"),
        (["--scores", "forgetting", "--epochs", "0.5"], "--epochs of whole numbers for forgetting events, but got"),
    ],
)
def test_wrong_usage_is_named(words, message, tmp_path):
    with pytest.raises(FulguriteError, match=message):
        run([*words, "--out", str(tmp_path / "s.safetensors")])


def test_a_run_that_fails_is_an_error_with_its_reason(tmp_path):
    config = {"trainer": {"max_epochs": 1, "accelerator": "cpu"}, "data": {"class_path": "Digits", "init_args": DATA}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--epochs",
        "2",
        "--runs",
        "1",
        "--out",
        str(tmp_path / "s.safetensors"),
    ]
    with pytest.raises(FulguriteError, match="1 of 1 runs failed.*within the 1 epochs of the trainer, but got 2"):
        run(words)


# What the report computes


def test_auc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores, wrong = torch.randint(0, 6, (40,), generator=generator).float(), torch.rand(40, generator=generator) < 0.3
    scores[3] = math.inf
    pairs = [
        1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        for i in range(40)
        for j in range(40)
        if wrong[i] and not wrong[j]
    ]
    assert auc(scores, wrong) == pytest.approx(sum(pairs) / len(pairs))
    from sklearn.metrics import roc_auc_score

    assert auc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores.nan_to_num(posinf=99.0)))
    assert math.isnan(auc(scores, torch.zeros(40).bool()))


def test_precision_and_recall_of_suspects():
    scores = torch.tensor([0.1, 0.9, 0.8, 0.2])
    wrong = torch.tensor([True, True, False, False])
    assert precision_and_recall(scores, wrong, 2) == (0.5, 0.5)
    assert precision_and_recall(scores, wrong, 1) == (1.0, 0.5)
    assert precision_and_recall(scores, wrong, 4) == (0.5, 1.0)


def test_averaging_raises_the_agreement_of_ranks():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(300, generator=generator)
    runs = [truth + 0.3 * torch.randn(300, generator=generator) for _ in range(10)]
    single, halves = rank_agreement(runs)
    assert 0.2 < single < 0.7 < halves
    assert all(map(math.isnan, rank_agreement(runs[:1])))


def test_pictures_of_images_and_of_what_is_none():
    assert pictures.image_of((torch.rand(1, 8, 8), 3)).shape == (8, 8)
    assert pictures.image_of((torch.rand(3, 8, 8), 3)).shape == (8, 8, 3)
    assert pictures.image_of({"x": torch.rand(8, 8)}).shape == (8, 8)
    assert pictures.image_of((torch.rand(12), 3)) is None
    assert pictures.image_of((torch.rand(1, 1, 40), 3)) is None
    flat = torch.utils.data.TensorDataset(torch.rand(5, 12), torch.arange(5))
    assert pictures.examples(flat, torch.rand(5), None, None, 2) is None
    assert pictures.wrong_labels({"a": torch.rand(5)}, None) is None
    assert pictures.accuracy([]) is None


def test_a_file_of_scores_of_other_data_is_not_reported_on(scored, tmp_path):
    from fulgurite_plugins.data_selection.data_diet.report import write_report

    folder, _ = scored
    scores = load_scores(folder / "s.safetensors")
    config = yaml.safe_load((folder / "mine.yaml").read_text())
    config["data"]["init_args"]["train_size"] = 100
    with pytest.raises(
        FulguriteError, match="whose size is 100, but the scores were computed on one whose size is 120"
    ):
        write_report(tmp_path / "r.html", config, scores, [scores], [], {})
    save_scores(tmp_path / "again.safetensors", scores)
    assert json.dumps(load_scores(tmp_path / "again.safetensors").provenance) == json.dumps(scores.provenance)
