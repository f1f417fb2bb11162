# SPDX-License-Identifier: Apache-2.0
"""What the claim measures besides the accuracies: how much the order of pruning matters."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor

from fulgurite_plugins.grokking.corrupted_grokking.curves import PruningCurves


class PruningGaps(PruningCurves):
    """Curves of pruning, and the accuracy with 30 % of the neurons taken out, lowest scores first minus highest first."""

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, dict[str, Tensor]]:
        """Return the curves, with that of the differences as one more order."""
        curves = super().measure(trainer, module)
        lowest, highest = curves["lowest"], curves["highest"]
        return {**curves, "gap": {name: lowest[name] - highest[name] for name in lowest}}
