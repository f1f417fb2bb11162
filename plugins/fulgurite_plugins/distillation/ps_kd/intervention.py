# SPDX-License-Identifier: Apache-2.0
"""PS-KD as a callback (Kim, Ji, Yoon, Hwang, 2021)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from fulgurite import lightning_adapter
from fulgurite.errors import FulguriteError, RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.losses import LossCall
from fulgurite.samples import SampleMemory
from fulgurite.samples.memory import Storage
from fulgurite.schedule import Schedule
from fulgurite.splice import Splice
from fulgurite.teachers import FrozenCopy, Mode
from fulgurite_plugins.distillation.ps_kd.functional import refine_targets

_SHARDED = dict.fromkeys(
    ("fsdp", "model_parallel", "deepspeed"),
    "its snapshot is a full copy of the weights, which are sharded there. Use teacher='memory'.",
)

_ENTROPY_EVERY = 8
"""Batches between two from which the entropy of the targets is logged."""


class PSKD(Intervention):
    r"""Train a classifier on its labels mixed with its own predictions of the previous epoch.

    The target of example $i$ in epoch $t$ is $q_i = (1 - \alpha_t) y_i + \alpha_t M_i$, where $M_i$ is what the model
    predicted for it the last time; the loss is the user's own cross entropy with $q_i$ for $y_i$. Class weights,
    `ignore_index`, label smoothing and the reduction of the criterion are kept. Validation and test are untouched.

    Args:
        alpha: Trust in the past prediction: a number in [0, 1] is the end value of the paper's linear ramp; a `Schedule`
            gives any other course. 0.8 is the paper's value for CIFAR-100.
        teacher: Where the past prediction comes from. `"memory"` keeps one row per training example (needs sample
            indices, adds no pass). `"snapshot"` runs a frozen copy of the network as it was at the end of an earlier
            epoch on the same augmented batch (one more forward; for iterable data, dense or token prediction, mixup).
        total_epochs: The planned number of epochs $T$ of the ramp; by default the trainer's.
        dtype: Precision of the memory: `"float32"`, or `"float16"` for half the space.
        storage: Where the memory lies: `"device"`, `"cpu"`, a `"memmap"` file, or `"auto"`.
        snapshot_mode: Whether the frozen copy runs in `"eval"` or in `"train"` mode.
        snapshot_every: Epochs between two snapshots.
        criterion: The criterion to change: an attribute of the module or a function of `torch.nn.functional`; by default
            the only one that the training step calls.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PSKD(alpha=0.8)])  # doctest: +SKIP
    """

    def __init__(
        self,
        alpha: float | Schedule = 0.8,
        teacher: Literal["memory", "snapshot"] = "memory",
        total_epochs: int | None = None,
        dtype: torch.dtype | str = "float32",
        storage: Storage = "auto",
        snapshot_mode: Mode = "eval",
        snapshot_every: int = 1,
        criterion: str | None = None,
    ) -> None:
        self.alpha = alpha
        self.schedule = alpha if isinstance(alpha, Schedule) else Schedule(end=_in_unit_interval(alpha))
        for value in self.schedule.range:
            _in_unit_interval(value)
        check_choice(teacher, ("memory", "snapshot"), "teacher", "PSKD")
        check_choice(storage, get_args(Storage), "storage", "PSKD")
        check_choice(snapshot_mode, get_args(Mode), "snapshot_mode", "PSKD")
        for name, number in (("total_epochs", total_epochs), ("snapshot_every", snapshot_every)):
            fits = number is None or (isinstance(number, int) and number >= 1)
            check_argument(fits, name, "PSKD", "a positive integer", number)
        self.teacher = teacher
        self.total_epochs = total_epochs
        self.dtype = str(dtype).removeprefix("torch.")
        check_choice(self.dtype, ("float32", "float16"), "dtype", "PSKD")
        self.storage = storage
        self.snapshot_mode = snapshot_mode
        self.snapshot_every = snapshot_every
        self.criterion = criterion
        self.weight = 0.0
        self.memory: SampleMemory | None = None
        self.snapshot: FrozenCopy | None = None
        self._restored: dict[str, Any] | None = None
        self._side_directory: Path | None = None
        self._entropy: Tensor | None = None
        self._batches = self._positions = 0

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """The memory needs sample indices; the snapshot replays the step and costs a forward pass."""
        if self.teacher == "memory":
            return Capabilities(sample_indices=True)
        return Capabilities(
            replays_step=True, extra_forwards=1.0, manual_optimization=False, refused_strategies=_SHARDED
        )

    def state_arguments(self) -> dict[str, Any]:
        """The kind of teacher and the criterion tell two instances apart."""
        return {"teacher": self.teacher, "criterion": self.criterion}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what the training of another trainer has left; a checkpoint is restored after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self.memory = self.snapshot = self._restored = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the ramp has an end, and bring back a snapshot."""
        self._side_directory = Path(trainer.default_root_dir)
        if self.schedule.shape != "constant" and math.isinf(self._progress(trainer)[1]):
            raise RefusedError(
                "PSKD: the planned number of epochs is not known (the trainer has neither max_epochs nor max_steps), so "
                "that the ramp of alpha has no end. Pass total_epochs, or a constant Schedule."
            )
        if self._restored is not None and "snapshot" in self._restored:
            self.snapshot = FrozenCopy(pl_module, self.snapshot_mode)
            self.snapshot.load_state_dict(self._restored["snapshot"])
            self._restored = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the weight of the epoch."""
        if self.schedule.unit == "epoch":
            self.weight = self.schedule.at(*self._progress(trainer))
        self._entropy, self._batches, self._positions = None, 0, 0

    def on_loss(self, call: LossCall) -> LossCall:
        """Refine the targets, and remember the prediction that gives this very loss."""
        if self.schedule.unit == "step":
            self.weight = self.schedule.at(*self._progress(call.step.trainer))
        self._batches += 1
        return self._from_memory(call) if self.teacher == "memory" else self._from_snapshot(call)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share the memory between ranks, or take a snapshot."""
        if self.memory is not None:
            self.memory.exchange()
        if self.teacher == "snapshot" and (trainer.current_epoch + 1) % self.snapshot_every == 0:
            if self.snapshot is None:
                self.snapshot = FrozenCopy(pl_module, self.snapshot_mode)
            else:
                self.snapshot.load_state_dict({**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())})
            self.snapshot.synchronize()
        pl_module.log("pskd/alpha", self.weight)
        entropy = torch.zeros(()) if self._entropy is None else self._entropy / max(self._positions, 1)
        pl_module.log("pskd/target_entropy", entropy)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory or the snapshot; on several ranks, all of them call this."""
        if self._restored is not None:
            return self._restored
        state: dict[str, Any] = {"version": 1, "weight": self.weight}
        if self.memory is not None:
            state["memory"] = self.memory.state_dict(self._side_directory)
        if self.snapshot is not None:
            state["snapshot"] = self.snapshot.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the sizes of the data and of the model are known."""
        self.weight = state_dict["weight"]
        self._restored = state_dict
        self.memory = self.snapshot = None

    def _progress(self, trainer: pl.Trainer) -> tuple[int, float]:
        position, total = lightning_adapter.train_progress(trainer, self.schedule.unit)
        return position, self.total_epochs if self.total_epochs and self.schedule.unit == "epoch" else total

    def _from_memory(self, call: LossCall) -> LossCall:
        predictions = call.probabilities()
        indices = self._indices(call, predictions)
        if self.memory is None:
            self.memory = self._make_memory(call, predictions)
        if predictions.shape[1:] != self.memory.shape:
            raise FulguriteError(
                f"PSKD remembers predictions over {self.memory.shape[0]} classes, but the model now predicts "
                f"{predictions.shape[1]}. The number of classes must not change during training."
            )
        on_device = call.step.indices_on(predictions.device)
        refined = call
        if self.weight > 0.0 and call.step.trainer.current_epoch > 0:
            past, seen = self.memory.read(indices, on_device)
            if self.dtype == "float16":
                past = past.float()
                past = past / past.sum(dim=1, keepdim=True).clamp_min(torch.finfo(past.dtype).tiny)
            refined = self._refine(call, past, self.weight if seen is None else self.weight * seen.unsqueeze(1))
        self.memory.write(indices, predictions, on_device)
        return refined

    def _from_snapshot(self, call: LossCall) -> LossCall:
        soft = call.soften()
        if self.snapshot is None or self.weight == 0.0:
            return call
        past = self.snapshot.loss_call(call.step, call.name).probabilities()
        return self._refine(soft, past, self.weight)

    def _refine(self, call: LossCall, past: Tensor, alpha: float | Tensor) -> LossCall:
        soft = call.soften()
        targets = refine_targets(soft.targets, past, alpha)
        if self._batches % _ENTROPY_EVERY == 1:
            entropy = torch.special.entr(targets.detach()).sum()
            self._entropy = entropy if self._entropy is None else self._entropy.add_(entropy)
            self._positions += targets.numel() // targets.shape[1]
        return soft.replace(targets=targets)

    def _indices(self, call: LossCall, predictions: Tensor) -> Tensor:
        indices = call.step.indices
        instead = "Use teacher='snapshot', which needs no memory."
        if predictions.ndim != 2:
            raise RefusedError(
                f"PSKD(teacher='memory') keeps one prediction per example, but the criterion got outputs of shape "
                f"{list(predictions.shape)}: one per position. {instead}"
            )
        if indices is None or len(indices) != len(predictions):
            raise RefusedError(
                f"PSKD(teacher='memory'): the DataLoader drew {0 if indices is None else len(indices)} examples for this "
                f"batch, but the criterion got outputs for {len(predictions)}: something dropped, repeated or mixed "
                f"examples in between. {instead}"
            )
        given = call.step.targets  # the user's own, before other plugins softened them
        assert given is not None
        if self._batches == 1 and given.is_floating_point() and bool((given.amax(dim=1) < 1.0).any()):
            raise RefusedError(
                f"PSKD(teacher='memory') got probability targets that are not one-hot, as mixup makes them: the prediction "
                f"for a mixed example must not be remembered as that of one example. {instead}"
            )
        return indices

    def _make_memory(self, call: LossCall, predictions: Tensor) -> SampleMemory:
        splice = Splice.of(call.step.trainer)
        assert splice is not None
        assert splice.tracker is not None
        memory = SampleMemory(
            size=splice.tracker.dataset_size,
            shape=tuple(predictions.shape[1:]),
            dtype=getattr(torch, self.dtype),
            device=predictions.device,
            storage=self.storage,
            name="PSKD",
        )
        if self._restored is not None and "memory" in self._restored:
            memory.load_state_dict(self._restored["memory"], self._side_directory)
        self._restored = None
        return memory


def _in_unit_interval(alpha: object) -> float:
    fits = is_number(alpha) and 0.0 <= alpha <= 1.0  # type: ignore[operator]
    check_argument(fits, "alpha", "PSKD", "in [0, 1] (or a Schedule within it)", alpha)
    return float(alpha)  # type: ignore[arg-type]
