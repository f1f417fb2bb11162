# SPDX-License-Identifier: Apache-2.0
"""The call of a criterion inside a training step: how it is seen, and how it is changed."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from fulgurite.intervention import Step

_FUNCTIONS = (
    F.cross_entropy,
    F.nll_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.kl_div,
    F.poisson_nll_loss,
    F.gaussian_nll_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss,
    F.soft_margin_loss,
    F.hinge_embedding_loss,
)

FUNCTIONAL_LOSSES: dict[Callable[..., Tensor], tuple[str, ...]] = {
    function: tuple(inspect.signature(function).parameters) for function in _FUNCTIONS
}
"""The losses of `torch.nn.functional` that take outputs and targets first, with the names of their arguments."""


@dataclass(frozen=True, slots=True)
class LossCall:
    """One call of a criterion: what an intervention reads and changes in `on_loss`.

    The loss is the raw one: not divided by the accumulation factor, not scaled for mixed precision.

    Args:
        fn: The criterion, called as `fn(outputs, targets, **arguments)`.
        outputs: What the model produced, usually logits `[B, C, *]`.
        targets: What it is compared with: class indices `[B, *]`, probabilities `[B, C, *]` or values.
        arguments: Everything else that the criterion was given (`weight`, `reduction`, `label_smoothing` ...).
        name: The name of the function or of the module's attribute, for messages.
        step: The training step in which the call happens.
    """

    fn: Callable[..., Tensor]
    outputs: Tensor
    targets: Tensor
    arguments: Mapping[str, Any]
    name: str
    step: Step

    @classmethod
    def bound(cls, fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], step: Step) -> LossCall:
        """Return the call `fn(*args, **kwargs)` of a functional loss."""
        names = FUNCTIONAL_LOSSES[fn]
        arguments = dict(zip(names, args, strict=False), **kwargs)
        return cls(fn, arguments.pop(names[0]), arguments.pop(names[1]), arguments, fn.__name__, step)

    def replace(self, **changes: Any) -> LossCall:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def evaluate(self) -> Tensor:
        """Call the criterion."""
        return self.fn(self.outputs, self.targets, **self.arguments)

    def probabilities(self) -> Tensor:
        """Return the predicted probabilities `[B, C, *]`, detached, in float32 at least.

        Raises:
            FulguriteError: If the criterion is not a classification loss over `C` classes.
        """
        outputs = self.outputs.detach()
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        with without_autocast(outputs.device.type):
            return outputs.exp() if self._log_probabilities() else outputs.softmax(dim=1)

    def soften(self) -> LossCall:
        """Return the same loss as a `soft_cross_entropy` over probability targets.

        Class indices become one-hot rows; label smoothing is applied to the rows; `ignore_index` becomes a mask; class
        weights, the reduction and the denominator of a weighted mean stay what they were. The value of the loss is
        unchanged (up to rounding) until somebody changes the targets.

        Raises:
            FulguriteError: If the criterion is not cross entropy or negative log-likelihood over `C` classes.
        """
        if self.fn is soft_cross_entropy:
            return self
        log_probabilities = self._log_probabilities()
        given = self.arguments
        smoothing = given.get("label_smoothing", 0.0)
        weight = given.get("weight")
        classes = self.outputs.shape[1]
        arguments: dict[str, Any] = {
            "weight": weight,
            "reduction": _reduction(given),
            "log_probabilities": log_probabilities,
        }
        if self.targets.is_floating_point():
            targets = self.targets.to(torch.promote_types(self.targets.dtype, torch.float32))
        else:
            kept = self.targets != given.get("ignore_index", -100)
            index = torch.where(kept, self.targets, 0)
            dtype = torch.promote_types(self.outputs.dtype, torch.float32)
            targets = torch.zeros(self.outputs.shape, dtype=dtype, device=self.outputs.device)
            targets.scatter_(1, index.unsqueeze(1), 1.0)
            arguments["mask"] = kept
            arguments["normalizer"] = (kept if weight is None else weight[index] * kept).sum()
        if smoothing:
            targets = targets * (1.0 - smoothing) + smoothing / classes
        return self.replace(fn=soft_cross_entropy, targets=targets, arguments=arguments)

    def _log_probabilities(self) -> bool:
        if self.fn is soft_cross_entropy:
            return bool(self.arguments.get("log_probabilities", False))
        if self.fn not in (F.cross_entropy, F.nll_loss) or self.outputs.ndim < 2:
            raise FulguriteError(
                f"Expected a classification loss (cross_entropy or nll_loss on outputs [B, C, ...]), but the training "
                f"step of {type(self.step.module).__name__} called {self.name!r} on outputs of shape "
                f"{list(self.outputs.shape)}. Remove the plugin, or name the right criterion with its `criterion` "
                f"argument."
            )
        return self.fn is F.nll_loss


def soft_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
    normalizer: Tensor | None = None,
    log_probabilities: bool = False,
) -> Tensor:
    r"""Cross entropy with probability targets, $-\sum_c w_c q_c \log p_c$.

    The same as `torch.nn.functional.cross_entropy` with probability targets, plus a mask and an explicit denominator, so
    that a weighted or masked mean over class indices keeps its value when the indices become probabilities. It is
    computed in float32 at least, also under autocast.

    Args:
        outputs: Logits `[B, C, *]`, or log-probabilities.
        targets: Probabilities `[B, C, *]`.
        weight: Class weights `[C]`.
        reduction: `"mean"`, `"sum"` or `"none"`.
        mask: Boolean `[B, *]`; positions that are False contribute nothing.
        normalizer: The denominator of the mean, a scalar tensor; by default the number of positions.
        log_probabilities: Whether `outputs` are log-probabilities already.

    Returns:
        A scalar, or `[B, *]` for `"none"`.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
        tensor(0.6931)
    """
    with without_autocast(outputs.device.type):
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        logs = outputs if log_probabilities else F.log_softmax(outputs, dim=1)
        targets = targets.to(logs.dtype)
        if weight is not None:
            targets = targets * weight.to(logs.dtype).view(1, -1, *[1] * (outputs.ndim - 2))
        if mask is not None:
            targets = targets * mask.unsqueeze(1)
        if reduction == "none":
            return -(targets * logs).sum(dim=1)
        total = torch.dot(targets.reshape(-1), logs.reshape(-1))
        if reduction == "sum":
            return -total
        if normalizer is None:
            positions = targets.numel() // targets.shape[1]
            return total * (-1.0 / positions if positions else math.nan)
        return total / -normalizer


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return the context in which nothing is cast; entering `torch.autocast` costs as much as a small operation."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _reduction(arguments: Mapping[str, Any]) -> str:
    if arguments.get("size_average") is None and arguments.get("reduce") is None:
        return arguments.get("reduction", "mean")
    return torch.nn._reduction.legacy_get_string(
        arguments.get("size_average"), arguments.get("reduce"), emit_warning=False
    )
