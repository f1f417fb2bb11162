# SPDX-License-Identifier: Apache-2.0
"""Label noise."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

NoiseKind = Literal["uniform", "symmetric", "pair", "permute"]


def flip_labels(
    targets: Tensor, num_classes: int, fraction: float, kind: NoiseKind, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Give a random fraction of the examples noisy labels.

    Equal generators make nested noise: what a smaller fraction changes, a larger one changes alike (of `"permute"`, the
    selection is nested).

    Args:
        targets: Classes `[N]`, in `0 ... num_classes - 1`.
        num_classes: Number of classes `C`, at least 2.
        fraction: Fraction of the examples to select, in [0, 1]; exactly `round(fraction * N)` are.
        kind: `"symmetric"`: a class drawn uniformly from the others. `"pair"`: the next class, `c + 1` modulo `C`.
            `"uniform"`: a class drawn uniformly from all, so that about one selected label in `C` stays right. `"permute"`:
            the labels of the selected examples change places among them, so that every class keeps its number of labels and
            some stay right.
        generator: The source of randomness.

    Returns:
        The labels after noise `[N]`, and a mask `[N]` of the examples that were selected.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> flip_labels(torch.tensor([0, 1, 2]), 3, 1.0, "pair", torch.Generator())[0]
        tensor([1, 2, 0])
    """
    check_noise("flip_labels", "fraction", fraction, "kind", kind)
    if num_classes < 2:
        raise ValueError(f"Expected `num_classes` of flip_labels to be at least 2, but got {num_classes}.")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"Expected `targets` of flip_labels to be in 0 ... {num_classes - 1}, but got values from "
            f"{int(targets.min())} to {int(targets.max())}."
        )
    n = len(targets)
    mask = torch.zeros(n, dtype=torch.bool)
    selected = torch.randperm(n, generator=generator)[: round(fraction * n)]
    mask[selected] = True
    if kind == "permute":
        noisy = targets.clone()
        noisy[selected] = targets[selected[torch.randperm(len(selected), generator=generator)]]
        return noisy, mask
    if kind == "pair":
        offset = torch.ones(n, dtype=targets.dtype)
    else:
        lowest = 1 if kind == "symmetric" else 0
        offset = torch.randint(lowest, num_classes, (n,), generator=generator, dtype=targets.dtype)
    return torch.where(mask, (targets + offset) % num_classes, targets), mask


def check_noise(owner: str, fraction_name: str, fraction: float, kind_name: str, kind: str) -> None:
    """Raise ValueError, in the argument names of `owner`, unless `fraction` is in [0, 1] and `kind` a kind of noise."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"Expected `{fraction_name}` of {owner} to be a fraction in [0, 1], but got {fraction!r}.")
    if kind not in get_args(NoiseKind):
        kinds = ", ".join(map(repr, get_args(NoiseKind)))
        raise ValueError(f"Expected `{kind_name}` of {owner} to be one of {kinds}, but got {kind!r}.")
