# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/batch_hessian_lr.png and batch_hessian_lr-density.png.

fulgurite reproduce batch_hessian_lr --out OUT && python docs/pictures/batch_hessian_lr.py OUT/runs.jsonl PNG DENSITY

The first, from the records of the claim: how far the largest eigenvalue of a batch exceeds that of all examples, and what
the learner did. The second, measured here: the spectral density of one batch and of all examples after a training.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from fulgurite.quiet import quiet
from fulgurite.records import RunRecord, read_records
from fulgurite.report.pictures import dress, new_figure, png
from fulgurite.tasks import Classification
from fulgurite_datamodules import Digits
from fulgurite_plugins.curvature import HessianSpectrum
from fulgurite_plugins.curvature.batch_hessian_lr.claim import SIZES
from fulgurite_plugins.curvature.batch_hessian_lr.claim_network import TanhMLP
from fulgurite_plugins.curvature.batch_hessian_lr.density import SpectralDensity

N = 1437
BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#718096"


def draw_claim(records: list[RunRecord], path: Path) -> None:
    """Draw the excess by batch size, and the learning rates of the learner."""
    figure = new_figure(9, 3.8, "white")
    left, right = figure.subplots(1, 2)
    spectra = [record.metrics for record in records if record.variant == "SGD"]
    effective = [size / (1 - size / N) for size in SIZES]
    for stage, colour in (("initial", BLUE), ("trained", ORANGE)):
        values = [[run[f"{stage}/ratio_{size}"] - 1 for run in spectra] for size in SIZES]
        left.plot(effective, [statistics.mean(v) for v in values], "o-", color=colour, label=stage)
        left.fill_between(effective, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
    for exponent, style in ((-0.5, ":"), (-1.0, "--")):
        line = [6 * (b / effective[0]) ** exponent for b in effective[:4]]
        left.plot(effective[:4], line, style, color=GREY, lw=1.2, label=f"b^{exponent:g}")
    left.set(xscale="log", yscale="log", xlabel="effective batch size b", ylabel="excess of the largest eigenvalue")
    left.legend(frameon=False, fontsize=8)
    learned = [record for record in records if record.variant == "inverse"]
    for record in learned:
        points = record.curves["slq/lr"]
        right.plot([point.epoch for point in points], [point.value for point in points], color=BLUE, lw=1.2)
    right.set(yscale="log", xlabel="epoch", ylabel="learning rate set by SLQLearningRate")
    for axes in (left, right):
        dress(axes)
    path.write_bytes(png(figure, 150))


def densities() -> dict[str, SpectralDensity]:
    """Return the densities of one batch of 64 and of all examples, after ten epochs."""
    torch.manual_seed(0)
    one = HessianSpectrum(num_batches=1, steps=100, probes=4, every_n_epochs=10)
    whole = HessianSpectrum(num_batches="all", steps=100, probes=4, every_n_epochs=10)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    module = Classification(10, network=TanhMLP(hidden=[16]), optimizer=optimizer)
    with quiet():
        trainer = pl.Trainer(
            max_epochs=10, callbacks=[one, whole], logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(module, datamodule=Digits(val_size=0, test_size=360, batch_size=64))
    return {"a batch of 64": one.densities[-1][1], "all 1437 examples": whole.densities[-1][1]}


def draw_densities(found: dict[str, SpectralDensity], path: Path) -> None:
    """Draw both densities on one scale."""
    figure = new_figure(9, 3.4, "white")
    axes = figure.subplots()
    low, high = (f(*(getattr(d, end) for d in found.values())) for f, end in ((min, "smallest"), (max, "largest")))
    points = torch.linspace(low - 0.1, high + 0.1, 1500, dtype=torch.float64)
    for (name, density), colour in zip(found.items(), (ORANGE, BLUE), strict=True):
        smooth = density.smoothed(points, 0.02).clamp_min(1e-5)
        axes.plot(points.tolist(), smooth.tolist(), color=colour, lw=1.3, label=f"{name}: up to {density.largest:.2f}")
    axes.set(yscale="log", ylim=(1e-5, 50), xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.legend(frameon=False, fontsize=9)
    dress(axes)
    path.write_bytes(png(figure, 150))


if __name__ == "__main__":
    ok = [record for record in read_records(Path(sys.argv[1])) if record.status == "ok"]
    draw_claim(ok, Path(sys.argv[2]))
    draw_densities(densities(), Path(sys.argv[3]))
