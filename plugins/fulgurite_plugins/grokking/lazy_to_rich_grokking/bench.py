# SPDX-License-Identifier: Apache-2.0
"""What it costs: the tangent kernel beside the plain way, a scaled network per training step, and the monitor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._python_dispatch import TorchDispatchMode

from fulgurite.bench import (
    Bench,
    Block,
    Callbacks,
    Case,
    Target,
    Training,
    batches,
    calls,
    device,
    perceptron,
    trainers,
)
from fulgurite.landscape import ntk_gram
from fulgurite_plugins.grokking.lazy_to_rich_grokking.intervention import OutputScaling
from fulgurite_plugins.grokking.lazy_to_rich_grokking.monitor import LazyRichMonitor

_EXAMPLES, _INPUTS, _WIDTH, _OUTPUTS = 256, 64, 512, 2
_OURS, _PLAIN = "ntk_gram(trace=True)", "jacrev and one contraction"
_ALONE = "trainer alone"


def _kernels() -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    widths = (_INPUTS, _WIDTH, _WIDTH)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    network = nn.Sequential(*layers, nn.Linear(_WIDTH, _OUTPUTS)).to(device())
    inputs = torch.randn(_EXAMPLES, _INPUTS, device=device())
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def plain() -> Tensor:
        jacobian = jacrev(lambda p: functional_call(network, p, (inputs,)))(parameters)
        rows = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2).flatten(1)
        return rows @ rows.mT

    return {_OURS: lambda: ntk_gram(network, inputs, trace=True), _PLAIN: plain}


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


def _largest(function: Callable[[], Tensor]) -> Block:
    def block() -> float:
        with _Largest() as largest:
            function()
        return float(largest.bytes)

    return block


def _kernel_times() -> Mapping[str, Block]:
    return calls(_kernels(), block_seconds=0.2)


def _kernel_memory() -> Mapping[str, Block]:
    return {name: _largest(function) for name, function in _kernels().items()}


_SCALED: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "trainer alone, once more": lambda: (),
    **{
        f"OutputScaling(center={center!r})": lambda center=center: (OutputScaling(2.0, center),)  # type: ignore[misc]
        for center in ("none", "copy", "antisymmetric")
    },
}

_WATCHED: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "LazyRichMonitor()": lambda: (LazyRichMonitor(),),
    "LazyRichMonitor(max_samples=64)": lambda: (LazyRichMonitor(max_samples=64),),
}


def _scaled_steps() -> Mapping[str, Block]:
    return trainers(Training(lambda: perceptron(10), batches(20_000, 784, 10, 128)), _SCALED)


def _watched_steps() -> Mapping[str, Block]:
    training = Training(lambda: perceptron(10), batches(20_000, 784, 10, 128), steps=100, cycle=100)
    return trainers(training, _WATCHED)


BENCH = Bench(
    cases=(
        Case(
            name=f"Trace of the tangent kernel of {_EXAMPLES} examples ({_INPUTS}-{_WIDTH}-{_WIDTH}-{_OUTPUTS})",
            blocks=_kernel_times,
            reference=_OURS,
            targets=(Target(_PLAIN, "ratio", at_least=3.0),),
        ),
        Case(
            name="The largest tensor that it makes",
            blocks=_kernel_memory,
            reference=_OURS,
            targets=(Target(_PLAIN, "ratio", at_least=float(_EXAMPLES)),),
            unit="bytes",
            rounds=1,
        ),
        Case(
            name="One training step of a perceptron of a million parameters (batch 128, 10 classes)",
            blocks=_scaled_steps,
            reference=_ALONE,
            targets=(
                Target("OutputScaling(center='none')", "ratio", at_most=1.05),
                Target("OutputScaling(center='copy')", "ratio", at_most=1.4),
                Target("OutputScaling(center='antisymmetric')", "ratio", at_most=2.1),
            ),
        ),
        Case(
            name="The same, watched: means over 100 steps, one of which is measured",
            blocks=_watched_steps,
            reference=_ALONE,
            targets=(Target("LazyRichMonitor()", "ratio", at_most=2.0),),
            rounds=10,
        ),
    )
)
