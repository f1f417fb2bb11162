# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/grokking_stability.png from the records of the claim.

fulgurite reproduce grokking_stability --out OUT && python docs/pictures/grokking_stability.py OUT/runs.jsonl PNG
"""

from __future__ import annotations

import sys
from pathlib import Path

from fulgurite.records import RunRecord, read_records
from fulgurite.report.pictures import LIGHT, dress, new_figure, png

records = [record for record in read_records(Path(sys.argv[1])) if record.status == "ok"]


def curve(record: RunRecord, name: str) -> tuple[list[int], list[float]]:
    """Return steps and values."""
    points = record.curves[name]
    return [point.step for point in points], [point.value for point in points]


figure = new_figure(10, 3.8, "white")
left, right = figure.subplots(1, 2)
for colour, variant in enumerate(("cross entropy", "weight decay 1", "PerpGrad")):
    for record in (r for r in records if r.variant == variant):
        steps, norms = curve(record, "grokking/weight_norm")
        label = variant if record.seed == 0 else None
        left.plot(steps, norms, color=LIGHT.colours[colour], linewidth=1.1, alpha=0.8, label=label)
        found = record.metrics["grokking/step_95"]
        if found <= steps[-1]:
            at = min(range(len(steps)), key=lambda i: abs(steps[i] - found))
            left.plot(steps[at], norms[at], "o", color=LIGHT.colours[colour], markersize=5)
left.set(xlabel="step", ylabel="length of all weights", title="dots: held-out accuracy passes 95 %")
for colour, variant in enumerate(("float16", "float32", "float64"), start=1):
    for record in (r for r in records if r.variant == variant):
        label = variant if record.seed == 0 else None
        right.plot(
            *curve(record, f"stability/collapse_{variant}"), color=LIGHT.colours[colour], linewidth=1.1, label=label
        )
right.set(
    xlabel="step",
    ylabel="share of collapsed examples",
    xscale="log",
    title="softmax collapse, by precision of the loss",
)
for axes in (left, right):
    axes.title.set_fontsize(10)
    dress(axes)
    axes.legend(frameon=False, fontsize=8.5)
Path(sys.argv[2]).write_bytes(png(figure, 110))
