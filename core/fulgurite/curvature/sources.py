# SPDX-License-Identifier: Apache-2.0
"""Where a loss comes from whose curvature is wanted: a model and a function, or the training step of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulgurite.captured import CapturedLoss
from fulgurite.errors import FulguriteError
from fulgurite.losses import LossCall
from fulgurite.measurement import undisturbed
from fulgurite.per_example.examples import Examples


@dataclass(frozen=True)
class Evaluation:
    """The loss of one batch, with its graph.

    Args:
        loss: The loss, a scalar, a mean over examples.
        outputs: What the criterion was given.
        criterion_loss: What the criterion made of it; `loss` may have more terms.
        examples: Number of examples: the weight of the batch in the mean over all batches.
        losses: Gives the loss of each example `[B]`, whose mean is `criterion_loss`.
    """

    loss: Tensor
    outputs: Tensor
    criterion_loss: Tensor
    examples: int
    losses: Callable[[], Tensor]


Source = Callable[[], Iterator[Evaluation]]
"""Evaluates the loss anew, batch by batch, each with a graph of its own."""


def model_loss(model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Iterable[tuple[Any, Any]]) -> Source:
    """Return the loss of a model on batches of inputs and targets.

    Args:
        model: The model, used in the mode that it is in; buffers and random state are put back.
        loss: `loss(outputs, targets)` gives the loss of each example, `[B]`; its mean is the loss.
        batches: Pairs of inputs and targets, as for `fulgurite.per_example.per_example_squares`; gone through once per
            product, unless the operator keeps its graphs.
    """

    def evaluations() -> Iterator[Evaluation]:
        for inputs, targets in batches:
            examples = Examples(inputs, targets)
            with undisturbed(model, training=None) as network, sdpa_kernel(SDPBackend.MATH):
                outputs, aims = examples.call(network, examples.part(0, examples.number))
                losses = loss(outputs, aims)
            if losses.shape != (examples.number,):
                raise ValueError(
                    f"Expected `loss` to return one loss per example, [{examples.number}], but got {list(losses.shape)}. "
                    f"Use reduction='none', and reduce all dimensions but the first."
                )
            mean = losses.mean()
            yield Evaluation(mean, outputs, mean, examples.number, lambda losses=losses: losses)  # type: ignore[misc]

    return evaluations


def step_loss(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: Iterable[Any],
    user: str,
    criterion: str | None = None,
) -> Source:
    """Return the loss that the training step of a module gives on batches: the user's own, in evaluation mode.

    Args:
        trainer: The trainer.
        module: The module.
        batches: Batches on the module's device, such as `fulgurite.samples.fixed.FixedBatches`.
        user: Who asks, for messages.
        criterion: As for `fulgurite.captured.CapturedLoss`.
    """
    captured = CapturedLoss(trainer, module, user, criterion)

    def evaluations() -> Iterator[Evaluation]:
        for batch_idx, batch in enumerate(batches):
            found = captured(batch, batch_idx)
            call = found.call
            yield Evaluation(
                found.loss,
                call.outputs,
                found.criterion_loss,
                len(call.outputs),
                lambda call=call: example_losses(call),  # type: ignore[misc]
            )

    return evaluations


def example_losses(call: LossCall) -> Tensor:
    """Return the loss of each example `[B]` of a criterion's call, so that their mean is the loss.

    A mean that is weighted by class, or leaves out targets, stays the same mean: its denominator is that of all examples.

    Raises:
        FulguriteError: If the criterion has no `reduction`, or its weights are not those of classes.
    """
    arguments = dict(call.arguments)
    reduction = arguments.get("reduction", "mean")
    try:
        if call.name in ("cross_entropy", "nll_loss", "soft_cross_entropy"):
            soft = call.soften()
            raw = soft.replace(arguments={**soft.arguments, "reduction": "none"}).evaluate()
            normalizer = soft.arguments.get("normalizer")
        else:
            if arguments.get("weight") is not None:
                raise TypeError("it has weights")
            raw, normalizer = call.replace(arguments={**arguments, "reduction": "none"}).evaluate(), None
    except TypeError as error:
        raise FulguriteError(
            f"The loss of each example is needed, but {call.name!r} does not tell it: {error}. Use a loss of "
            f"torch.nn.functional, or another curvature."
        ) from error
    examples = len(raw)
    per_example = raw.reshape(examples, -1).sum(dim=1)
    if reduction == "sum":
        return examples * per_example
    count = torch.as_tensor(raw.numel(), device=raw.device) if normalizer is None else normalizer
    return per_example * (examples / count.to(raw.dtype))
