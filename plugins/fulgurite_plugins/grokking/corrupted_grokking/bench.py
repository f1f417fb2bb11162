# SPDX-License-Identifier: Apache-2.0
"""What an epoch of the study costs, beside products with one-hot vectors; the curve of pruning, beside a pass per neuron."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.bench import Bench, Block, Case, Target, calls, device
from fulgurite_datamodules import ModularArithmetic
from fulgurite_datamodules.modular_arithmetic import Encoding
from fulgurite_plugins.grokking.corrupted_grokking.functional import inverse_participation_ratio, prune_curve
from fulgurite_plugins.grokking.corrupted_grokking.networks import OneHotMSE, QuadraticMLP
from fulgurite_plugins.grokking.corrupted_grokking.neurons import find_neurons

_P, _WIDTH = 97, 500
_TOKENS, _ONE_HOT = "tokens that are looked up", "products with one-hot vectors"
_CURVE, _PASSES = "prune_curve", "a copy and a forward pass per neuron"
_EPOCH, _SCORES, _LOOP = "an epoch", "NeuronIPR, every 10 epochs", "a transform per neuron, every 10 epochs"


class _Joined(nn.Module):
    """The network as one writes it down: one layer for both one-hot vectors, a square, and a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * _P, _WIDTH, bias=False), nn.Linear(_WIDTH, _P, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs) ** 2)


def _batch(encoding: Encoding) -> tuple[Tensor, Tensor]:
    data = ModularArithmetic(_P, encoding=encoding)
    inputs, targets = next(iter(data.train_dataloader()))
    return inputs.to(device()), targets.to(device())


def _epoch(network: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    network.to(device())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.98))

    def epoch() -> Tensor:
        optimizer.zero_grad()
        value = loss(network(inputs))
        value.backward()
        optimizer.step()
        return value

    return epoch


def _ours() -> Callable[[], Tensor]:
    tokens, targets = _batch("tokens")
    return _epoch(QuadraticMLP(_P, _WIDTH), tokens, functools.partial(OneHotMSE(), targets=targets))


def _epochs() -> Mapping[str, Block]:
    one_hot, targets = _batch("onehot")
    wanted = F.one_hot(targets, _P).float()
    return calls({_TOKENS: _ours(), _ONE_HOT: _epoch(_Joined(), one_hot, lambda outputs: F.mse_loss(outputs, wanted))})


def _curves() -> Mapping[str, Block]:
    """Seconds per number of neurons."""
    tokens, targets = _batch("tokens")
    one_hot, _ = _batch("onehot")
    network, joined = QuadraticMLP(_P, _WIDTH).to(device()).eval(), _Joined().to(device()).eval()
    order = torch.arange(_WIDTH, device=device())
    points = 5

    @torch.no_grad()
    def curve() -> Tensor:
        return (prune_curve(network.hidden(tokens), network.W.weight, order) == targets).double().mean(1)

    @torch.no_grad()
    def passes() -> list[float]:
        found = []
        for q in range(points):
            pruned = copy.deepcopy(joined)
            pruned.first.weight[:q] = 0
            pruned.second.weight[:, :q] = 0
            found.append(float((pruned(one_hot).argmax(1) == targets).double().mean()))
        return found

    return {_CURVE: _seconds(curve, _WIDTH), _PASSES: _seconds(passes, points)}


def _monitors() -> Mapping[str, Block]:
    network = QuadraticMLP(_P, _WIDTH).to(device())
    neurons = find_neurons(network, "auto", "the bench")

    @torch.no_grad()
    def loop() -> list[float]:
        rows = [(network.U.weight[k], network.V.weight[k], network.W.weight[:, k]) for k in range(_WIDTH)]
        return [sum(float(inverse_participation_ratio(row)) for row in three) / 3 for three in rows]

    return {
        _EPOCH: _seconds(_ours(), 1, 3),
        _SCORES: _seconds(lambda: float(neurons.scores(2, "fourier").mean()), 10, 20),
        _LOOP: _seconds(loop, 10),
    }


def _seconds(function: Callable[[], object], parts: int, times: int = 1) -> Block:
    """Return a block that measures a call, divided by how much of it counts."""

    def block() -> float:
        begin = time.perf_counter()
        for _ in range(times):
            function()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times / parts

    return block


BENCH = Bench(
    cases=(
        Case(
            name=f"An epoch of the study: 4704 pairs modulo {_P} in one batch, {_WIDTH} neurons, AdamW",
            blocks=_epochs,
            reference=_TOKENS,
            targets=(Target(_ONE_HOT, "ratio", at_least=3.0),),
            rounds=20,
        ),
        Case(
            name=f"The curve of pruning for {_WIDTH} neurons and 4704 examples, per number of neurons",
            blocks=_curves,
            reference=_CURVE,
            targets=(Target(_PASSES, "ratio", at_least=30.0),),
            rounds=10,
        ),
        Case(
            name="The ratios of the neurons, every tenth epoch, beside one epoch",
            blocks=_monitors,
            reference=_EPOCH,
            targets=(Target(_SCORES, "ratio", at_most=0.01),),
            rounds=10,
        ),
    )
)
