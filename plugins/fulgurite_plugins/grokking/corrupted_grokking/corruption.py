# SPDX-License-Identifier: Apache-2.0
"""Wrong labels for a part of any training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError, check_argument, is_number
from fulgurite.intervention import Capabilities, Intervention, Step
from fulgurite_datamodules.noise import flip_labels


class LabelCorruption(Intervention):
    """Train on wrong labels for a fixed random part of the training set.

    Which labels are wrong, and what they are instead, depends on the seed and on the index of the example in the dataset
    alone: not on ranks, workers, epochs or the order in which examples come. As a callback it changes the batches of
    training; validation and test keep their labels. `wrap` makes a dataset of the same labels, for training without it.

    Args:
        fraction: Fraction of the examples whose labels are redrawn, in [0, 1]; exactly `floor(fraction * n)` are.
        num_classes: Number of classes; `"auto"` asks the datamodule, the module and the dataset.
        seed: Seed of choice and labels.
        exclude_true_label: Whether wrong labels are drawn from the other classes; else from all, so that some stay right.
        indices: Examples that may be corrupted; None for all.
        key: Where the labels are in a batch: the position, or the key of a dict.

    Attributes:
        is_corrupted: Mask `[N]` of the examples whose labels are redrawn; known when training has begun.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LabelCorruption(0.2)])  # doctest: +SKIP
    """

    capabilities = Capabilities(sample_indices=True)

    def __init__(
        self,
        fraction: float,
        num_classes: int | Literal["auto"] = "auto",
        seed: int = 0,
        exclude_true_label: bool = False,
        indices: Sequence[int] | None = None,
        key: int | str = 1,
    ) -> None:
        fits = is_number(fraction) and 0 <= fraction <= 1
        check_argument(fits, "fraction", "LabelCorruption", "in [0, 1]", fraction)
        several = num_classes == "auto" or (isinstance(num_classes, int) and num_classes >= 2)
        check_argument(several, "num_classes", "LabelCorruption", "at least 2, or 'auto'", num_classes)
        self.fraction = fraction
        self.num_classes = num_classes
        self.seed = seed
        self.exclude_true_label = exclude_true_label
        self.indices = indices
        self.key = key
        self.classes = 0
        self.is_corrupted: Tensor | None = None
        self._offsets: Tensor | None = None
        self._restored: Tensor | None = None
        self._dataset: Any = None
        self._checked = False

    def state_arguments(self) -> dict[str, Any]:
        """Two corruptions, of different examples, are told apart by their seeds."""
        return {"seed": self.seed}

    def wrap(self, dataset: Dataset[Any]) -> CorruptedDataset:
        """Return the dataset with its corrupted labels.

        Raises:
            RefusedError: If the dataset has no length or indices, or labels that are no classes.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise RefusedError(
                f"LabelCorruption needs the index of every example, which {type(dataset).__name__} does not have. Let it "
                f"be a dataset with `__getitem__` and `__len__`: for examples that fit into memory, wrap(list(dataset))."
            )
        true_labels = labels_of(dataset, self.key)
        classes = int(true_labels.max()) + 1 if self.num_classes == "auto" else int(self.num_classes)
        offsets, is_corrupted = self.draw(len(true_labels), classes)
        return CorruptedDataset(dataset, self.key, true_labels, (true_labels + offsets) % classes, is_corrupted)

    def draw(self, size: int, classes: int) -> tuple[Tensor, Tensor]:
        """Return what is added to each label, modulo the number of classes `[N]`, and the mask of redrawn labels `[N]`.

        Raises:
            ValueError: If one of the `indices` is outside the dataset.
        """
        eligible = torch.arange(size) if self.indices is None else torch.as_tensor(self.indices, dtype=torch.int64)
        inside = len(eligible) == 0 or 0 <= int(eligible.min()) <= int(eligible.max()) < size
        check_argument(inside, "indices", "LabelCorruption", f"in 0 ... {size - 1}, the examples", self.indices)
        n = len(eligible)
        count = int(self.fraction * n + 1e-9)  # 0.29 * 100 is a little less than 29
        kind: Literal["symmetric", "uniform"] = "symmetric" if self.exclude_true_label else "uniform"
        generator = torch.Generator().manual_seed(self.seed)
        drawn, selected = flip_labels(torch.zeros(n, dtype=torch.int64), classes, count / max(n, 1), kind, generator)
        offsets, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
        offsets[eligible], mask[eligible] = drawn, selected
        return offsets, mask

    @property
    def true_labels(self) -> Tensor:
        """The labels of the training set before corruption `[N]`; once training has begun."""
        return labels_of(self._dataset, self.key)

    def relabelled(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Return the labels `[B]` that examples are trained on, from their true labels `[B]` and indices `[B]`."""
        assert self._offsets is not None
        if self._offsets.device != labels.device:
            self._offsets = self._offsets.to(labels.device)
        return ((labels + self._offsets[indices.to(labels.device)]) % self.classes).to(labels.dtype)

    def labels_and_truth(self, given: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels that are trained on `[B]` and the true ones, which the dataset gives."""
        return self.relabelled(given, indices), given

    @property
    def wrong_fraction(self) -> float:
        """The fraction of labels that are wrong; less than `fraction` where redrawn labels may be right."""
        return 0.0 if self._offsets is None else float((self._offsets % self.classes != 0).double().mean())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the wrong labels, of which only the size of the dataset and the number of classes have to be known.

        Raises:
            RefusedError: If the labels are corrupted already, or a checkpoint belongs to other data.
        """
        (loader,) = lightning_adapter.train_loaders(trainer)
        self._dataset, size = loader.dataset, len(loader.dataset)
        if isinstance(self._dataset, CorruptedDataset):
            raise RefusedError(
                "LabelCorruption would corrupt labels of a dataset that it has wrapped already. Remove the callback, or "
                "train on the dataset itself."
            )
        self.classes = self._number_of_classes(trainer, pl_module)
        self._offsets, self.is_corrupted = self.draw(size, self.classes)
        if self._restored is not None:
            if len(self._restored) != size:
                raise RefusedError(
                    f"LabelCorruption goes on with wrong labels for {len(self._restored)} examples, but the training set "
                    f"now has {size}. Resume with the same data."
                )
            self._offsets, self._restored = self._restored, None
        self._checked = False

    def transform_batch(self, batch: Any, step: Step) -> Any:
        """Replace the labels of the batch."""
        if self.fraction == 0:
            return batch
        labels = self._labels(batch)
        if step.indices is None or len(step.indices) != len(labels):
            raise RefusedError(
                f"LabelCorruption: the DataLoader drew {0 if step.indices is None else len(step.indices)} examples for a "
                f"batch with {len(labels)} labels: something dropped or repeated examples in between. Train on "
                f"`LabelCorruption(...).wrap(dataset)` instead."
            )
        return _replaced(batch, self.key, self.relabelled(labels, step.indices_on(labels.device)))

    def state_dict(self) -> dict[str, Any]:
        """Return the map of wrong labels."""
        offsets = self._offsets if self._restored is None else self._restored
        return {"version": 1, "offsets": None if offsets is None else offsets.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the map of wrong labels."""
        self._restored = state_dict["offsets"]

    def _labels(self, batch: Any) -> Tensor:
        try:
            labels = batch[self.key]
        except (KeyError, IndexError, TypeError) as error:
            found = f"the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise RefusedError(
                f"LabelCorruption finds labels in a batch by key={self.key!r}, but the batch has {found}. Give the `key` of "
                f"the labels."
            ) from error
        if self._checked:
            return labels
        _check_classes(labels, "batch")
        highest = int(labels.max()) if len(labels) else 0
        if highest >= self.classes:
            raise RefusedError(
                f"LabelCorruption draws labels from {self.classes} classes, but a batch has the label {highest}. Give the "
                f"right `num_classes`."
            )
        self._checked = True
        return labels

    def _number_of_classes(self, trainer: pl.Trainer, module: pl.LightningModule) -> int:
        if self.num_classes != "auto":
            return int(self.num_classes)
        for owner in (getattr(trainer, "datamodule", None), module):
            found = getattr(owner, "num_classes", None)
            if isinstance(found, int):
                return found
        names = getattr(self._dataset, "classes", None)
        return len(names) if names else int(labels_of(self._dataset, self.key).max()) + 1


class CorruptedDataset(Dataset[Any]):
    """A dataset some of whose labels are wrong.

    Args:
        dataset: The examples.
        key: Where the label is in an example.
        true_labels: `[N]`.
        targets: The labels that are shown `[N]`.
        is_corrupted: Mask `[N]` of the examples whose labels were redrawn.
    """

    def __init__(
        self, dataset: Dataset[Any], key: int | str, true_labels: Tensor, targets: Tensor, is_corrupted: Tensor
    ) -> None:
        self.dataset = dataset
        self.key = key
        self.true_labels = true_labels
        self.targets = targets
        self.is_corrupted = is_corrupted

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        label: Any = self.targets[index]
        return _replaced(item, self.key, label if isinstance(item[self.key], Tensor) else int(label))


def labels_of(dataset: Any, key: int | str = 1) -> Tensor:
    """Return the labels of a dataset `[N]`: from its attribute `targets` if it has one, else by reading every example.

    Raises:
        RefusedError: If they are no classes.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset, key)[torch.as_tensor(list(dataset.indices))]
    if isinstance(dataset, TensorDataset) and isinstance(key, int):
        found: Any = dataset.tensors[key]
    elif hasattr(dataset, "targets") and getattr(dataset, "target_transform", None) is None:
        found = dataset.targets
    else:
        found = [dataset[i][key] for i in range(len(dataset))]
    labels = torch.as_tensor(found)
    _check_classes(labels, "dataset")
    return labels


def _check_classes(labels: Any, where: str) -> None:
    if (
        not isinstance(labels, Tensor)
        or labels.ndim != 1
        or labels.dtype.is_floating_point
        or labels.dtype == torch.bool
    ):
        what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise RefusedError(
            f"LabelCorruption needs integer classes, one per example, but the labels of the {where} are {what}. Soft or "
            f"mixed labels, and those of positions, cannot be redrawn."
        )


def _replaced(item: Any, key: int | str, value: Any) -> Any:
    """Return a copy of an example or batch with one entry replaced."""
    if isinstance(item, Mapping):
        return {**item, key: value}
    values = list(item)
    values[int(key)] = value
    if isinstance(item, tuple):
        return type(item)(*values) if hasattr(item, "_fields") else tuple(values)
    return values
