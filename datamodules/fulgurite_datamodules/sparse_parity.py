# SPDX-License-Identifier: Apache-2.0
"""Barak, Edelman, Goel, Kakade, Malach, Zhang (2022), Hidden Progress in Deep Learning: sparse parities."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.errors import check_argument, check_choice, is_number
from fulgurite_datamodules.dataset import ArrayDataset, collate

Encoding = Literal["bits", "signs"]

_MOST_BITS = 62
"""Bits that a number of int64 holds."""


class SparseParity(pl.LightningDataModule):
    """Distinct random words of bits, labelled with the parity of a few of them; the others are noise.

    A part of the words is trained on, in one batch by default; validation and test are both the others. Words, the places
    of the relevant bits and the split depend on `seed` alone, and `setup` draws nothing from the global generators. A
    batch is `[inputs, targets]`.

    Args:
        relevant: Bits whose parity is the label, at least 1.
        noise: Bits that do not matter, at least 0; together there are at most 62.
        size: Number of words.
        train_fraction: Fraction of the words to train on, in (0, 1].
        encoding: `"bits"`: inputs of 0 and 1. `"signs"`: of -1 and 1.
        shuffle_places: Whether the relevant bits are in random places; else they are the first.
        batch_size: Training words per batch, drawn anew in every epoch; None for all of them, in their order.
        seed: Seed of words, places and split.

    Attributes:
        num_classes: 2.
        input_shape: `(relevant + noise,)`.
        words: All words `[size, relevant + noise]`, of 0 and 1, int64.
        places: The places of the relevant bits `[relevant]`.
        train_indices: Words of training `[n]`; `held_out_indices` are the others.
        train_dataset: The training examples; `val_dataset` and `test_dataset` are the held-out ones.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> data = SparseParity(relevant=2, noise=6, size=100)
        >>> data.setup()
        >>> len(data.train_dataset), len(data.val_dataset)
        (50, 50)
    """

    num_classes = 2
    _is_set_up = False

    def __init__(
        self,
        relevant: int = 3,
        noise: int = 40,
        size: int = 2000,
        train_fraction: float = 0.5,
        encoding: Encoding = "bits",
        shuffle_places: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        for name, value, lowest in (("relevant", relevant, 1), ("noise", noise, 0), ("size", size, 1)):
            check_argument(_is_count(value, lowest), name, owner, f"a whole number of at least {lowest}", value)
        bits = relevant + noise
        check_argument(bits <= _MOST_BITS, "noise", owner, f"at most {_MOST_BITS - relevant}", noise)
        check_argument(size <= 2**bits, "size", owner, f"at most {2**bits}, the number of words of {bits} bits", size)
        fraction = is_number(train_fraction) and 0 < train_fraction <= 1
        check_argument(fraction, "train_fraction", owner, "in (0, 1]", train_fraction)
        check_choice(encoding, get_args(Encoding), "encoding", owner)
        fits = batch_size is None or _is_count(batch_size, 1)
        check_argument(fits, "batch_size", owner, "a positive whole number or None", batch_size)
        self.relevant = relevant
        self.noise = noise
        self.size = size
        self.train_fraction = train_fraction
        self.encoding: Encoding = encoding
        self.shuffle_places = shuffle_places
        self.batch_size = batch_size
        self.seed = seed
        self.input_shape = (bits,)

    def setup(self, stage: str | None = None) -> None:
        """Draw words and split them; once, whatever the stage."""
        if self._is_set_up:
            return
        (bits,) = self.input_shape
        generator = torch.Generator().manual_seed(self.seed)
        numbers = _distinct(self.size, 2**bits, generator)
        self.words = (numbers.unsqueeze(1) >> torch.arange(bits)) & 1
        order = torch.randperm(bits, generator=generator) if self.shuffle_places else torch.arange(bits)
        self.places = order[: self.relevant]
        targets = self.words[:, self.places].sum(1) % 2
        inputs = self.words.float() if self.encoding == "bits" else 2.0 * self.words - 1.0
        split = max(1, round(self.train_fraction * self.size))
        self.train_indices, self.held_out_indices = torch.arange(split), torch.arange(split, self.size)
        self.train_dataset = ArrayDataset(inputs[:split], targets[:split])
        self.val_dataset = self.test_dataset = ArrayDataset(inputs[split:], targets[split:])
        self._is_set_up = True

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader; it shuffles if it has batches."""
        self.setup()
        size = self.batch_size or len(self.train_dataset)
        return DataLoader(self.train_dataset, size, shuffle=self.batch_size is not None, collate_fn=collate)

    def val_dataloader(self) -> Any:
        """Return the loader of the held-out words; if there are none an empty list, and Lightning does not validate."""
        self.setup()
        held_out = self.val_dataset
        return DataLoader(held_out, len(held_out), collate_fn=collate) if len(held_out) else []

    def test_dataloader(self) -> Any:
        """Return the loader of the held-out words; an empty list if there are none."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the loader of the held-out words; an empty list if there are none."""
        return self.val_dataloader()


def _distinct(count: int, below: int, generator: torch.Generator) -> Tensor:
    """Return distinct numbers `[count]` below a bound, in random order."""
    if below <= 4 * count:
        return torch.randperm(below, generator=generator)[:count]
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        drawn = torch.randint(below, (2 * count,), generator=generator)
        found = torch.cat([found, drawn]).unique()
    return found[torch.randperm(len(found), generator=generator)[:count]]


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest
