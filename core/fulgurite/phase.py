# SPDX-License-Identifier: Apache-2.0
"""An extra phase of a training: the user's own `training_step` on another batch, which nothing else notices."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fulgurite import distributed, lightning_adapter
from fulgurite.errors import FulguriteError
from fulgurite.measurement import kept_buffers, kept_modes
from fulgurite.random import seeded

if TYPE_CHECKING:
    import lightning.pytorch as pl

LOGGERS = ("log", "log_dict", "print")
"""The methods by which a training step speaks to the outside."""


@contextmanager
def unnoticed(module: pl.LightningModule, seed: int) -> Iterator[None]:
    """Run a block in evaluation mode, and leave the module as if it had not run.

    Logging is muted; the mode of each submodule, all buffers, the state of torchmetrics and torch's global generators (which
    the block finds seeded) are put back. The loops of the trainer, and so its counters, are not involved. What a training
    step writes elsewhere, such as into lists on the module, is not undone; nor are draws from NumPy's or Python's own
    generators.

    Args:
        module: The LightningModule, not its DDP wrapper.
        seed: What the block draws from torch's global generators depends on it alone.
    """
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, module.device))
        stack.enter_context(muted(module))
        stack.enter_context(kept_modes(module))
        stack.enter_context(kept_buffers(module))
        stack.enter_context(_evaluating(module))
        for child in module.modules():
            if isinstance(child, Metric):
                stack.enter_context(_metric_kept(child))
        yield


def training_loss(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss of the user's own `training_step` on a batch, with its graph, in the trainer's precision.

    Under float16 autocast, where small gradients vanish without a loss scale of their own, it is computed in float32.

    Args:
        trainer: The trainer.
        module: Its module, in `unnoticed`.
        batch: The batch, on its device.
        batch_idx: What the step is told as the index of the batch.

    Raises:
        FulguriteError: If the step returns no loss.
    """
    scaled = lightning_adapter.precision_name(trainer) == "16-mixed"
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if not scaled:
            stack.enter_context(trainer.precision_plugin.train_step_context())
        output = module.training_step(*(batch, batch_idx)[: positional(module.training_step)])
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise FulguriteError(
            f"{type(module).__name__}.training_step returned no loss for a batch outside the usual training, but a "
            f"{type(output).__name__}. It is called on such batches in evaluation mode, and must return its loss there too."
        )
    return loss


def mean_gradients(loss: Tensor, tensors: Sequence[Tensor], *values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of a loss for some tensors alone, and some values, averaged over ranks in one collective.

    No gradient of a parameter of the model is computed or left behind; under DDP its reducer is not involved.

    Args:
        loss: A scalar.
        tensors: What to differentiate for.
        values: Further tensors to average.

    Returns:
        The gradients (zero where the loss does not depend on a tensor), and the averages of `values`.
    """
    gradients = torch.autograd.grad(loss, list(tensors), allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]
    parts += [value.detach() for value in values]
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in parts], torch.float32)
    flat = distributed.average_(torch.cat([part.reshape(-1).to(dtype) for part in parts]))
    chunks = zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    averaged = [chunk.view_as(part).to(part.dtype) for chunk, part in chunks]
    return averaged[: len(tensors)], averaged[len(tensors) :]


@contextmanager
def muted(module: pl.LightningModule) -> Iterator[None]:
    """Let a module log and print nothing."""
    found = {name: module.__dict__[name] for name in LOGGERS if name in module.__dict__}
    for name in LOGGERS:
        module.__dict__[name] = silent
    try:
        yield
    finally:
        for name in LOGGERS:
            del module.__dict__[name]
        module.__dict__.update(found)


def silent(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in the place of a method that logs or prints."""


def positional(training_step: Callable[..., Any]) -> int:
    """Return how many of (batch, batch_idx) a bound training step takes."""
    parameters = inspect.signature(training_step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    return min(2, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    recurrent = [child for child in module.modules() if isinstance(child, nn.RNNBase) and child.training]
    dropouts = [rnn.dropout for rnn in recurrent]
    module.eval()
    for rnn in recurrent:  # cuDNN has no backward pass for recurrent layers in evaluation mode
        rnn.training, rnn.dropout = True, 0.0
    try:
        yield
    finally:
        for rnn, dropout in zip(recurrent, dropouts, strict=True):
            rnn.dropout = dropout


@contextmanager
def _metric_kept(metric: Metric) -> Iterator[None]:
    """Private: what torchmetrics keeps beside the states; `Metric.forward` changes all of it."""
    others = {name: getattr(metric, name) for name in ("_update_count", "_computed", "_forward_cache")}
    states = {
        name: value.clone() if isinstance(value, Tensor) else list(value) for name, value in metric.metric_state.items()
    }
    try:
        yield
    finally:
        for name, value in {**states, **others}.items():
            setattr(metric, name, value)
