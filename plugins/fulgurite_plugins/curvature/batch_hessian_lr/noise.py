# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvalue of batch Hessians of any size, as a model is in training: measured, or predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fulgurite import lightning_adapter
from fulgurite.curvature import Hessian, lanczos, step_loss
from fulgurite.errors import RefusedError
from fulgurite.random import derived_seed
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.curvature.batch_hessian_lr.functional import (
    ROUNDING,
    ExcessLaw,
    effective_batch_size,
    fit_excess,
    hessian_variance,
    predict_batch_extremes,
    saturation_batch_size,
    unit_probes,
)


class BatchHessians:
    """Hessians of random batches of a fixed part of the training data, at the present weights.

    All ranks compute the same on the same examples.

    Args:
        trainer: The trainer, whose training has begun.
        module: Its module.
        parameters: What the Hessian is of.
        user: Who measures, for messages.
        examples: How many training examples at most.
        criterion: As for `fulgurite.captured.CapturedLoss`.
        chunk: Examples in one graph, of which larger batches consist; None for a batch of the training.
        steps: Lanczos steps.
        seed: Seeds the choice of examples and all probes.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        parameters: list[nn.Parameter],
        user: str,
        examples: int,
        criterion: str | None = None,
        chunk: int | None = None,
        steps: int = 20,
        seed: int = 0,
    ) -> None:
        self.trainer, self.module, self.parameters, self.user = trainer, module, parameters, user
        self.criterion, self.steps, self.seed = criterion, steps, seed
        self._chunk = FixedBatches(trainer, user).batch_size if chunk is None else chunk
        (self._loader,) = lightning_adapter.train_loaders(trainer)
        self.dataset_size = len(self._loader.dataset)
        order = torch.randperm(self.dataset_size, generator=torch.Generator().manual_seed(derived_seed(seed)))
        self._order = order[:examples].tolist()
        """Shuffled, since a data set may be sorted by class."""

    def whole(self) -> Hessian:
        """Return the Hessian of all examples."""
        return self.of(self._order)

    def batches(self, size: int, number: int) -> list[Hessian]:
        """Return the Hessians of batches without a common example; fewer, where there are not enough.

        Raises:
            RefusedError: If not even one batch can be filled.
        """
        count = min(number, len(self._order) // size)
        if not count:
            raise RefusedError(
                f"{self.user} measures with batches of {size}, but has {len(self._order)} examples. Raise `examples`, if "
                f"the training set is larger, or take a mode that measures nothing."
            )
        return [self.of(self._order[k * size : (k + 1) * size]) for k in range(count)]

    def of(self, indices: list[int]) -> Hessian:
        """Return the Hessian of the mean loss of certain examples of the training set."""
        part: Any = Subset(self._loader.dataset, indices)
        loader: DataLoader[Any] = DataLoader(part, self._chunk, collate_fn=self._loader.collate_fn)
        batches = FixedBatches(self.trainer, self.user, loader, seed=self.seed)
        source = step_loss(self.trainer, self.module, batches, self.user, self.criterion)
        return Hessian(source, self.parameters, keep_graphs=len(batches) == 1)

    def largest(self, matrix: Hessian) -> float:
        """Return the largest eigenvalue."""
        try:
            with matrix:
                return lanczos(matrix, self.steps, seed=self.seed).largest()[0]
        except FloatingPointError as error:
            raise RefusedError(
                f"{self.user}: the Hessian of a batch is not finite, or the loader's collate function gives no batch of "
                f"this size. Take a mode that measures nothing."
            ) from error

    def variance(self, size: int, batches: int = 8, probes: int = 8) -> float:
        """Return the Hessian variance $v$, from batches without a common example."""
        matrices = self.batches(size, batches)
        if len(matrices) < 2:
            raise RefusedError(
                f"{self.user} compares batches of {size}, but has {len(self._order)} examples: too few for two of them. "
                f"Raise `examples`, if the training set is larger."
            )
        generator = torch.Generator().manual_seed(derived_seed(self.seed, 1))
        vectors = unit_probes(probes, matrices[0].shape[0], generator).to(matrices[0].device, matrices[0].dtype)
        return float(hessian_variance((self._products(matrix, vectors) for matrix in matrices), size))

    @staticmethod
    def _products(matrix: Hessian, vectors: Tensor) -> Tensor:
        with matrix:
            return (matrix @ vectors.mT).mT


def predicted(hessians: BatchHessians, batch_size: int) -> tuple[Callable[[float], float], float]:
    """Return the additive model's largest eigenvalue of batches of any size, and the batch size of saturation."""
    whole = hessians.whole()
    with whole:
        smallest, *_, largest = lanczos(whole, hessians.steps, seed=hessians.seed).ritz()[0].tolist()
    if largest <= ROUNDING * abs(smallest):
        raise RefusedError(
            f"{hessians.user}: the largest eigenvalue of the Hessian is {largest:.3g}, not positive, so that it bounds "
            f"no learning rate. Measure later in training, or take mode 'linear' or 'sqrt' without a cap."
        )
    variance, size = hessians.variance(batch_size), hessians.dataset_size

    def model(batch: float) -> float:
        return predict_batch_extremes(smallest, largest, variance, effective_batch_size(batch, size)).largest

    return model, saturation_batch_size(largest, variance, size)


def measured(hessians: BatchHessians, batches: int = 4) -> Callable[[float], float]:
    """Return the mean largest eigenvalue of batches of any size, by measuring it."""

    def mean(batch: float) -> float:
        matrices = hessians.batches(int(batch), batches)
        return sum(map(hessians.largest, matrices)) / len(matrices)

    return mean


def calibrated(hessians: BatchHessians, sizes: tuple[int, int], batches: int = 8) -> Callable[[float], float]:
    """Return the largest eigenvalue of batches of any size, by the law that fits what two small sizes have."""
    mean, size = measured(hessians, batches), hessians.dataset_size
    effective = [effective_batch_size(batch, size) for batch in sizes]
    try:
        law: ExcessLaw = fit_excess(effective, [mean(batch) for batch in sizes], hessians.largest(hessians.whole()))
    except ValueError as error:
        raise RefusedError(f"{hessians.user} cannot calibrate with batches of {sizes}: {error}") from error
    return lambda batch: law.largest(effective_batch_size(batch, size))
