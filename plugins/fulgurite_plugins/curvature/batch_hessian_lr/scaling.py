# SPDX-License-Identifier: Apache-2.0
"""The learning rate for the batch size that a training really has, as a callback."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError, check_argument, check_choice
from fulgurite.intervention import Capabilities, Intervention
from fulgurite_plugins.curvature.batch_hessian_lr import noise, rates
from fulgurite_plugins.curvature.batch_hessian_lr.functional import scale_learning_rate

Mode = Literal["auto", "linear", "sqrt", "rmt"]
Spectrum = Literal["predicted", "measured", "calibrated"]

_USER = "BatchSizeLRScaling (batch_size_lr)"


class BatchSizeLRScaling(Intervention):
    r"""Scale the learning rate, once, from the batch size that it was tuned for to that of this training.

    The batch size of a training is that of an update: examples per batch, times devices, times accumulated batches. The
    new rate is logged with its reason, and as `batch_size_lr/factor`. Schedules keep their form.

    Args:
        reference_batch_size: The batch size of an update for which the optimizer's rate was tuned.
        mode: `"linear"`; `"sqrt"`; `"rmt"`, by the largest eigenvalues of batch Hessians at both sizes; or `"auto"`:
            linear for optimizers of the type of SGD, the square root for those of the type of Adam.
        optimizer_kind: For `"auto"`: `"sgd"`, `"adam"`, or `"auto"`, by the optimizer's class.
        spectrum: For `"rmt"`: where eigenvalues come from. `"predicted"`: by the additive noise model, from the Hessian
            and its variance over batches. `"measured"`: from a few batches of both sizes. `"calibrated"`: by a power
            law through two small sizes, that of a loader's batch and a quarter of it.
        cap: For the others: whether larger batches than that of saturation count as of that size; it is measured as for
            `"predicted"`.
        batch_size: Examples in a batch of one device; None for what the loader says.
        examples: How many training examples measurements use at most.
        optimizer: Index of the optimizer, if there are several; None scales all of them.
        criterion: For measurements: the criterion, where the training step calls several losses: an attribute of the
            module or a function of `torch.nn.functional`.
        seed: Seeds the choice of examples and the probes.

    Attributes:
        factor: What rates were multiplied by; None before training.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[BatchSizeLRScaling(128)], accumulate_grad_batches=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        reference_batch_size: int,
        mode: Mode = "auto",
        optimizer_kind: Literal["auto", "sgd", "adam"] = "auto",
        spectrum: Spectrum = "predicted",
        cap: bool = False,
        batch_size: int | None = None,
        examples: int = 2048,
        optimizer: int | None = None,
        criterion: str | None = None,
        seed: int = 0,
    ) -> None:
        check_choice(mode, get_args(Mode), "mode", "BatchSizeLRScaling")
        check_choice(optimizer_kind, ("auto", "sgd", "adam"), "optimizer_kind", "BatchSizeLRScaling")
        check_choice(spectrum, get_args(Spectrum), "spectrum", "BatchSizeLRScaling")
        numbers = {"reference_batch_size": reference_batch_size, "examples": examples, "batch_size": batch_size}
        for name, number in numbers.items():
            fits = (isinstance(number, int) and number >= 1) or (name == "batch_size" and number is None)
            check_argument(fits, name, "BatchSizeLRScaling", "a positive integer", number)
        check_argument(
            not (cap and mode == "rmt"),
            "cap",
            "BatchSizeLRScaling",
            "False with mode='rmt', which saturates itself",
            cap,
        )
        self.reference_batch_size = reference_batch_size
        self.mode = mode
        self.optimizer_kind = optimizer_kind
        self.spectrum = spectrum
        self.cap = cap
        self.batch_size = batch_size
        self.examples = examples
        self.optimizer = optimizer
        self.criterion = criterion
        self.seed = seed
        self.factor: float | None = None

    @property
    def name(self) -> str:
        """The prefix of everything that is logged."""
        return "batch_size_lr"

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """What measures needs whole parameters."""
        if self.mode != "rmt" and not self.cap:
            return Capabilities(exclusive=("scaling with the batch size",))
        from fulgurite_plugins.curvature.batch_hessian_lr.spectrum import SHARDED

        return Capabilities(refused_strategies=SHARDED, exclusive=("scaling with the batch size",))

    def state_arguments(self) -> dict[str, Any]:
        """The mode and the batch size that is scaled from tell two instances apart."""
        return {"mode": self.mode, "reference_batch_size": self.reference_batch_size, "optimizer": self.optimizer}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the factor of another training; that of this one comes with its checkpoint, if there is one."""
        if stage == "fit" and trainer.current_epoch == 0:
            self.factor = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scale the rates; in a run that is resumed they are scaled already."""
        if self.factor is not None:
            return
        size = self._update_size(trainer)
        optimizers = rates.chosen_optimizers(trainer, self.optimizer, _USER)
        factors = [self._factor(trainer, pl_module, optimizer, size) for optimizer in optimizers]
        for optimizer, factor in zip(optimizers, factors, strict=True):
            rates.multiply_rates(trainer, optimizer, factor)
        self.factor = factors[0]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the factor."""
        assert self.factor is not None
        pl_module.log("batch_size_lr/factor", self.factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the factor: the rates in the checkpoint are scaled already."""
        return {"version": 1, "factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring it back."""
        self.factor = state_dict["factor"]

    def _update_size(self, trainer: pl.Trainer) -> int:
        return self._device_batch(trainer) * trainer.world_size * trainer.accumulate_grad_batches

    def _device_batch(self, trainer: pl.Trainer) -> int:
        if self.batch_size is not None:
            return self.batch_size
        loaders = lightning_adapter.train_loaders(trainer)
        sizes = [_loader_batch(loader) for loader in loaders]
        if len(sizes) == 1 and sizes[0] is not None:
            return sizes[0]
        found = "has no batch size" if len(sizes) == 1 else f"is one of {len(sizes)}"
        raise RefusedError(
            f"{_USER} needs the number of examples in a batch, which the training loader does not tell: it {found}. Pass "
            f"batch_size=."
        )

    def _factor(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, size: int) -> float:
        mode = self._mode(optimizer)
        largest, saturation = None, math.inf
        if mode == "rmt" or self.cap:
            hessians = noise.BatchHessians(
                trainer, module, rates.optimised(optimizer), _USER, self.examples, self.criterion, seed=self.seed
            )
            if mode == "rmt":
                self._check_sizes(hessians.dataset_size, size)
            batch = self._device_batch(trainer)
            if mode != "rmt" or self.spectrum == "predicted":
                largest, saturation = noise.predicted(hessians, batch)
            elif self.spectrum == "measured":
                largest = noise.measured(hessians)
            else:
                largest = noise.calibrated(hessians, (max(1, batch // 4), batch))
        if mode == "rmt":
            factor = scale_learning_rate(1.0, self.reference_batch_size, size, mode, largest=largest)
        else:
            factor = scale_learning_rate(1.0, self.reference_batch_size, size, mode, saturation=saturation)
        before = rates.base_rate(optimizer)
        saturates = "" if math.isinf(saturation) else f", saturation at a batch size of {saturation:.0f}"
        rank_zero_info(
            f"{_USER}: batches of {size} instead of {self.reference_batch_size}: learning rate {before:.4g} -> "
            f"{before * factor:.4g} (x {factor:.3g}, mode {mode!r}{saturates})."
        )
        return factor

    def _mode(self, optimizer: Optimizer) -> Any:
        if self.mode != "auto":
            return self.mode
        kind = rates.optimizer_kind(optimizer) if self.optimizer_kind == "auto" else self.optimizer_kind
        if kind is None:
            raise RefusedError(
                f"{_USER}: whether the rate of {type(optimizer).__name__} goes with the batch size or with its square root "
                f"is not known. Pass optimizer_kind='sgd' or 'adam', or a mode."
            )
        return "linear" if kind == "sgd" else "sqrt"

    def _check_sizes(self, dataset_size: int, size: int) -> None:
        largest = max(size, self.reference_batch_size)
        if largest > dataset_size:
            raise RefusedError(
                f"{_USER}: a batch of {largest} is larger than the {dataset_size} examples of the training set, and has "
                f"no Hessian to be predicted. Use mode 'linear' or 'sqrt'."
            )


def _loader_batch(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None
