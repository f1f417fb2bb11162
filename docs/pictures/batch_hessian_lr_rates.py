# SPDX-License-Identifier: Apache-2.0
"""Write docs/measured/batch_hessian_lr-rates.md: the largest learning rate that still trains, by batch size.

python docs/pictures/batch_hessian_lr_rates.py MD

A rate trains if the loss over all training examples is below 0.5 after 150 steps. Rates are tried on a grid of factors of
the square root of 2; the figure is the geometric mean over seeds of the largest that trains.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite_datamodules import Digits
from fulgurite_plugins.curvature.batch_hessian_lr.claim_network import TanhMLP

SIZES, SEEDS, STEPS = (4, 8, 16, 32, 64, 256), 3, 150
GRIDS = {"SGD": (torch.optim.SGD, 0.1), "Adam": (torch.optim.Adam, 0.005)}


def loss_after(x: Tensor, y: Tensor, make: Any, lr: float, size: int, seed: int) -> float:
    """Return the loss over all examples after the steps."""
    torch.manual_seed(seed)
    network = TanhMLP(hidden=[64])
    optimizer = make(network.parameters(), lr=lr)
    for _ in range(STEPS):
        batch = torch.randint(0, len(x), (size,))
        optimizer.zero_grad()
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(network(x), y))


def largest(x: Tensor, y: Tensor, make: Any, start: float, size: int, seed: int) -> float:
    """Return the largest rate of the grid that trains."""
    rates = [start * 2 ** (k / 2) for k in range(15)]
    return max((lr for lr in rates if loss_after(x, y, make, lr, size, seed) < 0.5), default=math.nan)


def main(path: Path) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    digits = Digits(val_size=0, test_size=360)
    digits.setup()
    x, y = (torch.stack([torch.as_tensor(pair[part]) for pair in digits.train_dataset]) for part in (0, 1))
    lines = ["| | " + " | ".join(f"B = {size}" for size in SIZES) + " | exponent |", "|---" * (len(SIZES) + 2) + "|"]
    for name, (make, start) in GRIDS.items():
        means = []
        for size in SIZES:
            found = [largest(x, y, make, start, size, seed) for seed in range(SEEDS)]
            means.append(math.exp(sum(map(math.log, found)) / SEEDS))
        exponent = math.log(means[3] / means[0]) / math.log(SIZES[3] / SIZES[0])
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3g}" for mean in means) + f" | {exponent:.2f} |")
    path.write_text("\n".join(lines) + "\n")


main(Path(sys.argv[1]))
