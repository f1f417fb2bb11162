# SPDX-License-Identifier: Apache-2.0
"""What Self-Tuning Networks cost: time per training step, of the gates alone and with validation steps; memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.bench import (
    Bench,
    Block,
    Callbacks,
    Case,
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
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.intervention import SelfTuning
from fulgurite_plugins.bilevel.self_tuning_networks.layers import HyperConv2d, HyperLinear
from fulgurite_plugins.bilevel.self_tuning_networks.layers.gated import Gated
from fulgurite_plugins.bilevel.self_tuning_networks.targets import Dropout

_BATCH = 128
_ALONE = "trainer alone"
_GATES = "SelfTuning, gates alone"
_WHOLE = "SelfTuning()"
_NEVER = 5_000.0
"""Epochs of a warm-up that does not end while it is measured."""


def _tuner(warmup_epochs: float) -> SelfTuning:
    return SelfTuning([Hyper("rate", Dropout(), init=0.1)], warmup_epochs=warmup_epochs, schedule_file=None)


_VARIANTS: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "trainer alone, once more": lambda: (),  # tells how far two equal trainings are apart
    _GATES: lambda: (_tuner(_NEVER),),
    _WHOLE: lambda: (_tuner(0.0),),
}


def _perceptron() -> Training:
    return Training(lambda: perceptron(100, dropout=0.1), batches(20_000, 784, 100, _BATCH), cycle=2)


def _perceptron_steps() -> Mapping[str, Block]:
    return trainers(_perceptron(), _VARIANTS)


def _convolutional_steps() -> Mapping[str, Block]:
    loader = batches(10 * _BATCH, 768, 100, _BATCH)
    return trainers(Training(lambda: convolutional(100, dropout=0.1), loader, steps=2, cycle=2), _VARIANTS)


def _memory() -> Mapping[str, Block]:
    return training_memory(_perceptron(), {name: _VARIANTS[name] for name in (_ALONE, _WHOLE)})


def _layers(make: Callable[[], Gated], plain: Callable[..., Tensor], shape: tuple[int, ...]) -> Mapping[str, Block]:
    """A gated layer beside the natural way to write one, and beside the plain one; all forward and backward."""
    torch.manual_seed(0)
    layer: Any = make().to(device())
    inputs = torch.randn(shape, device=device(), requires_grad=True)
    layer.conditioning.set(torch.randn(shape[0], layer.num_hyper, device=device()))
    weight, bias = layer.elementary()

    def two_calls() -> Tensor:
        h = layer.conditioning.h
        gates = layer.gate.weight if h is None else F.linear(h, layer.gate.weight)
        scale, shift = (g.view(*g.shape, *[1] * (inputs.ndim - 2)) for g in gates.chunk(2, dim=1))
        c = layer.hyper_bias.view(1, -1, *[1] * (inputs.ndim - 2))
        return plain(inputs, weight, bias) + scale * plain(inputs, layer.hyper_weight) + shift * c

    functions = {
        _LAYER: lambda: layer(inputs).sum().backward(),
        _TWO: lambda: two_calls().sum().backward(),
        "the plain layer": lambda: plain(inputs, weight, bias).sum().backward(),
    }
    return calls(functions)


def _linear() -> Mapping[str, Block]:
    return _layers(lambda: HyperLinear(512, 512, num_hyper=8), F.linear, (_BATCH, 512))


def _convolution() -> Mapping[str, Block]:
    make = functools.partial(HyperConv2d, 64, 64, 3, num_hyper=8, padding=1)
    return _layers(make, functools.partial(F.conv2d, padding=1), (32, 64, 16, 16))


_LAYER = "the gated layer"
_TWO = "two calls and elementwise passes"
_ONE_KERNEL = (Target(_TWO, "ratio", at_least=1.3),) if torch.cuda.is_available() else ()
"""On a CPU, where one call of twice the width takes as long as two calls, there is nothing to win."""
_COST = (Target(_GATES, "ratio", at_most=2.1), Target(_WHOLE, "ratio", at_most=3.0))
"""The cost model: twice the products of the gated layers; two thirds of that again in every second step."""

BENCH = Bench(
    cases=(
        Case(
            name=f"One training step of a perceptron of a million parameters with dropout (batch {_BATCH}, 100 classes)",
            blocks=_perceptron_steps,
            reference=_ALONE,
            targets=_COST,
            rounds=30,
        ),
        Case(
            name=f"One training step of a convolutional network of a million parameters with dropout (batch {_BATCH})",
            blocks=_convolutional_steps,
            reference=_ALONE,
            targets=_COST,
            rounds=15,
        ),
        Case(
            name=f"Forward and backward of a gated linear layer (512 to 512, batch {_BATCH})",
            blocks=_linear,
            reference=_LAYER,
            targets=_ONE_KERNEL,
        ),
        Case(
            name="Forward and backward of a gated convolution (64 to 64 channels, 3x3, 16x16 pixels, batch 32)",
            blocks=_convolution,
            reference=_LAYER,
            targets=_ONE_KERNEL,
        ),
        Case(
            name="All tensors alive when training of the perceptron ends",
            blocks=_memory,
            reference=_ALONE,
            unit="bytes",
            rounds=1,
        ),
    )
)
