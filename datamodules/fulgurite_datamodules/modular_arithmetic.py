# SPDX-License-Identifier: Apache-2.0
"""Power, Burda, Edwards, Babuschkin, Misra (2022), Grokking: the tables of binary operations on integers modulo p."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.errors import check_argument, check_choice, is_number
from fulgurite_datamodules.dataset import ArrayDataset, collate
from fulgurite_datamodules.noise import flip_labels

Operation = Literal["add", "subtract", "multiply", "linear", "squares"]
Encoding = Literal["onehot", "binary", "tokens"]

_EVALUATED_AT_ONCE = 16_384
"""Held-out pairs in a batch of validation and test."""


class ModularArithmetic(pl.LightningDataModule):
    """All `p^2` ordered pairs `(m, n)` of integers modulo `p`, labelled with the result of an operation on them.

    A part of the pairs is trained on, in one batch by default; validation and test are both the others, all of them, whose
    labels are always right. Which pairs are trained on, and which labels are wrong, depends on the seeds here alone, and
    `setup` draws nothing from the global generators. A smaller `train_fraction` gives a part of the pairs of a larger one. A
    batch is `[inputs, targets]`.

    Args:
        modulus: The modulus `p`, at least 2; also the number of classes.
        operation: `"add"`: m + n. `"subtract"`: m - n. `"multiply"`: m n. `"linear"`: a m + b n with `coefficients`.
            `"squares"`: m^2 + n^2. All modulo `p`.
        train_fraction: Fraction of the pairs to train on, in (0, 1]; exactly `floor(train_fraction * p^2)` are.
        corrupted_fraction: Fraction of the training labels to be redrawn, in [0, 1]; exactly `floor(fraction * n)` are.
        exclude_true_label: Whether a redrawn label is drawn from the wrong classes only; else from all, so that about one
            in `p` stays right.
        encoding: `"onehot"`: both numbers one-hot, joined, float `[2 p]`. `"binary"`: the `bits` digits of both in base 2, 0
            or 1, the highest first, joined, float `[2 bits]`. `"tokens"`: the two numbers, int64 `[2]`.
        batch_size: Training pairs per batch, drawn anew in every epoch; None for all of them, in their order.
        coefficients: `(a, b)` of `"linear"`.
        pair_seed: Seed of the split.
        noise_seed: Seed of the corrupted labels.
        drop_last: Whether training leaves out a last batch that is not full.
        exclude_zero: Whether pairs with a 0 are left out; `(p - 1)^2` pairs of 1 to `p - 1` are left then, and the fractions
            are of these.

    Attributes:
        num_classes: `p`, known before `setup`.
        input_shape: Shape of one input, known before `setup`.
        bits: `ceil(log2 p)`, the binary digits of a number.
        pairs: All pairs `[p^2, 2]`, in lexicographic order: pair `(m, n)` is in row `m p + n`, unless zeros are left out.
        train_indices: Rows of the pairs of training `[n]`; `held_out_indices` are the others.
        train_targets: The labels of training `[n]`, with the corrupted ones.
        train_clean_targets: The results of the operation `[n]`.
        train_noisy: Mask `[n]` of the labels that were redrawn.
        train_dataset: The training examples; `val_dataset` and `test_dataset` are the held-out ones.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> data = ModularArithmetic(modulus=5, train_fraction=0.8, encoding="tokens")
        >>> data.setup()
        >>> len(data.train_dataset), len(data.val_dataset)
        (20, 5)
    """

    _is_set_up = False

    def __init__(
        self,
        modulus: int = 97,
        operation: Operation = "add",
        train_fraction: float = 0.5,
        corrupted_fraction: float = 0.0,
        exclude_true_label: bool = False,
        encoding: Encoding = "onehot",
        batch_size: int | None = None,
        coefficients: tuple[int, int] = (1, 1),
        pair_seed: int = 0,
        noise_seed: int = 0,
        drop_last: bool = False,
        exclude_zero: bool = False,
    ) -> None:
        super().__init__()
        self._check("modulus", modulus, "a whole number of at least 2", _is_count(modulus, 2))
        check_choice(operation, get_args(Operation), "operation", type(self).__name__)
        check_choice(encoding, get_args(Encoding), "encoding", type(self).__name__)
        self._check(
            "batch_size", batch_size, "a positive whole number or None", batch_size is None or _is_count(batch_size, 1)
        )
        self._check("coefficients", coefficients, "two whole numbers", _are_two(coefficients))
        self._check(
            "train_fraction", train_fraction, "in (0, 1]", is_number(train_fraction) and 0 < train_fraction <= 1
        )
        self._check(
            "corrupted_fraction",
            corrupted_fraction,
            "in [0, 1]",
            is_number(corrupted_fraction) and 0 <= corrupted_fraction <= 1,
        )
        self._check("exclude_zero", exclude_zero, "True or False", isinstance(exclude_zero, bool))
        size = (modulus - exclude_zero) ** 2
        train_size = _floor(train_fraction * size)
        self._check("train_fraction", train_fraction, f"at least 1 / {size}, one pair", train_size > 0)
        self._check(
            "batch_size",
            batch_size,
            f"at most {train_size}, the number of training pairs, when drop_last=True leaves out what does not fill a batch",
            not drop_last or batch_size is None or batch_size <= train_size,
        )
        self.modulus = self.num_classes = modulus
        self.operation: Operation = operation
        self.train_fraction = train_fraction
        self.corrupted_fraction = corrupted_fraction
        self.exclude_true_label = exclude_true_label
        self.encoding: Encoding = encoding
        self.batch_size = batch_size
        self.coefficients = coefficients
        self.pair_seed = pair_seed
        self.noise_seed = noise_seed
        self.drop_last = drop_last
        self.exclude_zero = exclude_zero
        self.bits = (modulus - 1).bit_length()
        self.input_shape = ({"onehot": 2 * modulus, "binary": 2 * self.bits, "tokens": 2}[encoding],)
        self._train_size = train_size

    def setup(self, stage: str | None = None) -> None:
        """Make the table, split it and corrupt labels; once, whatever the stage."""
        if self._is_set_up:
            return
        numbers = torch.arange(int(self.exclude_zero), self.modulus)
        self.pairs = torch.cartesian_prod(numbers, numbers)
        targets = self._results(*self.pairs.unbind(1))
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.pair_seed))
        self.train_indices, self.held_out_indices = order[: self._train_size], order[self._train_size :]
        self.train_clean_targets = targets[self.train_indices]
        self.train_targets, self.train_noisy = flip_labels(
            self.train_clean_targets,
            self.modulus,
            _floor(self.corrupted_fraction * self._train_size) / self._train_size,
            "symmetric" if self.exclude_true_label else "uniform",
            torch.Generator().manual_seed(self.noise_seed),
        )
        self.train_dataset = self._dataset(self.train_indices, self.train_targets)
        self.val_dataset = self.test_dataset = self._dataset(self.held_out_indices, targets[self.held_out_indices])
        self._is_set_up = True

    @property
    def true_labels(self) -> Tensor:
        """The results of the operation for the training pairs `[n]`, as `LabelCorruption` calls them."""
        self.setup()
        return self.train_clean_targets

    @property
    def is_corrupted(self) -> Tensor:
        """Mask `[n]` of the training labels that were redrawn, as `LabelCorruption` calls it."""
        self.setup()
        return self.train_noisy

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader; it shuffles if it has batches."""
        self.setup()
        return DataLoader(
            self.train_dataset,
            self.batch_size or self._train_size,
            shuffle=self.batch_size is not None,
            drop_last=self.drop_last and self.batch_size is not None,
            collate_fn=collate,
        )

    def val_dataloader(self) -> Any:
        """Return the loader of the held-out pairs; if there are none an empty list, and Lightning does not validate."""
        self.setup()
        held_out = self.val_dataset
        return DataLoader(held_out, _EVALUATED_AT_ONCE, collate_fn=collate) if len(held_out) else []

    def test_dataloader(self) -> Any:
        """Return the loader of the held-out pairs; an empty list if there are none."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the loader of the held-out pairs; an empty list if there are none."""
        return self.val_dataloader()

    def one_hot(self, tokens: Tensor) -> Tensor:
        """Return pairs `[B, 2]` as float `[B, 2 p]`: number `m` sets column `m`, number `n` column `p + n`."""
        columns = tokens + torch.tensor([0, self.modulus])
        return torch.zeros(len(tokens), 2 * self.modulus).scatter_(1, columns, 1.0)

    def binary(self, tokens: Tensor) -> Tensor:
        """Return pairs `[B, 2]` as float `[B, 2 bits]`: the digits of `m` in base 2, highest first, then those of `n`."""
        places = torch.arange(self.bits - 1, -1, -1)
        return ((tokens.unsqueeze(2) >> places) & 1).flatten(1).float()

    def _dataset(self, rows: Tensor, targets: Tensor) -> ArrayDataset:
        """Keep tokens, and make the vectors of a batch when it is read: that is as quick as copying them."""
        transform = {"onehot": self.one_hot, "binary": self.binary, "tokens": None}[self.encoding]
        return ArrayDataset(self.pairs[rows], targets, transform)

    def _results(self, m: Tensor, n: Tensor) -> Tensor:
        a, b = self.coefficients
        results: dict[Operation, Tensor] = {
            "add": m + n,
            "subtract": m - n,
            "multiply": m * n,
            "linear": a * m + b * n,
            "squares": m * m + n * n,
        }
        return results[self.operation] % self.modulus

    def _check(self, name: str, value: Any, expected: str, fits: bool) -> None:
        check_argument(fits, name, type(self).__name__, expected, value)


def _floor(number: float) -> int:
    """Return the whole part, also of a product of a fraction such as 0.29 * 100 that rounding puts below 29."""
    return math.floor(number + 1e-9)


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _are_two(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(number, int) for number in value)
