# SPDX-License-Identifier: Apache-2.0
"""What the claim measures: the largest eigenvalue of batch Hessians of several sizes, before and after training."""

from __future__ import annotations

import statistics
from itertools import pairwise

import lightning.pytorch as pl
import torch

from fulgurite_plugins.curvature.batch_hessian_lr import noise
from fulgurite_plugins.curvature.batch_hessian_lr.claim import SIZES
from fulgurite_plugins.curvature.batch_hessian_lr.functional import effective_batch_size, fit_excess

_FITTED = (4, 16, 64)
_BATCHES = {4: 48, 16: 48, 64: 48, 256: 12, 1024: 12}
"""Batches of each size; more where the exponent is fitted."""


class BatchSpectra(pl.Callback):
    """Log largest eigenvalues of batch Hessians, under `initial/` and `trained/`.

    - `full`: that over all training examples;
    - `batch_B`: the mean over random batches of `B` (48 up to 64, else 12); `ratio_B`: over `full`;
    - `least_fall`: the least of the quotients of `batch_B` from one size to the next;
    - `exponent`: of the excess over `full` as a power of the effective batch size, fitted to the sizes 4, 16 and 64;
    - `predicted_4`: what the additive noise model predicts for batches of 4, over what was measured.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure before the first step."""
        if trainer.current_epoch == 0:
            pl_module.log_dict({f"initial/{name}": v for name, v in measure(trainer, pl_module).items()})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure after the last one."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            pl_module.log_dict({f"trained/{name}": v for name, v in measure(trainer, pl_module).items()})


def measure(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Return the measures of `BatchSpectra` now."""
    hessians = noise.BatchHessians(trainer, module, list(module.parameters()), "BatchSpectra", 1 << 30, chunk=2048)
    generator = torch.Generator().manual_seed(0)
    full = hessians.largest(hessians.whole())
    found = {"full": full}
    for size in SIZES:
        draws = (
            torch.randperm(hessians.dataset_size, generator=generator)[:size].tolist() for _ in range(_BATCHES[size])
        )
        found[f"batch_{size}"] = statistics.mean(hessians.largest(hessians.of(indices)) for indices in draws)
        found[f"ratio_{size}"] = found[f"batch_{size}"] / full
    found["least_fall"] = min(found[f"batch_{a}"] / found[f"batch_{b}"] for a, b in pairwise(SIZES))
    effective = [effective_batch_size(size, hessians.dataset_size) for size in _FITTED]
    found["exponent"] = -fit_excess(effective, [found[f"batch_{size}"] for size in _FITTED], full).exponent
    found["predicted_4"] = noise.predicted(hessians, 64)[0](4) / found["batch_4"]
    return found
