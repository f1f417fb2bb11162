# SPDX-License-Identifier: Apache-2.0
"""Which labels of a training are known to be wrong, and what the model says of its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Subset

from fulgurite import distributed, lightning_adapter
from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.grokking.corrupted_grokking.corruption import LabelCorruption, labels_of


class Corruption:
    """What is known of the labels of a training set.

    Args:
        labels: Gives the labels that are trained on `[B]`, and the true ones, of examples: from the labels that the dataset
            shows `[B]` and indices `[B]`.
        is_corrupted: Mask `[N]` of the examples whose labels were redrawn.
        wrong_fraction: Fraction of all labels that are wrong.
    """

    def __init__(
        self, labels: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], is_corrupted: Tensor, wrong_fraction: float
    ) -> None:
        self._labels = labels
        self.is_corrupted = is_corrupted
        self.wrong_fraction = wrong_fraction

    def __call__(self, given: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels, true labels and mask, `[B]` each."""
        return *self._labels(given, indices), self.is_corrupted[indices].to(given.device)


def corruption_of(trainer: pl.Trainer) -> Corruption:
    """Return what is known of the corrupted labels of a training.

    Raises:
        RefusedError: If nothing is, or it is about a training set of another size.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, LabelCorruption) and callback.is_corrupted is not None:
            return Corruption(callback.labels_and_truth, callback.is_corrupted, callback.wrong_fraction)
    (dataset,) = (loader.dataset for loader in lightning_adapter.train_loaders(trainer))
    size = len(dataset)
    for true_labels, is_corrupted in _known(dataset, getattr(trainer, "datamodule", None)):
        if len(true_labels) == len(is_corrupted) == size:
            wrong = float((labels_of(dataset) != true_labels).double().mean())
            return Corruption(_Shown(true_labels), is_corrupted, wrong)
    raise RefusedError(
        "Expected a LabelCorruption before this callback, a dataset that one has wrapped, or a datamodule with label noise "
        f"whose true labels are those of the {size} training examples, but found none of them."
    )


class _Shown:
    """The labels of a dataset that shows wrong ones."""

    def __init__(self, true_labels: Tensor) -> None:
        self.true_labels = true_labels

    def __call__(self, given: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return given, self.true_labels[indices].to(given.device)


def _known(dataset: Any, datamodule: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield true labels and masks that a dataset or a datamodule has, under their names in either."""
    if isinstance(dataset, Subset):
        indices = torch.as_tensor(list(dataset.indices))
        yield from ((truth[indices], mask[indices]) for truth, mask in _known(dataset.dataset, None))
    for owner in (dataset, datamodule):
        for names in (("true_labels", "is_corrupted"), ("train_clean_targets", "train_noisy")):
            if all(isinstance(getattr(owner, name, None), Tensor) for name in names):
                yield getattr(owner, names[0]), getattr(owner, names[1])


def evaluated(batches: FixedBatches, captured: CapturedLoss, share: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield indices `[B]`, logits `[B, C]` and labels `[B]` of this rank's batches."""
    rank, world = distributed.world() if share else (0, 1)
    for indices, batch in zip(batches.indices[rank::world].split(batches.batch_size), batches, strict=False):
        call = captured(batch).call
        labels, logits = call.targets, call.outputs.detach()
        if logits.ndim != 2 or len(logits) != len(indices):
            raise RefusedError(
                f"Expected the criterion to get logits [{len(indices)}, C] for a batch of {len(indices)} examples, but got "
                f"outputs of shape {list(logits.shape)}: accuracies are of classifiers with one label per example."
            )
        yield indices, logits, labels.argmax(1) if labels.shape == logits.shape else labels
