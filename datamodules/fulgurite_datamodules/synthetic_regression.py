# SPDX-License-Identifier: Apache-2.0
"""Small regression problems with Gaussian inputs: a sparse linear target, and a single ReLU neuron."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fulgurite.errors import check_argument, is_number
from fulgurite_datamodules.dataset import ArrayDataset, collate


class _SyntheticRegression(pl.LightningDataModule, ABC):
    r"""Inputs $x \sim N(0, I_d)$ and a target function of them; everything depends on `data_seed` alone."""

    _is_set_up = False

    def __init__(
        self,
        dim: int,
        train_size: int,
        test_size: int,
        noise: float,
        data_seed: int,
        batch_size: int | None,
        passes_per_epoch: int,
    ) -> None:
        super().__init__()
        counts = {"dim": dim, "train_size": train_size, "passes_per_epoch": passes_per_epoch}
        for argument, value in {**counts, "batch_size": 1 if batch_size is None else batch_size}.items():
            self._check(argument, value, "a positive integer", isinstance(value, int) and value >= 1)
        self._check("test_size", test_size, "an integer, not negative", isinstance(test_size, int) and test_size >= 0)
        self._check("noise", noise, "a number that is not negative", is_number(noise) and noise >= 0)
        self.dim, self.train_size, self.test_size, self.noise = dim, train_size, test_size, noise
        self.data_seed, self.batch_size, self.passes_per_epoch = data_seed, batch_size, passes_per_epoch
        self.input_shape = (dim,)

    @abstractmethod
    def target(self, inputs: Tensor) -> Tensor:
        """Return the noiseless targets `[N]` of inputs `[N, dim]`."""

    def setup(self, stage: str | None = None) -> None:
        """Draw the data; once, whatever the stage."""
        if self._is_set_up:
            return
        generator = torch.Generator().manual_seed(self.data_seed)
        inputs = torch.randn(self.train_size + self.test_size, self.dim, generator=generator)
        noise = self.noise * torch.randn(self.train_size, generator=generator)
        targets = self.target(inputs)
        targets[: self.train_size] += noise
        self.train_indices = torch.arange(self.train_size)
        self.val_indices = torch.arange(0)
        self.test_indices = torch.arange(self.train_size, len(inputs))
        self.train_dataset = ArrayDataset(inputs[: self.train_size], targets[: self.train_size].unsqueeze(1))
        self.test_dataset = ArrayDataset(inputs[self.train_size :], targets[self.train_size :].unsqueeze(1))
        self._is_set_up = True

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader, which goes through the data in a new order in every pass."""
        self.setup()
        sampler = _Passes(self.train_size, self.passes_per_epoch)
        size = min(self.batch_size or self.train_size, self.train_size)
        return DataLoader(self.train_dataset, size, sampler=sampler, collate_fn=collate)

    def test_dataloader(self) -> Any:
        """Return the loader of the test examples; an empty list if there are none."""
        self.setup()
        return DataLoader(self.test_dataset, 1024, collate_fn=collate) if self.test_size else []

    def predict_dataloader(self) -> Any:
        """Return the loader of the test examples."""
        return self.test_dataloader()

    def _check(self, argument: str, value: object, expected: str, fits: bool) -> None:
        check_argument(fits and not isinstance(value, bool), argument, type(self).__name__, expected, value)


class SparseRegression(_SyntheticRegression):
    r"""A sparse linear target, $y = \beta^{*\top} x$ plus noise, with fewer examples than inputs.

    The first `sparsity` coefficients are 1 and the others 0. A batch is `[inputs, targets]`, the targets `[B, 1]`.
    There is no validation; the test set has no noise.

    Args:
        dim: Number of inputs $d$.
        train_size: Number of training examples.
        test_size: Number of test examples; 0 for none.
        sparsity: Number of coefficients that are not zero.
        noise: Standard deviation of the noise of the training targets.
        data_seed: Seed of the data.
        batch_size: Examples per batch; None for all of them.
        passes_per_epoch: How often an epoch goes through the data: with few examples an epoch is short, and its fixed
            costs are not.

    Attributes:
        coefficients: $\beta^*$, `[dim]`.
        train_dataset: The training examples, after `setup`; `test_dataset` alike.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> data = SparseRegression(dim=60, train_size=30, sparsity=3)
        >>> data.setup()
        >>> data.train_dataset.inputs.shape
        torch.Size([30, 60])
    """

    def __init__(
        self,
        dim: int = 60,
        train_size: int = 30,
        test_size: int = 1000,
        sparsity: int = 3,
        noise: float = 0.0,
        data_seed: int = 0,
        batch_size: int | None = None,
        passes_per_epoch: int = 1,
    ) -> None:
        super().__init__(dim, train_size, test_size, noise, data_seed, batch_size, passes_per_epoch)
        fits = isinstance(sparsity, int) and 0 <= sparsity <= dim
        self._check("sparsity", sparsity, f"an integer in [0, {dim}]", fits)
        self.sparsity = sparsity

    @property
    def coefficients(self) -> Tensor:
        r"""$\beta^*$, `[dim]`."""
        return (torch.arange(self.dim) < self.sparsity).float()

    def target(self, inputs: Tensor) -> Tensor:
        """Return the noiseless targets `[N]` of inputs `[N, dim]`."""
        return inputs @ self.coefficients


class SingleNeuron(_SyntheticRegression):
    r"""A single ReLU neuron, $y = \mathrm{relu}(x_1)$ plus noise, for networks that could be much larger.

    A batch is `[inputs, targets]`, the targets `[B, 1]`. There is no validation; the test set has no noise.

    Args:
        dim: Number of inputs $d$.
        train_size: Number of training examples.
        test_size: Number of test examples; 0 for none.
        noise: Standard deviation of the noise of the training targets.
        data_seed: Seed of the data.
        batch_size: Examples per batch; None for all of them.
        passes_per_epoch: How often an epoch goes through the data.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> data = SingleNeuron(dim=10, train_size=40, batch_size=1)
        >>> len(data.train_dataloader())
        40
    """

    def __init__(
        self,
        dim: int = 10,
        train_size: int = 40,
        test_size: int = 1000,
        noise: float = 0.0,
        data_seed: int = 0,
        batch_size: int | None = None,
        passes_per_epoch: int = 1,
    ) -> None:
        super().__init__(dim, train_size, test_size, noise, data_seed, batch_size, passes_per_epoch)

    def target(self, inputs: Tensor) -> Tensor:
        """Return the noiseless targets `[N]` of inputs `[N, dim]`."""
        return inputs[:, 0].relu()


class _Passes(Sampler[int]):
    """Random orders of the examples, several of them one after the other."""

    def __init__(self, size: int, passes: int) -> None:
        self.size = size
        self.passes = passes

    def __len__(self) -> int:
        return self.size * self.passes

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.passes):
            yield from torch.randperm(self.size).tolist()
