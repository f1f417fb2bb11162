# SPDX-License-Identifier: Apache-2.0
"""Tables and files of a report: exact numbers, escaping, self-containment, failed and missing runs."""

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fulgurite.claims import Claim, Expectation, Setting, Variant, judge
from fulgurite.records import CurvePoint, RunRecord
from fulgurite.report import (
    better_direction,
    comparison_table,
    default_metrics,
    format_bytes,
    format_interval,
    format_number,
    format_ratio,
    format_seconds,
    format_spread,
    terminal_tables,
    write_report,
)
from fulgurite.report.pictures import _band
from fulgurite.statistics import PairedRatio

VOID = {"meta", "img", "source", "br", "line"}


class Page(HTMLParser):
    """Collects text and the addresses of resources, and checks that tags are balanced."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.resources += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def run(variant: str, seed: int, nll: float, setting: str = "main", epochs: int = 3, **fields) -> RunRecord:
    points = tuple(CurvePoint(10 * (e + 1), e, 0.5 * (e + 1) + 0.01 * seed, nll + 1 / (e + 1)) for e in range(epochs))
    values = {
        "status": "ok",
        "metrics": {"test/nll": nll},
        "curves": {"val/nll": points},
        "step_seconds": 0.01,
        **fields,
    }
    return RunRecord(setting, variant, seed, peak_memory=2**20, **values)


def three_seeds() -> list[RunRecord]:
    baseline = [run("baseline", seed, value) for seed, value in enumerate((1.0, 2.0, 3.0))]
    return [*(run("<b>", seed, value, step_seconds=0.02) for seed, value in enumerate((0.5, 1.0, 1.5))), *baseline]


def test_table_by_hand():
    """Differences -0.5, -1, -1.5: mean -1, standard error 1/sqrt(12), t(0.975, 2) = 4.302653; steps twice as long."""
    rows = {(row.measure, row.variant): row for row in comparison_table(three_seeds())}
    assert [name for name, _ in rows] == [n for n in ("test/nll", "step time", "peak memory") for _ in range(2)]
    reference, row = rows["test/nll", "baseline"], rows["test/nll", "<b>"]
    assert (reference.summary.mean, reference.summary.std, reference.comparison) == (2.0, 1.0, "reference")
    assert (row.summary.mean, row.summary.std, row.summary.n) == (1.0, 0.5, 3)
    assert row.difference.mean == -1.0
    assert row.difference.low == pytest.approx(-1 - 4.302652729749464 / math.sqrt(12))
    assert (row.wins, row.effect, row.comparison) == ("3/3", "unclear", "-1.0 [-2.2, +0.2]")
    assert rows["step time", "<b>"].ratio.ratio == pytest.approx(2.0)
    assert rows["step time", "<b>"].value == "20.0 ms"
    assert rows["peak memory", "<b>"].value == "1.00 MiB"


def test_effect_and_wins_follow_the_direction():
    def effect(metric: str, shift: float) -> tuple[str, str]:
        records = [RunRecord("main", "baseline", s, "ok", metrics={metric: s / 10}) for s in range(3)]
        records += [RunRecord("main", "x", s, "ok", metrics={metric: s / 10 + shift + s / 100}) for s in range(3)]
        row = comparison_table(records)[1]
        return row.effect, row.wins

    assert [effect("test/nll", -1), effect("test/nll", 1)] == [("better", "3/3"), ("worse", "0/3")]
    assert [effect("test/acc", -1), effect("test/acc", 1)] == [("worse", "0/3"), ("better", "3/3")]
    assert effect("test/norm", -1) == ("", "lower in 3/3")


def test_only_common_seeds_are_paired():
    records = [record for record in three_seeds() if (record.variant, record.seed) != ("<b>", 1)]
    row = comparison_table(records)[1]
    assert (row.summary.n, row.difference.n, row.difference.mean) == (2, 2, -1.0)


def test_default_metrics_prefer_test_over_validation_over_training():
    def chosen(*names: str) -> list[str]:
        return default_metrics([RunRecord("main", "baseline", 0, "ok", metrics=dict.fromkeys(names, 1.0))])

    assert chosen("train/loss", "val/nll", "test/nll", "test_acc") == ["test/nll", "test_acc"]
    assert chosen("train/loss", "val_loss", "valid/acc", "other") == ["val_loss", "valid/acc"]
    assert chosen("train/loss", "score") == ["score"]
    assert chosen("train/loss") == ["train/loss"]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("val/nll", "lower"),
        ("test_top1_error", "lower"),
        ("test/excess_aurc", "lower"),
        ("val/f1_loss", "lower"),
        ("test/MulticlassAccuracy", "higher"),
        ("val/MulticlassF1Score", "higher"),
        ("val/AUROC", "higher"),
        ("pskd/alpha", None),
        ("accelerator", None),
    ],
)
def test_direction_is_read_from_the_name(name, direction):
    assert better_direction(name) == direction


def test_numbers_are_written_to_sensible_digits():
    assert [format_number(v) for v in (0.0, 0.123456, 97.5, 12345.6, 1.5e-7, 2e9)] == [
        "0", "0.1235", "97.50", "12346", "1.500e-07", "2.000e+09",
    ]  # fmt: skip
    assert format_number(math.nan) == "nan"
    assert format_spread(0.68312, 0.01234) == "0.683 ± 0.012"
    assert format_spread(12345.0, 678.0) == "12345 ± 678"
    assert format_spread(3.1e-7, 1.2e-8) == "3.10e-07 ± 0.12e-07"
    assert format_spread(0.5, math.nan) == format_spread(0.5, 0.0) == "0.5000"
    assert format_interval(-0.065, -0.0832, -0.0468) == "-0.065 [-0.083, -0.047]"
    assert format_interval(0.5, -math.inf, math.inf) == "+0.5000"
    assert format_interval(0.25, 0.25, 0.25) == "+0.2500 [+0.2500, +0.2500]"
    assert format_ratio(PairedRatio(1.034, 1.026, 1.043, 8, 0.95)) == "\N{MULTIPLICATION SIGN}1.034 [1.026, 1.043]"
    assert format_ratio(PairedRatio(1.034, 0.0, math.inf, 1, 0.95)) == "\N{MULTIPLICATION SIGN}1.03"
    assert [format_seconds(s) for s in (3e-5, 0.0021, 35.0, 600.0, 9000.0)] == [
        "30.0 µs", "2.10 ms", "35.0 s", "10.0 min", "2.50 h",
    ]  # fmt: skip
    assert [format_bytes(b) for b in (512, 41e6, 3 * 2**30)] == ["0.500 KiB", "39.1 MiB", "3.00 GiB"]


def test_band_interpolates_over_the_common_range():
    """Runs of unequal length and unequal times: no extrapolation, exact at common points."""
    x, mean, std = _band([{0.0: 0.0, 2.0: 2.0}, {1.0: 3.0, 3.0: 5.0}])
    assert x.tolist() == [1.0, 2.0]
    assert mean.tolist() == [2.0, 3.0]
    assert std == pytest.approx(np.full(2, math.sqrt(2)))
    x, mean, _ = _band([{1.0: 2.0}, {2.0: 4.0}])
    assert (x.tolist(), mean.tolist()) == ([1.5], [3.0])


def test_terminal_table_keeps_brackets_of_names():
    records = [run("baseline", 0, 1.0), run("X(range=[0, 1])", 0, 0.5)]
    console = Console(width=140)
    with console.capture() as capture:
        for table in terminal_tables(comparison_table(records)):
            console.print(table)
    text = capture.get()
    assert "X(range=[0, 1])" in text
    assert "test/nll ↓" in text
    assert "-0.5000" in text


def test_report_is_one_self_contained_page_with_escaped_names(tmp_path):
    facts = {"command": "fulgurite compare --add '<i>'", "torch": "2.13.0"}
    path = write_report(tmp_path / "out", "Does <b> & $x$ help?", three_seeds(), facts=facts)
    source = path.read_text(encoding="utf-8")
    page = Page(path)
    assert "http://" not in source
    assert "https://" not in source
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.resources)
    assert not {"b", "i"} & set(page.tags)
    assert source.count("&lt;b&gt;") >= 3
    assert "Does <b> & $x$ help?" in page.text
    assert "fulgurite compare --add '<i>'" in page.text
    assert "\N{MINUS SIGN}1.0" in page.text
    assert page.tags.count("img") == 3
    assert "Only 3 seeds" in page.text
    files = ["curves.png", "report.html", "results.csv", "results.json", "results.md"]
    assert sorted(p.name for p in path.parent.iterdir()) == files
    assert (path.parent / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_csv_and_json_give_back_the_numbers(tmp_path):
    records = [*three_seeds(), run("<b>", 3, 1 / 3)]
    write_report(tmp_path, "t", records, facts={}, metrics=["test/nll"])
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(r["variant"], int(r["seed"]), float(r["test/nll"])) for r in lines] == [
        (r.variant, r.seed, r.metrics["test/nll"]) for r in records
    ]
    data = json.loads((tmp_path / "results.json").read_text())
    assert [RunRecord(**entry).metrics for entry in data["runs"]] == [dict(r.metrics) for r in records]
    row = next(r for r in data["comparison"] if r["variant"] == "<b>" and r["measure"] == "test/nll")
    assert row["difference"]["mean"] == comparison_table(records)[1].difference.mean


def test_failed_runs_are_listed_with_their_reason(tmp_path):
    records = three_seeds()
    records[1] = RunRecord("main", "<b>", 1, "failed", error="RuntimeError: <loss> is nan")
    records.append(RunRecord("main", "broken", 0, "failed", error="ImportError: nothing"))
    page = Page(write_report(tmp_path, "t", records, facts={}))
    assert "2 runs failed" in page.text
    assert "RuntimeError: <loss> is nan" in page.text
    assert "ImportError: nothing" in page.text
    assert "2 of 3 runs" in page.text
    assert "0 of 1 run" in page.text


@pytest.mark.parametrize(
    "records",
    [
        [],
        [run("x", 0, 1.0)],
        [run("baseline", 0, 1.0, epochs=1), run("x", 0, 2.0, epochs=1)],
        [run("baseline", 0, math.nan), run("baseline", 1, math.inf), run("x", 0, 2.0), run("x", 1, 1.0)],
        [run("baseline", 0, 1.0, curves={}, step_seconds=None), run("x", 0, 1.0, curves={}, metrics={})],
        [RunRecord("main", "baseline", 0, "failed", error=None)],
    ],
    ids=["nothing", "no reference", "one point", "not finite", "no curves", "all failed"],
)
@pytest.mark.filterwarnings("error")
def test_sparse_results_still_make_a_report(tmp_path, records):
    """A report of little is a report; it must not crash or warn at the end of hours of training."""
    Page(write_report(tmp_path, "t", records, facts={}))
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert len(terminal_tables(comparison_table(records))) == (1 if records else 0)


def test_one_seed_is_said_to_be_one(tmp_path):
    records = [run("baseline", 0, 1.0), run("x", 0, 0.5)]
    assert "One seed" in Page(write_report(tmp_path, "t", records, facts={})).text


def test_claim_and_verdict_are_shown_per_setting(tmp_path):
    variants = (Variant("baseline"), Variant("new", ("PSKD(alpha=0.8)",), {"model.label_smoothing": 0.1}))
    claim = Claim(
        "New lowers NLL.",
        tuple(Setting(name, {}, variants, f"The {name} labels") for name in ("clean", "40% noise")),
        2,
        (Expectation("clean", "new", "baseline", "test/nll", "lower", description="NLL is lower on clean labels"),),
        refuted_when="it is not lower",
        findings=("ECE is worse.",),
        measures=("val/nll",),
    )
    records = [
        run(
            v.name,
            s,
            1 + s / 10 - 0.5 * (v.name == "new"),
            setting.name,
            metrics={"val/nll": 1.0, "test/nll": 1.0 - (v.name == "new") - s},
        )
        for setting in claim.settings
        for v in variants
        for s in range(2)
    ]
    page = Page(write_report(tmp_path, "t", records, facts={}, claim=claim, verdict=judge(claim, records)))
    for text in (
        "✓ Reproduced",
        "NLL is lower on clean labels",
        "The 40% noise labels",
        "ECE is worse.",
        "it is not lower",
    ):
        assert text in page.text
    assert "model.label_smoothing=0.1" in page.text
    assert page.tags.count("section") == 2
    assert (tmp_path / "curves-1-clean.png").exists()
    assert (tmp_path / "curves-2-40-noise.png").exists()
    assert {row["measure"] for row in json.loads((tmp_path / "results.json").read_text())["comparison"]} >= {"val/nll"}


def test_markdown_has_the_numbers_of_the_table_and_the_verdict(tmp_path):
    claim = Claim(
        "New is better.",
        (Setting("clean", {}, (Variant("baseline"), Variant("<b>"))),),
        3,
        (Expectation("clean", "<b>", "baseline", "test/nll", "lower", 3, "NLL is lower"),),
    )
    records = [run(r.variant, r.seed, r.metrics["test/nll"], "clean") for r in three_seeds()]
    write_report(tmp_path, "t", records, facts={"command": "fulgurite x"}, claim=claim, verdict=judge(claim, records))
    text = (tmp_path / "results.md").read_text()
    difference = comparison_table(records)[1].comparison
    assert f"| NLL is lower | undecided | {difference} | 3/3 |" in text
    assert f"| <b> | 1.00 ± 0.50<br>{difference} 3/3 |" in text
    assert "**Inconclusive.**" in text
    assert "command: fulgurite x." in text


def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch):
    """A page that cannot be written does not destroy the one that is there, nor leave a torn file."""
    page = write_report(tmp_path, "old", [run("baseline", 0, 1.0)], facts={})
    before = page.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, "new", [run("baseline", 0, 1.0)], facts={})
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
