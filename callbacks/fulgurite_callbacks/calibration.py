# SPDX-License-Identifier: Apache-2.0
"""How far the confidence of a classifier can be trusted, logged for modules that know nothing of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.utilities.data import dim_zero_cat

from fulgurite import distributed
from fulgurite.errors import RefusedError
from fulgurite.intervention import Intervention, named_losses
from fulgurite.losses import LossCall
from fulgurite.metrics import AURC, BrierScore, ExcessAURC, NegativeLogLikelihood
from fulgurite_callbacks.reliability import ReliabilityBins, draw_reliability

Measure = Literal["ece", "nll", "brier", "aurc", "excess_aurc"]

_CRITERIA = {"cross_entropy": F.cross_entropy, "nll_loss": F.nll_loss}


class Calibration(Intervention):
    r"""Log measures of calibration in validation and test, on a classifier that logs none of them.

    Outputs and targets are those of the criterion that `validation_step` and `test_step` call: `cross_entropy` or
    `nll_loss`, as functions or modules. The module is not changed. Logged are, over all positions that are not
    `ignore_index`: `ece`, the expected calibration error of the largest probability in equally wide bins (L1 norm); `nll`,
    the mean of $-\log p_y$ in nats without class weights or label smoothing; `brier`, $\sum_c (p_c - y_c)^2$ in [0, 2];
    `aurc` and `excess_aurc`, the area under the risk-coverage curve and what of it a perfect ranking would avoid
    (fractions; papers print them times 1000). Predictions that are not a number give nan.

    Names are `calibration/val_ece`, `calibration/test_ece` and so on, and with several dataloaders
    `calibration/val_ece/dataloader_idx_0`, as Lightning names them. The prefix keeps them apart from your own `val/ece`.
    The sanity check logs nothing. Two numbers per position are kept until the end of the epoch for `ece`, and two for each
    of `aurc` and `excess_aurc`.

    Args:
        measures: Which measures to log.
        n_bins: Number of bins of the ECE and of the diagram; 10 and 15 are usual.
        prefix: Beginning of the logged names; not empty. Give two instances in one trainer different ones.
        criterion: Which criterion is meant if a step calls several: an attribute of the module that is a loss module, or
            `"cross_entropy"` or `"nll_loss"`. By default the only one.
        plot: Whether to keep a reliability diagram of the latest validation and test as a PNG file in the trainer's
            `default_root_dir`, named after the prefix: `calibration_val.png`.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Calibration(n_bins=15)])  # doctest: +SKIP
    """

    def __init__(
        self,
        measures: Sequence[Measure] = get_args(Measure),
        n_bins: int = 10,
        prefix: str = "calibration/",
        criterion: str | None = None,
        plot: bool = False,
    ) -> None:
        unknown = [repr(m) for m in measures if m not in get_args(Measure)]
        if isinstance(measures, str) or unknown or not measures or len(set(measures)) < len(measures):
            raise ValueError(
                f"Expected `measures` of Calibration to be a list of some of {', '.join(map(repr, get_args(Measure)))}, "
                f"each once, but got {measures!r}."
            )
        if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
            raise ValueError(f"Expected `n_bins` of Calibration to be a positive integer, but got {n_bins!r}.")
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(
                f"Expected `prefix` of Calibration to be a text that is not empty, but got {prefix!r}: without it the "
                f"names could be those of your own metrics."
            )
        if criterion is not None and not (isinstance(criterion, str) and criterion):
            raise ValueError(
                f"Expected `criterion` of Calibration to be the name of an attribute or a loss, but got {criterion!r}."
            )
        if not isinstance(plot, bool):
            raise ValueError(f"Expected `plot` of Calibration to be a bool, but got {plot!r}.")
        self.measures = tuple(measures)
        self.n_bins = n_bins
        self.prefix = prefix
        self.criterion = criterion
        self.plot = plot
        self._forget()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two instances that would log under one name."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, Calibration) and c is not self]
        if any(other.prefix == self.prefix for other in others):
            raise RefusedError(
                f"Expected each Calibration of a trainer to have its own `prefix`, but got {self.prefix!r} twice: give one "
                f"of them another prefix."
            )

    def on_evaluation_loss(self, call: LossCall) -> None:
        """Remember the call until the step is over."""
        self._calls.append(call)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin afresh; find the named criterion."""
        self._begin(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin afresh; find the named criterion."""
        self._begin(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """Update the measures; the sanity check only finds out whether that is possible."""
        self._update(pl_module, "validation_step", dataloader_idx, keep=not trainer.sanity_checking)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """Update the measures."""
        self._update(pl_module, "test_step", dataloader_idx, keep=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the measures."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")
        self._forget()

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the measures."""
        self._log(trainer, pl_module, "test")
        self._forget()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the criterion go."""
        self._forget()

    # Which call of a criterion

    def _forget(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self._handle.remove()
        self._handle: Any = None
        self._calls: list[LossCall] = []
        self._inputs: list[Tensor] = []
        self._metrics: dict[int | None, dict[str, Metric]] = {}
        self._classes: dict[int | None, int] = {}

    def _begin(self, module: pl.LightningModule) -> None:
        self._forget()
        name = self.criterion or getattr(type(module), "fulgurite_criterion", None)
        if name is None or name in _CRITERIA:
            return
        criterion = getattr(module, name, None)
        if isinstance(criterion, nn.Module):
            self._handle = criterion.register_forward_pre_hook(self._on_criterion, with_kwargs=True)
        elif self.criterion is not None:
            known = named_losses(module)
            raise RefusedError(
                f"Expected `criterion` of Calibration to name a loss module of {type(module).__name__}, 'cross_entropy' or "
                f"'nll_loss', but got {name!r}{'' if criterion is None else ', which is no torch module'}. "
                + (f"Loss modules found: {', '.join(known)}." if known else "It has no loss modules as attributes.")
            )

    def _on_criterion(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs += [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

    def _take_call(self, module: pl.LightningModule, method: str) -> LossCall:
        calls, inputs = self._calls, self._inputs
        self._calls, self._inputs = [], []
        where = f"{type(module).__name__}.{method}"
        found = [call for call in calls if call.fn in _CRITERIA.values()]
        if self._handle is not None:
            given = [call for call in found if any(call.outputs is value for value in inputs)]
            found = given if given or self.criterion is not None else found
        elif self.criterion is not None:
            found = [call for call in found if call.name == self.criterion]
        if len(found) == 1:
            return found[0]
        seen = ", ".join(call.name for call in calls) or "nothing"
        if not found:
            meant = self.criterion if self.criterion in _CRITERIA else "cross_entropy or nll_loss"
            given_to = (
                f" as they are given to {self.criterion!r}" if self._handle is not None and self.criterion else ""
            )
            raise RefusedError(
                f"Calibration: expected {where} to call {meant} on outputs of shape [B, C, ...]{given_to}, but it "
                f"called {seen}. Compute the classification loss there, name it with `criterion`, or remove Calibration."
            )
        raise RefusedError(
            f"Calibration: expected {where} to call one classification loss, but it called {seen}, and which of them is "
            f"meant is not clear. Name one with `criterion`: an attribute of the module that is a loss module and is "
            f"called once in a step. Loss modules found: {', '.join(named_losses(module)) or 'none'}."
        )

    # Measures

    def _update(self, module: pl.LightningModule, method: str, loader: int | None, keep: bool) -> None:
        with torch.no_grad():
            logs, targets = predictions_and_targets(self._take_call(module, method))
        if not keep:
            return
        classes = self._classes.setdefault(loader, logs.shape[1])
        if logs.shape[1] != classes:
            raise RefusedError(
                f"Calibration: expected {type(module).__name__}.{method} to predict the same number of classes in every "
                f"batch, but got {classes} and then {logs.shape[1]}. Put other tasks into dataloaders of their own."
            )
        for metric in self._metrics_of(loader, classes, logs.device).values():
            metric.update(logs, targets)

    def _metrics_of(self, loader: int | None, classes: int, device: torch.device) -> dict[str, Metric]:
        if loader not in self._metrics:
            makers: dict[str, Callable[[], Metric]] = {
                "ece": lambda: _CalibrationError(classes, self.n_bins, norm="l1", validate_args=False),
                "nll": NegativeLogLikelihood,
                "brier": BrierScore,
                "aurc": AURC,
                "excess_aurc": ExcessAURC,
                "diagram": lambda: ReliabilityBins(self.n_bins),
            }
            names = [*self.measures, *(["diagram"] if self.plot else [])]
            self._metrics[loader] = {name: makers[name]().to(device) for name in names}
        return self._metrics[loader]

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        known: dict[int | None, int] = {}
        for classes in distributed.gather_objects(self._classes):
            known.update(classes)
        for loader in sorted(known, key=lambda index: index or 0):
            metrics = self._metrics_of(loader, known[loader], module.device)
            if loader not in self._classes:  # only other ranks had data
                nothing = torch.zeros(0, known[loader], device=module.device)
                for metric in metrics.values():
                    metric.update(nothing, nothing.new_zeros(0, dtype=torch.long))
            suffix = "" if loader is None else f"/dataloader_idx_{loader}"
            values = {name: metric.compute() for name, metric in metrics.items()}
            bins = values.pop("diagram", None)
            for name, value in values.items():
                # Equal on all ranks already: the mean over them only tells Lightning so.
                module.log(
                    f"{self.prefix}{stage}_{name}{suffix}",
                    value,
                    sync_dist=True,
                    batch_size=1,
                    add_dataloader_idx=False,
                )
            if bins is not None and trainer.is_global_zero:
                slug = re.sub(r"[^\w]+", "_", f"{self.prefix}{stage}{'' if loader is None else f'_{loader}'}").strip(
                    "_"
                )
                ece = f", ECE {float(values['ece']):.4f}" if "ece" in values else ""
                draw_reliability(bins, Path(trainer.default_root_dir) / f"{slug}.png", stage, ece)


def predictions_and_targets(call: LossCall) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities [N, C] and class indices [N] of a criterion's call, without ignored positions.

    Args:
        call: A call of `cross_entropy` (on logits) or `nll_loss` (on log-probabilities).

    Raises:
        RefusedError: If the outputs are not `[B, C, *]` over two classes or more, or the targets are probabilities that
            are not one-hot.
    """
    outputs, targets = call.outputs.detach(), call.targets
    if outputs.ndim == 1:
        outputs, targets = outputs.unsqueeze(0), targets.unsqueeze(0)
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise RefusedError(
            f"Calibration: expected outputs of {call.name} to be [B, C, ...] over at least two classes, but got shape "
            f"{list(call.outputs.shape)}. Name the classification loss with `criterion`, or remove Calibration."
        )
    with torch.autocast(outputs.device.type, enabled=False):
        logs = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).log_softmax(dim=1)
    if targets.is_floating_point():
        if not bool(((targets == 0) | (targets == 1)).all() & (targets.sum(dim=1) == 1).all()):
            raise RefusedError(
                "Calibration: expected class indices as targets in validation and test, but got probabilities that are not "
                "one-hot, for which there is no right class. Compute the loss of unmixed examples there, or remove "
                "Calibration."
            )
        targets = targets.argmax(dim=1)
    logs, targets = logs.movedim(1, -1).reshape(-1, logs.shape[1]), targets.reshape(-1)
    kept = targets != call.arguments.get("ignore_index", -100)
    return logs[kept], targets[kept]


class _CalibrationError(MulticlassCalibrationError):
    """Not a number if a prediction is none; torchmetrics would count it as confidence 0."""

    def compute(self) -> Tensor:
        undefined = dim_zero_cat(self.confidences).isnan().any()
        return torch.where(undefined, torch.nan, super().compute())
