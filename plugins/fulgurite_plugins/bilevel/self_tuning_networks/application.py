# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters at work in somebody's training: what a step sees of them, whoever decides on their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from fulgurite import distributed
from fulgurite.errors import RefusedError
from fulgurite.losses import LossCall
from fulgurite.random import derived_seed
from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper, Knobs

Embed = Literal["unconstrained", "constrained"]
"""What enters the gates: hyperparameters on the whole real line, or as values in their ranges."""


class Application:
    """Applies values of hyperparameters, one row per example, to the inputs, the layers and the loss of a training step.

    All random numbers of a micro-batch are derived from the seed, the rank and the number of the micro-batch, so that a
    checkpoint holds one number, which is equal on all ranks.

    Args:
        hyperparameters: The hyperparameters.
        user: Who applies them, for messages.
        seed: The seed.
        embed: What enters the gates.

    Attributes:
        knobs: The hyperparameters in the model; `lay` makes them.
        conditioning: What the layers of the model read.
        trainer: The trainer, from `setup` for a training to its end.
        draws: Number of micro-batches so far.
    """

    def __init__(self, hyperparameters: Sequence[Hyper], user: str, seed: int, embed: Embed = "unconstrained") -> None:
        self.hyperparameters = list(hyperparameters)
        self.user = user
        self.seed = seed
        self.embed = embed
        self.conditioning = Conditioning()
        self.trainer: pl.Trainer | None = None
        self.draws = 0
        self._knobs: Knobs | None = None
        self.generators = Generators()

    @property
    def knobs(self) -> Knobs:
        """The hyperparameters, one for each column of values."""
        assert self._knobs is not None
        return self._knobs

    def find(self, module: pl.LightningModule) -> Knobs:
        """Return the hyperparameters of a model, which is not changed yet."""
        self._knobs = Knobs(self.hyperparameters, module)
        return self._knobs

    def attach(self, module: pl.LightningModule) -> None:
        """Take hold of what the hyperparameters act on, if it is to be trained."""
        if self.trainer is not None:
            self.knobs.attach(module, self.conditioning, self.trainer)

    def embedded(self, lam: Tensor) -> Tensor:
        """Return what enters the gates `[..., H]` for hyperparameters on the whole real line `[..., H]`."""
        return lam if self.embed == "unconstrained" else self.knobs.constrain(lam)

    def begin(self, batch: Any, h: Tensor | None, values: Tensor) -> Any:
        """Set what the layers see, and return the batch with its inputs transformed.

        Args:
            batch: The batch on its device.
            h: What enters the gates `[B, H]`, or None.
            values: The values in their ranges `[B, H]`.
        """
        self.conditioning.set(h, values, self.seed_of(1))
        if self.knobs.transforms_inputs:
            batch = with_inputs(
                batch,
                lambda x: self.knobs.transform(x, values, self.generators.seeded(x.device, self.seed_of(2))),
                self.user,
            )
        self.draws += 1
        return batch

    def on_loss(self, call: LossCall) -> LossCall:
        """Return the call of the criterion with the present values."""
        values = self.conditioning.values
        return call if values is None else self.knobs.on_loss(call, values)

    def penalties(self) -> dict[str, Tensor]:
        """Return the penalties with the present values, by name; the forward pass of the step is over."""
        values, knobs, found = self.conditioning.values, self.knobs, {}
        if values is not None and len(values):
            found = {**knobs.penalties(values, "activations"), **knobs.penalties(values, "parameters")}
        self.conditioning.seal()
        return {f"{name}_penalty": value for name, value in found.items()}

    def leave(self) -> None:
        """Let go of everything but the gates of the layers."""
        self.trainer = None
        self.conditioning.clear()
        if self._knobs is not None:
            self._knobs.detach()

    def within_ranges(self, offsets: Sequence[float]) -> list[float]:
        """Return the initial values plus offsets, kept within the ranges."""
        pairs = zip(self.knobs.hypers, offsets, strict=True)
        return [min(max(hyper.start + offset, hyper.range[0]), hyper.range[1]) for hyper, offset in pairs]

    def seed_of(self, stream: int) -> int:
        """Return the seed of one of the streams of random numbers of this micro-batch."""
        return derived_seed(self.seed, distributed.world()[0], self.draws, stream)


class Generators:
    """One generator per device, seeded anew for each use."""

    def __init__(self) -> None:
        self._made: dict[torch.device, torch.Generator] = {}

    def seeded(self, device: torch.device, seed: int) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self._made:
            self._made[device] = torch.Generator(device)
        return self._made[device].manual_seed(seed)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the generators out: they cannot be pickled, and hold nothing that lasts."""
        return {"_made": {}}


def tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch of nested lists, tuples and mappings, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors(value)


def batch_size(batch: Any, user: str) -> int:
    """Return the number of examples of a batch: the length of its first tensor that has one.

    Raises:
        RefusedError: If there is no such tensor.
    """
    for tensor in tensors(batch):
        if tensor.ndim > 0:
            return len(tensor)
    raise RefusedError(
        f"{user} gives each example of a batch hyperparameters of its own, and cannot tell how many there are: the batch, a "
        f"{type(batch).__name__}, holds no tensor with a dimension. Let the collate function make lists, tuples or "
        f"dictionaries of tensors."
    )


def with_inputs(batch: Any, transform: Callable[[Tensor], Tensor], user: str) -> Any:
    """Return a batch whose first floating-point tensor with more than one dimension is transformed.

    Raises:
        RefusedError: If there is no such tensor.
    """
    done = False

    def walk(part: Any) -> Any:
        nonlocal done
        if done:
            return part
        if isinstance(part, Tensor):
            if not part.is_floating_point() or part.ndim < 2:
                return part
            done = True
            return transform(part)
        if isinstance(part, Mapping):
            return type(part)({key: walk(value) for key, value in part.items()})  # type: ignore[call-arg]
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(walk, part))
        return type(part)(map(walk, part)) if isinstance(part, (list, tuple)) else part

    changed = walk(batch)
    if not done:
        raise RefusedError(
            f"{user} has hyperparameters that act on the inputs, but the batch, a {type(batch).__name__}, holds no "
            f"floating-point tensor [B, ...]. Remove them, or make the inputs floating-point tensors."
        )
    return changed
