# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/orthogonal_convolutions-weights.png from the records of the claim.

fulgurite reproduce orthogonal_convolutions --out OUT && python docs/pictures/orthogonal_convolutions.py OUT/runs.jsonl PNG
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from fulgurite.records import read_records
from fulgurite.report.pictures import dress, new_figure, png

WEIGHTS = {"lorth 0.01": 0.01, "lorth 0.03": 0.03, "lorth 0.1": 0.1, "lorth 1": 1.0, "lorth 10": 10.0}
MEASURES = {
    "test/acc": ("clean", "#2b6cb0"),
    "test/pgd_0.3": ("attacked, radius 0.3", "#2f855a"),
    "test/pgd_0.6": ("attacked, radius 0.6", "#c05621"),
    "test/pgd_1.0": ("attacked, radius 1.0", "#9b2c2c"),
}
records = [record for record in read_records(Path(sys.argv[1])) if record.status == "ok"]


def values(variant: str, measure: str) -> list[float]:
    """Return what the seeds of a variant measured."""
    return [record.metrics[measure] for record in records if record.variant == variant]


def mean(variant: str, measure: str) -> float:
    """Return the mean over seeds."""
    return statistics.mean(values(variant, measure))


figure = new_figure(9, 4, "white")
left, right = figure.subplots(1, 2)
for measure, (label, colour) in MEASURES.items():
    of_weights = [values(name, measure) for name in WEIGHTS]
    left.plot([*WEIGHTS.values()], [statistics.mean(v) for v in of_weights], "o-", color=colour, label=label)
    ends = [min(v) for v in of_weights], [max(v) for v in of_weights]
    left.fill_between([*WEIGHTS.values()], *ends, color=colour, alpha=0.15, lw=0)
    left.axhline(mean("baseline", measure), color=colour, ls=":", lw=1.2)
left.set_xscale("log")
left.set(xlabel="weight of the penalty (dotted: without it)", ylabel="accuracy", ylim=(0, 1))
left.legend(fontsize=8, frameon=False, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
pair = "test/acc", "test/pgd_0.6"
for name in ("baseline", "kernel 1", *WEIGHTS):
    colour = {"baseline": "#718096", "kernel 1": "#c05621"}.get(name, "#2b6cb0")
    x, y = (mean(name, measure) for measure in pair)
    spread = [statistics.stdev(values(name, measure)) for measure in pair]
    right.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt="o", color=colour)
    right.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8)
right.plot(*([mean(name, measure) for name in WEIGHTS] for measure in pair), "-", color="#2b6cb0", lw=1)
right.set(xlabel="accuracy on clean images", ylabel="accuracy attacked, radius 0.6")
for axes in (left, right):
    dress(axes)
Path(sys.argv[2]).write_bytes(png(figure, 150))
