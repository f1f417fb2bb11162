# SPDX-License-Identifier: Apache-2.0
"""Draw the delay of the paper's toy: loss curves by alpha, and a map of the delay by alpha and number of examples.

Run it from the repository's root: it trains for some minutes, and writes docs/measured/lazy_to_rich_grokking-phases.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from fulgurite_datamodules.polynomial_regression import PolynomialRegression
from fulgurite_plugins.grokking.lazy_to_rich_grokking import (
    QuadraticPerceptron,
    generalization_decomposition,
    generalization_delay,
    kernel_regression,
    quadratic_ntk,
)
from fulgurite_plugins.grokking.lazy_to_rich_grokking.functional import Delay

DIM, WIDTH, EPSILON, STEPS, EVERY = 25, 400, 0.25, 10_000, 10
ALPHAS, SIZES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (40, 80, 150, 300, 600)
CURVES_AT, TRIVIAL = 150, 0.75  # E[y^2] of y = (beta x)^2 / 2
TARGET = Path(__file__).parents[1] / "measured" / "lazy_to_rich_grokking-phases.png"


def train(alpha: float, size: int) -> tuple[Tensor, Tensor, float]:
    """Return training losses and exact test losses every ten steps, and the test loss of kernel regression; all relative."""
    data = PolynomialRegression(dim=DIM, train_size=size, test_size=2000)
    data.setup()
    torch.manual_seed(0)
    start = QuadraticPerceptron(DIM, WIDTH, EPSILON).hidden.weight.detach()
    x, y, weights = data.train_dataset.inputs, data.train_dataset.targets[:, 0], start.clone()

    def network(w: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ w.mT
        return (h + EPSILON / 2 * h.square()).mean(dim=1), 1 + EPSILON * h

    zero, train_losses, test_losses = network(start)[0], [], []
    for step in range(1, STEPS + 1):
        g, slopes = network(weights)
        residual = alpha * (g - zero) - y
        if step % EVERY == 0:
            train_losses.append(float(residual.square().mean() / y.square().mean()))
            test = generalization_decomposition(weights, alpha, EPSILON, data.beta, start)
            test_losses.append(float(test.total) / TRIVIAL)
        weights = weights - (residual.unsqueeze(1) * slopes).mT @ x / (alpha * size)
    held_out = data.test_dataset
    kernel, cross = (quadratic_ntk(start, EPSILON, a, x) for a in (x, held_out.inputs))
    best = (kernel_regression(kernel, y, cross) - held_out.targets[:, 0]).square().mean() / TRIVIAL
    return torch.tensor(train_losses), torch.tensor(test_losses), float(best)


def main() -> None:
    """Train everything, and draw."""
    runs = {(alpha, size): train(alpha, size) for alpha in ALPHAS for size in SIZES}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    steps = EVERY * torch.arange(1, STEPS // EVERY + 1)
    shown = ALPHAS[1::2]
    for alpha, colour in zip(shown, mpl.colormaps["viridis"]([0.85, 0.5, 0.1]), strict=True):
        train_losses, test_losses, _ = runs[alpha, CURVES_AT]
        left.plot(steps, train_losses, color=colour, linestyle="--", linewidth=1)
        left.plot(steps, test_losses, color=colour, label=f"alpha = {alpha:g}")
    left.axhline(runs[ALPHAS[0], CURVES_AT][2], color="grey", linewidth=1)
    left.text(12, runs[ALPHAS[0], CURVES_AT][2] * 1.06, "kernel regression", color="grey", fontsize=9, va="bottom")
    left.axhline(0.1, color="black", linestyle=":", linewidth=1)
    left.set(xscale="log", yscale="log", ylim=(1e-3, 2), xlabel="step", ylabel="loss, relative to that of zero")
    left.set_title(f"test (solid) and training loss (dashed), {CURVES_AT} examples", fontsize=11)
    left.legend(loc="lower left", frameon=False)
    delays = [[generalization_delay(*runs[alpha, size][:2], steps=steps) for size in SIZES] for alpha in ALPHAS]
    shades = torch.tensor([[Delay(d.train, min(d.test, STEPS)).decades for d in row] for row in delays])
    image = right.imshow(shades, origin="lower", cmap="magma_r", aspect="auto", vmin=0)
    for row, found in enumerate(delays):
        for column, delay in enumerate(found):
            never = delay.test > STEPS
            text = f"{'>' if never else ''}{shades[row][column]:.1f}"
            dark = shades[row][column] > 0.6 * shades.max()
            right.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    right.set_xticks(range(len(SIZES)), [str(size) for size in SIZES])
    right.set_yticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS])
    right.set(xlabel="training examples", ylabel="alpha")
    right.set_title("delay in decades of steps (>: not learnt in 10,000)", fontsize=11)
    figure.colorbar(image, ax=right)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
