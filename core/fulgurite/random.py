# SPDX-License-Identifier: Apache-2.0
"""Random numbers that nobody else notices: the global generators saved and put back, and seeds made from counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """States of torch's generators."""

    cpu: Tensor
    cuda: tuple[torch.device, Tensor] | None


def get_random_state(device: torch.device) -> RandomState:
    """Return the state of the CPU generator and of the device's."""
    cuda = (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), cuda)


def set_random_state(state: RandomState) -> None:
    """Put a state back."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda[1], state.cuda[0])


@contextmanager
def replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Run a block from an earlier random state, and go on afterwards as if it had not run."""
    now = get_random_state(device)
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(now)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block from a seed, and go on afterwards as if it had not run."""
    now = get_random_state(device)
    torch.random.default_generator.manual_seed(seed)
    if now.cuda is not None:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(now)


def derived_seed(*numbers: int) -> int:
    """Return a seed that depends on all of the non-negative numbers, such as a user's seed, a rank and a counter.

    A generator that is seeded so for every draw has no state but the counter: a checkpoint is the same on all ranks, and a
    run that is resumed draws what it would have drawn.

    Example:
        >>> derived_seed(0, 1, 2) == derived_seed(0, 1, 2) != derived_seed(0, 2, 1)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
