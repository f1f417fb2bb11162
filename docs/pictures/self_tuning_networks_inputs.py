# SPDX-License-Identifier: Apache-2.0
"""Why the claim of Self-Tuning Networks comes out as it does: its training, six networks at once, with one thing changed.

python docs/pictures/self_tuning_networks_inputs.py > OUT

Prints a line per case: test loss of six networks, or of some times six; how many of them never recovered; and which share of
the units of either hidden layer is active on any training example in the end. Only torch and the plugin's formulas are used,
not its callback: it is a check of that, too.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fulgurite_datamodules import Digits
from fulgurite_plugins.bilevel.self_tuning_networks.functional import RangeMap, softplus_inverse

NETWORKS, BATCH, WIDTHS = 6, 64, (64, 128, 128, 10)
LOST = 1.5
"""A test loss above which a network has learnt next to nothing; that of guessing is 2.3."""
RATES = RangeMap(0.0, 0.9)


@dataclass(frozen=True)
class Case:
    """A training of the claim, and what is changed of it; `scaled` inputs are in [0, 1], others standardised."""

    start: float
    tuned: bool = False
    scaled: bool = False
    updates: int = 2000
    lr: float = 0.05
    decay: bool = True
    clip: float = 1.0
    warmup: int = 150
    hyper_lr: float = 0.02
    fixed_scale: bool = False
    own_split: bool = False
    random_batches: bool = False


def data(case: Case) -> list[Tensor]:
    """Return inputs `[6, N, 64]` and targets `[6, N]` to train, to tune and to test."""
    found = []
    for network in range(NETWORKS):
        seed = network if case.own_split else 0
        noise = {"label_noise": 0.2, "noise_kind": "uniform", "noise_seed": seed}
        digits = Digits(train_size=300, val_size=200, test_size=1000, split_seed=seed, **noise)
        digits.setup()
        source = digits.read()
        inputs = source.inputs / 16 if case.scaled else (source.inputs - digits.mean) / digits.std
        parts = (digits.train_indices, digits.val_indices, digits.test_indices)
        targets = [digits.train_targets, *(source.targets[part] for part in parts[1:])]
        found.append([t for part, y in zip(parts, targets, strict=True) for t in (inputs[part].flatten(1), y)])
    return [torch.stack(tensors) for tensors in zip(*found, strict=True)]


def orders(size: int, at_random: bool, generator: Generator) -> Iterator[Tensor]:
    """Yield indices `[6, B]` of batches for ever: of epochs, or each drawn by itself."""
    while at_random:
        yield torch.randint(0, size, (NETWORKS, BATCH), generator=generator)
    while True:
        order = torch.stack([torch.randperm(size, generator=generator) for _ in range(NETWORKS)])
        yield from order.split(BATCH, dim=1)


class Perceptrons:
    """Six perceptrons with dropout on inputs and hidden layers; gated, if they are tuned."""

    def __init__(self, gated: bool, generator: Generator) -> None:
        self.generator = generator
        self.layers: list[list[Tensor]] = []
        self.active: list[Tensor] = []
        for inputs, outputs in itertools.pairwise(WIDTHS):
            shapes = [(inputs, outputs)] * (1 + gated) + [(1, outputs)] * (1 + gated)
            bound = 1 / math.sqrt(inputs)
            tensors = [torch.empty(NETWORKS, *s).uniform_(-bound, bound, generator=generator) for s in shapes]
            if gated:
                tensors.append(0.01 * torch.randn(NETWORKS, 3, 2 * outputs, generator=generator))
            self.layers.append([tensor.requires_grad_() for tensor in tensors])

    def __call__(self, x: Tensor, rates: Tensor | None = None, lam: Tensor | None = None) -> Tensor:
        """Return logits `[6, B, 10]`, with dropout at rates `[6, B, 3]` and gates at hyperparameters `[6, B, 3]`."""
        self.active.clear()
        for number, tensors in enumerate(self.layers):
            if rates is not None:
                keep = 1 - rates[..., number : number + 1]
                x = x * ((torch.rand(x.shape, generator=self.generator) < keep) / keep)
            if len(tensors) == 2:
                x = torch.baddbmm(tensors[1], x, tensors[0])
            else:
                weight, hyper_weight, bias, hyper_bias, gate = tensors
                scale, shift = torch.bmm(lam, gate).chunk(2, dim=-1)
                x = torch.baddbmm(bias, x, weight) + scale * torch.bmm(x, hyper_weight) + shift * hyper_bias
            if number < len(self.layers) - 1:
                x = x.relu()
                self.active.append((x > 0).any(1).float().mean(1))
        return x


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each network `[6]`."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(NETWORKS, -1).mean(1)


def train(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """Return, after a training, the test loss of each network `[6]`, and the share of its active units `[6, 2]`."""
    generator = Generator().manual_seed(seed)
    x, y, held_x, held_y, test_x, test_y = data(case)
    networks = Perceptrons(case.tuned, generator)
    parameters = list(itertools.chain(*networks.layers))
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    lam = RATES.unconstrain(torch.full((NETWORKS, 3), case.start)).requires_grad_()
    rho = softplus_inverse(torch.full((NETWORKS, 3), 0.5)).requires_grad_()
    adam = torch.optim.Adam([lam, rho], lr=case.hyper_lr)
    batches, held_out = orders(300, case.random_batches, generator), orders(200, False, generator)
    each = torch.arange(NETWORKS)[:, None]

    def perturbed(count: int) -> Tensor:
        scale = torch.full_like(rho, 0.5) if case.fixed_scale else F.softplus(rho)
        return lam[:, None] + scale[:, None] * torch.randn(NETWORKS, count, 3, generator=generator)

    def tune(index: Tensor) -> None:
        shown = perturbed(index.shape[1])
        if case.fixed_scale:
            shown = lam[:, None].expand_as(shown)
        entropy = 0.0 if case.fixed_scale else F.softplus(rho).log().sum()
        objective = loss(networks(held_x[each, index], lam=shown), held_y[each, index]).sum() - 1e-3 * entropy
        lam.grad, rho.grad = torch.autograd.grad(objective, [lam, rho], allow_unused=True)
        adam.step()

    for update in range(case.updates):
        lr = case.lr * (0.1 if case.decay and update >= 0.7 * case.updates else 1.0)
        index = next(batches)
        if case.tuned:
            shown = perturbed(index.shape[1]).detach()
            logits = networks(x[each, index], RATES.constrain(shown), shown)
        else:
            logits = networks(x[each, index], torch.full((NETWORKS, index.shape[1], 3), case.start))
        gradients = torch.autograd.grad(loss(logits, y[each, index]).sum(), parameters)
        norms = sum(gradient.square().flatten(1).sum(1) for gradient in gradients).sqrt()
        factors = (case.clip / (norms + 1e-6)).clamp(max=1)[:, None, None]
        with torch.no_grad():
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                parameter -= lr * momentum.mul_(0.9).add_(gradient * factors)
        since = update + 1 - case.warmup
        if case.tuned and since > 0 and since % 2 == 0:
            tune(next(held_out))
    with torch.no_grad():
        resting = lam[:, None].expand(-1, 1000, -1) if case.tuned else None
        losses = loss(networks(test_x, lam=resting), test_y)
        networks(x, lam=None if resting is None else resting[:, :300])
        return losses, torch.stack(networks.active, dim=1)


STARTS = (0.05, 0.4, 0.8)
ONCE, TWICE = (0,), (0, 1)
CASES = {
    **{f"fixed at {s}": (Case(s), ONCE) for s in STARTS},
    **{f"fixed at {s}, inputs in [0, 1]": (Case(s, scaled=True), ONCE) for s in STARTS},
    "fixed at 0.4, 3000 updates": (Case(0.4, updates=3000), ONCE),
    "fixed at 0.4, inputs in [0, 1], 3000 updates": (Case(0.4, scaled=True, updates=3000), ONCE),
    "fixed at 0.4, inputs in [0, 1], constant rate": (Case(0.4, scaled=True, decay=False), ONCE),
    "fixed at 0.4, inputs in [0, 1], no clipping": (Case(0.4, scaled=True, clip=math.inf), ONCE),
    "fixed at 0.4, inputs in [0, 1], own split, random batches": (
        Case(0.4, scaled=True, own_split=True, random_batches=True),
        ONCE,
    ),
    **{f"tuned from {s}": (Case(s, tuned=True), ONCE if s < 0.8 else (0, 1, 2, 10, 11)) for s in STARTS},
    **{
        f"tuned from {s}, inputs in [0, 1]": (Case(s, tuned=True, scaled=True), ONCE if s < 0.8 else (0, 10, 11))
        for s in STARTS
    },
    "tuned from 0.8, no warm-up": (Case(0.8, tuned=True, warmup=0), TWICE),
    "tuned from 0.8, four times the warm-up": (Case(0.8, tuned=True, warmup=600), TWICE),
    "tuned from 0.8, rate 0.02": (Case(0.8, tuned=True, lr=0.02), TWICE),
    "tuned from 0.8, constant rate": (Case(0.8, tuned=True, decay=False), TWICE),
    "tuned from 0.8, 3000 updates": (Case(0.8, tuned=True, updates=3000), TWICE),
    "tuned from 0.8, own split": (Case(0.8, tuned=True, own_split=True), TWICE),
    "tuned from 0.8, hyperparameters at twice the rate": (Case(0.8, tuned=True, hyper_lr=0.04), TWICE),
    "tuned from 0.8, fixed scales": (Case(0.8, tuned=True, fixed_scale=True), TWICE),
    "tuned from 0.8, no clipping": (Case(0.8, tuned=True, clip=math.inf), TWICE),
}
"""The cases, and the seeds of each six networks."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (case, seeds) in CASES.items():
        losses, active = (torch.cat(parts) for parts in zip(*(train(case, seed) for seed in seeds), strict=True))
        lost = ~(losses < LOST)
        line = (
            f"{name}: mean {losses.mean():.3f}, median {losses.median():.3f}, lost {int(lost.sum())} of {len(losses)}"
        )
        for what, networks in (("lost", lost), ("others", ~lost)):
            if bool(networks.any()):
                line += f", active units of {what} {' and '.join(f'{s:.0%}' for s in active[networks].mean(0))}"
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
