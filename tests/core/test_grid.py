# SPDX-License-Identifier: Apache-2.0
"""Sweeps: what is trained, what the table says, and what the maps show."""

from __future__ import annotations

import pytest
from rich.console import Console

from fulgurite.claims import Variant
from fulgurite.errors import FulguriteError
from fulgurite.experiment import plan
from fulgurite.grid import Grid
from fulgurite.records import RunRecord
from fulgurite.report import comparison_table, grid_table, write_report
from fulgurite.report.maps import draw_map
from fulgurite.report.pictures import LIGHT, lines_of

NOISE, RATE = "data.label_noise", "model.optimizer.lr"


def test_every_combination_is_a_setting_with_all_variants():
    grid = Grid({NOISE: (0, 0.2), RATE: (0.01, 0.1)})
    settings = grid.settings({"data": "Digits"}, [Variant("baseline"), Variant("x", overrides={RATE: 9})])
    assert [setting.name for setting in settings] == list(grid.cells)
    assert list(grid.cells)[1] == "label_noise=0, lr=0.1"
    runs = {(run.setting, run.variant): run.config for run in plan(settings, [0])}
    assert len(runs) == 8
    assert runs["label_noise=0.2, lr=0.1", "baseline"] == {
        "data": {"class_path": "Digits", "init_args": {"label_noise": 0.2}},
        "model": {"init_args": {"optimizer": {"lr": 0.1}}},
    }
    own = runs["label_noise=0, lr=0.01", "x"]["model"]["init_args"]["optimizer"]["lr"]
    assert own == 9, "a variant's own override is what it is about"


def test_values_are_read_as_yaml_has_them_and_numbers_as_they_are_written():
    grid = Grid.parse([f"{NOISE} = 0, 1e-3, 0.2", "model.name=a,b,null", "data.shuffle=true,false"])
    assert grid.axes == {NOISE: (0, 0.001, 0.2), "model.name": ("a", "b", None), "data.shuffle": (True, False)}
    assert isinstance(grid.axes[NOISE][1], float)


def test_keys_that_end_alike_keep_their_whole_name():
    assert Grid({"model.a.lr": (1, 2), "model.b.lr": (1, 2), "seed": (1, 2)}).names == {
        "model.a.lr": "model.a.lr",
        "model.b.lr": "model.b.lr",
        "seed": "seed",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["data.label_noise"], "KEY=VALUE,VALUE"),
        (["=1,2"], "KEY=VALUE,VALUE"),
        (["a=["], "KEY=VALUE,VALUE"),
        (["a=[1],[2]"], "KEY=VALUE,VALUE"),
        (["a=1"], "two or more distinct values of a"),
        (["a=1,2,1"], "two or more distinct values of a"),
        (["a=1,2", "a=3,4"], "a comes twice"),
    ],
)
def test_a_grid_that_is_none_is_refused_by_name(texts, message):
    with pytest.raises(FulguriteError, match=message):
        Grid.parse(texts)


def records(grid: Grid, gain: float = -0.5) -> list[RunRecord]:
    """The baseline's NLL is the number of the cell; "x" lowers it by `gain` and a little noise, but not in the last cell."""
    last = len(grid.cells) - 1
    return [
        RunRecord(
            cell,
            variant,
            seed,
            "ok",
            metrics={
                "test/nll": number + (variant == "x") * ((number < last) * gain + 0.01 * (seed - 1)),
                "test/acc": 0.5,
            },
        )
        for number, cell in enumerate(grid.cells)
        for variant in ("baseline", "x")
        for seed in range(3)
    ]


def drawn(grid: Grid, runs: list[RunRecord]):
    rows = comparison_table(runs)
    return draw_map(grid, rows, lines_of(["baseline", "x"], "baseline"), "test/nll", LIGHT)


def test_two_keys_are_a_map_of_values_and_one_of_differences_with_dots_where_they_are_clear():
    grid = Grid({NOISE: (0, 0.2, 0.4), RATE: (0.01, 0.1)})
    maps = [axes for axes in drawn(grid, records(grid)).axes if axes.images]
    values, differences = (axes.images[0].get_array().tolist() for axes in maps)
    assert values == [[0, 2, 4], [1, 3, 5]], "rows are the second key, columns the first"
    assert differences[0] == pytest.approx([-0.5, -0.5, -0.5])
    assert differences[1] == pytest.approx([-0.5, -0.5, 0.0])
    assert [axes.images[0].get_cmap().name for axes in maps] == ["viridis", "RdBu_r"], "a lower NLL is blue"
    dots = {tuple(round(float(c)) for c in line.get_xydata()[0]) for line in maps[1].lines}
    assert dots == {(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)}
    assert "x: difference" in maps[1].get_title()


def test_one_key_is_a_curve_and_a_third_one_makes_columns():
    curve = Grid({NOISE: (0, 0.2)})
    (axes,) = drawn(curve, records(curve)).axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [0.2, 1]]
    words = Grid({"model.name": ("a", "b")})
    assert [t.get_text() for t in drawn(words, records(words)).axes[0].get_xticklabels()] == ["a", "b"]
    cube = Grid({NOISE: (0, 0.2), RATE: (0.01, 0.1), "model.depth": (1, 2)})
    titles = [axes.get_title() for axes in drawn(cube, records(cube)).axes if axes.images]
    assert titles == ["baseline, depth 1", "baseline, depth 2", "x: difference, depth 1", "x: difference, depth 2"]


def test_cells_without_runs_stay_empty():
    grid = Grid({NOISE: (0, 0.2), RATE: (0.01, 0.1)})
    runs = [record for record in records(grid) if record.setting != "label_noise=0, lr=0.1"]
    first = drawn(grid, runs).axes[0].images[0].get_array()
    assert first.mask.tolist() == [[False, False], [True, False]]


def test_table_and_report_of_a_grid(tmp_path):
    grid = Grid({NOISE: (0, 0.2), RATE: (0.01, 0.1)})
    console = Console(width=160, record=True)
    console.print(grid_table(comparison_table(records(grid)), grid))
    shown = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "x " in line
    ]
    assert shown[0][:4] == ["0", "0.01", "x", "-0.5000*"]
    assert shown[-1][3] == "3.000", "no star where the interval contains zero"
    page = write_report(tmp_path, "A sweep", records(grid), facts={}, grid=grid)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"map-1-test-nll.png", "map-2-test-acc.png"} <= names
    assert not any(name.startswith("curves") for name in names)
    text = page.read_text()
    assert text.count("over the grid") == 2
    assert "a dot where the interval excludes zero" in text
