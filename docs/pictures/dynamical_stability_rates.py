# SPDX-License-Identifier: Apache-2.0
"""Write docs/measured/dynamical_stability-rates.md: where SGD and gradient descent end, as rate and initial weights grow.

python docs/pictures/dynamical_stability_rates.py MD

The network, the data and the number of steps are those of the second setting of the claim, with more learning rates and a
second scale of the initial weights. All networks are trained at once, as stacked tensors, with SGD in batches of one.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from fulgurite_datamodules import SingleNeuron
from fulgurite_plugins.curvature.dynamical_stability.modules import TwoLayerReLU

SEEDS, STEPS, CONVERGED = range(5), 20_000, 1e-4
SCALES = (1.0, 1.5)
SGD, GD = (0.003, 0.02, 0.04, 0.06, 0.08), (0.003, 0.08, 0.2)

Cell = tuple[float, str, float]
"""Scale of the initial weights, method, learning rate."""


def outputs(W: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs `[E, B]` and hidden units `[E, B, m]` of networks for inputs `[E, B, d]`."""
    hidden = (x @ W.mT).relu()
    return (hidden @ a.unsqueeze(2)).squeeze(2), hidden


def train(seed: int, cells: list[Cell], single: bool) -> tuple[Tensor, Tensor]:
    """Return first layers `[E, m, d]` and second layers `[E, m]` of one seed, trained on single examples or on all."""
    data = SingleNeuron(data_seed=seed)
    data.setup()
    x, y = data.train_dataset.inputs, data.train_dataset.targets[:, 0]
    networks = []
    for scale, _, _ in cells:
        torch.manual_seed(seed)
        networks.append(TwoLayerReLU(10, 40, init_scale=scale))
    W = torch.stack([network.hidden.weight.detach() for network in networks])
    a = torch.stack([network.output.weight.detach()[0] for network in networks])
    lr = torch.tensor([rate for _, _, rate in cells])
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(STEPS // len(x) + 1)])
    for step in range(STEPS):
        batch = order[step : step + 1] if single else slice(None)
        given = x[batch].expand(len(cells), -1, -1)
        found, hidden = outputs(W, a, given)
        errors = (found - y[batch]) * lr.unsqueeze(1) / given.shape[1]
        of_hidden = errors.unsqueeze(2) * a.unsqueeze(1) * (hidden > 0)
        W, a = W - of_hidden.mT @ given, a - (errors.unsqueeze(1) @ hidden).squeeze(1)
    return W, a


def measure(seed: int, W: Tensor, a: Tensor) -> tuple[float, float, float, float]:
    """Return training loss, trace of the Hessian, path norm and test error of one network."""
    data = SingleNeuron(data_seed=seed)
    data.setup()
    network = TwoLayerReLU(10, 40)
    network.hidden.weight.data, network.output.weight.data = W, a.unsqueeze(0)
    with torch.no_grad():
        loss, test = (
            (network(part.inputs) - part.targets).square().mean() for part in (data.train_dataset, data.test_dataset)
        )
        trace = network.trace(data.train_dataset.inputs)
        return float(loss) / 2, float(trace), float(network.path_norm()), float(test)


def main() -> None:
    """Train everything, and write the table."""
    found: dict[Cell, list[tuple[float, float, float, float]]] = defaultdict(list)
    for method, rates in (("SGD", SGD), ("GD", GD)):
        cells = [(scale, method, rate) for scale in SCALES for rate in rates]
        for seed in SEEDS:
            for cell, W, a in zip(cells, *train(seed, cells, method == "SGD"), strict=True):
                found[cell].append(measure(seed, W, a))
    lines = [
        "| initial weights | method | rate | diverged | loss below 1e-4 | rate times trace | path norm | test error |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (scale, method, rate), values in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] == "GD")):
        kept = torch.tensor([each for each in values if each[0] < float("inf")])
        loss, trace, path, test = kept.T if len(kept) else kept.new_empty(4, 0)
        products = f"{rate * trace.mean():.2f} (at most {rate * trace.max():.2f})" if len(kept) else "-"
        norms = f"{path.mean():.2f} | {test.mean():.3f}" if len(kept) else "- | -"
        counts = f"{len(values) - len(kept)}/{len(values)} | {int((loss < CONVERGED).sum())}/{len(values)}"
        lines.append(f"| {scale:g} | {method} | {rate:g} | {counts} | {products} | {norms} |")
    end = "Means over the seeds that did not diverge: `python docs/pictures/dynamical_stability_rates.py MD`."
    Path(sys.argv[1]).write_text("\n".join([*lines, "", end, ""]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
