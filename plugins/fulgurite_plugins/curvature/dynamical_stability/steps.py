# SPDX-License-Identifier: Apache-2.0
"""The outputs of a user's training step as a function of the parameters, and the curvature of its loss in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError
from fulgurite.losses import LossCall
from fulgurite_plugins.curvature.dynamical_stability.features import NonFiniteError, OutputCurvature

_SAME = 1e-5
"""Relative difference up to which a second derivative is that of a known loss."""


@dataclass(frozen=True)
class Observed:
    """What the training step made of a batch.

    Args:
        outputs: What the criterion was given, `[N, C]`, detached.
        curvature: The second derivative of the criterion in it.
        loss: The mean loss of the criterion.
        residuals: $r_i$ with $R_i r_i$ the derivative of example $i$'s loss for its output, `[N, C]`; None unless the
            loss is squared.
    """

    outputs: Tensor
    curvature: OutputCurvature
    loss: Tensor
    residuals: Tensor | None


class StepOutputs(nn.Module):
    """A training step as a network: called with a batch, it gives what the criterion is given.

    Args:
        trainer: The trainer.
        module: Its module; the parameters are its own.
        user: Who asks, for messages.
        criterion: The criterion, as for `fulgurite.captured.CapturedLoss`.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, user: str, criterion: str | None) -> None:
        super().__init__()
        self.module = module
        self._captured = CapturedLoss(trainer, module, user, criterion)
        self._user = user

    def forward(self, batch: Any) -> Tensor:
        """Return the outputs that the criterion is given for a batch."""
        return self._captured(batch).call.outputs

    def weights(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """Return weights of the module's parameters by their names here."""
        return {f"module.{name}": ratio for name, ratio in ratios.items()}

    def observe(self, batch: Any) -> Observed:
        """Return the outputs for a batch, and what the criterion is there.

        Raises:
            NonFiniteError: If the loss is not finite.
            RefusedError: If the loss is neither squared nor cross entropy.
        """
        captured = self._captured(batch)
        outputs = captured.call.outputs
        if not bool(captured.criterion_loss.isfinite()):
            raise NonFiniteError("the loss of the measured examples is not finite.")
        curvature = output_curvature(captured.call, self._user)
        residuals = None
        if curvature.kind == "squared":
            (gradient,) = torch.autograd.grad(captured.criterion_loss, [outputs])
            residuals = len(outputs) / curvature.scale**0.5 * gradient.reshape(len(outputs), -1)
        flat = outputs.detach().reshape(len(outputs), -1)
        return Observed(flat, curvature, captured.criterion_loss.detach(), residuals)


def output_curvature(call: LossCall, user: str) -> OutputCurvature:
    r"""Return the second derivative of an example's loss in its output, from the criterion itself.

    The criterion is called on other outputs, in float64, and its second derivative in a random direction compared with a
    multiple of the identity and of $\mathrm{diag}(p) - p p^\top$: so the factors that a criterion has (one half, the mean
    over outputs) need not be known, and nothing depends on how far training has come.

    Args:
        call: The call of the criterion.
        user: Who asks, for messages.

    Raises:
        RefusedError: If it is neither of the two, or the loss is a sum over the batch.
    """
    if call.arguments.get("reduction", "mean") == "sum":
        raise RefusedError(
            f"{user} needs a loss that is a mean over examples, but {call.name} is called with reduction='sum', with which "
            f"the step of SGD grows with the batch. Use the mean, and multiply the learning rate instead."
        )
    examples = len(call.outputs)
    generator = torch.Generator().manual_seed(0)
    device = call.outputs.device
    outputs, direction = torch.randn(2, *call.outputs.shape, generator=generator).to(device, torch.float64).unbind()
    targets = call.targets.detach()
    targets = targets.double() if targets.is_floating_point() else targets
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        outputs.requires_grad_()
        loss = call.replace(outputs=outputs, targets=targets).evaluate()
        (gradient,) = torch.autograd.grad(loss, [outputs], create_graph=True)
        bent = None
        if gradient.requires_grad:
            (bent,) = torch.autograd.grad(gradient, [outputs], direction, allow_unused=True)
    kinds: list[Literal["squared", "cross_entropy"]] = ["squared", "cross_entropy"]
    for kind in kinds[: outputs.ndim]:
        if bent is None:
            break
        unit = OutputCurvature(kind)
        flat, vectors = outputs.detach().reshape(examples, -1), direction.reshape(examples, -1)
        expected = unit.times_root(flat, unit.times_transposed_root(flat, vectors)).view_as(outputs)
        scale = examples * (bent * expected).sum() / expected.square().sum()
        if scale > 0 and (examples * bent - scale * expected).norm() <= _SAME * scale * expected.norm():
            return OutputCurvature(kind, float(scale))
    raise RefusedError(
        f"{user} knows the curvature of squared losses and of cross entropy (without class weights and ignored targets, on "
        f"logits [N, C]), but the training step calls {call.name} on outputs of shape {list(call.outputs.shape)}, whose "
        f"second derivative is neither. Remove the plugin, or name another criterion with `criterion=`."
    )
