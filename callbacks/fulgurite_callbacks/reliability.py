# SPDX-License-Identifier: Apache-2.0
"""The reliability diagram: how often predictions of each confidence are right."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from fulgurite_callbacks import pictures


class ReliabilityBins(Metric):
    """Number, sum of confidences and number of hits in each bin of confidence: [3, n_bins]."""

    full_state_update = False
    totals: Tensor

    def __init__(self, n_bins: int) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.add_state("totals", default=torch.zeros(3, n_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logs: Tensor, targets: Tensor) -> None:
        """Add log-probabilities [N, C] and class indices [N]."""
        best, predicted = logs.max(dim=1)
        confidence = best.exp().nan_to_num()
        index = (confidence * self.n_bins).long().clamp(max=self.n_bins - 1)
        rows = torch.stack((torch.ones_like(confidence), confidence, (predicted == targets).to(confidence.dtype)))
        self.totals = self.totals.index_add(1, index, rows.to(self.totals.dtype))

    def compute(self) -> Tensor:
        """Return the totals."""
        return self.totals


def draw_reliability(totals: Tensor, path: Path, stage: str, ece: str) -> None:
    """Draw how often predictions of each confidence are right, and how many there are."""
    from fulgurite.report.pictures import new_figure

    counts, confidences, hits = totals.cpu().double()
    n_bins, total = len(counts), float(counts.sum())
    edges = torch.linspace(0, 1, n_bins + 1).tolist()
    accuracy = (hits / counts).tolist()
    mean = (confidences / counts).tolist()
    figure = new_figure(4.2, 4.9, "white")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    width = 1 / n_bins
    filled = [i for i in range(n_bins) if counts[i] > 0]
    upper.bar(
        [edges[i] for i in filled], [accuracy[i] for i in filled], width, align="edge", color="#9ecae9", linewidth=0
    )
    upper.plot([0, 1], [0, 1], color=pictures.NEUTRAL, linestyle=(0, (4, 2)), linewidth=1.2, label="calibrated")
    upper.plot(
        [mean[i] for i in filled],
        [accuracy[i] for i in filled],
        color=pictures.COLOURS[0],
        marker="o",
        markersize=4,
        linewidth=1.6,
        label="observed",
    )
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of right predictions")
    shares = [float(count) / total if total else 0.0 for count in counts]
    lower.bar(edges[:-1], shares, width * 0.92, align="edge", color=pictures.NEUTRAL, linewidth=0)
    lower.set(xlabel="confidence", ylabel="share of\nexamples")
    pictures.finish(upper, f"{stage}: {total:,.0f} predictions{ece}")
    pictures.finish(lower)
    upper.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=pictures.TEXT)
    pictures.save(figure, path)
