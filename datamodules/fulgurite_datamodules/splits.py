# SPDX-License-Identifier: Apache-2.0
"""Stratified splits."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_order(targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order of the examples in which every slice has the class proportions of the whole.

    The `j`-th of the `n` shuffled examples of a class gets the rank `(j + 1/2) / n`, and examples are sorted by rank. When
    classes are about equally frequent, a prefix is within one example per class of exact proportions, and a slice within
    two. Cutting the order into slices makes a split; shorter prefixes are subsets of longer ones.

    Args:
        targets: Classes `[N]`.
        generator: The source of randomness.

    Returns:
        A permutation `[N]` of the indices.

    Example:
        >>> order = stratified_order(torch.tensor([0, 0, 0, 1, 1, 1]), torch.Generator().manual_seed(0))
        >>> sorted(torch.tensor([0, 0, 0, 1, 1, 1])[order[:2]].tolist())
        [0, 1]
    """
    shuffled = torch.randperm(len(targets), generator=generator)
    classes = targets[shuffled]
    rank = torch.empty(len(targets), dtype=torch.float64)
    for c in classes.unique():
        members = classes == c
        n = int(members.sum())
        rank[members] = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return shuffled[torch.argsort(rank, stable=True)]
