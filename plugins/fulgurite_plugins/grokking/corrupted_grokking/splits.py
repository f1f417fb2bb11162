# SPDX-License-Identifier: Apache-2.0
"""Accuracies on clean and on corrupted training examples, and what they tell of a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from fulgurite import lightning_adapter
from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError, check_argument
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.grokking.corrupted_grokking.functional import inversion_times
from fulgurite_plugins.grokking.corrupted_grokking.known import corruption_of, evaluated


class CorruptionAccuracy(Metric):
    """Accuracies on training examples some of whose labels are corrupted.

    `update(logits, labels, true_labels, is_corrupted, counted=None)` takes `[B, C]` and four times `[B]`; examples with
    `counted` False, such as those that a sampler has repeated, are left out. `compute` returns a dict: `"train"` on the
    labels as they are; `"as_labelled"` and `"true"`, of the corrupted examples with their wrong and with their true labels;
    `"clean"`, of the others. NaN for a group without examples. Ranks add up counts.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = CorruptionAccuracy()
        >>> logits, labels, truth = torch.eye(3), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])
        >>> metric.update(logits, labels, truth, labels != truth)
        >>> metric.compute()["true"]
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    hits: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", default=torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        true_labels: Tensor,
        is_corrupted: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        if logits.ndim != 2 or {len(logits), len(labels), len(true_labels), len(is_corrupted)} != {len(logits)}:
            raise ValueError(
                f"Expected `logits` [B, C], `labels`, `true_labels` and `is_corrupted` [B] of the same examples, but got "
                f"shapes {', '.join(str(list(t.shape)) for t in (logits, labels, true_labels, is_corrupted))}."
            )
        counted = torch.ones_like(is_corrupted, dtype=torch.bool) if counted is None else counted
        predictions = logits.argmax(1)
        corrupted, clean = is_corrupted.bool() & counted, ~is_corrupted.bool() & counted
        fits = predictions == labels
        self.hits = self.hits + torch.stack(
            [(fits & corrupted).sum(), ((predictions == true_labels) & corrupted).sum(), (fits & clean).sum()]
        )
        self.counts = self.counts + torch.stack([corrupted.sum(), clean.sum()])

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies over everything seen."""
        as_labelled, true, clean = self.hits
        corrupted, others = self.counts
        return {
            "train": (as_labelled + clean) / (corrupted + others),
            "as_labelled": as_labelled / corrupted,
            "true": true / corrupted,
            "clean": clean / others,
        }


class SplitAccuracies(pl.Callback):
    """Log accuracies on clean and corrupted training examples, and on validation, in evaluation mode.

    What is corrupted it learns from a `LabelCorruption` among the callbacks, a dataset that one has wrapped, or a datamodule
    with label noise that keeps the true labels, as all of Fulgurite's do. It logs `corruption/train`,
    `corruption/as_labelled`, `corruption/true`, `corruption/clean`, and `corruption/test`, of the validation data if there
    are any. Outputs and labels are those that the training step gives its criterion.

    Args:
        every_n_epochs: Epochs between two measurements; the last epoch is always measured.
        batch_size: Examples per batch; None for those of the loaders.
        criterion: The criterion, if the training step calls several; see `Intervention`.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LabelCorruption(0.2), SplitAccuracies()])  # doctest: +SKIP
    """

    def __init__(self, every_n_epochs: int = 10, batch_size: int | None = None, criterion: str | None = None) -> None:
        check_argument(every_n_epochs >= 1, "every_n_epochs", type(self).__name__, "at least 1", every_n_epochs)
        fits = batch_size is None or batch_size >= 1
        check_argument(fits, "batch_size", type(self).__name__, "at least 1, or None", batch_size)
        self.every_n_epochs = every_n_epochs
        self.batch_size = batch_size
        self.criterion = criterion

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out which labels are corrupted.

        Raises:
            RefusedError: If nothing is known of any.
        """
        corruption_of(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        epoch, epochs = lightning_adapter.train_progress(trainer, "epoch")
        if epoch % self.every_n_epochs == 0 or epoch >= epochs:
            for name, value in self.measure(trainer, pl_module).items():
                pl_module.log(f"corruption/{name}", value.float(), sync_dist=True)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Return the accuracies now; on several ranks, all of them call this."""
        corruption = corruption_of(trainer)
        # Ranks whose forward passes communicate must make equally many.
        share = lightning_adapter.strategy_name(trainer) in ("single", "ddp")
        captured = CapturedLoss(trainer, module, type(self).__name__, self.criterion)
        metric = CorruptionAccuracy().to(module.device)
        train = FixedBatches(trainer, type(self).__name__, "train", batch_size=self.batch_size, share=share)
        for indices, logits, given in evaluated(train, captured, share):
            metric.update(logits, *corruption(given, indices))
        found = metric.compute()
        if trainer.enable_validation:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()  # of which there may be none before the first validation
            test = CorruptionAccuracy().to(module.device)
            val = FixedBatches(trainer, type(self).__name__, "val", batch_size=self.batch_size, share=share)
            for _, logits, labels in evaluated(val, captured, share):
                test.update(logits, labels, labels, torch.zeros_like(labels, dtype=torch.bool))
            found["test"] = test.compute()["clean"]
        return found


class InversionDetector(SplitAccuracies):
    r"""Log when a training grokked, and when it then unlearned the corrupted labels, besides the accuracies.

    `corruption/grokked_at` is the first measured epoch, counted from 1, with a test accuracy of 1, within the tolerance;
    `corruption/inverted_at` the first at which the training accuracy moreover has come down to the fraction of right
    labels. They are logged from then on.

    Args:
        every_n_epochs: Epochs between two measurements; the last epoch is always measured.
        tolerance: What counts as equal, in [0, 1].
        batch_size: Examples per batch; None for those of the loaders.
        criterion: The criterion, if the training step calls several; see `Intervention`.

    Attributes:
        history: For each measurement the epoch, the training and the test accuracy.
        grokked_at: The first epoch; None before. `inverted_at` is the second.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        tolerance: float = 0.05,
        batch_size: int | None = None,
        criterion: str | None = None,
    ) -> None:
        super().__init__(every_n_epochs, batch_size, criterion)
        check_argument(0 <= tolerance <= 1, "tolerance", "InversionDetector", "in [0, 1]", tolerance)
        self.tolerance = tolerance
        self.history: list[tuple[int, float, float]] = []
        self.grokked_at: int | None = None
        self.inverted_at: int | None = None

    @property
    def state_key(self) -> str:
        """The key of the history in a checkpoint."""
        return self._generate_state_key(module=type(self).__module__, criterion=self.criterion)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out which labels are corrupted, and forget another training.

        Raises:
            RefusedError: If nothing is known of any, or there are no validation data.
        """
        super().on_train_start(trainer, pl_module)
        if not trainer.enable_validation:
            raise RefusedError(
                "InversionDetector needs validation data: without them nobody knows when a model grokked."
            )
        if trainer.current_epoch == 0:
            self.history, self.grokked_at, self.inverted_at = [], None, None

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Return the accuracies now, and the epochs that are known."""
        found = super().measure(trainer, module)
        self.history.append((trainer.current_epoch + 1, float(found["train"]), float(found["test"])))
        wrong = corruption_of(trainer).wrong_fraction
        epochs, train, test = (list(column) for column in zip(*self.history, strict=True))
        self.grokked_at, self.inverted_at = inversion_times(epochs, train, test, wrong, self.tolerance)
        for name in ("grokked_at", "inverted_at"):
            if getattr(self, name) is not None:
                found[name] = torch.tensor(getattr(self, name), device=module.device)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"version": 1, "history": [list(row) for row in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = [(int(epoch), float(train), float(test)) for epoch, train, test in state_dict["history"]]
