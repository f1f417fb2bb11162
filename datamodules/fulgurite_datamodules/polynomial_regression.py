# SPDX-License-Identifier: Apache-2.0
"""Regression on Gaussian inputs: a polynomial of one direction (Kumar et al., 2024), or what a random network gives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fulgurite.errors import check_argument, check_choice, is_number
from fulgurite_datamodules.dataset import ArrayDataset, collate

_EVALUATED_AT_ONCE = 16_384
"""Held-out examples in a batch of validation and test."""


class _GaussianRegression(pl.LightningDataModule, ABC):
    """Inputs from $N(0, I_D / D)$ with targets `[N, 1]`; validation and test are the same held-out examples."""

    _is_set_up = False

    def __init__(
        self,
        dim: int,
        train_size: int,
        test_size: int,
        noise_std: float,
        batch_size: int | None,
        repeats: int,
        seed: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for key, value, lowest in (("dim", dim, 1), ("train_size", train_size, 1), ("test_size", test_size, 0)):
            check_argument(_is_count(value, lowest), key, name, f"a whole number of at least {lowest}", value)
        good = is_number(noise_std) and noise_std >= 0
        check_argument(good, "noise_std", name, "a number of at least 0", noise_std)
        good = batch_size is None or _is_count(batch_size, 1)
        check_argument(good, "batch_size", name, "a positive whole number or None", batch_size)
        check_argument(_is_count(repeats, 1), "repeats", name, "a positive whole number", repeats)
        self.dim = dim
        self.train_size = train_size
        self.test_size = test_size
        self.noise_std = noise_std
        self.batch_size = batch_size
        self.repeats = repeats
        self.seed = seed
        self.input_shape = (dim,)

    @abstractmethod
    def make_target(self, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Draw what the target needs, and return a function from inputs `[N, D]` to targets `[N]`."""

    def setup(self, stage: str | None = None) -> None:
        """Draw the target and the examples; once, whatever the stage."""
        if self._is_set_up:
            return
        generator = torch.Generator().manual_seed(self.seed)
        target = self.make_target(generator)
        inputs = torch.randn(self.train_size + self.test_size, self.dim, generator=generator) / math.sqrt(self.dim)
        clean = target(inputs).unsqueeze(1)
        noise = self.noise_std * torch.randn(self.train_size, 1, generator=generator)
        self.train_clean_targets = clean[: self.train_size]
        self.train_dataset = ArrayDataset(inputs[: self.train_size], self.train_clean_targets + noise)
        self.test_dataset = ArrayDataset(inputs[self.train_size :], clean[self.train_size :])
        self._is_set_up = True

    def train_dataloader(self) -> Any:
        """Return the training loader; without `batch_size`, of one batch, in its order."""
        self.setup()
        size = self.batch_size or self.train_size
        order = _Repeated(self.train_size, self.repeats, shuffle=self.batch_size is not None)
        return DataLoader(self.train_dataset, size, sampler=order, collate_fn=collate)

    def val_dataloader(self) -> Any:
        """Return the loader of the held-out examples; an empty list if there are none."""
        self.setup()
        if not self.test_size:
            return []
        return DataLoader(self.test_dataset, min(self.test_size, _EVALUATED_AT_ONCE), collate_fn=collate)

    def test_dataloader(self) -> Any:
        """Return the loader of the held-out examples; an empty list if there are none."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the loader of the held-out examples; an empty list if there are none."""
        return self.val_dataloader()


class PolynomialRegression(_GaussianRegression):
    r"""Targets $y = (\beta \cdot x)^k / k! + $ noise of Gaussian inputs, $x \sim N(0, I_D / D)$, with $|\beta|^2 = D$.

    Held-out targets have no noise; validation and test are the same examples. Everything depends on `seed` alone, and
    `setup` draws nothing from the global generators. A batch is `[inputs, targets]`, `[B, D]` and `[B, 1]`.

    Args:
        dim: Dimension $D$ of the inputs.
        train_size: Training examples.
        test_size: Held-out examples; 0 for none.
        degree: Degree $k$ of the polynomial.
        direction: `"axis"`: $\beta$ lies along the first axis. `"random"`: it is drawn.
        noise_std: Standard deviation of the noise of training targets.
        batch_size: Training examples per batch, drawn anew in every epoch; None for all, in their order.
        repeats: How often an epoch goes through the training examples. An epoch of one full batch costs more to begin and
            end than to compute.
        seed: Seed of direction, inputs and noise.

    Attributes:
        input_shape: `(dim,)`, known before `setup`.
        beta: The direction $\beta$, `[D]`.
        train_dataset: The training examples; `test_dataset` are the held-out ones.
        train_clean_targets: Training targets without noise, `[train_size, 1]`.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> data = PolynomialRegression(dim=4, train_size=6, test_size=3)
        >>> data.setup()
        >>> inputs, targets = data.train_dataset.inputs, data.train_dataset.targets
        >>> torch.allclose(targets[:, 0], 2 * inputs[:, 0] ** 2)
        True
    """

    def __init__(
        self,
        dim: int = 25,
        train_size: int = 150,
        test_size: int = 1000,
        degree: int = 2,
        direction: Literal["axis", "random"] = "axis",
        noise_std: float = 0.0,
        batch_size: int | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, train_size, test_size, noise_std, batch_size, repeats, seed)
        check_argument(_is_count(degree, 1), "degree", "PolynomialRegression", "a positive whole number", degree)
        check_choice(direction, ("axis", "random"), "direction", "PolynomialRegression")
        self.degree = degree
        self.direction = direction

    def make_target(self, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Draw the direction, and return the polynomial."""
        drawn = torch.randn(self.dim, generator=generator)
        beta = drawn if self.direction == "random" else torch.eye(self.dim)[0]
        self.beta = beta * (math.sqrt(self.dim) / beta.norm())
        return lambda x: (x @ self.beta) ** self.degree / math.factorial(self.degree)


class TeacherStudent(_GaussianRegression):
    r"""Targets that a random network gives, $y = \frac{1}{\sqrt K} \sum_k a_k \tanh(v_k \cdot x) + $ noise.

    Inputs are $x \sim N(0, I_D / D)$, the teacher's weights $v_k \sim N(0, I_D)$ and $a_k \sim N(0, 1)$. The rest is as in
    `PolynomialRegression`.

    Args:
        dim: Dimension $D$ of the inputs.
        train_size: Training examples.
        test_size: Held-out examples; 0 for none.
        width: Hidden units $K$ of the teacher.
        noise_std: Standard deviation of the noise of training targets.
        batch_size: Training examples per batch, drawn anew in every epoch; None for all, in their order.
        repeats: How often an epoch goes through the training examples.
        seed: Seed of teacher, inputs and noise.

    Attributes:
        input_shape: `(dim,)`, known before `setup`.
        hidden: The teacher's first layer `[K, D]`; `readout` is the second, `[K]`.
        train_dataset: The training examples; `test_dataset` are the held-out ones.
        train_clean_targets: Training targets without noise, `[train_size, 1]`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        dim: int = 25,
        train_size: int = 150,
        test_size: int = 1000,
        width: int = 5,
        noise_std: float = 0.0,
        batch_size: int | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, train_size, test_size, noise_std, batch_size, repeats, seed)
        check_argument(_is_count(width, 1), "width", "TeacherStudent", "a positive whole number", width)
        self.width = width

    def make_target(self, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Draw the teacher, and return it."""
        self.hidden = torch.randn(self.width, self.dim, generator=generator)
        self.readout = torch.randn(self.width, generator=generator)
        return lambda x: torch.tanh(x @ self.hidden.mT) @ self.readout / math.sqrt(self.width)


class _Repeated(Sampler[int]):
    """Every example `repeats` times per epoch: the whole order, then the next."""

    def __init__(self, size: int, repeats: int, shuffle: bool) -> None:
        self.size = size
        self.repeats = repeats
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.repeats):
            yield from torch.randperm(self.size).tolist() if self.shuffle else range(self.size)

    def __len__(self) -> int:
        return self.size * self.repeats


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest
