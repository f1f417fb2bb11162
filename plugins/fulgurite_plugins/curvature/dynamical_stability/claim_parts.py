# SPDX-License-Identifier: Apache-2.0
"""The loss and the data of the claim, and what is measured at the solutions besides their stability."""

from __future__ import annotations

import os

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite_datamodules import SingleNeuron, SparseRegression
from fulgurite_plugins.curvature.dynamical_stability.modules import DiagonalLinearNetwork, TwoLayerReLU


class HalfSquaredError(nn.Module):
    """Half the mean squared error: the loss of the paper."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of outputs and targets `[B, 1]`."""
        return (outputs - targets).square().mean() / 2


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


class SeededSparseRegression(SparseRegression):
    """A sparse target in 60 dimensions, 30 examples, drawn anew for each seed.

    Args:
        batch_size: Examples per batch; None for all.
        passes_per_epoch: How often an epoch goes through the data.
    """

    def __init__(self, batch_size: int | None = None, passes_per_epoch: int = 1) -> None:
        super().__init__(data_seed=_seed(), batch_size=batch_size, passes_per_epoch=passes_per_epoch)


class SeededSingleNeuron(SingleNeuron):
    """A single neuron in 10 dimensions, 40 examples, drawn anew for each seed.

    Args:
        batch_size: Examples per batch; None for all.
        passes_per_epoch: How often an epoch goes through the data.
    """

    def __init__(self, batch_size: int | None = None, passes_per_epoch: int = 1) -> None:
        super().__init__(data_seed=_seed(), batch_size=batch_size, passes_per_epoch=passes_per_epoch)


class Solution(pl.Callback):
    """Log the norms that flatness stands for, `solution/...`, and the logarithm of the test error, `test/log_mse`."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the norms of the network."""
        network = pl_module.network
        if isinstance(network, DiagonalLinearNetwork):
            pl_module.log("solution/l1_norm", network.coefficients.detach().abs().sum())
        elif isinstance(network, TwoLayerReLU):
            pl_module.log("solution/path_norm", network.path_norm().detach())
            pl_module.log("solution/expected_trace", network.expected_trace().detach())

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the test error, whose ratios are differences then."""
        test = trainer.datamodule.test_dataset  # type: ignore[attr-defined]
        with torch.no_grad():
            error = (pl_module(test.inputs) - test.targets).square().mean()
        pl_module.log("test/log_mse", error.log())
