# SPDX-License-Identifier: Apache-2.0
"""The report on scores: one HTML page that opens offline, its pictures as PNG, and its table as CSV."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from fulgurite.cli.train import assemble
from fulgurite.experiment.worker import quiet as without_output
from fulgurite.files import write_whole
from fulgurite.quiet import quiet
from fulgurite.records import RunRecord
from fulgurite.report.pictures import png
from fulgurite_plugins.data_selection.data_diet import pictures
from fulgurite_plugins.data_selection.data_diet.files import Scores, check_same_data, describe_dataset
from fulgurite_plugins.data_selection.data_diet.intervention import wrong_labels
from fulgurite_plugins.data_selection.data_diet.summary import Row, as_csv, cells, summarise

_SHOWN = 12
"""Examples of each kind in pictures and lists."""


def write_report(
    page: Path,
    config: Mapping[str, Any],
    scores: Scores,
    parts: Sequence[Scores],
    records: Sequence[RunRecord],
    facts: Mapping[str, str],
) -> list[Row]:
    """Write the page, and beside it a PNG of each picture and the table as CSV; return the table.

    Args:
        page: The HTML file.
        config: The configuration whose training set was scored; it is read for the pictures.
        scores: The scores.
        parts: The scores of each run.
        records: Trainings on fractions; none if there were none.
        facts: What the reader must know to repeat it.
    """
    dataset, datamodule = _training_data(config)
    check_same_data(scores, describe_dataset(dataset))
    wrong = wrong_labels(datamodule, len(dataset))
    clean = None if wrong is None else datamodule.train_clean_targets
    first = next(iter(scores.values))
    drawn = {
        "Distribution of the scores": ("histogram", pictures.histograms(scores.values, wrong)),
        f"Hardest and easiest examples by {first}": (
            "examples",
            pictures.examples(dataset, scores.values[first], scores.targets, clean, _SHOWN),
        ),
        "Wrong labels found": ("wrong-labels", pictures.wrong_labels(scores.values, wrong)),
        "Accuracy against the fraction kept": ("accuracy", pictures.accuracy(records)),
    }
    images = {}
    for caption, (name, figure) in drawn.items():
        if figure is not None:
            content = png(figure, 130)
            write_whole(page.with_name(f"{page.stem}-{name}.png"), content)
            images[caption] = base64.b64encode(content).decode()
    rows = summarise(scores, parts, wrong)
    write_whole(page.with_name(f"{page.stem}-summary.csv"), as_csv(rows))
    context = {
        "title": f"Scores of {len(dataset)} training examples",
        "images": images,
        "summary": cells(rows),
        "wrong": None if wrong is None else int(wrong.sum()),
        "lists": {name: _extremes(values, scores.targets) for name, values in scores.values.items()},
        "runs": len(parts),
        "accuracies": pictures.mean_accuracies(records),
        "facts": dict(facts),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    write_whole(page, environment.get_template("report.html").render(context))
    return rows


def _training_data(config: Mapping[str, Any]) -> tuple[Any, Any]:
    with quiet(), tempfile.TemporaryDirectory() as work:
        cli = assemble(without_output(config, Path(work)), seed=0)
    owner = cli.datamodule if cli.datamodule is not None else cli.model
    if cli.datamodule is not None:
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
    return owner.train_dataloader().dataset, cli.datamodule


def _extremes(values: Tensor, targets: Tensor | None) -> dict[str, list[tuple[int, float, int | None]]]:
    order = values.sort(stable=True).indices
    return {
        kind: [(int(i), float(values[i]), None if targets is None else int(targets[i])) for i in chosen]
        for kind, chosen in (("hardest", order.flip(0)[:_SHOWN]), ("easiest", order[:_SHOWN]))
    }
