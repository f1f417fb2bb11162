# SPDX-License-Identifier: Apache-2.0
"""What a hyperparameter can act on: the protocol of targets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Generator, Tensor, nn

from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from fulgurite.losses import LossCall


@dataclass(frozen=True)
class Site:
    """Where a hyperparameter acts.

    Args:
        module: The model.
        conditioning: Where its present values stand.
        index: Its column among them.
        trainer: The trainer, if there is one.
    """

    module: nn.Module
    conditioning: Conditioning
    index: int
    trainer: pl.Trainer | None = None


class Target:
    """What a hyperparameter acts on.

    Values arrive detached, one per example. A target that acts on something that all examples have in common sets
    `needs_shared`, and reads the value of the first.
    """

    needs_shared: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    """The widest range that makes sense."""

    def expand(self, module: nn.Module) -> Sequence[tuple[str, Target]]:
        """Return the targets that this one stands for in a model, one hyperparameter each, with what tells them apart."""
        return [("", self)]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor, which are attributes of the same names."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and type(self) is type(other) and self.arguments() == other.arguments()

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments().items())})"

    def attach(self, site: Site) -> None:
        """Take hold of what it acts on."""

    def detach(self) -> None:
        """Let go of it, and leave it as it was."""


class InputTarget(Target):
    """A target that changes the inputs of the model in training."""

    def transform(self, x: Tensor, value: Tensor, generator: Generator) -> Tensor:
        """Return the changed inputs.

        Args:
            x: Inputs `[B, *]`, floating point.
            value: One value per example `[B]`.
            generator: Source of noise, on the device of `x`.
        """
        raise NotImplementedError


class LossTarget(Target):
    """A target that changes the call of the criterion in training."""

    def on_loss(self, call: LossCall, value: Tensor) -> LossCall:
        """Return the call to be made instead, for values `[B]` or `[1]`."""
        raise NotImplementedError


class PenaltyTarget(Target):
    """A target that adds a term to the training loss, weighted by a value that all examples share."""

    needs_shared = True
    bounds = (0.0, float("inf"))
    penalises: ClassVar[Literal["activations", "parameters"]]

    def penalty(self, value: Tensor) -> Tensor | None:
        """Return the term for the one value `[]`; None if there is nothing to penalise in this step."""
        raise NotImplementedError
