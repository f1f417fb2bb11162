# SPDX-License-Identifier: Apache-2.0
"""Gradients of mini-batches for the Fisher, and statistics for batch norm, unnoticed by the training around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fulgurite import distributed
from fulgurite.errors import FulguriteError
from fulgurite.phase import training_loss, unnoticed
from fulgurite.random import derived_seed
from fulgurite.samples.fixed import FixedBatches

if TYPE_CHECKING:
    import lightning.pytorch as pl


def random_batches(trainer: pl.Trainer, number: int, size: int, seed: int, share: bool = True) -> Iterator[Any]:
    """Yield random batches of the training data on the module's device, each example as often as any other, or once more.

    Args:
        trainer: The trainer.
        number: Number of batches of all ranks together, which are the same for any number of ranks.
        size: Examples per batch.
        seed: Seeds the choice.
        share: Whether each rank gets every W-th batch; else all of them.
    """
    batches = FixedBatches(trainer, "MFACPruner", batch_size=size, seed=seed)
    generator, total = torch.Generator().manual_seed(seed), len(batches.indices)
    rounds = -(-number * size // total)
    order = torch.cat([torch.randperm(total, generator=generator) for _ in range(rounds)])[: number * size]
    rank, world = distributed.world() if share else (0, 1)
    batches.indices = order.view(number, size)[rank::world].reshape(-1)
    yield from batches


def gradient_rows(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    parameters: Sequence[Tensor],
    kept: Tensor,
    number: int,
    size: int,
    seed: int,
) -> Tensor:
    """Return the gradients of this rank's share of random mini-batches, in evaluation mode.

    Args:
        trainer: The trainer.
        module: Its module.
        parameters: The parameters.
        kept: Which of their numbers, one after the other, are wanted: booleans `[D]`.
        number: Mini-batches of all ranks together.
        size: Examples per mini-batch.
        seed: Seeds the choice of examples.

    Returns:
        `[n, d]` in float32, or in float64 if the parameters are; batches that the loader gives as None have no row.

    Raises:
        FulguriteError: If a gradient is not finite.
    """
    rank, world = distributed.world()
    columns = kept.nonzero().squeeze(1)
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    rows = torch.empty(len(range(rank, number, world)), len(columns), dtype=dtype, device=columns.device)
    with unnoticed(module, derived_seed(seed)):
        taken = 0  # fewer than planned if the collate function gives None for some, as training skips them
        for row, batch in zip(rows, random_batches(trainer, number, size, seed), strict=False):
            loss = training_loss(trainer, module, batch, 0)
            found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, parameters, strict=True)]
            row.copy_(torch.cat([gradient.reshape(-1) for gradient in flat])[columns])
            taken += 1
    rows = rows[:taken]
    if distributed.average_((~rows.isfinite().all()).float()) > 0:  # on all ranks, so that none waits for another
        raise FulguriteError(
            "MFACPruner: the gradient of a mini-batch is not finite, so that there is no Fisher to prune with. Prune a "
            "model whose training loss is finite, or use method='magnitude'."
        )
    return rows


def recalibrate(trainer: pl.Trainer, module: pl.LightningModule, number: int, size: int, seed: int) -> None:
    """Replace the running statistics of all batch norm layers by the averages over random batches; equal on all ranks.

    Args:
        trainer: The trainer.
        module: Its module.
        number: Number of batches.
        size: Examples per batch.
        seed: Seeds the choice of examples.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    try:
        with unnoticed(module, derived_seed(seed)):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain average over batches
                nn.Module.train(layer, True)
            for batch in random_batches(trainer, number, size, seed, share=False):
                training_loss(trainer, module, batch, 0)
            averages = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]  # type: ignore[union-attr]
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    for layer, (mean, variance) in zip(layers, averages, strict=True):
        layer.running_mean.copy_(mean)  # type: ignore[union-attr]
        layer.running_var.copy_(variance)  # type: ignore[union-attr]
