# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of M-FAC's components."""

from __future__ import annotations

from typing import Any

import torch

from fulgurite.testing import Case
from fulgurite_plugins.curvature.m_fac.fisher import FisherInverse
from fulgurite_plugins.curvature.m_fac.intervention import MFACPruner
from fulgurite_plugins.curvature.m_fac.optimizer import MFAC


def _drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pruner(**arguments: Any) -> MFACPruner:
    small: dict[str, Any] = {
        "num_grads": 6,
        "grad_batch_size": 8,
        "recomputations": 2,
        "damping": 1e-3,
        "start_epoch": 1,
    }
    return MFACPruner(**{"sparsities": (0.5,), **small, **arguments})


def _optimizer(parameters: Any, **arguments: Any) -> MFAC:
    return MFAC(parameters, **{"lr": 0.05, "num_grads": 8, "damping": 1e-2, "momentum": 0.9, **arguments})


CASES = {
    "MFAC": (
        Case(make=_optimizer),
        Case(label="per_group, bfloat16", make=lambda p: _optimizer(p, per_group=True, storage_dtype="bfloat16")),
    ),
    "MFACPruner": (
        Case(
            make=_pruner,
            off=lambda: _pruner(sparsities=(0.0,)),
            inapplicable={
                "limited_batches": "its gradients are of random examples of the whole training set, not of an epoch's"
            },
        ),
        Case(
            label="magnitude",
            make=lambda: _pruner(
                method="magnitude", sparsities=(0.3,), start_epoch=0
            ),  # before the other, if both are there
            off=lambda: _pruner(sparsities=(0.0,), method="magnitude"),
        ),
    ),
    "woodbury_ihvp": Case(arguments=lambda: (_drawn(4, 10), _drawn(10, seed=1), 0.1)),
    "obs_saliency": Case(arguments=lambda: (_drawn(10), _drawn(10, seed=1).exp())),
    "obs_update": Case(
        arguments=lambda: (_drawn(10, seed=1), FisherInverse(_drawn(4, 10).double(), 0.1, 5), _drawn(10, seed=2) > 0)
    ),
    "densities": Case(arguments=lambda: (0.8, 0.1, 4)),
}
