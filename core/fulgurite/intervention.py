# SPDX-License-Identifier: Apache-2.0
"""The heart of Fulgurite: a Lightning callback that may change what a training step computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from fulgurite.losses import LossCall

HOOKS = (
    "operate",
    "parameter_options",
    "transform_batch",
    "on_loss",
    "penalty",
    "transform_gradients",
    "constrain",
    "on_evaluation_loss",
)
"""The two-way hooks, in the order in which a step meets them."""


@dataclass(frozen=True)
class Capabilities:
    """What an intervention asks of a training loop; core refuses, before training, what would train wrongly.

    Args:
        sample_indices: It needs to know which examples of the training set are in the batch.
        reads_loss: It reads `step.outputs`, `step.targets` or `step.loss` outside `on_loss`.
        replays_step: It runs the training step again on the same batch (`Step.random_state` is kept for that).
        penalises_parameters: Its `penalty` depends on parameters only: it is asked once per optimizer update, in the
            micro-batch that completes it, and counts fully there whatever the accumulation.
        extra_forwards: Forward passes per step that it adds, in units of the model's own.
        extra_backwards: Backward passes per step that it adds.
        exclusive: What it takes for itself alone, for instance `("head",)`; two plugins with one item in common are
            refused together.
        manual_optimization: Whether it works when the module steps its optimizers itself.
        refused_strategies: Strategies that it cannot work with, and why: `{"fsdp": "..."}`. Names are `single`, `ddp`,
            `fsdp`, `model_parallel`, `deepspeed`, `xla`.
        refused_precisions: Precisions that it cannot work with, and why: `{"16-mixed": "..."}`.
    """

    sample_indices: bool = False
    reads_loss: bool = False
    replays_step: bool = False
    penalises_parameters: bool = False
    extra_forwards: float = 0.0
    extra_backwards: float = 0.0
    exclusive: tuple[str, ...] = ()
    manual_optimization: bool = True
    refused_strategies: Mapping[str, str] = field(default_factory=dict)
    refused_precisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """One training step (one micro-batch), as the hooks see it.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        batch: The batch on its device, after the transforms made so far.
        batch_idx: Its index in the epoch.
        updates: Optimizer updates that have really happened (a step skipped for overflow is none).
        indices: Indices `[B]` of the examples in the training set, on the CPU; None unless somebody declared
            `sample_indices`.
        outputs: What the criterion was first given as outputs; None before, or if nobody reads the loss.
        targets: What the criterion was first given as targets.
        loss: The loss that the training step returned, before penalties; None before it returned.
        random_state: The random state in which the step began; None unless somebody declared `replays_step`.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    batch: Any
    batch_idx: int
    updates: int
    indices: Tensor | None = None
    outputs: Tensor | None = None
    targets: Tensor | None = None
    loss: Tensor | None = None
    random_state: Any = None
    _indices_on: Tensor | None = None

    @property
    def completes_update(self) -> bool:
        """Whether an optimizer step follows this micro-batch (under automatic optimization)."""
        return lightning_adapter.completes_update(self.trainer)

    def indices_on(self, device: torch.device) -> Tensor:
        """Return the sample indices on a device, copied once per step and without a synchronisation.

        Raises:
            FulguriteError: If the indices of this batch are not known.
        """
        if self.indices is None:
            raise FulguriteError(
                "The sample indices of this batch are not known. An intervention that reads them declares "
                "`Capabilities(sample_indices=True)`."
            )
        if device.type == "cpu":
            return self.indices
        if self._indices_on is None or self._indices_on.device != device:
            self._indices_on = self.indices.pin_memory().to(device, non_blocking=True)
        return self._indices_on


class Intervention(pl.Callback):
    """A callback that may also change what the training step computes, on a module that was written without it.

    Override any of the hooks below; every ordinary hook of `lightning.pytorch.Callback` stays available too. All
    interventions of a trainer are composed by one `fulgurite.splice.Splice`, in the order of `Trainer.callbacks`.
    Plugins never patch anything themselves.

    `criterion` names the criterion that `on_loss` is about: an attribute of the module, or a function of
    `torch.nn.functional`. With None it is found: the `criterion` of a `fulgurite.Task`, else the one functional loss that
    the training step calls.
    """

    capabilities: Capabilities = Capabilities()
    criterion: str | None = None

    @property
    def name(self) -> str:
        """The prefix of everything that the intervention logs."""
        return type(self).__name__.lower()

    @functools.cached_property
    def state_key(self) -> str:  # cached: Lightning asks for it in every hook of every step
        """The key of the state in a checkpoint: where the class is defined, and what makes instances differ."""
        return self._generate_state_key(module=type(self).__module__, **self.state_arguments())

    def state_arguments(self) -> dict[str, Any]:
        """Return the arguments without which the state of one instance would be mistaken for that of another."""
        return {}

    def operate(self, module: pl.LightningModule) -> None:
        """Change the model: after `configure_model`, before weights are restored, wrapped or optimised.

        It is called once in each run of a trainer (`fit`, `validate` ...): a model that is changed already is left as it is.
        """

    def parameter_options(self, module: pl.LightningModule) -> Mapping[nn.Parameter, Mapping[str, Any]]:
        """Return options that parameters shall have in the optimizers of the user: `{p: {"weight_decay": 0.0}}`.

        It is asked as each optimizer is made in `configure_optimizers`. Core moves these parameters, if the optimizer has
        them, into groups of their own; `lr_scale` multiplies the learning rate of the group that they come from.
        """
        return {}

    def transform_batch(self, batch: Any, step: Step) -> Any:
        """Return the batch that the training step shall see; it is on its device already."""
        return batch

    def on_loss(self, call: LossCall) -> LossCall:
        """Return the call of the criterion that shall be made instead of `call`."""
        return call

    def penalty(self, step: Step) -> Tensor | Mapping[str, Tensor] | None:
        """Return a scalar, or named scalars, to be added to the loss; they are logged under the plugin's name.

        It is computed outside autocast, inside the strategy's forward, after the training step has returned.
        """
        return None

    def transform_gradients(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Change gradients in place: complete, reduced over ranks and unscaled, before clipping and the step."""

    def constrain(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Change parameters in place after the optimizer has really stepped."""

    def on_evaluation_loss(self, call: LossCall) -> None:
        """Read the call of the criterion in a validation or test step; it cannot be changed."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lay the splice; an override runs after it."""
        from fulgurite.splice import Splice

        Splice.ensure(trainer, pl_module, stage)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "setup" in cls.__dict__:
            cls.setup = _after_splice(cls.__dict__["setup"])  # type: ignore[method-assign]

    @property
    def acts(self) -> bool:
        """Whether it wants anything of core: implements a hook, or declares a capability."""
        return self.capabilities != Capabilities() or any(self.overrides(hook) for hook in HOOKS)

    def overrides(self, hook: str) -> bool:
        """Return whether this intervention implements a hook."""
        return getattr(type(self), hook) is not getattr(Intervention, hook)


def others_that_change(trainer: pl.Trainer, intervention: pl.Callback) -> str:
    """Return a sentence for messages that names the other interventions that change the model; empty if there are none."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    names = [
        type(other).__name__
        for other in callbacks
        if other is not intervention and isinstance(other, Intervention) and other.overrides("operate")
    ]
    return f" The model is changed by {', '.join(names)} too." if names else ""


def _after_splice(setup: Callable[..., None]) -> Callable[..., None]:
    """Make an overridden `setup` lay the splice first, so that forgetting `super().setup` cannot disable a plugin."""

    @functools.wraps(setup)
    def wrapped(self: Intervention, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        Intervention.setup(self, trainer, pl_module, stage)
        setup(self, trainer, pl_module, stage)

    return wrapped


def named_losses(module: nn.Module) -> list[str]:
    """Return the names of a module's attributes that are loss modules of torch, for messages."""
    return [name for name, child in module.named_children() if isinstance(child, nn.modules.loss._Loss)]
