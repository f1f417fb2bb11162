# SPDX-License-Identifier: Apache-2.0
"""What exact norms of gradients per example cost, beside a loop, `torch.func` by hand, and the libraries made for it."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fulgurite.bench import Block, Case, Missing, Target, calls, device, peer
from fulgurite.per_example import per_example_norms

_OURS, _LOOP, _TRAINING = "per_example_norms", "a loop over examples", "one training step's passes"
_CLASSES = 10


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, _CLASSES))


def _convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, _CLASSES))


def _norms(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Mapping[str, Block]:
    """Return the ways to the same norms; each is checked once against the loop."""
    generator = torch.Generator().manual_seed(0)
    model = make().to(device())
    x = torch.randn(shape, generator=generator).to(device())
    y = torch.randint(0, _CLASSES, shape[:1], generator=generator).to(device())
    functions: dict[str, Callable[[], Any]] = {
        _OURS: functools.partial(per_example_norms, model, x, y),
        _LOOP: functools.partial(_by_loop, model, x, y),
        "vmap(grad) by hand": functools.partial(_by_vmap, model, x, y, None),
        "vmap(grad) by hand, chunks of 64": functools.partial(_by_vmap, model, x, y, 64),
        "BackPACK BatchL2Grad": peer(
            lambda: _by_backpack(copy.deepcopy(model), x, y), "backpack-for-pytorch unfoldNd einops"
        ),
        "Opacus ghost norms": peer(lambda: _by_opacus(copy.deepcopy(model), x, y), "opacus opt-einsum"),
    }
    expected = _by_loop(model, x, y)
    for function in functions.values():
        if not isinstance(function, Missing):
            torch.testing.assert_close(function(), expected, rtol=1e-4, atol=0)
    return calls({**functions, _TRAINING: lambda: F.cross_entropy(model(x), y).backward()})


def _by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parameters = list(model.parameters())
    norms = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        norms.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
    return torch.stack(norms)


def _by_vmap(model: nn.Module, x: Tensor, y: Tensor, chunk: int | None) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    def norm(x: Tensor, y: Tensor) -> Tensor:
        gradients = grad(loss)(parameters, x, y).values()
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()

    return vmap(norm, chunk_size=chunk)(x, y)


def _by_backpack(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    backpack = importlib.import_module("backpack")
    squares = importlib.import_module("backpack.extensions").BatchL2Grad()
    model, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def norms() -> Tensor:
        with backpack.backpack(squares):
            loss(model(x), y).backward()
        return torch.stack([parameter.batch_l2 for parameter in model.parameters()]).sum(dim=0).sqrt()  # type: ignore[attr-defined]

    return norms


def _by_opacus(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    opacus = importlib.import_module("opacus.grad_sample")
    wrapped = opacus.GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def norms() -> Tensor:
        F.cross_entropy(wrapped(x), y, reduction="sum").backward()
        return wrapped.get_norm_sample()

    return norms


GRADIENT_CASES = (
    Case(
        name="Gradient norms of 512 examples, perceptron 64-128-128-10",
        blocks=functools.partial(_norms, _mlp, (512, 64)),
        reference=_OURS,
        targets=(Target(_LOOP, "ratio", at_least=20.0),),
        rounds=20,
    ),
    Case(
        name="Gradient norms of 256 examples, three convolutions on 16x16 pixels",
        blocks=functools.partial(_norms, _convnet, (256, 3, 16, 16)),
        reference=_OURS,
        targets=(Target(_LOOP, "ratio", at_least=2.5),),
        rounds=20,
    ),
)
"""Ours is the reference: a ratio says how many times as long another way takes."""
