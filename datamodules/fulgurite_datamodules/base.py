# SPDX-License-Identifier: Apache-2.0
"""What the datamodules have in common: splits, label noise, standardisation and loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite_datamodules.dataset import ArrayDataset, channel_statistics, collate, standardize
from fulgurite_datamodules.noise import NoiseKind, check_noise, flip_labels
from fulgurite_datamodules.splits import stratified_order


class Source(NamedTuple):
    """Everything that a data set has.

    Attributes:
        inputs: Raw inputs `[N, C, ...]`.
        targets: Classes `[N]`, int64.
        test: Indices of the published test set; None if there is none, so that it is split off here.
    """

    inputs: Tensor
    targets: Tensor
    test: Tensor | None = None


class ClassificationDataModule(pl.LightningDataModule, ABC):
    """Labelled data in memory, split, with noisy training labels if asked for, standardised by the training examples.

    Splits and noise depend on their own seeds only: they are the same in every run and on every rank, and `setup` draws
    nothing from the global generators. A batch is `[inputs, targets]`.

    Args:
        train_size: Number of training examples, a stratified part of those that validation and test leave; None for all.
        val_size: Number of validation examples; 0 for none.
        test_size: Number of test examples; 0 for none. None if the test set is a published one.
        split_seed: Seed of the split.
        label_noise: Fraction of the training labels that get noise.
        noise_kind: See `flip_labels`.
        noise_seed: Seed of the noise.
        batch_size: Examples per batch.
        num_workers: Processes that load data; 0 for none.
        drop_last: Whether training leaves out a last batch that is not full.

    Attributes:
        num_classes: Number of classes, known before `setup`.
        input_shape: Shape of one input, known before `setup`.
        train_indices: Position of each training example in the whole data set `[n]`; `val_indices`, `test_indices` alike.
        train_targets: The labels of training `[n]`, with noise.
        train_clean_targets: The labels before noise `[n]`.
        train_noisy: Mask `[n]` of the examples that the noise selected.
        train_dataset: The training examples; `val_dataset` and `test_dataset` alike.
        mean: Mean per channel `[C]` of the raw training inputs; `std` is the standard deviation.

    Raises:
        ValueError: If an argument is outside its range.
    """

    num_classes: ClassVar[int]
    input_shape: ClassVar[tuple[int, ...]]

    _is_set_up = False

    def __init__(
        self,
        *,
        train_size: int | None,
        val_size: int,
        test_size: int | None,
        split_seed: int,
        label_noise: float,
        noise_kind: NoiseKind,
        noise_seed: int,
        batch_size: int,
        num_workers: int,
        drop_last: bool,
    ) -> None:
        super().__init__()
        self._check_count("train_size", train_size, 1, optional=True)
        self._check_count("val_size", val_size, 0)
        self._check_count("test_size", test_size, 0, optional=True)
        self._check_count("batch_size", batch_size, 1)
        self._check_count("num_workers", num_workers, 0)
        check_noise(type(self).__name__, "label_noise", label_noise, "noise_kind", noise_kind)
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.label_noise = label_noise
        self.noise_kind: NoiseKind = noise_kind
        self.noise_seed = noise_seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.drop_last = drop_last

    @abstractmethod
    def read(self) -> Source:
        """Return all the data, raw."""

    def make_dataset(self, inputs: Tensor, targets: Tensor, train: bool) -> ArrayDataset:
        """Return the dataset of one part of the split, once `mean` and `std` are known."""
        return ArrayDataset(standardize(inputs, self.mean, self.std), targets)

    def setup(self, stage: str | None = None) -> None:
        """Read, split, add noise and standardise; once, whatever the stage.

        Raises:
            ValueError: If the data are too few for the sizes that were asked for.
        """
        if self._is_set_up:
            return
        source = self.read()
        self.train_indices, self.val_indices, self.test_indices = self._split(source)
        inputs, targets = source.inputs[self.train_indices], source.targets[self.train_indices]
        self.mean, self.std = channel_statistics(inputs)
        self.train_clean_targets = targets
        self.train_targets, self.train_noisy = flip_labels(
            targets,
            self.num_classes,
            self.label_noise,
            self.noise_kind,
            torch.Generator().manual_seed(self.noise_seed),
        )
        self.train_dataset = self.make_dataset(inputs, self.train_targets, train=True)
        self.val_dataset, self.test_dataset = (
            self.make_dataset(source.inputs[part], source.targets[part], train=False)
            for part in (self.val_indices, self.test_indices)
        )
        self._is_set_up = True

    def train_dataloader(self) -> Any:
        """Return the shuffled training loader."""
        return self._loader("train_dataset", shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> Any:
        """Return the validation loader; an empty list, with which Lightning does not validate, if there are no examples."""
        return self._loader("val_dataset")

    def test_dataloader(self) -> Any:
        """Return the test loader; an empty list if there are no examples."""
        return self._loader("test_dataset")

    def predict_dataloader(self) -> Any:
        """Return the test loader."""
        return self.test_dataloader()

    def _loader(self, dataset_name: str, **kwargs: Any) -> Any:
        self.setup()
        dataset = getattr(self, dataset_name)
        if not len(dataset):
            return []
        return DataLoader(dataset, self.batch_size, num_workers=self.num_workers, collate_fn=collate, **kwargs)

    def _split(self, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.split_seed)
        if source.test is None:
            order = stratified_order(source.targets, generator)
            test, order = order[: self.test_size], order[self.test_size :]
        else:
            test = source.test
            others = torch.ones(len(source.targets), dtype=torch.bool)
            others[test] = False
            order = others.nonzero().squeeze(1)
            order = order[stratified_order(source.targets[order], generator)]
        val, train = order[: self.val_size], order[self.val_size :]
        name, total = type(self).__name__, len(source.targets)
        if len(train) == 0:
            raise ValueError(
                f"Expected `val_size` and the size of the test set of {name} to leave training examples of its {total}, "
                f"but got val_size={self.val_size} and {self.test_size if source.test is None else len(test)} for the test."
            )
        if self.train_size is not None and self.train_size > len(train):
            raise ValueError(
                f"Expected `train_size` of {name} to be at most {len(train)}, which is what {len(val)} validation and "
                f"{len(test)} test examples leave of {total}, but got {self.train_size}."
            )
        train = train[: self.train_size]
        if self.drop_last and len(train) < self.batch_size:
            raise ValueError(
                f"Expected `batch_size` of {name} to be at most {len(train)}, the number of training examples, when "
                f"drop_last=True leaves out what does not fill a batch, but got {self.batch_size}."
            )
        return train, val, test

    def _check_count(self, name: str, value: Any, lowest: int, optional: bool = False) -> None:
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(
                f"Expected `{name}` of {type(self).__name__} to be a whole number of at least {lowest}"
                f"{' or None' if optional else ''}, but got {value!r}."
            )
