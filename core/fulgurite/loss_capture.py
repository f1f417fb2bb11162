# SPDX-License-Identifier: Apache-2.0
"""Seeing every loss of `torch.nn.functional` that somebody's code calls, at the price of one function call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fulgurite.losses import FUNCTIONAL_LOSSES

Loss = Callable[..., Tensor]

_LOSSES: dict[str, Loss] = {function.__name__: function for function in FUNCTIONAL_LOSSES}


class LossCapture:
    """A context in which every loss of `torch.nn.functional` that is called goes to `handler(fn, args, kwargs)` instead.

    A torch function mode sees every call however the code came by the function, but makes every torch operation under it
    slower. So it is there until the first losses have been seen. If they were all called as attributes of
    `torch.nn.functional`, as `F.cross_entropy` and torch's own loss modules are, from then on these attributes are replaced
    while the context is entered and nothing else is touched; else the mode stays.

    What the handler itself calls does not go to it. It runs outside any compiled graph, so that the Python state it keeps
    never triggers a recompilation.

    Args:
        handler: Makes the call, or another one, and returns the loss.
        compiled: Whether the code that calls the losses was compiled as a whole: then the mode stays, through which the
            compiler traces. Under DDP it cannot make sense of the replacements.
    """

    def __init__(
        self, handler: Callable[[Loss, tuple[Any, ...], dict[str, Any]], Tensor], compiled: bool = False
    ) -> None:
        self._handler = handler
        self._way: Literal["both", "mode", "attributes"] = "mode" if compiled else "both"
        self._replacements = {name: self._replacement(function) for name, function in _LOSSES.items()}
        known = {replacement: _LOSSES[name] for name, replacement in self._replacements.items()}
        self._mode = _Mode({**dict(zip(_LOSSES.values(), _LOSSES.values(), strict=True)), **known}, self._on_mode)
        self._found: dict[str, Any] = {}
        self._thread = 0
        self._named: Loss | None = None
        self._seen = self._by_reference = False

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._found = {name: vars(F)[name] for name in self._replacements}
        self._replace()
        if self._way != "attributes":
            self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._way != "attributes":
            self._mode.__exit__(*error)
        self._restore()
        if self._way == "both" and self._seen:
            self._way = "mode" if self._by_reference else "attributes"

    def _replace(self) -> None:
        if self._way != "mode":
            vars(F).update(self._replacements)

    def _restore(self) -> None:
        vars(F).update(self._found)

    def _replacement(self, function: Loss) -> Loss:
        @torch.compiler.disable
        @functools.wraps(function)
        def replacement(*args: Any, **kwargs: Any) -> Tensor:
            if self._thread != threading.get_ident():
                return function(*args, **kwargs)
            if self._way == "both":
                self._named = function
                return function(*args, **kwargs)  # where the mode sees it
            return self._handle(function, args, kwargs)

        return replacement

    def _on_mode(self, function: Loss, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self._seen = True
        self._by_reference |= self._named is not function
        self._named = None
        return self._handle(function, args, kwargs)

    def _handle(self, function: Loss, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self._restore()
        try:
            return self._handler(function, args, kwargs)
        finally:
            self._replace()


class _Mode(TorchFunctionMode):
    """Hands losses to `handler(fn, args, kwargs)`; it keeps no state of its own that a compiler could trace.

    `functions` has the losses, and what stands for them: torch looks itself up among the attributes.
    """

    def __init__(self, functions: Mapping[Any, Loss], handler: Callable[..., Tensor]) -> None:
        super().__init__()
        self.functions = functions
        self.handler = torch.compiler.disable(handler)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.functions:
            return self.handler(self.functions[func], args, kwargs or {})
        return func(*args, **(kwargs or {}))


# Dynamo may trace through the mode in a frame that it compiles, but must not compile the mode's own frame, anew for every
# kind of operation, inside modules that it leaves alone (`nn.Sequential.compile()`).
skip_code(_Mode.__torch_function__.__code__)
