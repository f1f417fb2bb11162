# SPDX-License-Identifier: Apache-2.0
"""What the penalty costs: time per training step, and the regularizer beside the direct form and the dense operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.bench import (
    Bench,
    Block,
    Callbacks,
    Case,
    Classifier,
    Target,
    Training,
    batches,
    calls,
    device,
    trainers,
)
from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import lorth
from fulgurite_plugins.reparametrization.orthogonal_convolutions.intervention import OrthogonalConvPenalty
from fulgurite_plugins.reparametrization.orthogonal_convolutions.theory import conv_operator_matrix

_BATCH = 128
_ALONE = "trainer alone"
_VARIANTS: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "trainer alone, once more": lambda: (),  # tells how far two equal trainings are apart
    "OrthogonalConvPenalty()": lambda: (OrthogonalConvPenalty(0.01),),
    "OrthogonalConvPenalty(every_n_steps=4)": lambda: (OrthogonalConvPenalty(0.01, every_n_steps=4),),
    "OrthogonalConvPenalty(variant='kernel')": lambda: (OrthogonalConvPenalty(0.01, variant="kernel"),),
}


def _network() -> Classifier:
    """Return four convolutions (3 to 32, 64, 128, 128 channels) and a linear layer, for 16x16 pixels given as rows."""
    layers: list[nn.Module] = [nn.Unflatten(1, (3, 16, 16))]
    for inputs, outputs in pairwise((3, 32, 64, 128, 128)):
        stride = 2 if inputs > 3 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, padding_mode="circular"), nn.ReLU()]
    return Classifier(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 100)))


def _steps() -> Mapping[str, Block]:
    return trainers(Training(_network, batches(5 * _BATCH, 768, 100, _BATCH), steps=4), _VARIANTS)


def _kernel(*shape: int) -> Tensor:
    return (0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(device()).requires_grad_()


def _with_gradient(function: Callable[[Tensor], Tensor], weight: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(weight), weight)


def _direct(weight: Tensor, stride: int) -> Tensor:
    """The formula as the reference implementations write it: convolve, make the target, subtract."""
    filters, channels, k = weight.shape[:3]
    padding = (k - 1) // stride * stride
    found = F.conv2d(weight, weight, stride=stride, padding=padding)
    target = torch.zeros_like(found)
    target[:, :, padding // stride, padding // stride] = torch.eye(filters, device=weight.device)
    return (found - target).square().sum() - max(0, filters - channels * stride**2)


def _dense(weight: Tensor, stride: int) -> Tensor:
    """The definition: the matrix of the operator on the smallest input that is exact, and its Gram matrix."""
    matrix = conv_operator_matrix(weight, stride, -(-(2 * weight.shape[2] - 1) // stride) * stride)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return (gram - torch.eye(len(gram), device=weight.device)).square().sum()


def _forms(stride: int, *shape: int) -> Mapping[str, Block]:
    weight = _kernel(*shape)
    return calls(
        {
            "lorth": _with_gradient(lambda w: lorth(w, stride), weight),
            "lorth(method='lags')": _with_gradient(lambda w: lorth(w, stride, method="lags"), weight),
            "lorth(method='fft')": _with_gradient(lambda w: lorth(w, stride, method="fft"), weight),
            "lorth(method='conv')": _with_gradient(lambda w: lorth(w, stride, method="conv"), weight),
            "conv2d(K, K) - target": _with_gradient(lambda w: _direct(w, stride), weight),
        }
    )


def _beside_dense() -> Mapping[str, Block]:
    weight = _kernel(16, 8, 3, 3)
    return calls(
        {
            "lorth": _with_gradient(lorth, weight),
            "dense operator": _with_gradient(lambda w: _dense(w, 1), weight),
        }
    )


def _form(case: str, at_least: float, stride: int, *shape: int) -> Case:
    return Case(
        name=f"Value and gradient of the regularizer, {case}: {' x '.join(map(str, shape))}, stride {stride}",
        blocks=functools.partial(_forms, stride, *shape),
        reference="lorth",
        targets=(Target("conv2d(K, K) - target", "ratio", at_least=at_least),),
        rounds=20,
    )


BENCH = Bench(
    cases=(
        Case(
            name=f"One training step of a convolutional network of 290 thousand parameters (batch {_BATCH})",
            blocks=_steps,
            reference=_ALONE,
            targets=(Target("OrthogonalConvPenalty()", "ratio", at_most=1.3),),
            rounds=20,
        ),
        _form("row case", 0.95, 1, 64, 64, 3, 3),
        _form("row case", 0.95, 1, 128, 256, 3, 3),
        _form("row case with a stride", 0.95, 2, 128, 64, 3, 3),
        _form("column case", 2.0, 1, 256, 64, 3, 3),
        _form("large kernel", 0.95, 1, 64, 64, 7, 7),
        Case(
            name="Value and gradient of the regularizer, beside its definition: 16 x 8 x 3 x 3, stride 1",
            blocks=_beside_dense,
            reference="lorth",
            targets=(Target("dense operator", "ratio", at_least=10.0),),
            rounds=20,
        ),
    )
)
