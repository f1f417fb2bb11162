# SPDX-License-Identifier: Apache-2.0
"""A learning rate that stays below what the present weights allow; an extension that is not in the paper."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import lightning.pytorch as pl

from fulgurite.errors import RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite_plugins.curvature.dynamical_stability.estimating import Measuring, Quantity
from fulgurite_plugins.curvature.dynamical_stability.features import NonFiniteError
from fulgurite_plugins.curvature.dynamical_stability.measuring import SHARDED, measure
from fulgurite_plugins.curvature.dynamical_stability.rates import read_rates, read_sampling

_QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "refined": ("trace", "lambda_max", "refined"),
    "exact": ("exact",),
    "gd": ("lambda_max",),
}


class StableLearningRate(Intervention):
    r"""Set the learning rate to a part of the largest one that is stable at the present weights, epoch by epoch.

    After the first epochs, which keep the rate of the user, $\eta = \text{target} \cdot \hat\eta$ for the limit
    $\hat\eta$ that `StabilityMonitor` logs as `max_lr_sgd`. Groups keep the ratios of their rates. The largest stable
    rate is the one at which SGD's preference for flat minima is strongest; away from interpolation it is a heuristic.

    Args:
        target: Part of the limit, in (0, 1].
        warmup_epochs: Epochs at the beginning that keep the rate as it is; more than training has switch it off.
        limit: `"refined"`, for any model; `"exact"`, for at most 1024 outputs of all examples together; `"gd"`, the
            limit of gradient descent, which ignores the noise of batches.
        max_samples: On how many of the training examples the curvature is measured.
        batch_size: Examples of one update, over all devices and accumulated batches; None finds it out.
        criterion: The criterion, if the training step calls several losses.
        seed: Seeds the choice of examples and the probes.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[StableLearningRate(target=0.9)])  # doctest: +SKIP
    """

    capabilities = Capabilities(refused_strategies=SHARDED, exclusive=("learning rate",))

    def __init__(
        self,
        target: float = 0.9,
        warmup_epochs: int = 1,
        limit: Literal["refined", "exact", "gd"] = "refined",
        max_samples: int = 512,
        batch_size: int | None = None,
        criterion: str | None = None,
        seed: int = 0,
    ) -> None:
        name = "StableLearningRate"
        check_argument(is_number(target) and 0 < target <= 1, "target", name, "in (0, 1]", target)
        check_choice(limit, _QUANTITIES, "limit", name)
        for argument, value, least in (
            ("warmup_epochs", warmup_epochs, 0),
            ("max_samples", max_samples, 1),
            ("batch_size", batch_size or 1, 1),
        ):
            check_argument(
                isinstance(value, int) and value >= least, argument, name, f"an integer of at least {least}", value
            )
        self.target, self.warmup_epochs, self.limit = target, warmup_epochs, limit
        self.max_samples, self.batch_size, self.criterion, self.seed = max_samples, batch_size, criterion, seed
        self.measuring = Measuring(
            name, max_samples=max_samples, quantities=_QUANTITIES[limit], criterion=criterion, seed=seed
        )

    def state_arguments(self) -> dict[str, Any]:
        """The limit and the target tell two instances apart."""
        return {"target": self.target, "limit": self.limit}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what else sets the learning rate, and set it if there is no warm-up."""
        if trainer.lr_scheduler_configs:
            raise RefusedError(
                "StableLearningRate sets the learning rate itself, but the module has a learning-rate scheduler, which "
                "would overwrite it. Remove the one or the other."
            )
        rates = read_rates(trainer, pl_module)
        if not rates.covered:
            raise RefusedError(
                f"StableLearningRate knows the stability of SGD, but the optimizer is {', '.join(rates.optimizers)}. "
                f"Use SGD, or remove the plugin."
            )
        if self.warmup_epochs == 0 and trainer.global_step == 0:
            self._set(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the rate of the next epoch, and log it."""
        if trainer.current_epoch + 1 >= self.warmup_epochs:
            self._set(trainer, pl_module)
        pl_module.log(f"{self.name}/lr", read_rates(trainer, pl_module).lr)

    def _set(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        rates = read_rates(trainer, module)
        sampling = read_sampling(trainer, self.measuring.user, self.batch_size)
        try:
            limit = measure(trainer, module, rates, sampling, self.measuring)["max_lr_sgd"]
        except NonFiniteError as error:
            warnings.warn(f"StableLearningRate leaves the learning rate as it is: {error}", stacklevel=2)
            return
        if not 0 < limit < float("inf") or not rates.lr:
            return  # no curvature, or nothing to scale: the rate stays what it is
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= self.target * limit / rates.lr
