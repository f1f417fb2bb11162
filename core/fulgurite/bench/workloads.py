# SPDX-License-Identifier: Apache-2.0
"""Models and data to measure with: they cost as little as they can besides the training step itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Classifier(pl.LightningModule):
    """A network trained by SGD with momentum on the cross entropy; it knows nothing of Fulgurite.

    Args:
        network: The network, or the widths of a multi-layer perceptron: of the input, of each hidden layer, and of the
            output.
    """

    def __init__(self, network: nn.Module | Sequence[int]) -> None:
        super().__init__()
        self.network = network if isinstance(network, nn.Module) else _perceptron(network, None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def perceptron(classes: int, dropout: float | None = None) -> Classifier:
    """Return a perceptron of a million parameters, for inputs `[B, 784]`.

    Args:
        classes: Classes.
        dropout: Rate of dropout after each of the two hidden layers; None for no such layers.
    """
    return Classifier(_perceptron((784, 800, 460, classes), dropout))


def convolutional(
    classes: int, dropout: float | None = None, channels: Sequence[int] = (64, 128, 256, 256)
) -> Classifier:
    """Return a convolutional network, by default of a million parameters, for images of 16x16 pixels as rows `[B, 768]`.

    Args:
        classes: Classes.
        dropout: Rate at which each of its blocks drops channels; None for no such layers.
        channels: Outputs of each 3x3 convolution, at most four; after each come a ReLU and pooling that halves the image.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (3, 16, 16))]
    for inputs, outputs in pairwise((3, *channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [] if dropout is None else [nn.Dropout2d(dropout)]
    pixels = (16 >> len(channels)) ** 2
    return Classifier(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * pixels, classes)))


def _perceptron(widths: Sequence[int], dropout: float | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), *([] if dropout is None else [nn.Dropout(dropout)])]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class _InMemory(Dataset[Any]):
    """Gives whole batches by one indexing operation each, so that loading hides nothing of a step's time."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices)
        return tuple(tensor[index] for tensor in self.tensors)


def _as_is(batch: Any) -> Any:
    return batch


def batches(size: int, features: int, classes: int, batch_size: int) -> Callable[[], DataLoader[Any]]:
    """Return a maker of shuffling DataLoaders over a fixed random classification set that lies in memory.

    Args:
        size: Examples `N` of the set.
        features: Values per example.
        classes: Classes.
        batch_size: Batch size; an incomplete last batch is dropped.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, features, generator=generator)
    targets = torch.randint(0, classes, (size,), generator=generator)
    dataset = _InMemory(inputs, targets)
    return functools.partial(
        DataLoader, dataset, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=_as_is
    )
