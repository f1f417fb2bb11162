# SPDX-License-Identifier: Apache-2.0
"""The state of the global random number generators, saved and put back around work that must not be noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

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
