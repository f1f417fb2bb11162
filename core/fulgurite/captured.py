# SPDX-License-Identifier: Apache-2.0
"""What a user's own training step gives its criterion for any batch, unnoticed by the training that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError
from fulgurite.intervention import Step, named_losses
from fulgurite.loss_capture import LossCapture
from fulgurite.losses import FUNCTIONAL_LOSSES, LossCall
from fulgurite.phase import positional, unnoticed

_FUNCTIONS = {function.__name__ for function in FUNCTIONAL_LOSSES}


@dataclass(frozen=True)
class Captured:
    """One run of a training step.

    Args:
        call: The call of the criterion; its outputs carry their graph.
        criterion_loss: What the criterion returned.
        loss: What the training step returned: the same, or more; that of the criterion under manual optimization.
    """

    call: LossCall
    criterion_loss: Tensor
    loss: Tensor


class CapturedLoss:
    """Runs the training step of a module on batches, in evaluation mode, and sees its criterion.

    Without autocast, compiled graphs and fused attention, so that the graph can be differentiated twice; logging is muted;
    modes, buffers, metrics and random state are put back. It is the user's own step: interventions do not act on it. A step
    that optimises manually ends where it calls its criterion.

    Args:
        trainer: The trainer, which the training step may ask.
        module: The module itself.
        user: Who reads, for messages.
        criterion: The criterion: an attribute of the module or a function of `torch.nn.functional`; None for the only one.
        seed: Seeds what the step draws from torch's global generators, anew on each call.
        throwaway: Whether `module` is a copy in evaluation mode whose state nobody needs: nothing is put back, and no graph
            is made.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        user: str,
        criterion: str | None = None,
        seed: int = 0,
        throwaway: bool = False,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.user = user
        self.seed = seed
        self.throwaway = throwaway
        self._criterion = criterion or getattr(type(module), "fulgurite_criterion", None)
        spliced = vars(module).get("training_step")
        self._training_step = getattr(spliced, "__wrapped__", module.training_step)
        self._capture = LossCapture(self._on_functional_loss)
        self._seen: list[tuple[LossCall, Tensor]] = []
        self._inside = False
        self._step: Step | None = None

    def __call__(self, batch: Any, batch_idx: int = 0) -> Captured:
        """Return what the criterion got and gave for a batch.

        Args:
            batch: The batch, on the module's device.
            batch_idx: What the step is told as its index.

        Raises:
            RefusedError: If the step calls no criterion, or several and none is named, or returns no loss.
        """
        self._seen, self._step = [], Step(self.trainer, self.module, batch, batch_idx, updates=0)
        result: Any = None
        with self._surroundings(), suppress(_SeenError):
            result = self._training_step(*(batch, batch_idx)[: positional(self._training_step)])
        seen, self._seen, self._step = self._seen, [], None
        if len(seen) != 1:
            self._refuse([call for call, _ in seen])
        call, criterion_loss = seen[0]
        loss = result.get("loss") if isinstance(result, dict) else result
        if not self.module.automatic_optimization:
            loss = criterion_loss
        if not isinstance(loss, Tensor):
            raise RefusedError(
                f"{self.user} reads the loss of the training step, but that of {type(self.module).__name__} returned a "
                f"{type(loss).__name__} for a batch outside the usual training. It is called in evaluation mode, and must "
                f"return its loss there too."
            )
        return Captured(call, criterion_loss, loss)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.throwaway:
                stack.enter_context(torch.no_grad())
            else:
                self._enter_unnoticed(stack)
            if not self.module.automatic_optimization:
                stack.enter_context(self._kept_off_optimizers())
            if self._criterion is None or self._criterion in _FUNCTIONS:
                self._inside = True
            else:
                stack.enter_context(self._watched_attribute(self._criterion))
            stack.enter_context(self._capture)
            try:
                yield
            except BaseException:
                lightning_adapter.leave_hook(self.module)  # the hook of a callback, in which this was called
                raise

    def _enter_unnoticed(self, stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(unnoticed(self.module, self.seed))
        stack.enter_context(torch.autocast(self.module.device.type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))

    def _on_functional_loss(self, fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        loss = fn(*args, **kwargs)
        if self._inside and (self._criterion not in _FUNCTIONS or self._criterion == fn.__name__):
            assert self._step is not None
            self._note(LossCall.bound(fn, args, kwargs, self._step), loss)
        return loss

    def _note(self, call: LossCall, loss: Tensor) -> None:
        self._seen.append((call, loss))
        if not self.module.automatic_optimization:
            raise _SeenError

    @contextmanager
    def _kept_off_optimizers(self) -> Iterator[None]:
        """Let a step that optimises manually reach its criterion, and nothing else: the optimizers are the trainer's own."""
        number = len(self.trainer.optimizers)
        stub = MagicMock()
        stubs = dict.fromkeys(
            ("lr_schedulers", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), stub
        )
        own = self.module.__dict__
        found = {name: own[name] for name in (*stubs, "optimizers") if name in own}
        own.update(stubs, optimizers=lambda *_, **__: stub if number == 1 else [stub] * number)
        try:
            yield
        finally:
            for name in (*stubs, "optimizers"):
                del own[name]
            own.update(found)

    @contextmanager
    def _watched_attribute(self, name: str) -> Iterator[None]:
        criterion = getattr(self.module, name, None)
        if not callable(criterion):
            raise RefusedError(
                f"{self.user}: expected `criterion` to name a callable attribute of {type(self.module).__name__} or a loss "
                f"of torch.nn.functional, but got {name!r}."
            )
        functional = isinstance(criterion, nn.modules.loss._Loss)
        owner, attribute = (criterion, "forward") if isinstance(criterion, nn.Module) else (self.module, name)
        original, own = getattr(owner, attribute), owner.__dict__
        found = {attribute: own[attribute]} if attribute in own else {}

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not functional:
                assert self._step is not None
                loss = original(*args, **kwargs)
                self._note(LossCall(original, args[0], args[1], kwargs, name, self._step), loss)
                return loss
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        self._inside = False
        own[attribute] = watched
        try:
            yield
        finally:
            del own[attribute]
            own.update(found)

    def _refuse(self, calls: list[LossCall]) -> None:
        names = ", ".join(call.name for call in calls) or "no loss of torch.nn.functional"
        known = named_losses(self.module)
        raise RefusedError(
            f"{self.user} reads outputs and targets where the training step calls its criterion, but that of "
            f"{type(self.module).__name__} calls {names}. Name one with `criterion=`: an attribute of the module, or a "
            f"function of torch.nn.functional. {f'Loss modules found: {chr(44).join(known)}.' if known else ''}"
        )


class _SeenError(Exception):
    """Ends a manual training step when its criterion has been called."""
