# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/m_fac.png from the records of the claim.

fulgurite reproduce m_fac --out OUT && python docs/pictures/m_fac.py OUT/runs.jsonl PNG
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from fulgurite.records import RunRecord, read_records
from fulgurite.report.pictures import LIGHT, dress, new_figure, png

SPARSITIES = (80, 90, 95)
WHOLE = "M-FAC without blocks"
PRUNERS = {"magnitude": 0, "M-FAC": 1, WHOLE: 3}
OPTIMIZERS = {"SGD": 0, "M-FAC": 1, "Adam": 2}

runs: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
for record in read_records(Path(sys.argv[1])):
    if record.status == "ok":
        runs[record.setting, record.variant].append(record)


def accuracies(variant: str) -> list[float]:
    """Return the test accuracy of every seed."""
    return [record.metrics["test/acc"] for record in runs["pruning", variant]]


figure = new_figure(10, 3.8, "white")
left, right = figure.subplots(1, 2)
left.axhline(fmean(accuracies("dense")), color=LIGHT.text, linewidth=1, linestyle=":")
left.text(80, fmean(accuracies("dense")) + 0.01, "not pruned", fontsize=8.5, color=LIGHT.text)
for name, number in PRUNERS.items():
    found = {s: values for s in SPARSITIES if (values := accuracies(f"{name}, {s}%"))}
    colour = LIGHT.colours[number]
    left.plot(list(found), [fmean(values) for values in found.values()], "o-", color=colour, markersize=5, label=name)
    for sparsity, values in found.items():
        left.plot([sparsity] * len(values), values, "o", color=colour, markersize=3, alpha=0.45)
left.set(xlabel="weights taken out, per cent", ylabel="test accuracy", ylim=(0, 1.06), xticks=SPARSITIES)
left.set_title("pruned at once, not trained afterwards", fontsize=10)

best: dict[str, tuple[str, list[RunRecord]]] = {}
for (setting, variant), records in runs.items():
    if setting == "ill-conditioned":
        method = variant.rpartition(" ")[0].split(" ")[0]
        loss = fmean(record.metrics["train/loss"] for record in records)
        if method not in best or loss < fmean(record.metrics["train/loss"] for record in best[method][1]):
            best[method] = variant, records
for method, number in OPTIMIZERS.items():
    variant, records = best[method]
    for record in records:
        points = record.curves["train/loss"]
        label = variant if record is records[0] else None
        right.plot(
            [p.step for p in points], [p.value for p in points], color=LIGHT.colours[number], label=label, linewidth=1.2
        )
right.set(xlabel="step", ylabel="training loss", yscale="log")
right.set_title("badly scaled inputs; of each optimizer the best", fontsize=10)
for axes in (left, right):
    dress(axes)
    axes.legend(frameon=False, fontsize=8.5)
Path(sys.argv[2]).write_bytes(png(figure, 110))
