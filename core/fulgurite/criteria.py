# SPDX-License-Identifier: Apache-2.0
"""Which call in a training step is the criterion, for each intervention, and what becomes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError
from fulgurite.intervention import Intervention, Step, named_losses
from fulgurite.loss_capture import LossCapture
from fulgurite.losses import FUNCTIONAL_LOSSES, LossCall

_FUNCTION_NAMES = frozenset(function.__name__ for function in FUNCTIONAL_LOSSES)


class Criteria:
    """Finds the criterion of each intervention that reads or changes the loss, and lets them act on its call, in order.

    Args:
        module: The LightningModule.
        readers: The interventions that want to see the call.
        names: The names of all interventions.
        patch: Sets an attribute of an object until the splice is taken out.
        timing: Gives the context in which a hook is called.
        trace: Told what a hook has done.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        readers: Sequence[Intervention],
        names: Mapping[Intervention, str],
        patch: Callable[[Any, str, Any], None],
        timing: Callable[[Intervention, str], Any],
        trace: Callable[[Intervention, str, Callable[[], Any]], None],
    ) -> None:
        self.module = module
        self.readers = readers
        self.names = names
        self.step: Step | None = None
        self.whole_step = any(self.criterion_of(reader) in (None, *_FUNCTION_NAMES) for reader in readers)
        self._changers = [reader for reader in readers if reader.overrides("on_loss")]
        self._patch = patch
        self._timing = timing
        self._trace = trace
        self._capture = LossCapture(self._on_functional_loss, lightning_adapter.is_compiled(module))
        self._matched: dict[Intervention, str] = {}
        self._inside: str | None = None

    def watching(self, step: Step) -> Any:
        """Return the context in which a training step is to be run."""
        self.step, self._matched = step, {}
        return self._capture if self.whole_step else _NOTHING

    def criterion_of(self, intervention: Intervention) -> str | None:
        """Return the name of the criterion: the user's word, else that of a Fulgurite task, else None: to be found."""
        return intervention.criterion or getattr(type(self.module), "fulgurite_criterion", None)

    def lay(self) -> None:
        """Wrap the criteria that are named as attributes; they may not have existed in `setup`."""
        for name in {self.criterion_of(intervention) for intervention in self.readers} - {None, *_FUNCTION_NAMES}:
            criterion = getattr(self.module, str(name), None)
            if not callable(criterion):
                users = ", ".join(self.names[i] for i in self.readers if self.criterion_of(i) == name)
                raise RefusedError(
                    f"{users}: expected `criterion` to name a callable attribute of {type(self.module).__name__} or a loss "
                    f"of torch.nn.functional, but got {name!r}{'' if criterion is None else ' (not callable)'}. "
                    f"{self._loss_modules()}"
                )
            owner, attribute = (criterion, "forward") if isinstance(criterion, nn.Module) else (self.module, str(name))
            functional = isinstance(criterion, nn.modules.loss._Loss)
            self._patch(owner, attribute, self._wrap_criterion(str(name), getattr(owner, attribute), functional))

    def _wrap_criterion(self, name: str, original: Callable[..., Tensor], functional: bool) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def criterion(*args: Any, **kwargs: Any) -> Tensor:
            step = self.step
            if step is None or step.loss is not None or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            self._inside = name
            try:
                if not functional:
                    if len(args) < 2:
                        raise RefusedError(
                            f"Expected the criterion {name!r} of {type(self.module).__name__} to be called as (outputs, "
                            f"targets, ...), but it got {len(args)} positional arguments. Pass both by position."
                        )
                    call = LossCall(original, args[0], args[1], kwargs, name, step)
                    return self._on_loss(call, lambda: original(*args, **kwargs))
                with nullcontext() if self.whole_step else self._capture:
                    return original(*args, **kwargs)
            finally:
                self._inside = None

        return torch.compiler.disable(criterion)

    def _on_functional_loss(self, fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        step = self.step
        if step is None or not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        return self._on_loss(LossCall.bound(fn, args, kwargs, step), lambda: fn(*args, **kwargs))

    def _on_loss(self, call: LossCall, unchanged: Callable[[], Tensor]) -> Tensor:
        """Let the interventions that this call concerns change it, in order, and make it."""
        wanted = (call.name, self._inside) if call.fn in FUNCTIONAL_LOSSES else (self._inside,)
        automatic = call.fn in FUNCTIONAL_LOSSES
        readers = [i for i in self.readers if (c := self.criterion_of(i)) in wanted or (c is None and automatic)]
        if not readers or not getattr(call.outputs, "requires_grad", True):
            return unchanged()
        if call.step.outputs is None:
            call.step.outputs, call.step.targets = call.outputs, call.targets
        found = call
        for intervention in readers:
            self._match(intervention, call.name)
            if intervention in self._changers:
                with self._timing(intervention, "on_loss"):
                    changed = intervention.on_loss(call)
                if not isinstance(changed, LossCall):
                    raise TypeError(
                        f"Expected `on_loss` of {self.names[intervention]} to return a LossCall, but got "
                        f"{type(changed).__name__}. Return the call that shall be made; `return call` changes nothing."
                    )
                self._trace(intervention, "on_loss", functools.partial(_differences, call, changed))
                call = changed
        return unchanged() if call is found else call.evaluate()

    def _match(self, intervention: Intervention, name: str) -> None:
        if intervention in self._matched:
            raise RefusedError(
                f"{self.names[intervention]}: the training step of {type(self.module).__name__} calls several losses "
                f"({self._matched[intervention]}, {name}), and which of them is meant is not clear. Name one with "
                f"`criterion=`: an attribute of the module that is called once in a step (such as self.main_loss), or a "
                f"function of torch.nn.functional. {self._loss_modules()}"
            )
        self._matched[intervention] = name

    def check_found(self) -> None:
        """Refuse a step that returned a loss without calling the criterion of everybody who reads it."""
        for intervention in self.readers:
            if intervention not in self._matched:
                name = self.criterion_of(intervention)
                raise RefusedError(
                    f"{self.names[intervention]}: the training step of {type(self.module).__name__} returned a loss, but "
                    f"no call of {'a loss of torch.nn.functional' if name is None else repr(name)} with outputs that "
                    f"require gradients was seen. Name the criterion with `criterion=`: an attribute of the module that "
                    f"is called as (outputs, targets). {self._loss_modules()}"
                )

    def _loss_modules(self) -> str:
        known = named_losses(self.module)
        return f"Loss modules found: {', '.join(known)}." if known else "It has no loss modules as attributes."


def observed(
    original: Callable[..., Any],
    observers: Sequence[Intervention],
    names: Mapping[Intervention, str],
    make_step: Callable[[Any, int], Step | None],
    compiled: bool,
) -> Callable[..., Any]:
    """Wrap a bound validation or test step so that `on_evaluation_loss` is told of the losses that it calls.

    Args:
        original: The bound step.
        observers: The interventions that read the loss.
        names: The names of all interventions.
        make_step: Makes the step from batch and index; None if nobody is to be told.
        compiled: Whether the module was compiled as a whole.

    Raises:
        RefusedError: When the step is run and calls no loss.
    """
    calls: list[LossCall] = []
    step: Step | None = None

    def observe(fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert step is not None
        calls.append(LossCall.bound(fn, args, kwargs, step))
        return fn(*args, **kwargs)

    capture = LossCapture(observe, compiled)

    @functools.wraps(original)
    def evaluation_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        batch = args[0] if args else kwargs.get("batch")
        step = make_step(batch, args[1] if len(args) > 1 else 0)
        if step is None:
            return original(*args, **kwargs)
        calls.clear()
        with capture:
            result = original(*args, **kwargs)
        if not calls:
            raise RefusedError(
                f"{', '.join(names[o] for o in observers)}: {type(step.module).__name__}.{original.__name__} called no "
                f"loss of torch.nn.functional, so that its outputs and targets are not known. Compute the loss there too."
            )
        for observer in observers:
            for call in calls:
                observer.on_evaluation_loss(call)
        return result

    return evaluation_step


_NOTHING = nullcontext()


def _differences(before: LossCall, after: LossCall) -> str:
    def describe(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return getattr(value, "__name__", repr(value))

    changes = [
        f"{field} {describe(getattr(before, field))} -> {describe(getattr(after, field))}"
        for field in ("fn", "outputs", "targets")
        if getattr(before, field) is not getattr(after, field)
    ]
    return "; ".join(changes) or "unchanged"
