# SPDX-License-Identifier: Apache-2.0
r"""Draw the phases of networks over training fraction, fraction of wrong labels and weight decay, from a sweep.

fulgurite compare --config docs/pictures/corrupted_grokking.yaml --seeds 1 \
  --grid data.train_fraction=0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9 --grid data.corrupted_fraction=0.1,0.2,0.3,0.4,0.5,0.6,0.7 \
  --grid model.optimizer.weight_decay=0,5,10 --metric corruption/train --metric corruption/test --out OUT
python docs/pictures/corrupted_grokking.py OUT/runs.jsonl docs/measured/corrupted_grokking.png
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from fulgurite.records import read_records
from fulgurite.report.pictures import LIGHT, dress, new_figure, png
from fulgurite_plugins.grokking.corrupted_grokking.functional import Phase, classify_phase

CHANCE = 1 / 31
COLOURS = ("#3b6fb6", "#59a89c", "#8fd175", "#d9a441", "#777777", "#c9c9c9")
PHASES = list(get_args(Phase))

found: dict[tuple[float, float, float], int] = {}
for record in read_records(Path(sys.argv[1])):
    if record.status == "ok":
        fraction, wrong, decay = (float(number) for number in re.findall(r"=([\d.]+)", record.setting))
        train, test = (record.metrics[f"corruption/{name}"] for name in ("train", "test"))
        found[fraction, wrong, decay] = PHASES.index(classify_phase(train, test, wrong, CHANCE))

fractions, corrupted, decays = (sorted({key[axis] for key in found}) for axis in range(3))
figure = new_figure(10, 3.7, "white")
grid = figure.subplots(1, len(decays), sharey=True, squeeze=False)[0]
for axes, decay in zip(grid, decays, strict=True):
    table = np.array([[found.get((fraction, wrong, decay), np.nan) for fraction in fractions] for wrong in corrupted])
    axes.imshow(table, origin="lower", aspect="auto", cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=len(PHASES) - 0.5)
    axes.set_xticks(range(len(fractions)), [f"{value:g}" for value in fractions])
    axes.set_yticks(range(len(corrupted)), [f"{value:g}" for value in corrupted])
    axes.set_title(f"weight decay {decay:g}", fontsize=10)
    axes.set_xlabel("fraction of pairs trained on")
    dress(axes)
    axes.grid(visible=False)
grid[0].set_ylabel("fraction of wrong labels")
handles = [Patch(color=COLOURS[number], label=PHASES[number]) for number in sorted(set(found.values()))]
figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9, labelcolor=LIGHT.text)
Path(sys.argv[2]).write_bytes(png(figure, 110))
