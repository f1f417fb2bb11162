# SPDX-License-Identifier: Apache-2.0
"""The inverse participation ratio of the neurons during training."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from scipy.stats import spearmanr
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError, check_argument
from fulgurite_plugins.grokking.corrupted_grokking.functional import Basis
from fulgurite_plugins.grokking.corrupted_grokking.neurons import Layers, batch_norm_scales, find_neurons

SHARDED = dict.fromkeys(
    ("fsdp", "deepspeed"),
    "it reads whole rows of weights, which these strategies flatten or partition. Use DDP or ModelParallelStrategy.",
)


class NeuronIPR(pl.Callback):
    """Log how concentrated the weights of each hidden neuron are, in a basis: high if it generalises, low if it memorises.

    The score of a neuron is the mean inverse participation ratio of its weights in all its layers: 1 for a single component.
    In the Fourier basis this has a meaning where inputs are one-hot numbers of a cyclic group, as in modular addition; other
    data need a basis of their own. It logs `ipr/mean`, `ipr/median`, `ipr/lowest` and `ipr/highest`, of neurons that have
    weights; and, where a batch norm follows the neurons, `ipr/batch_norm_correlation`, the rank correlation of the scores
    with the scale that it gives the neurons.

    Args:
        layers: `{"in": [...], "out": [...]}`, the names of linear layers that lead to the neurons and away from them; or
            `"auto"`, the first such layers.
        r: The power of the ratio; the paper has 2.
        basis: `"fourier"`, a tensor `[K, d]` or a function from weights `[N, d]` to components `[N, K]`, for all layers.
        log_every_n_epochs: Epochs between two measurements; the last epoch is always measured.

    Attributes:
        scores: The scores when they were last measured `[N]`; None before.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self, layers: Layers = "auto", r: float = 2, basis: Basis = "fourier", log_every_n_epochs: int = 10
    ) -> None:
        check_argument(r > 1, "r", "NeuronIPR", "above 1", r)
        check_argument(log_every_n_epochs >= 1, "log_every_n_epochs", "NeuronIPR", "at least 1", log_every_n_epochs)
        self.layers = layers
        self.r = r
        self.basis = basis
        self.log_every_n_epochs = log_every_n_epochs
        self.scores: Tensor | None = None
        self._warned = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the neurons.

        Raises:
            RefusedError: If there are none, the basis does not fit them, or the strategy hides the weights.
        """
        strategy = lightning_adapter.strategy_name(trainer)
        if strategy in SHARDED:
            raise RefusedError(f"NeuronIPR cannot work with the strategy {strategy}: {SHARDED[strategy]}")
        find_neurons(pl_module, self.layers, "NeuronIPR").scores(self.r, self.basis)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        epoch, epochs = lightning_adapter.train_progress(trainer, "epoch")
        if epoch % self.log_every_n_epochs and epoch < epochs:
            return
        neurons = find_neurons(pl_module, self.layers, "NeuronIPR")
        self.scores = neurons.scores(self.r, self.basis)
        alive = self.scores[self.scores > 0]
        if len(alive) < len(self.scores) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"NeuronIPR: {len(self.scores) - len(alive)} of {len(self.scores)} neurons have no weights; they are given "
                f"the score 0, and left out of what is logged."
            )
        if not len(alive):
            return
        for name, value in (
            ("mean", alive.mean()),
            ("median", alive.median()),
            ("lowest", alive.min()),
            ("highest", alive.max()),
        ):
            pl_module.log(f"ipr/{name}", value, sync_dist=True)
        for norm in neurons.norms:
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                scales = batch_norm_scales(norm)[self.scores > 0]
                correlation = spearmanr(alive.double().cpu().numpy(), scales.double().cpu().numpy()).statistic
                pl_module.log("ipr/batch_norm_correlation", float(correlation), sync_dist=True)
