# SPDX-License-Identifier: Apache-2.0
"""What Weight Compander costs: a training step beside plain training and beside weight normalisation, and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fulgurite.bench import (
    Bench,
    Block,
    Callbacks,
    Case,
    Classifier,
    Target,
    Training,
    batches,
    calls,
    convolutional,
    device,
    perceptron,
    trainers,
    training_memory,
)
from fulgurite.intervention import Intervention
from fulgurite_plugins.reparametrization.weight_compander.functional import compand
from fulgurite_plugins.reparametrization.weight_compander.intervention import WeightCompander
from fulgurite_plugins.reparametrization.weight_compander.modules import Compander
from fulgurite_plugins.reparametrization.weight_compander.selection import select

_BATCH = 128
_ALONE = "trainer alone"
_PEER = "weight_norm"
_BYTES = 4 * 1_000_000
"""The weights of either network, about a million, in float32."""


class _WeightNorm(Intervention):
    """Torch's weight normalisation of the same tensors."""

    def operate(self, module: nn.Module) -> None:
        for place in select(module, "Linear,Conv"):
            parametrizations.weight_norm(place.host, place.tensor)


_VARIANTS: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "trainer alone, once more": lambda: (),  # tells how far two equal trainings are apart
    _PEER: lambda: (_WeightNorm(),),
    "WeightCompander()": lambda: (WeightCompander(),),
    "WeightCompander(fn='softsign')": lambda: (WeightCompander(fn="softsign"),),
    "WeightCompander(learn=True)": lambda: (WeightCompander(learn=True),),
}


def _perceptron() -> Training:
    return Training(lambda: perceptron(10), batches(20_000, 784, 10, _BATCH))


def _convolutional() -> Training:
    return Training(lambda: convolutional(100), batches(5 * _BATCH, 768, 100, _BATCH), steps=2)


def _steps(training: Callable[[], Training], reference: str) -> Mapping[str, Block]:
    others = (_PEER, "WeightCompander()")
    variants = _VARIANTS if reference == _ALONE else {name: _VARIANTS[name] for name in others}
    return trainers(training(), variants)


def _memory() -> Mapping[str, Block]:
    return training_memory(_perceptron(), _VARIANTS)


def _evaluations() -> Mapping[str, Block]:
    """Weights and their gradient, of 30 layers: one after the other, and in the slow ways."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 64, 3, 3, generator=generator).to(device()).requires_grad_() for _ in range(30)]
    companders = [Compander(1.2, 1.2).to(device()) for _ in weights]
    pairs = list(zip(weights, companders, strict=True))
    plain = [weight.detach() for weight in weights]

    def run(make: Callable[[], list[Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(make(), weights, plain)

    return calls(
        {
            "Compander": run(lambda: [compander(v) for v, compander in pairs]),
            "a * atan(v / b) by autograd": run(lambda: [c.a * torch.atan(v / c.b) for v, c in pairs]),
            "by autograd, foreach": run(lambda: _foreach(weights)),
            "torch.atan alone, forward": lambda: [torch.atan(v) for v in plain],
            "floats read in every step": run(lambda: [compand(v, float(c.a), float(c.b)) for v, c in pairs]),
        }
    )


def _foreach(weights: list[Tensor]) -> list[Tensor]:
    x = torch._foreach_atan(torch._foreach_div(weights, 1.2))
    return list(torch._foreach_mul(x, 1.2))


class _Unrolled(Classifier):
    """A recurrent cell that is called 28 times in a step."""

    def __init__(self, cached: bool) -> None:
        super().__init__((128, 10))
        self.cell = nn.GRUCell(28, 128)
        self.cached = cached

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy, with the weights computed once or at every call of the cell."""
        inputs, targets = batch
        if not self.cached:
            return self._loss(inputs, targets)
        with parametrize.cached():
            return self._loss(inputs, targets)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = inputs.new_zeros(len(inputs), 128)
        for row in inputs.unflatten(1, (28, 28)).unbind(1):
            hidden = self.cell(row, hidden)
        return nn.functional.cross_entropy(self.network(hidden), targets)


def _recurrent() -> Mapping[str, Block]:
    loader = batches(20 * _BATCH, 784, 10, _BATCH)

    def with_method() -> tuple[WeightCompander]:
        return (WeightCompander("GRUCell,Linear"),)

    return {
        **trainers(Training(lambda: _Unrolled(cached=False), loader, steps=5), {_ALONE: lambda: ()}),
        **trainers(Training(lambda: _Unrolled(cached=False), loader, steps=5), {"every call": with_method}),
        **trainers(Training(lambda: _Unrolled(cached=True), loader, steps=5), {"cached": with_method}),
    }


_NETWORKS = (
    ("a perceptron of a million parameters (batch 128, 10 classes)", _perceptron, 60),
    ("a convolutional network of a million parameters (batch 128, 100 classes)", _convolutional, 20),
)

BENCH = Bench(
    cases=(
        *(
            Case(
                name=f"One training step of {name}",
                blocks=functools.partial(_steps, training, _ALONE),
                reference=_ALONE,
                targets=(Target("WeightCompander()", "ratio", at_most=1.15),),
                rounds=rounds,
            )
            for name, training, rounds in _NETWORKS
        ),
        *(
            Case(
                name=f"Beside weight normalisation: {name}",
                blocks=functools.partial(_steps, training, _PEER),
                reference=_PEER,
                targets=(Target("WeightCompander()", "ratio", at_most=1.1),),
                rounds=rounds,
            )
            for name, training, rounds in _NETWORKS
        ),
        Case(
            name="Weights of 30 layers of 36,864 entries, and their gradients",
            blocks=_evaluations,
            reference="Compander",
            rounds=30,
        ),
        Case(
            name="One training step of a recurrent cell that is called 28 times (batch 128)",
            blocks=_recurrent,
            reference=_ALONE,
            rounds=20,
        ),
        Case(
            name="All tensors alive when training ends (perceptron)",
            blocks=_memory,
            reference=_ALONE,
            targets=(Target("WeightCompander()", "difference", at_most=1.05 * _BYTES),),
            unit="bytes",
            rounds=1,
        ),
    )
)
