# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of PS-KD's components."""

from __future__ import annotations

from typing import Any

import torch

from fulgurite.testing import Case
from fulgurite_plugins.distillation.ps_kd.intervention import PSKD


def _predictions(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)


def _targets_and_past() -> tuple[Any, ...]:
    return _predictions(1), _predictions(2), 0.4


def _gradient_ratio() -> tuple[Any, ...]:
    return _predictions(1), _predictions(2), 0.05, torch.tensor([0, 1, 2, 3, 0, 1])


CASES = {
    "PSKD": (
        Case(make=PSKD, off=lambda: PSKD(alpha=0.0)),
        Case(
            label="snapshot",
            make=lambda: PSKD(teacher="snapshot"),
            off=lambda: PSKD(alpha=0.0, teacher="snapshot"),
        ),
    ),
    "refine_targets": Case(arguments=_targets_and_past),
    "progressive_weight": Case(arguments=lambda: (3, 10, 0.8)),
    "pskd_gradient_ratio": Case(arguments=_gradient_ratio),
}
