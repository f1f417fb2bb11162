# SPDX-License-Identifier: Apache-2.0
"""What a user's training step gives its criterion for a batch, and which network made it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError
from fulgurite.losses import LossCall
from fulgurite.teachers import FrozenCopy


class Reader:
    """Runs the training step of a copy of a module, in evaluation mode and without gradients, and sees its criterion.

    Args:
        trainer: The trainer, which the training step may ask.
        module: The module, of which a copy is made.
        user: Who reads, for messages.
        criterion: The criterion: an attribute of the module or a function of `torch.nn.functional`; None for the only one.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, user: str, criterion: str | None) -> None:
        self.user = user
        self.module: pl.LightningModule = FrozenCopy(module, "eval").module
        for own, theirs in zip(self.module.parameters(), module.parameters(), strict=True):
            own.requires_grad_(theirs.requires_grad)  # GraNd is taken over these
        self.module._trainer = trainer
        self.network: nn.Module = self.module
        self.inputs: Any = None
        self._captured = CapturedLoss(trainer, self.module, user, criterion, throwaway=True)
        self._made: list[tuple[nn.Module, Any, Any]] = []

    def __call__(self, batch: Any, batch_idx: int, examples: int, find_network: bool = False) -> LossCall:
        """Return the call of the criterion for a batch of so many examples.

        Args:
            batch: The batch, on its device.
            batch_idx: Its number.
            examples: How many examples it has.
            find_network: Whether to find the `network` that made the outputs, and the `inputs` that it was given.

        Raises:
            RefusedError: If the step calls no criterion or several, does not have one output per example, or what its
                criterion is given is not what a module of its returned.
        """
        self._made = []
        modules = list(self.module.modules()) if find_network else []
        hooks = [module.register_forward_hook(self._on_forward, with_kwargs=True) for module in modules]
        try:
            call = self._captured(batch, batch_idx).call
        finally:
            for hook in hooks:
                hook.remove()
        if call.outputs.ndim == 0 or len(call.outputs) != examples or len(call.targets) != examples:
            raise RefusedError(
                f"{self.user} needs one output per example, but for a batch of {examples} examples the criterion "
                f"{call.name} got outputs of shape {list(call.outputs.shape)} and targets of {list(call.targets.shape)}."
            )
        if find_network:
            self._find_network(call)
        return call

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            self._made.append((module, None if args and kwargs else kwargs or args, outputs))

    def _find_network(self, call: LossCall) -> None:
        """Take the outermost module, which is the last to return, whose output the criterion got."""
        found = [(module, inputs) for module, inputs, outputs in self._made if outputs is call.outputs]
        self._made = []
        if not found or found[-1][1] is None:
            raise RefusedError(
                f"{self.user}: 'grand' needs the network whose output is what the criterion {call.name} gets, but no module "
                f"of {type(self.module).__name__} returned that tensor (and was called either with positional or with named "
                f"arguments). Let one module compute it, or use 'el2n'."
            )
        self.network, self.inputs = found[-1]
