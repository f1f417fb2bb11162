# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the components of dynamical stability."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from fulgurite.testing import Case
from fulgurite_plugins.curvature.dynamical_stability.callbacks import StabilityMonitor
from fulgurite_plugins.curvature.dynamical_stability.controller import StableLearningRate
from fulgurite_plugins.curvature.dynamical_stability.intervention import TracePenalty
from fulgurite_plugins.curvature.dynamical_stability.modules import DiagonalLinearNetwork, TwoLayerReLU


def _kernel() -> torch.Tensor:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    return features @ features.T


def _inputs(features: int = 4) -> torch.Tensor:
    return torch.randn(6, features, generator=torch.Generator().manual_seed(2))


def _model_and_inputs() -> tuple[Any, ...]:
    model = nn.Sequential(skip_init(nn.Linear, 4, 5), nn.Tanh(), skip_init(nn.Linear, 5, 2))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model, _inputs()


def _monitor() -> StabilityMonitor:
    return StabilityMonitor(max_samples=24, probes=2, lanczos_steps=4)


def _exact() -> StabilityMonitor:
    return StabilityMonitor(max_samples=12, quantities=("exact",))


_ONE_BATCH = {
    "odd_batches": "the collate function of the kit makes no batch of the examples that are measured together, which is "
    "refused by name",
    "nan_is_reported": "it measures all examples as one batch, the first, and never meets the kit's batch with NaN, the "
    "third; the states that are compared differ by the momentum of the two optimizers",
}
_WHOLE = {
    "limited_batches": "it measures on the training set and its size, which are others for a loader of the first three "
    "batches",
}
_SIGNS = dict.fromkeys(
    ("accumulation", "short_last_window", "two_ranks_equal_one"),
    "it estimates the trace from random signs of the examples of each micro-batch, whose products with each other "
    "vanish on average only; that it is unbiased is tested with the plugin",
)
_MODEL = "its first argument is a model, whose precision the kit does not change with that of the inputs"

CASES = {
    "StabilityMonitor": (  # it never changes anything, and is off when it is on
        Case(make=_monitor, off=_monitor, observes=True),
        Case(make=_exact, off=_exact, observes=True, label="exact", inapplicable=_ONE_BATCH),
    ),
    "StableLearningRate": Case(
        make=lambda: StableLearningRate(max_samples=24, warmup_epochs=1),
        off=lambda: StableLearningRate(max_samples=24, warmup_epochs=1000),
        inapplicable=_WHOLE,
    ),
    "TracePenalty": Case(
        make=lambda: TracePenalty(weight=0.01), off=lambda: TracePenalty(weight=0.0), inapplicable=_SIGNS
    ),
    "DiagonalLinearNetwork": (
        Case(make=lambda: DiagonalLinearNetwork(4), arguments=lambda: (_inputs(),)),
        Case(label="uv", make=lambda: DiagonalLinearNetwork(4, form="uv"), arguments=lambda: (_inputs(),)),
    ),
    "TwoLayerReLU": Case(make=lambda: TwoLayerReLU(4, 5), arguments=lambda: (_inputs(),)),
    "gauss_newton_trace": Case(
        arguments=_model_and_inputs,
        inapplicable=dict.fromkeys(("precision_is_kept", "half_precision", "gradient"), _MODEL),
    ),
    "stability_radius": Case(arguments=lambda: (_kernel(), 0.1, 2)),
    "max_stable_lr": Case(arguments=lambda: (_kernel(), 2)),
    "refined_trace_bound": Case(arguments=lambda: (_kernel(), 2)),
    "trace_bound": Case(arguments=lambda: (torch.tensor(3.0), 2)),
    "frobenius_norm": Case(arguments=lambda: (_kernel(),)),
    "lambda_max": Case(arguments=lambda: (_kernel(),)),
    "alignment_factor": Case(arguments=lambda: (_kernel(), torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0]))),
    "non_uniformity": Case(arguments=lambda: (_kernel(),)),
    "stability_box": Case(arguments=lambda: (0.5, 2, 10)),
    "path_norm": Case(arguments=lambda: (_inputs(), torch.tensor([1.0, -2.0, 3.0, 1.0, 0.5, 1.0]))),
}
