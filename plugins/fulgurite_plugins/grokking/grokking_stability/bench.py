# SPDX-License-Identifier: Apache-2.0
"""What perpendicular gradients cost beside the loop over tensors and peers, and StableMax beside cross entropy."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

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
    peer,
    perceptron,
    trainers,
    training_memory,
)
from fulgurite_plugins.grokking.grokking_stability.functional import stablemax_cross_entropy
from fulgurite_plugins.grokking.grokking_stability.intervention import PerpGrad, ReplaceSoftmax
from fulgurite_plugins.grokking.grokking_stability.projection import perp_grad_

_ALONE = "trainer alone"
_OURS = "perp_grad_"
_LOOP = "a loop over tensors"
_VARIANTS: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "trainer alone, once more": lambda: (),  # tells how far two equal trainings are apart
    "PerpGrad()": lambda: (PerpGrad(),),
    "ReplaceSoftmax()": lambda: (ReplaceSoftmax(),),
    "ReplaceSoftmax(compute_dtype='float32')": lambda: (ReplaceSoftmax(compute_dtype="float32"),),
}


def _tensors(rows: int, columns: int) -> list[nn.Parameter]:
    """Return 200 parameters with gradients: a hundred matrices, and a hundred vectors as biases and gains are."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, columns), (rows,)] * 100
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(device())) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device())
    return made


@torch.no_grad()
def _loop(parameters: Sequence[nn.Parameter]) -> None:
    """The equations, tensor by tensor."""
    for parameter in parameters:
        assert parameter.grad is not None
        w, g = parameter.view(-1), parameter.grad.view(-1)
        projected = g - torch.dot(w, g) / (torch.dot(w, w) + 1e-30) * w
        rescaled = projected * (g.norm() / (projected.norm() + 1e-30))
        parameter.grad.copy_(rescaled.view_as(parameter.grad))


class _NoStep(Optimizer):
    """Does nothing, so that what a wrapper does around it is what is timed."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing."""


def _pytorch_optimizer(parameters: Sequence[nn.Parameter], foreach: bool) -> Callable[[], object]:
    library: Any = importlib.import_module("pytorch_optimizer")
    wrapper = library.OrthoGrad(_NoStep(parameters), foreach=foreach)
    return lambda: wrapper.step()


def _heavyball(parameters: Sequence[nn.Parameter]) -> Callable[[], object]:
    library: Any = importlib.import_module("heavyball")
    library.utils.compile_mode = None  # compiling the loop over 200 tensors takes minutes
    weights, gradients = [p.detach() for p in parameters], [p.grad for p in parameters]
    return lambda: library.utils.orthogonalize_grad_to_param(weights, gradients, 1e-30, True)


def _projections(rows: int, columns: int) -> Mapping[str, Block]:
    ours, looped, once, foreach, compiled = (_tensors(rows, columns) for _ in range(5))
    library = "pytorch-optimizer"
    return calls(
        {
            _OURS: lambda: perp_grad_(ours),
            _LOOP: lambda: _loop(looped),
            f"{library}, OrthoGrad": peer(lambda: _pytorch_optimizer(once, False), library),
            f"{library}, OrthoGrad(foreach=True)": peer(lambda: _pytorch_optimizer(foreach, True), library),
            "heavyball, orthogonalize_grad_to_param, not compiled": peer(lambda: _heavyball(compiled), "heavyball"),
        }
    )


def _losses(rows: int, classes: int) -> Mapping[str, Block]:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(rows, classes, generator=generator)).to(device()).requires_grad_()
    targets = torch.randint(0, classes, (rows,), generator=generator).to(device())

    def run(loss: Callable[..., Tensor], **arguments: object) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits, targets, **arguments), logits)

    return calls(
        {
            "F.cross_entropy": run(F.cross_entropy),
            "StableMax, float32": run(stablemax_cross_entropy, compute_dtype="float32"),
            "StableMax, float32, as it is written": run(_as_written),
            "F.cross_entropy, float64": run(lambda z, y: F.cross_entropy(z.double(), y)),
            "StableMax, float64": run(stablemax_cross_entropy),
        }
    )


def _as_written(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition: probabilities from a choice between two branches, in float32."""
    scores = torch.where(logits < 0, 1 / (1 - logits.clamp(max=0)), logits.clamp(min=0) + 1)
    return F.nll_loss((scores / scores.sum(1, keepdim=True)).log(), targets)


def _saved(rows: int, classes: int) -> Mapping[str, Block]:
    """Bytes that the graph of a loss keeps for the backward pass, its logits among them."""
    logits = torch.zeros(rows, classes, device=device()).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64, device=device())

    def block(loss: Callable[..., Tensor], **arguments: object) -> Block:
        def measure() -> float:
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss(logits, targets, **arguments)
            del value
            return float(sum(kept.values()))

        return measure

    return {
        "F.cross_entropy": block(F.cross_entropy),
        "StableMax, float32": block(stablemax_cross_entropy, compute_dtype="float32"),
        "StableMax, float64": block(stablemax_cross_entropy),
        "StableMax, float64, chunk_rows=64": block(stablemax_cross_entropy, chunk_rows=64),
    }


def _perceptron() -> Training:
    return Training(lambda: perceptron(10), batches(20_000, 784, 10, 128))


def _convolutional() -> Training:
    return Training(lambda: convolutional(100), batches(640, 768, 100, 128), steps=2)


def _steps(training: Callable[[], Training]) -> Mapping[str, Block]:
    return trainers(training(), _VARIANTS)


def _memory() -> Mapping[str, Block]:
    return training_memory(_perceptron(), _VARIANTS)


BENCH = Bench(
    cases=(
        *(
            Case(
                name=f"Gradients of 200 tensors projected: 100 of {rows} x {columns}, 100 of {rows}",
                blocks=functools.partial(_projections, rows, columns),
                reference=_OURS,
                targets=(Target(_LOOP, "ratio", at_least=3.0),),
            )
            for rows, columns in ((16, 16), (64, 64), (256, 256))
        ),
        Case(
            name="One training step of a perceptron of a million parameters (batch 128, 10 classes)",
            blocks=functools.partial(_steps, _perceptron),
            reference=_ALONE,
            targets=(Target("PerpGrad()", "ratio", at_most=1.03),),
        ),
        Case(
            name="One training step of a convolutional network of a million parameters (batch 128, 100 classes)",
            blocks=functools.partial(_steps, _convolutional),
            reference=_ALONE,
            targets=(Target("PerpGrad()", "ratio", at_most=1.03),),
            rounds=20,
        ),
        *(
            Case(
                name=f"Loss and gradient of {rows} examples, {classes:,} classes",
                blocks=functools.partial(_losses, rows, classes),
                reference="F.cross_entropy",
                targets=(Target("StableMax, float32", "ratio", at_most=1.3),),
            )
            for rows, classes in ((512, 113), (512, 1000), (64, 32_000))
        ),
        Case(
            name="What the graph of the loss of 512 examples of 1,000 classes keeps",
            blocks=functools.partial(_saved, 512, 1000),
            reference="F.cross_entropy",
            unit="bytes",
            rounds=1,
        ),
        Case(
            name="All tensors alive when training ends (perceptron)",
            blocks=_memory,
            reference=_ALONE,
            targets=(Target("PerpGrad()", "difference", at_most=1000.0),),
            unit="bytes",
            rounds=1,
        ),
    )
)
