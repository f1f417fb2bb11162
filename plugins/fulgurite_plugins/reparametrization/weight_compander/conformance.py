# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of Weight Compander's components."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.testing import Case
from fulgurite_plugins.reparametrization.weight_compander.functional import FUNCTIONS
from fulgurite_plugins.reparametrization.weight_compander.intervention import WeightCompander
from fulgurite_plugins.reparametrization.weight_compander.modules import Compander


def _tensor(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)


def _call() -> tuple[Any, ...]:
    return _tensor(), torch.tensor([1.2]), torch.tensor([0.8])


def _inverse_call() -> tuple[Any, ...]:
    return _tensor(0.5), torch.tensor([1.2]), torch.tensor([0.8])


def _layer() -> tuple[Any, ...]:
    layer = nn.utils.skip_init(nn.Linear, 4, 6, bias=False)
    layer.weight.data.copy_(_tensor())
    return (layer,)


def _groups() -> tuple[Any, ...]:
    return *_layer(), 0.1


def _state() -> tuple[Any, ...]:
    name = "head.parametrizations.weight."
    state = {f"{name}original": _tensor(), f"{name}0.a": torch.ones(1), f"{name}0.b": torch.ones(1)}
    return ({"head.bias": torch.ones(6), **state},)


_ALWAYS = {"identity_when_off": "companded weights have no setting that is bit-equal to plain ones"}

CASES = {
    "WeightCompander": (
        Case(make=WeightCompander, inapplicable=_ALWAYS),
        Case(
            label="learned",
            make=lambda: WeightCompander(fn="tanh", learn=True, lr_scale=0.1, shared=True),
            inapplicable=_ALWAYS,
        ),
        Case(
            label="left in place",
            make=lambda: WeightCompander(a=0.5, b=0.4, init="direct", export=False),
            inapplicable={
                **_ALWAYS,
                "frozen_unused_tied": "with export=False every holder of a tied tensor computes the same weights from it, "
                "which are equal and not the same object",
            },
        ),
    ),
    "Compander": (
        Case(make=lambda: Compander(a=1.2, b=0.8), arguments=lambda: (_tensor(),)),
        Case(label="learned", make=lambda: Compander(a=1.2, b=0.8, learn=True), arguments=lambda: (_tensor(),)),
    ),
    "Companding": Case(make=lambda: FUNCTIONS["softsign"], arguments=lambda: (_tensor(),)),
    "compand": Case(arguments=_call),
    "expand": Case(arguments=_inverse_call),
    "compand_grad_scale": Case(arguments=_call),
    "fold_state_dict": Case(arguments=_state),
    "parameter_groups": Case(arguments=_groups),
    "weight_shape": Case(arguments=_layer),
}
