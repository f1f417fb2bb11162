# SPDX-License-Identifier: Apache-2.0
"""Schedules of hyperparameters in ordinary trainings, without Self-Tuning Networks: one that was found, and its rivals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import RefusedError
from fulgurite.intervention import Capabilities, Intervention, Step
from fulgurite.losses import LossCall
from fulgurite_plugins.bilevel.self_tuning_networks.application import Application, batch_size
from fulgurite_plugins.bilevel.self_tuning_networks.course import Course
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import LossTarget


class ScheduledHyperparameters(Intervention):
    """What the schedules below have in common: all examples of a step train with the values of its update; no gates.

    Args:
        hyperparameters: The hyperparameters.
        seed: Seeds the noise.
    """

    capabilities = Capabilities(manual_optimization=False)

    def __init__(self, hyperparameters: list[Hyper], seed: int = 0) -> None:
        self.seed = seed
        self._hyperparameters = hyperparameters
        self._reset()

    def _reset(self) -> None:
        self._application = Application(self._hyperparameters, type(self).__name__, self.seed)
        self.updates = 0

    def values_at(self, updates: int) -> list[float]:
        """Return the values of the hyperparameters `[H]` after so many updates of the optimizer."""
        raise NotImplementedError

    def overrides(self, hook: str) -> bool:
        """Take part in the call of the criterion only if a hyperparameter acts on it."""
        if hook == "on_loss":
            return any(isinstance(hyper.target, LossTarget) for hyper in self._hyperparameters)
        return super().overrides(hook)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, unless training goes on."""
        if stage != "fit":
            return
        if trainer.current_epoch == 0:
            self._reset()
        self._application.trainer = trainer

    def operate(self, module: pl.LightningModule) -> None:
        """Take hold of the layers that hyperparameters act on."""
        self._application.find(module)
        self._application.attach(module)

    def transform_batch(self, batch: Any, step: Step) -> Any:
        """Show the values to the inputs and the layers."""
        knobs = self._application.knobs
        row = torch.tensor(self.values_at(self.updates), dtype=torch.float32, device=step.module.device)
        row = torch.where(knobs.discrete.to(row.device), row.floor(), row)
        return self._application.begin(batch, None, row.expand(batch_size(batch, type(self).__name__), -1))

    def on_loss(self, call: LossCall) -> LossCall:
        """Let hyperparameters of the loss act."""
        return self._application.on_loss(call)

    def penalty(self, step: Step) -> dict[str, Tensor]:
        """Return the penalties with their present weights."""
        return self._application.penalties()

    def constrain(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Count an update that has really happened."""
        self.updates += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget the step."""
        self._application.conditioning.clear()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the values."""
        values = zip(self._application.knobs.names, self.values_at(self.updates), strict=True)
        pl_module.log_dict({f"{self.name}/{name}": value for name, value in values})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self._application.leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found."""
        self._application.leave()

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {"version": 1, "updates": self.updates, "draws": self._application.draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the counters."""
        self.updates, self._application.draws = state_dict["updates"], state_dict["draws"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one model; the counters are kept."""
        return {**self.__dict__, "_application": self._application.draws}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()
        self.load_state_dict({"updates": state["updates"], "draws": state["_application"]})


class ReplaySchedule(ScheduledHyperparameters):
    """Train with a schedule that `SelfTuning` has found and written, on the plain model.

    The values that were in force after so many updates there are in force after as many here; the last ones stay.

    Args:
        path: The schedule file.
        final: Whether to train with its last values throughout instead.
        hyperparameters: What the values are for, if not what the file says.
        seed: Seeds the noise.

    Raises:
        FulguriteError: If there is no such file, or it is no schedule.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ReplaySchedule("stn_schedule.json")])  # doctest: +SKIP
    """

    def __init__(
        self, path: str, final: bool = False, hyperparameters: list[Hyper] | None = None, seed: int = 0
    ) -> None:
        self.path = path
        self.final = final
        self.hyperparameters = hyperparameters
        self.course, described = Course.read(Path(path))
        super().__init__([*map(Hyper.from_dict, described)] if hyperparameters is None else hyperparameters, seed)

    def state_arguments(self) -> dict[str, Any]:
        """The file tells two instances apart."""
        return {"path": self.path, "final": self.final}

    def values_at(self, updates: int) -> list[float]:
        """Return the values of the file."""
        return self.course.values[-1] if self.final else self.course.at(updates)

    def operate(self, module: pl.LightningModule) -> None:
        """Take hold of the layers that hyperparameters act on.

        Raises:
            RefusedError: If the model has others than the schedule.
        """
        super().operate(module)
        names = list(self._application.knobs.names)
        if names != list(self.course.names):
            self._application.leave()
            raise RefusedError(
                f"ReplaySchedule: {self.path} is a schedule of {', '.join(self.course.names)}, but {type(module).__name__} "
                f"has {', '.join(names)}. Replay it on a model of the same structure, or pass `hyperparameters`."
            )


class JitterSchedule(ScheduledHyperparameters):
    """Train with fixed values to which Gaussian noise is added in every update, within their ranges: a rival of a schedule.

    Args:
        hyperparameters: The hyperparameters; `init` are the fixed values.
        std: Standard deviation of the noise; 0 for none.
        seed: Seeds the noise.

    Raises:
        ValueError: If `std` is negative.
    """

    def __init__(self, hyperparameters: list[Hyper], std: float = 0.05, seed: int = 0) -> None:
        if std < 0:
            raise ValueError(f"Expected `std` of JitterSchedule not to be negative, but got {std!r}.")
        self.hyperparameters = hyperparameters
        self.std = std
        super().__init__(hyperparameters, seed)

    def values_at(self, updates: int) -> list[float]:
        """Return the fixed values with the noise of an update."""
        generator = np.random.default_rng([self.seed, updates])
        return self._application.within_ranges(generator.normal(0.0, self.std, len(self._application.knobs)).tolist())


class SinusoidSchedule(ScheduledHyperparameters):
    """Train with values that swing around fixed ones, within their ranges: a rival of a schedule.

    Args:
        hyperparameters: The hyperparameters; `init` are the values that they swing around.
        amplitude: How far they swing to each side.
        period: Updates of the optimizer in one swing.
        seed: Seeds the noise.

    Raises:
        ValueError: If `period` is not positive.
    """

    def __init__(self, hyperparameters: list[Hyper], amplitude: float = 0.1, period: int = 1200, seed: int = 0) -> None:
        if period < 1:
            raise ValueError(f"Expected `period` of SinusoidSchedule to be positive, but got {period!r}.")
        self.hyperparameters = hyperparameters
        self.amplitude = amplitude
        self.period = period
        super().__init__(hyperparameters, seed)

    def values_at(self, updates: int) -> list[float]:
        """Return the values at an update."""
        swing = self.amplitude * math.sin(2 * math.pi * updates / self.period)
        return self._application.within_ranges([swing] * len(self._application.knobs))
