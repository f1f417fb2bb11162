# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the components."""

from __future__ import annotations

from typing import Any

import torch

from fulgurite.testing import Case
from fulgurite_plugins.curvature.batch_hessian_lr.intervention import SLQLearningRate
from fulgurite_plugins.curvature.batch_hessian_lr.scaling import BatchSizeLRScaling
from fulgurite_plugins.curvature.batch_hessian_lr.spectrum import HessianSpectrum


def _matrix() -> torch.Tensor:
    draws = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    return draws + draws.mT


def _products() -> tuple[Any, ...]:
    return torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(0)), 8, 44


def _scaled() -> tuple[Any, ...]:
    return 0.1, 64, 256, "sqrt"


_WHOLE_DATASET = {
    "limited_batches": "it measures on examples of the loader's whole data set, also of batches that the trainer leaves out"
}
_OTHER_SIZES = {"odd_batches": "it measures on batches of 4, which the check's collate function leaves out"}

CASES = {
    "SLQLearningRate": (
        Case(
            make=lambda: SLQLearningRate(steps=4, warmup_epochs=0, max_change=1.5),
            off=lambda: SLQLearningRate(warmup_epochs=1000),
        ),
        Case(
            label="rayleigh, dataset",
            make=lambda: SLQLearningRate("rayleigh", warmup_epochs=0, max_change=1.5, on="dataset"),
            inapplicable=_WHOLE_DATASET,
            off=lambda: SLQLearningRate("rayleigh", warmup_epochs=1000, on="dataset"),
        ),
    ),
    "BatchSizeLRScaling": (
        Case(make=lambda: BatchSizeLRScaling(4, "sqrt"), off=lambda: BatchSizeLRScaling(8)),
        Case(
            label="measured",
            make=lambda: BatchSizeLRScaling(4, "rmt", spectrum="measured"),
            inapplicable=_WHOLE_DATASET | _OTHER_SIZES,
            off=lambda: BatchSizeLRScaling(8, "rmt", spectrum="measured"),
        ),
    ),
    "HessianSpectrum": Case(make=lambda: HessianSpectrum(steps=4, every_n_epochs=1), observes=True),
    "slq_density": Case(arguments=lambda: (_matrix(), 5)),
    "hessian_variance": Case(arguments=_products),
    "effective_batch_size": Case(arguments=lambda: (50, 100)),
    "predict_batch_extremes": Case(arguments=lambda: (-0.1, 2.0, 16.0, 16.0)),
    "predict_ggn_extremes": Case(arguments=lambda: (4.0, 1.0, 100, 100)),
    "fit_excess": Case(arguments=lambda: ([4, 16], [5.0, 2.0], 1.0)),
    "scale_learning_rate": Case(arguments=_scaled),
    "saturation_batch_size": Case(arguments=lambda: (2.0, 400.0, 100)),
    "heavy_ball_parameters": Case(arguments=lambda: (1.0, 9.0)),
    "rule_parameters": Case(arguments=lambda: ("inverse", 1.0, 9.0)),
}
