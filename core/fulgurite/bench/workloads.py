# SPDX-License-Identifier: Apache-2.0
"""A model and data to measure with: they cost as little as they can besides the training step itself."""

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
    """A multi-layer perceptron trained by SGD with momentum; it knows nothing of Fulgurite.

    Args:
        widths: Width of the input, of each hidden layer, and of the output.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.network = nn.Sequential(*layers[:-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


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
