# SPDX-License-Identifier: Apache-2.0
"""Small models of every kind that gradients per example are taken of, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, CLASSES = 5, 3


def images(*shape: int) -> Callable[[torch.Generator], Any]:
    return lambda generator: torch.randn(N, *shape, generator=generator, dtype=torch.float64)


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 7, (N, 6), generator=generator)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)
    )


def convnet() -> nn.Module:
    """Strides, groups, dilation, padding modes, with and without bias; both forms of the norm are used."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, (3, 1), padding="same", padding_mode="reflect", dilation=(2, 1), bias=False),
        nn.Conv2d(8, 6, 2, padding=(1, 0), padding_mode="circular", groups=2),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="replicate", groups=6),
        nn.AdaptiveMaxPool2d(2),
        nn.Conv2d(6, 30, 2, padding="valid"),
        nn.Flatten(),
        nn.Linear(30, CLASSES),
    )


def batch_norm() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    )
    for layer in (model[1], model[5]):
        nn.init.normal_(layer.weight)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return model.eval()


class Sequences(nn.Module):
    """Embeddings with padding, layer norms over one and two dimensions, RMS norm, linear layers over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.norms = nn.Sequential(
            nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm((6, 4)), nn.GELU(), nn.RMSNorm(4, eps=1e-6)
        )
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norms(self.embedding(x))).mean(dim=1)


class Tied(nn.Module):
    """The embedding is the output layer too; a linear layer is used twice; two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.twice = nn.Linear(5, 5)
        self.other = nn.Linear(5, 5, bias=False)
        self.other.weight = self.twice.weight
        self.output = nn.Linear(5, 7)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.embedding(x.flip(1)).tanh()
        return self.output(torch.tanh(self.other(self.twice(self.twice(h).relu()))).mean(dim=1))


class Raw(nn.Module):
    """Parameters of no layer, and the weight of a layer used as a tensor besides."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.scale = nn.Parameter(torch.randn(()))
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        x = torch.cat([self.token.expand(len(x), 1, 4), x], dim=1)
        return self.head((self.linear(x) @ self.linear.weight * self.scale).tanh().sum(dim=1))


class TimeFirst(nn.Module):
    """A linear layer that sees the examples along the second dimension, and one that sees them flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(0, 1)).tanh().transpose(0, 1)
        return self.second(h.reshape(-1, 4)).reshape(len(x), -1, CLASSES).logsumexp(dim=1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, CLASSES)

    def forward(self, left: Tensor, right: Tensor, power: int = 1) -> Tensor:
        return self.head(input=(self.left(left) * self.right(right)).tanh() ** power)


class Attention(nn.Module):
    """Torch's own attention uses its output layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Noisy(nn.Linear):
    """A subclass that computes something else than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight**3, self.bias)


def parametrized() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), Noisy(6, 5), nn.Linear(5, 3)
    )


def rarer_layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
        nn.GroupNorm(3, 6),
        nn.PReLU(6),
        nn.ConvTranspose1d(6, 4, 3),
        nn.InstanceNorm1d(4, affine=True),
        nn.Unflatten(2, (-1, 1, 1)),
        nn.Conv3d(4, 4, (3, 1, 1), groups=4),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any]]] = {
    "mlp": (mlp, images(6)),
    "convnet": (convnet, images(4, 7, 8)),
    "batch norm": (batch_norm, images(3, 6, 6)),
    "sequences": (Sequences, tokens),
    "tied": (Tied, tokens),
    "raw parameters": (Raw, images(6, 4)),
    "examples not first": (TimeFirst, images(6, 4)),
    "as many positions as examples": (TimeFirst, images(N - 1, 4)),
    "one position": (TimeFirst, images(1, 4)),
    "two inputs": (TwoInputs, lambda g: (images(3)(g), images(2)(g))),
    "keywords": (TwoInputs, lambda g: {"right": images(2)(g), "left": images(3)(g), "power": 2}),
    "attention": (Attention, images(5, 4)),
    "parametrized": (parametrized, images(4)),
    "rarer layers": (rarer_layers, images(4, 9)),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Tensor]:
    """Return model, inputs and targets of a case."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make(), cast(inputs(generator), dtype)
    if any(isinstance(module, nn.LazyLinear) for module in model.modules()):
        model(cast(x, torch.float32))
    return model.to(dtype), x, torch.randint(0, CLASSES, (N,), generator=generator)


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, dict):
        return {key: cast(value, dtype) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(cast(value, dtype) for value in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def one(x: Any, i: int) -> Any:
    if isinstance(x, dict):
        return {key: one(value, i) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(one(value, i) for value in x)
    return x[i : i + 1] if isinstance(x, Tensor) else x


def call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
