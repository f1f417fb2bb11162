# SPDX-License-Identifier: Apache-2.0
"""The weight of another intervention of the same trainer, such as the `alpha` of PS-KD."""

from __future__ import annotations

from dataclasses import dataclass, field

import lightning.pytorch as pl

from fulgurite.errors import RefusedError
from fulgurite.intervention import Intervention
from fulgurite.schedule import Schedule
from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import Site, Target


@dataclass(frozen=True)
class TunedSchedule(Schedule):
    """A schedule that says, at any time, the present value of a hyperparameter.

    It calls itself constant and counts in steps, so that whoever holds it asks for its value in each step. Outside a step
    it keeps the last value.
    """

    conditioning: Conditioning = field(default_factory=Conditioning, compare=False)
    index: int = 0
    last: list[float] = field(default_factory=list, compare=False)

    def at(self, position: float, total: float) -> float:
        """Return the value of the first example; it comes from the device, which waits for it."""
        present = self.conditioning.column(self.index)
        if present is not None:
            self.last[:] = [float(present[0])]
        return self.last[0] if self.last else self.end


class InterventionWeight(Target):
    """The `Schedule` of another intervention of the trainer, which all its users of the type have.

    While a trainer runs, the schedule is replaced by one that says the present value. Nothing is imported: the
    intervention is found by its class's name.

    Args:
        intervention: The name of its class: `"PSKD"`.
        attribute: The attribute that holds the schedule; None if there is only one.
    """

    needs_shared = True

    def __init__(self, intervention: str, attribute: str | None = None) -> None:
        self.intervention = intervention
        self.attribute = attribute
        self._replaced: list[tuple[Intervention, str, Schedule]] = []

    def attach(self, site: Site) -> None:
        """Replace the schedule, once there is a trainer.

        Raises:
            RefusedError: If there is no such intervention, or it has no such schedule.
        """
        if site.trainer is None:
            return
        owner = self._owner(site.trainer)
        schedules = {name: value for name, value in vars(owner).items() if isinstance(value, Schedule)}
        if self.attribute is not None:
            schedules = {name: value for name, value in schedules.items() if name == self.attribute}
        if len({id(value) for value in schedules.values()}) != 1:
            held = [name for name, value in vars(owner).items() if isinstance(value, Schedule)]
            where = f" in {self.attribute!r}" if self.attribute else ""
            raise RefusedError(
                f"Expected {self.intervention} to hold one Schedule{where}, but it holds {', '.join(held) or 'none'}. Name "
                f"the attribute with InterventionWeight({self.intervention!r}, attribute=...)."
            )
        for name, schedule in schedules.items():
            end = schedule.end
            tuned = TunedSchedule(
                end=end, start=end, shape="constant", unit="step", conditioning=site.conditioning, index=site.index
            )
            self._replaced.append((owner, name, schedule))
            setattr(owner, name, tuned)

    def detach(self) -> None:
        """Put the schedule back."""
        while self._replaced:
            owner, name, schedule = self._replaced.pop()
            setattr(owner, name, schedule)

    def _owner(self, trainer: pl.Trainer) -> Intervention:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if isinstance(callback, Intervention)]
        found = [other for other in others if type(other).__name__ == self.intervention]
        if len(found) != 1:
            raise RefusedError(
                f"Expected one {self.intervention} among the trainer's callbacks, whose weight can be tuned, but found "
                f"{len(found)}. Its interventions are: {', '.join(type(other).__name__ for other in others) or 'none'}."
            )
        return found[0]
