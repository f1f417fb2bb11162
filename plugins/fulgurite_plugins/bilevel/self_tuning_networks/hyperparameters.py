# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters as users declare them, and all of a run together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import register_type
from torch import Generator, Tensor, nn

from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.description import build_target, describe_target
from fulgurite_plugins.bilevel.self_tuning_networks.functional import RangeMap
from fulgurite_plugins.bilevel.self_tuning_networks.targets import (
    Cutout,
    InputFunction,
    InputTarget,
    LossTarget,
    PenaltyTarget,
    Site,
    Target,
    WeightDecay,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from fulgurite.losses import LossCall


@dataclass
class Hyper:
    """A hyperparameter to be tuned.

    Args:
        name: What it is called in logs and files.
        target: What it acts on: a target such as `Dropout("net.*")`, or a function `(x [B, *], value [B]) -> x` of the
            inputs.
        init: The value at the start, inside the range.
        range: The ends of the open range that it may take; infinite ones too.
        discrete: Whether its value is rounded down to a whole number. A start at `n` is a start in the middle of
            `[n, n + 1)`.
        shared: Whether all examples of a batch share one draw; None for what the target needs.
        scale: The scale of its perturbation at the start, on the unconstrained scale; positive.

    Raises:
        ValueError: If an argument is outside its range, or does not fit the target.

    Example:
        >>> from fulgurite_plugins.bilevel.self_tuning_networks.targets import Dropout
        >>> Hyper("rate", Dropout(), init=0.05).range
        (0.0, 0.9)
    """

    name: str
    target: Target | Callable[[Tensor, Tensor], Tensor]
    init: float
    range: tuple[float, float] = (0.0, 0.9)
    discrete: bool = False
    shared: bool | None = None
    scale: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.target, Target):
            if not callable(self.target):
                raise self._wrong("target", "a target or a function (x, value) -> x", self.target)
            self.target = InputFunction(self.target)
        low, high = self.range
        if not low < high:
            raise self._wrong("range", "a lower and a higher end", self.range)
        least, most = self.target.bounds
        if low < least or high > most:
            raise self._wrong("range", f"within ({least:g}, {most:g}), as {_kind(self.target)} needs it", self.range)
        if self.discrete and math.isfinite(low) and not math.ceil(low) < high:
            raise self._wrong("range", "one with a whole number inside, as it is discrete", self.range)
        if self.discrete and self.init != math.floor(self.init):
            raise self._wrong("init", "a whole number, as it is discrete", self.init)
        if not low < self.start < high:
            raise self._wrong("init", f"strictly inside its range ({low:g}, {high:g})", self.init)
        if not (math.isfinite(self.scale) and self.scale > 0.0):
            raise self._wrong("scale", "positive", self.scale)
        if self.shared is False and self.target.needs_shared:
            raise self._wrong(
                "shared", f"True, since all examples of a batch have what {_kind(self.target)} acts on in common", False
            )

    @property
    def start(self) -> float:
        """The value that the start stands for before it is rounded down."""
        return self.init + 0.5 if self.discrete else self.init

    @property
    def is_shared(self) -> bool:
        """Whether all examples of a batch share one draw."""
        return _target(self).needs_shared if self.shared is None else self.shared

    def as_dict(self) -> dict[str, Any]:
        """Return the declaration as plain data, as a configuration file spells it."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "range": list(self.range), "target": describe_target(_target(self))}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Hyper:
        """Return the hyperparameter that plain data describe.

        Raises:
            ValueError: If its target cannot be made, or an argument is outside its range.
        """
        plain = {**description, "target": build_target(description["target"])}
        if "range" in plain:
            plain["range"] = tuple(plain["range"])
        return cls(**plain)

    def _wrong(self, argument: str, expected: str, found: object) -> ValueError:
        return ValueError(f"Expected `{argument}` of Hyper {self.name!r} to be {expected}, but got {found!r}.")


class Knobs:
    """All hyperparameters of a run, in order: their maps to values, and what the values do.

    Args:
        hypers: What the user declared.
        module: The model that they are for; a hyperparameter for several layers becomes one for each.

    Raises:
        ValueError: If there are none, or two have one name.
    """

    def __init__(self, hypers: Sequence[Hyper], module: nn.Module) -> None:
        self.hypers = [
            dataclasses.replace(hyper, name=f"{hyper.name}/{suffix}" if suffix else hyper.name, target=target)
            for hyper in hypers
            for suffix, target in _target(hyper).expand(module)
        ]
        self.names = [hyper.name for hyper in self.hypers]
        if not self.hypers or len(set(self.names)) < len(self.names):
            raise ValueError(f"Expected hyperparameters with distinct names, but got {self.names}.")
        self.targets = [_target(hyper) for hyper in self.hypers]
        self.range_map = RangeMap([hyper.range[0] for hyper in self.hypers], [hyper.range[1] for hyper in self.hypers])
        self.shared = torch.tensor([hyper.is_shared for hyper in self.hypers])
        self.discrete = torch.tensor([hyper.discrete for hyper in self.hypers])
        self._least = torch.tensor(
            [math.ceil(h.range[0]) if math.isfinite(h.range[0]) else -math.inf for h in self.hypers]
        )
        self._partners = {
            i: j
            for i, first in enumerate(self.targets)
            for j, second in enumerate(self.targets)
            if isinstance(first, Cutout) and first.completes(second)
        }

    def __len__(self) -> int:
        return len(self.hypers)

    @property
    def transforms_inputs(self) -> bool:
        """Whether some of them change the inputs."""
        return any(isinstance(target, InputTarget) for target in self.targets)

    @property
    def changes_loss(self) -> bool:
        """Whether some of them change the call of the criterion."""
        return any(isinstance(target, LossTarget) for target in self.targets)

    @property
    def penalises_activations(self) -> bool:
        """Whether some of them weigh a penalty on activations."""
        return self._penalises("activations")

    @property
    def penalises_parameters(self) -> bool:
        """Whether some of them weigh a penalty on parameters."""
        return self._penalises("parameters")

    def initial(self) -> tuple[Tensor, Tensor]:
        """Return the unconstrained start `[H]` and the scales of the perturbation `[H]`, in float32."""
        start = torch.tensor([hyper.start for hyper in self.hypers], dtype=torch.float64)
        scale = torch.tensor([hyper.scale for hyper in self.hypers])
        return self.range_map.unconstrain(start).float(), scale

    def to(self, device: torch.device) -> Knobs:
        """Move the constants to a device."""
        self.shared, self.discrete = self.shared.to(device), self.discrete.to(device)
        self._least = self._least.to(device)
        return self

    def constrain(self, lam: Tensor) -> Tensor:
        """Return the values `[..., H]` in their ranges, before rounding, differentiable in `lam` `[..., H]`."""
        return self.range_map.constrain(lam)

    def values(self, lam: Tensor) -> Tensor:
        """Return the values `[..., H]` that targets get: in their ranges, whole where discrete, detached."""
        values = self.constrain(lam.detach())
        return torch.where(self.discrete, torch.maximum(values.floor(), self._least), values)

    def attach(self, module: nn.Module, conditioning: Conditioning, trainer: pl.Trainer | None = None) -> None:
        """Let all targets take hold of a model, whose gates are in place already; what held before is let go first.

        Without a trainer, other interventions are left alone for now.

        Raises:
            ValueError: If a target finds nothing to act on.
        """
        self.detach()
        try:
            for index, target in enumerate(self.targets):
                target.attach(Site(module, conditioning, index, trainer))
        except Exception:
            self.detach()
            raise

    def detach(self) -> None:
        """Let all targets go, and leave model and trainer as they were."""
        for target in self.targets:
            target.detach()

    def transform(self, x: Tensor, values: Tensor, generator: Generator) -> Tensor:
        """Return the inputs that the model shall see in training.

        Args:
            x: Inputs `[B, *]`, floating point.
            values: Values `[B, H]`, `[1, H]` or `[H]`.
            generator: Source of noise, on the device of `x`.

        Raises:
            ValueError: If the inputs are no floating-point tensor with one entry per example.
        """
        several = values.ndim > 1 and len(values) != 1
        if not x.is_floating_point() or (several and len(values) != len(x)):
            examples = f" with {len(values)} examples" if several else ""
            raise ValueError(
                f"Expected the inputs to be floating point{examples}, but got {x.dtype} of shape {list(x.shape)}."
            )
        columns = values.expand(len(x), -1).unbind(1)
        for index, target in enumerate(self.targets):
            if not isinstance(target, InputTarget):
                continue
            partner = self._partners.get(index)
            if partner is None:
                x = target.transform(x, columns[index], generator)
            elif index < partner:
                x = target.transform(x, columns[index], generator, other=columns[partner])  # type: ignore[call-arg]
        return x

    def on_loss(self, call: LossCall, values: Tensor) -> LossCall:
        """Return the call of the criterion to be made instead, for values `[B, H]`, `[1, H]` or `[H]`."""
        for index, target in enumerate(self.targets):
            if isinstance(target, LossTarget):
                call = target.on_loss(call, values[..., index].reshape(-1))
        return call

    def penalties(self, values: Tensor, what: Literal["activations", "parameters"]) -> dict[str, Tensor]:
        """Return penalties of this step by name, for values `[B, H]`, `[1, H]` or `[H]`."""
        first = values.reshape(-1, len(self))[0]
        found: dict[str, Tensor] = {}
        for index, target in enumerate(self.targets):
            if isinstance(target, PenaltyTarget) and target.penalises == what:
                penalty = target.penalty(first[index])
                if penalty is not None:
                    found[self.names[index]] = penalty
        return found

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Return the weights whose decay is tuned: an optimizer should not decay them as well."""
        return [p for target in self.targets if isinstance(target, WeightDecay) for p in target.parameters()]

    def _penalises(self, what: str) -> bool:
        return any(isinstance(target, PenaltyTarget) and target.penalises == what for target in self.targets)


def _target(hyper: Hyper) -> Target:
    target: Any = hyper.target  # a function was wrapped
    return target


def _kind(target: Target) -> str:
    return type(target).__name__


register_type(Hyper, Hyper.as_dict, Hyper.from_dict)  # how configuration files spell it
