# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/corrupted_grokking.png: phases over training fraction and fraction of wrong labels, for three decays.

python docs/pictures/corrupted_grokking.py PNG
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import matplotlib
import numpy as np
import torch

from fulgurite_plugins.grokking.corrupted_grokking.functional import Phase, classify_phase
from fulgurite_plugins.grokking.corrupted_grokking.sweep import train_grid

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

P, WIDTH, EPOCHS = 31, 128, 400
DECAYS = (0.0, 5.0, 10.0)
FRACTIONS = [float(value) for value in np.linspace(0.2, 0.9, 8)]
CORRUPTED = [float(value) for value in np.linspace(0.1, 0.7, 7)]
PHASES: dict[Phase, str] = dict(
    zip(get_args(Phase), ("#3b6fb6", "#59a89c", "#8fd175", "#d9a441", "#777777", "#c9c9c9"), strict=True)
)

torch.set_num_threads(1)
figure, axes = plt.subplots(1, len(DECAYS), figsize=(10, 3.6), layout="constrained", sharey=True)
seen: set[Phase] = set()
for axis, decay in zip(axes, DECAYS, strict=True):
    found = train_grid(P, FRACTIONS, CORRUPTED, decay, width=WIDTH, epochs=EPOCHS)
    train, test = found["train"][..., 0], found["test"][..., 0]
    names = [
        [classify_phase(float(train[i, j]), float(test[i, j]), wrong, 1 / P) for i, _ in enumerate(FRACTIONS)]
        for j, wrong in enumerate(CORRUPTED)
    ]
    seen |= {name for row in names for name in row}
    numbers = [[list(PHASES).index(name) for name in row] for row in names]
    extent = (FRACTIONS[0] - 0.05, FRACTIONS[-1] + 0.05, CORRUPTED[0] - 0.05, CORRUPTED[-1] + 0.05)
    colours = ListedColormap(list(PHASES.values()))
    axis.imshow(numbers, origin="lower", aspect="auto", extent=extent, cmap=colours, vmin=-0.5, vmax=5.5)
    axis.set(title=f"weight decay {decay:g}", xlabel="fraction of pairs trained on")
axes[0].set_ylabel("fraction of wrong labels")
figure.legend(
    handles=[Patch(color=colour, label=name) for name, colour in PHASES.items() if name in seen],
    loc="outside lower center",
    ncols=6,
    frameon=False,
)
figure.savefig(Path(sys.argv[1]), dpi=110)
