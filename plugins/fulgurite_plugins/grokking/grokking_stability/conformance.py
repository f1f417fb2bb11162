# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the components."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fulgurite.testing import Case
from fulgurite_plugins.grokking.grokking_stability.intervention import PerpGrad, ReplaceSoftmax
from fulgurite_plugins.grokking.grokking_stability.losses import StableMaxCrossEntropy
from fulgurite_plugins.grokking.grokking_stability.metrics import NLMAlignment, SoftmaxCollapse, ZeroLossFraction
from fulgurite_plugins.grokking.grokking_stability.modules import ModularMLP
from fulgurite_plugins.grokking.grokking_stability.monitor import NumericalStabilityMonitor
from fulgurite_plugins.grokking.grokking_stability.optimizer import PerpAdamW, PerpGradOptimizer, PerpSGD


def _logits(scale: float = 3.0) -> Tensor:
    return scale * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def _call(scale: float = 3.0) -> tuple[Any, ...]:
    return _logits(scale), torch.arange(12) % 4


def _gap(*gaps: float) -> Tensor:
    """Return logits of two classes with certain differences, which bfloat16 holds exactly."""
    return torch.stack([torch.tensor(gaps), torch.zeros(len(gaps))], dim=1)


def _gaps() -> Tensor:
    return _gap(1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44)


def _tensors() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator)], [torch.randn(3, 4, generator=generator)]


def _sgd(parameters: Any) -> PerpGradOptimizer:
    return PerpGradOptimizer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))


def _parameter() -> tuple[Any, ...]:
    parameter = torch.nn.Parameter(_logits())
    parameter.grad = _logits().flip(0)
    return ([parameter],)


CASES = {
    "PerpGrad": (
        Case(make=PerpGrad, off=lambda: PerpGrad(exclude="*")),
        Case(label="rows", make=lambda: PerpGrad(scope="row", exclude="vectors"), off=lambda: PerpGrad(exclude="*")),
        Case(
            label="all together",
            # of vectors only: companded weights are twenty times as long, and would dominate the one common vector
            make=lambda: PerpGrad(scope="global", rescale=False, start_step=2, include="vectors"),
            off=lambda: PerpGrad(start_step=10**9),
        ),
    ),
    "ReplaceSoftmax": (
        Case(make=ReplaceSoftmax, off=lambda: ReplaceSoftmax(loss="cross_entropy", compute_dtype="unchanged")),
        Case(
            label="float32",
            make=lambda: ReplaceSoftmax(compute_dtype="float32", alpha=2.0),
            off=lambda: ReplaceSoftmax(loss="cross_entropy", compute_dtype="unchanged"),
        ),
    ),
    "NumericalStabilityMonitor": Case(make=lambda: NumericalStabilityMonitor(every_n_steps=2), observes=True),
    "PerpGradOptimizer": Case(make=_sgd),
    "PerpSGD": Case(make=lambda parameters: PerpSGD(parameters, lr=0.1, momentum=0.9)),
    "PerpAdamW": Case(make=lambda parameters: PerpAdamW(parameters, lr=0.01)),
    "StableMaxCrossEntropy": (
        Case(make=StableMaxCrossEntropy, arguments=_call),
        Case(label="in parts", make=lambda: StableMaxCrossEntropy(chunk_rows=5), arguments=_call),
    ),
    "SoftmaxCollapse": Case(make=SoftmaxCollapse, arguments=lambda: (_gaps(), torch.arange(12) % 2)),
    "ZeroLossFraction": Case(make=ZeroLossFraction, arguments=lambda: (_gaps(), torch.arange(12) // 3 % 2)),
    "NLMAlignment": Case(make=NLMAlignment, arguments=lambda: (_logits(), _logits().flip(0))),
    "ModularMLP": Case(make=lambda: ModularMLP((6,), 4, (8, 8)), arguments=lambda: (_logits().reshape(8, 6),)),
    "stablemax": Case(arguments=lambda: (_logits(),)),
    "log_stablemax": Case(arguments=lambda: (_logits(),)),
    "stable_logits": Case(arguments=lambda: (_logits(),)),
    "stablemax_cross_entropy": Case(arguments=_call),
    "softmax_collapse_fraction": Case(arguments=lambda: (_gaps(),)),
    "zero_loss_fraction": Case(arguments=lambda: (_gaps(), torch.arange(12) // 3 % 2)),
    "nlm_alignment": Case(arguments=_tensors),
    "perp_grad_": Case(arguments=_parameter),
}
