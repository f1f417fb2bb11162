# SPDX-License-Identifier: Apache-2.0
"""Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits: the part that ships with scikit-learn."""

from __future__ import annotations

import torch

from fulgurite_datamodules.base import ClassificationDataModule, Source
from fulgurite_datamodules.noise import NoiseKind


class Digits(ClassificationDataModule):
    """1797 handwritten digits of 43 people: 10 classes, inputs `[1, 8, 8]`; by default 1200 train, 200 validate, 397 test.

    Splits are stratified and the same in every run. Inputs are standardised with mean and standard deviation of the
    training examples. Attributes after `setup` are those of `ClassificationDataModule`.

    Args:
        train_size: Number of training examples, a stratified part of those that validation and test leave; None for all.
        val_size: Number of validation examples; 0 for no validation.
        test_size: Number of test examples; 0 for no test.
        split_seed: Seed of the split; independent of the seed of training.
        label_noise: Fraction of the training labels that get noise, in [0, 1]; exactly the rounded number is selected. The
            clean labels stay in `train_clean_targets`, the mask of the selected ones in `train_noisy`.
        noise_kind: `"symmetric"`: a class drawn from the others. `"pair"`: the next class. `"uniform"`: a class drawn from
            all, so that some labels stay right. `"permute"`: the selected labels change places, so that some stay right.
        noise_seed: Seed of the noise.
        batch_size: Examples per batch.
        num_workers: Processes that load data; 0 for none.
        drop_last: Whether training leaves out a last batch that is not full.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> data = Digits(val_size=0, test_size=997, label_noise=0.4, noise_kind="uniform")
        >>> data.setup()
        >>> len(data.train_targets), int(data.train_noisy.sum())
        (800, 320)
    """

    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(
        self,
        train_size: int | None = None,
        val_size: int = 200,
        test_size: int = 397,
        split_seed: int = 0,
        label_noise: float = 0.0,
        noise_kind: NoiseKind = "symmetric",
        noise_seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            split_seed=split_seed,
            label_noise=label_noise,
            noise_kind=noise_kind,
            noise_seed=noise_seed,
            batch_size=batch_size,
            num_workers=num_workers,
            drop_last=drop_last,
        )

    def read(self) -> Source:
        """Return the images `[1797, 1, 8, 8]`, values 0 to 16, and their classes."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        return Source(torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target).long())
