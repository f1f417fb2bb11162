# SPDX-License-Identifier: Apache-2.0
"""A frozen copy of a LightningModule that repeats the training step on the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fulgurite import distributed
from fulgurite.errors import FulguriteError
from fulgurite.loss_capture import LossCapture
from fulgurite.losses import LossCall
from fulgurite.phase import LOGGERS, positional, silent
from fulgurite.random import replayed

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from fulgurite.intervention import Step

Mode = Literal["eval", "train"]


class FrozenCopy:
    """A copy of a module as it is now: not wrapped, not optimised, not part of the module tree.

    Its forward is the user's own `training_step` under `no_grad`, from the random state in which the student's step began,
    so that it sees the same augmentation; logging is muted, and the student's random stream goes on as if it had not run.

    Args:
        module: The module to copy. Plain deep copy: what a splice laid on it is left out.
        mode: `"eval"` (dropout off, running statistics used), or `"train"`, which leaves the running statistics of the
            copy as they are.
    """

    def __init__(self, module: pl.LightningModule, mode: Mode = "eval") -> None:
        trainer = module._trainer  # a CLI's module holds it, through the function that makes its optimizer
        shared = {id(each): each for each in (trainer, getattr(trainer, "datamodule", None))}
        with _DetachedCopies():
            self.module = copy.deepcopy(module, shared)
        self.module.requires_grad_(False)
        self.module.train(mode == "train")
        self._buffers = dict(self.module.named_buffers()) if mode == "train" else {}
        for name in LOGGERS:
            self.module.__dict__[name] = silent
        self._calls: list[LossCall] = []
        self._capture = LossCapture(self._observe)
        self._step: Step | None = None
        self._arguments = positional(self.module.training_step)

    def loss_call(self, step: Step, name: str) -> LossCall:
        """Return the call of the criterion that the copy makes on the step's batch; its outputs carry no gradient.

        Args:
            step: The student's step; it must have been begun with `replays_step`.
            name: The name of the functional loss to look for.

        Raises:
            FulguriteError: If the copy makes no such call.
        """
        self._calls, self._step = [], step
        saved = {key: value.clone() for key, value in self._buffers.items()}
        self.module._trainer = step.trainer
        arguments = (step.batch, step.batch_idx)[: self._arguments]
        try:
            with torch.no_grad(), replayed(step.random_state, step.module.device), self._capture:
                self.module.training_step(*arguments)
        finally:
            self.module._trainer = None
            for key, value in saved.items():
                self._buffers[key].copy_(value)
            calls, self._calls, self._step = self._calls, [], None
        for call in calls:
            if call.name == name:
                return call
        raise FulguriteError(
            f"The frozen copy of {type(self.module).__name__} did not call {name} on the same batch (it called "
            f"{', '.join(call.name for call in calls) or 'no loss'}). Its training_step must not depend on anything but "
            f"the batch, the weights and the random state."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds a function that cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_capture"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._capture = LossCapture(self._observe)

    def _observe(self, fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self._step is not None
        self._calls.append(LossCall.bound(fn, args, kwargs, self._step))
        return fn(*args, **kwargs)

    def synchronize(self) -> None:
        """Give all ranks the parameters and buffers of rank 0; buffers may differ between ranks."""
        distributed.broadcast_(self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of parameters and buffers, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Overwrite parameters and buffers."""
        for name, tensor in self.tensors().items():
            tensor.data.copy_(state[name])


class _DetachedCopies(TorchFunctionMode):
    """Lets a module be copied that keeps tensors with a graph, such as the outputs of an epoch; torch refuses to."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))
