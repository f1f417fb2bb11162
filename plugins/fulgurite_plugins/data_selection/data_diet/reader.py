# SPDX-License-Identifier: Apache-2.0
"""What a user's training step gives its criterion for a batch, and which network made it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import MagicMock

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite.errors import RefusedError
from fulgurite.intervention import Step, named_losses
from fulgurite.loss_capture import LossCapture
from fulgurite.losses import FUNCTIONAL_LOSSES, LossCall
from fulgurite.phase import positional
from fulgurite.teachers import FrozenCopy

_FUNCTIONS = {function.__name__ for function in FUNCTIONAL_LOSSES}


class _SeenError(Exception):
    """Ends a manual training step when its criterion has been called."""


class Reader:
    """Runs the training step of a copy of a module, in evaluation mode and without gradients, and sees its criterion.

    Args:
        trainer: The trainer, which the training step may ask.
        module: The module, of which a copy is made.
        user: Who reads, for messages.
        criterion: The criterion: an attribute of the module or a function of `torch.nn.functional`; None for the only one.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, user: str, criterion: str | None) -> None:
        self.trainer = trainer
        self.user = user
        self.module: pl.LightningModule = FrozenCopy(module, "eval").module
        for own, theirs in zip(self.module.parameters(), module.parameters(), strict=True):
            own.requires_grad_(theirs.requires_grad)  # GraNd is taken over these
        self.module._trainer = trainer
        self.network: nn.Module = self.module
        self.inputs: Any = None
        self._criterion = criterion or getattr(type(module), "fulgurite_criterion", None)
        self._arguments = positional(self.module.training_step)
        self._capture = LossCapture(self._on_functional_loss)
        self._calls: list[LossCall] = []
        self._made: list[tuple[nn.Module, Any, Any]] = []
        self._inside = self._criterion is None or self._criterion in _FUNCTIONS
        self._step: Step | None = None
        self._manual = not module.automatic_optimization
        if self._manual:
            self._keep_off_optimizers()
        if not self._inside:
            self._watch_attribute(str(self._criterion))

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
        self._calls, self._made = [], []
        self._step = Step(self.trainer, self.module, batch, batch_idx, updates=0)
        hooks = [m.register_forward_hook(self._on_forward, with_kwargs=True) for m in self._modules(find_network)]
        try:
            with torch.no_grad(), self._capture, suppress(_SeenError):
                self.module.training_step(*(batch, batch_idx)[: self._arguments])
        finally:
            for hook in hooks:
                hook.remove()
        if len(self._calls) != 1:
            self._refuse_calls()
        (call,) = self._calls
        if call.outputs.ndim == 0 or len(call.outputs) != examples or len(call.targets) != examples:
            raise RefusedError(
                f"{self.user} needs one output per example, but for a batch of {examples} examples the criterion "
                f"{call.name} got outputs of shape {list(call.outputs.shape)} and targets of {list(call.targets.shape)}."
            )
        if find_network:
            self._find_network(call)
        return call

    def _modules(self, find_network: bool) -> list[nn.Module]:
        return list(self.module.modules()) if find_network else []

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            self._made.append((module, kwargs or args, outputs))
            if kwargs and args:
                self._made[-1] = (module, None, outputs)

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

    def _on_functional_loss(self, fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self._step is not None
        if self._inside and (self._criterion not in _FUNCTIONS or self._criterion == fn.__name__):
            self._note(LossCall.bound(fn, args, kwargs, self._step))
        return fn(*args, **kwargs)

    def _note(self, call: LossCall) -> None:
        self._calls.append(call)
        if self._manual:
            raise _SeenError

    def _keep_off_optimizers(self) -> None:
        """Let a step that optimises manually reach its criterion, and nothing else: the optimizers are the trainer's own."""
        number = len(self.trainer.optimizers)
        stub = MagicMock()
        self.module.__dict__["optimizers"] = lambda *_, **__: stub if number == 1 else [stub] * number
        for name in ("lr_schedulers", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"):
            self.module.__dict__[name] = stub

    def _watch_attribute(self, name: str) -> None:
        criterion = getattr(self.module, name, None)
        if not callable(criterion):
            raise RefusedError(
                f"{self.user}: expected `criterion` to name a callable attribute of {type(self.module).__name__} or a loss "
                f"of torch.nn.functional, but got {name!r}."
            )
        functional = isinstance(criterion, nn.modules.loss._Loss)
        owner, attribute = (criterion, "forward") if isinstance(criterion, nn.Module) else (self.module, name)
        original = getattr(owner, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not functional:
                assert self._step is not None
                self._note(LossCall(original, args[0], args[1], kwargs, name, self._step))
                return original(*args, **kwargs)
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        owner.__dict__[attribute] = watched

    def _refuse_calls(self) -> None:
        names = ", ".join(call.name for call in self._calls) or "no loss of torch.nn.functional"
        known = named_losses(self.module)
        raise RefusedError(
            f"{self.user} reads outputs and targets where the training step calls its criterion, but that of "
            f"{type(self.module).__name__} calls {names}. Name one with `criterion=`: an attribute of the module, or a "
            f"function of torch.nn.functional. {f'Loss modules found: {chr(44).join(known)}.' if known else ''}"
        )
