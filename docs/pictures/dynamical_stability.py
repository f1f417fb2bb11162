# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/dynamical_stability.png from the records of the claim.

fulgurite reproduce dynamical_stability --out OUT && python docs/pictures/dynamical_stability.py OUT/runs.jsonl PNG
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from fulgurite.records import read_records
from fulgurite.report.pictures import LIGHT, dress, new_figure, png

SETTINGS = {"diagonal": "diagonal linear network", "neuron": "two-layer ReLU network"}
COLOURS = {"SGD": LIGHT.colours[1], "GD": LIGHT.colours[2]}

points: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
for record in read_records(Path(sys.argv[1])):
    if record.status == "ok":
        method, rate = record.variant.split()
        lr = float(rate)
        found = lr, lr * record.metrics["stability/trace"], record.metrics["test/mse"]
        points[record.setting, method].append(found)

figure = new_figure(9, 6.4, "white")
rows = figure.subplots(2, 2)
for (left, right), (setting, title) in zip(rows, SETTINGS.items(), strict=True):
    for method, colour in COLOURS.items():
        lr, product, error = zip(*sorted(points[setting, method]), strict=True)
        left.plot(lr, product, "o", markersize=4, alpha=0.7, color=colour, label=method)
        right.plot(lr, error, "o", markersize=4, alpha=0.7, color=colour, label=method)
    left.axhline(2.0, color=LIGHT.text, linewidth=1.0, linestyle=":")
    left.text(lr[-1], 2.0, "limit of SGD", fontsize=8, ha="right", va="bottom")
    left.set(title=title, xlabel="learning rate", ylabel="learning rate times trace", xscale="log")
    right.set(xlabel="learning rate", ylabel="test error", xscale="log", ylim=(0, None))
    rates = sorted({rate for method in COLOURS for rate, _, _ in points[setting, method]})
    for axes in (left, right):
        dress(axes)
        axes.title.set_fontsize(10)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xticks([], minor=True)
        axes.legend(frameon=False, fontsize=8.5)
Path(sys.argv[2]).write_bytes(png(figure, 130))
