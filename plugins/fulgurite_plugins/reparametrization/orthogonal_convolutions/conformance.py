# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the components of orthogonal convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.testing import Case
from fulgurite.testing.lab import Plain
from fulgurite_plugins.reparametrization.orthogonal_convolutions.intervention import OrthogonalConvPenalty


def _kernel(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _convolutions() -> Plain:
    convolution = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
    return Plain(nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)))


def _chain() -> tuple[Any, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)),)


_FILLS_AT_RANDOM = "it fills its argument at random, as every function of `torch.nn.init` does"

CASES = {
    "OrthogonalConvPenalty": (
        Case(make=OrthogonalConvPenalty, off=lambda: OrthogonalConvPenalty(weight=0.0)),
        Case(
            label="convolutions",
            make=lambda: OrthogonalConvPenalty(weight=0.01, every_n_steps=2, exempt_from_weight_decay=True),
            off=lambda: OrthogonalConvPenalty(weight=0.0, every_n_steps=2),
            module=_convolutions,
        ),
    ),
    "ConvOrthogonality": Case(),
    "lorth": Case(arguments=lambda: (_kernel(4, 3, 3, 3), 2)),
    "orthogonal_conv_exists": Case(arguments=lambda: (8, 3, 3)),
    "isometry_bounds": Case(arguments=lambda: (_kernel(4, 3, 3, 3), 2)),
    "conv_singular_values": Case(arguments=lambda: (_kernel(4, 3, 3, 3), 2, 6)),
    "conv_operator_matrix": Case(arguments=lambda: (_kernel(4, 3, 3, 3), 2, 6)),
    "lipschitz_certificate": Case(arguments=_chain),
    "orthogonal_conv_init_": Case(
        arguments=lambda: (_kernel(4, 2, 3, 3), 2),
        inapplicable=dict.fromkeys(
            ("arguments_are_left_alone", "pure", "gradient", "non_contiguous"), _FILLS_AT_RANDOM
        ),
    ),
}
