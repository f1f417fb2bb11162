# SPDX-License-Identifier: Apache-2.0
"""What a trained network still knows when more and more of its neurons are taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError, check_argument, check_choice
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.grokking.corrupted_grokking.functional import Basis, prune_curve, split_accuracies
from fulgurite_plugins.grokking.corrupted_grokking.ipr import SHARDED
from fulgurite_plugins.grokking.corrupted_grokking.known import corruption_of, evaluated
from fulgurite_plugins.grokking.corrupted_grokking.neurons import Layers, Neurons, find_neurons, whole
from fulgurite_plugins.grokking.corrupted_grokking.surgery import Order, ranked


class PruningCurves(pl.Callback):
    """Measure, at the end of the last epoch, the accuracies with 0, 1, ... N - 1 neurons taken out; nothing is changed.

    It takes one pass over training and validation data, whatever the number of neurons. At the fractions it logs
    `prune/lowest_30/as_labelled` and so on: the order, the percentage of neurons taken out, and the accuracies of
    `SplitAccuracies`.

    Args:
        fractions: Fractions of the neurons, in [0, 1), at which accuracies are logged.
        orders: `"lowest"` scores first, `"highest"` first, at `"random"`.
        layers: `{"in": [...], "out": [...]}`, names of linear layers, one of them outgoing; or `"auto"`.
        r: The power of the ratio.
        basis: The basis of the ratio; see `NeuronIPR`.
        batch_size: Examples per batch; None for those of the loaders.
        criterion: The criterion, if the training step calls several; see `Intervention`.
        seed: Seed of the random order.

    Attributes:
        curves: By order, the accuracies by name, `[N]` each: entry `q` with `q` neurons taken out. Empty before.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        fractions: Sequence[float] = (0.3, 0.6),
        orders: Sequence[Order] = ("lowest", "highest", "random"),
        layers: Layers = "auto",
        r: float = 2,
        basis: Basis = "fourier",
        batch_size: int | None = None,
        criterion: str | None = None,
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        check_argument(all(0 <= f < 1 for f in fractions), "fractions", name, "in [0, 1)", fractions)
        for order in orders:
            check_choice(order, get_args(Order), "orders", name)
        check_argument(r > 1, "r", name, "above 1", r)
        self.fractions = fractions
        self.orders = orders
        self.layers = layers
        self.r = r
        self.basis = basis
        self.batch_size = batch_size
        self.criterion = criterion
        self.seed = seed
        self.curves: dict[str, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the neurons and the corrupted labels.

        Raises:
            RefusedError: If there are none, or they are normalised together, or several layers lead away from them.
        """
        strategy = lightning_adapter.strategy_name(trainer)
        if strategy in SHARDED:
            raise RefusedError(f"PruningCurves cannot work with the strategy {strategy}: {SHARDED[strategy]}")
        self._neurons(pl_module).scores(self.r, self.basis)
        corruption_of(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log, if it is the last epoch."""
        epoch, epochs = lightning_adapter.train_progress(trainer, "epoch")
        if epoch < epochs:
            return
        self.curves = self.measure(trainer, pl_module)
        for order, accuracies in self.curves.items():
            for fraction in self.fractions:
                for name, curve in accuracies.items():
                    value = curve[int(fraction * len(curve) + 1e-9)].float()
                    pl_module.log(f"prune/{order}_{round(100 * fraction)}/{name}", value, sync_dist=True)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, dict[str, Tensor]]:
        """Return the accuracies by order and name `[N]`; on several ranks, all measure the same."""
        neurons = self._neurons(module)
        scores = neurons.scores(self.r, self.basis)
        (layer,) = neurons.outgoing.values()
        weight, bias = whole(layer.weight).detach(), None if layer.bias is None else whole(layer.bias).detach()
        hidden, given, indices = self._hidden(trainer, module, layer, "train")
        corruption = corruption_of(trainer)
        val = self._hidden(trainer, module, layer, "val") if trainer.enable_validation else None
        curves: dict[str, dict[str, Tensor]] = {}
        for order in self.orders:
            neuron_order = ranked(scores, order, self.seed)
            predictions = prune_curve(hidden, weight, neuron_order, bias)
            curves[order] = split_accuracies(predictions, *corruption(given, indices))
            if val is not None:
                fits = prune_curve(val[0], weight, neuron_order, bias) == val[1]
                curves[order]["test"] = fits.double().mean(-1)
        return curves

    def _hidden(
        self, trainer: pl.Trainer, module: pl.LightningModule, layer: nn.Linear, part: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the outgoing layer gets `[n, N]`, labels `[n]` and indices `[n]` of all examples of a part."""
        if part == "val":
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            captured = CapturedLoss(trainer, module, "PruningCurves", self.criterion)
            batches = FixedBatches(trainer, "PruningCurves", part, batch_size=self.batch_size)
            found = [(labels, indices) for indices, _, labels in evaluated(batches, captured, share=False)]
        finally:
            handle.remove()
        labels, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        return torch.cat(seen), labels, indices

    def _neurons(self, module: pl.LightningModule) -> Neurons:
        neurons = find_neurons(module, self.layers, "PruningCurves")
        if len(neurons.outgoing) != 1 or any(isinstance(norm, nn.LayerNorm) for norm in neurons.norms):
            raise RefusedError(
                f"PruningCurves adds up what neurons give one layer, but {', '.join(neurons.outgoing)} follow, or a "
                f"LayerNorm makes each neuron depend on all others. Name other layers, or use IPRPruning."
            )
        return neurons
