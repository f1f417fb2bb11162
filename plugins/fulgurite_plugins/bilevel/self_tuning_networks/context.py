# SPDX-License-Identifier: Apache-2.0
"""How the hyperparameters of the present step reach the layers that depend on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fulgurite.errors import RefusedError

_MASK = 2**64 - 1


class Conditioning:
    """The hyperparameters that the layers of one model see, held by reference by all of them.

    Nothing goes through the arguments of `forward`. What is `set` for a step stays in force until it is cleared, so that
    activation checkpointing, which runs parts of the forward pass again during backward, sees the same values and, through
    `uniform`, the same noise. A deep copy of a model follows the hyperparameters of the original; a pickle keeps what was
    laid to rest.

    Attributes:
        h: What enters the gates: `[B, H]`, one row per example; `[H]` or `[1, H]` for all alike; None leaves the
            elementary weights alone.
        values: Values of the hyperparameters in their ranges, detached: `[B, H]`, `[H]` or `[1, H]`; None for none.
    """

    def __init__(self) -> None:
        self.h: Tensor | None = None
        self.values: Tensor | None = None
        self._resting: Tensor | None = None
        self._seed = 0
        self._sealed = False
        self._calls: dict[int, int] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def set(self, h: Tensor | None = None, values: Tensor | None = None, seed: int = 0) -> None:
        """Set what a step sees.

        Args:
            h: What enters the gates, see `h`.
            values: Values in their ranges, see `values`.
            seed: What all noise of the step is derived from.
        """
        self.h, self.values, self._seed = h, None if values is None else values.detach(), seed
        self._sealed = False
        self._calls.clear()

    def seal(self) -> None:
        """Say that the forward pass of the step is over: what layers return from now on counts no more."""
        self._sealed = True

    def clear(self) -> None:
        """Forget the step: layers see what rests."""
        self.set(self._resting)

    def rest(self, h: Tensor | None) -> None:
        """Lay down what layers see outside training steps: the unperturbed hyperparameters `[H]`, or None."""
        self._resting = None if h is None else h.detach()
        self.clear()

    def column(self, index: int) -> Tensor | None:
        """Return the present values of one hyperparameter, `[B]` or `[1]`; None outside a step."""
        return None if self.values is None else self.values[..., index].reshape(-1)

    @property
    def counts(self) -> bool:
        """Whether a call of a layer belongs to the forward pass of a step, and is no recomputation."""
        return self.values is not None and not self._sealed and not _in_backward()

    @torch.compiler.disable  # private generators and the table below are no part of a graph
    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return noise in [0, 1) for one call of a layer: new in every call, the same when the call is recomputed.

        The noise follows from the seed of the step and the number of the call, never from the global random state, so that
        it is resumed exactly. But a recomputation must find the number of its call again, and of all random states torch's
        checkpointing puts back the global ones only: a number drawn from the global generator of the CPU is therefore the
        key under which the number of the call is kept.

        Raises:
            RefusedError: If a recomputation does not restore the random state.
        """
        key = int(torch.randint(0, 2**63 - 1, ()))
        call = self._calls.get(key)
        if call is None:
            if _in_backward():
                raise RefusedError(
                    "A layer with dropout was run again during the backward pass, but not from the random state of the "
                    "forward pass, so that its mask would be another. Use torch.utils.checkpoint with "
                    "preserve_rng_state=True."
                )
            call = self._calls[key] = len(self._calls)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        generator = self._generators[device].manual_seed(_mixed(self._seed, call))
        return torch.rand(shape, generator=generator, device=device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Conditioning:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"resting": None if self._resting is None else self._resting.cpu()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.rest(state["resting"])


def _in_backward() -> bool:
    """Return whether autograd is running, and a call can only be a recomputation; torch's checkpointing asks this way."""
    return torch._C._current_graph_task_id() != -1


def _mixed(seed: int, call: int) -> int:
    """Return a seed for one call: splitmix64, so that neighbouring numbers give unrelated streams."""
    z = (seed + (call + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1
