# SPDX-License-Identifier: Apache-2.0
"""What the claim compares Weight Compander with: weights that are bounded, and nothing else."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from fulgurite.intervention import Intervention
from fulgurite_plugins.reparametrization.weight_compander.functional import check_positive
from fulgurite_plugins.reparametrization.weight_compander.selection import select


class HardClip(Intervention):
    """Clip every weight after each update to a multiple of its tensor's standard deviation when training began.

    It bounds weights as Weight Compander does, and has no steep slope at zero. A control for the claim: a run that is
    resumed takes the standard deviation anew.

    Args:
        at: The bound, in standard deviations.
        modules: Which layers, as `WeightCompander` takes them.

    Raises:
        ValueError: If `at` is not positive and finite.
    """

    def __init__(self, at: float = 1.2, modules: str = "Linear,Conv") -> None:
        check_positive("HardClip", "at", at)
        self.at = at
        self.modules = modules
        self._weights: list[Tensor] = []
        self._bounds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the bounds."""
        self._weights = [place.parameter.detach() for place in select(pl_module, self.modules)]
        self._bounds = [self.at * float(weight.std()) for weight in self._weights]

    def constrain(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Clip."""
        torch._foreach_clamp_max_(self._weights, self._bounds)
        torch._foreach_clamp_min_(self._weights, [-bound for bound in self._bounds])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the weights go."""
        self._weights, self._bounds = [], []
