# SPDX-License-Identifier: Apache-2.0
"""LightningModules whose network, criterion, metrics, optimizer and schedule are injected, in code or on a command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from fulgurite.metrics import AURC, BrierScore, NegativeLogLikelihood
from fulgurite.models import MLP


class StepOutput(NamedTuple):
    """What one step of a task has computed."""

    inputs: Tensor
    outputs: Tensor
    targets: Tensor
    loss: Tensor


class Task(pl.LightningModule):
    """A network, a criterion and the measures of a kind of problem.

    Batches are pairs `(inputs, targets)`. Training logs `train/loss`; validation and test log the loss and the metrics under
    `val/` and `test/`. Interventions act on the attribute `criterion`.

    Args:
        network: Maps inputs to outputs.
        criterion: Called as `criterion(outputs, targets)`.
        metrics: Measures of validation and test, updated with `(outputs, targets)`.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; None for a constant rate.
        lr_interval: Whether the schedule advances per `"epoch"` or per `"step"`.
    """

    fulgurite_criterion: ClassVar[str] = "criterion"

    def __init__(
        self,
        network: nn.Module,
        criterion: nn.Module,
        metrics: MetricCollection,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
    ) -> None:
        super().__init__()
        if lr_interval not in ("epoch", "step"):
            raise ValueError(
                f"Expected `lr_interval` of {type(self).__name__} to be 'epoch' or 'step', but got {lr_interval!r}."
            )
        self.network = network
        self.criterion = criterion
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to outputs."""
        return self.network(inputs)

    def step(self, batch: Any) -> StepOutput:
        """Compute outputs and loss of a batch `(inputs, targets)`."""
        inputs, targets = batch
        outputs = self(inputs)
        return StepOutput(inputs, outputs, targets, self.criterion(outputs, targets))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        result = self.step(batch)
        self.log("train/loss", result.loss, on_step=False, on_epoch=True, batch_size=len(result.inputs))
        return result.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics of validation."""
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics of the test."""
        self._evaluate(batch, self.test_metrics, "test/loss")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the outputs for a batch `(inputs, ...)`, or for inputs alone."""
        return self(batch[0] if isinstance(batch, list | tuple) else batch)

    def measured(self, outputs: Tensor) -> Tensor:
        """Return what the metrics are given of the outputs."""
        return outputs

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _evaluate(self, batch: Any, metrics: MetricCollection, loss_name: str) -> None:
        result = self.step(batch)
        metrics.update(self.measured(result.outputs), result.targets)
        self.log(loss_name, result.loss, on_epoch=True, batch_size=len(result.inputs), sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True)


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """SGD with learning rate 0.1, Nesterov momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


class Classification(Task):
    """Classification with cross entropy.

    Validation and test log `loss`, `nll` (of the hard labels, whatever the criterion), `error` and `acc` (fractions), `ece`
    (10 bins, a fraction), `brier` and `aurc` (a fraction; papers print a thousand times it).

    Args:
        num_classes: Number of classes `C`; the command line takes it from the data.
        input_shape: Shape of one input, for the default network; the command line takes it from the data.
        network: Maps inputs to logits `[B, C]`; by default an `MLP`. A callable such as a class is called with
            `input_shape` and `num_classes`.
        criterion: The loss; by default `nn.CrossEntropyLoss` with `label_smoothing`.
        label_smoothing: Label smoothing of the default criterion, in [0, 1].
        optimizer: Makes the optimizer; by default SGD, learning rate 0.1, Nesterov momentum 0.9, weight decay 5e-4.
        lr_scheduler: Makes the learning-rate schedule.
        lr_interval: Whether the schedule advances per `"epoch"` or per `"step"`.

    Raises:
        ValueError: If an argument is outside its range, no network is given and `input_shape` is not known, or both
            criterion and smoothing are given.

    Example:
        >>> Classification(num_classes=10, input_shape=(1, 8, 8)).network[-1].out_features
        10
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int] | None = None,
        network: nn.Module | Callable[[Sequence[int], int], nn.Module] | None = None,
        criterion: nn.Module | None = None,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
    ) -> None:
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(
                f"Expected `num_classes` of Classification to be a positive integer, but got {num_classes!r}: give it, or "
                f"data with an attribute of that name."
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(
                f"Expected `label_smoothing` of Classification to be in [0, 1], but got {label_smoothing!r}."
            )
        if not isinstance(network, nn.Module):
            if input_shape is None:
                raise ValueError(
                    "Expected `input_shape` of Classification for a network that is yet to be made, but got None: give it, "
                    "or a network that is made already."
                )
            network = (network or MLP)(input_shape, num_classes)
        if criterion is None:
            criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        elif label_smoothing:
            raise ValueError(
                f"Expected `label_smoothing` of Classification to be 0 when a criterion is given, but got "
                f"{label_smoothing}. Set it on the criterion."
            )
        metrics = MetricCollection(
            {
                "nll": NegativeLogLikelihood(),
                "acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "error": ErrorRate(num_classes, average="micro", validate_args=False),
                "ece": MulticlassCalibrationError(num_classes, n_bins=10, validate_args=False),
                "brier": BrierScore(),
                "aurc": AURC(),
            },
            compute_groups=False,
        )
        super().__init__(network, criterion, metrics, optimizer, lr_scheduler, lr_interval)
        self.num_classes = num_classes

    def measured(self, outputs: Tensor) -> Tensor:
        """Return log-probabilities `[B, C]`: torchmetrics takes logits that all lie in [0, 1] for probabilities."""
        return outputs.float().log_softmax(dim=1)


class ErrorRate(MulticlassAccuracy):
    """One minus the accuracy."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the fraction of wrong predictions."""
        return 1 - super().compute()


def default_adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with learning rate 1e-3.

    It is a function because a command line that names another optimizer keeps the arguments that a default class shares
    with it, such as AdamW's weight decay.
    """
    return torch.optim.AdamW(parameters, lr=1e-3)


class Regression(Task):
    """Regression with the mean squared error; validation and test log `loss`, `mse`, `mae` and `r2`.

    Args:
        network: Maps inputs to predictions of the shape of the targets.
        criterion: The loss; by default `nn.MSELoss`.
        optimizer: Makes the optimizer; by default AdamW with learning rate 1e-3.
        lr_scheduler: Makes the learning-rate schedule.
        lr_interval: Whether the schedule advances per `"epoch"` or per `"step"`.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: nn.Module | None = None,
        optimizer: OptimizerCallable = default_adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
    ) -> None:
        metrics = MetricCollection(
            {
                "mse": torchmetrics.MeanSquaredError(),
                "mae": torchmetrics.MeanAbsoluteError(),
                "r2": torchmetrics.R2Score(),
            },
            compute_groups=False,
        )
        super().__init__(network, criterion or nn.MSELoss(), metrics, optimizer, lr_scheduler, lr_interval)
