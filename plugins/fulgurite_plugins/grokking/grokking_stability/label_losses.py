# SPDX-License-Identifier: Apache-2.0
r"""The cross entropy of StableMax for class indices, without exponentials and with logarithms of sums only.

$s$ is rational, so that one sum per example gives its loss, and its gradient has as few operations:

$$
-\log \mathrm{StableMax}(z)_y = \log \left( 1 + \frac{\sum_{j \ne y} s(z_j)}{s(z_y)} \right), \qquad
\frac{\partial}{\partial z_k} = \frac{r(z_k)^2}{\sum_j s(z_j)} \; (k \ne y), \qquad
\frac{\partial}{\partial z_y} = -\frac{1 - \mathrm{StableMax}(z)_y}{1 + |z_y|},
$$

where $r(x) = 1 / (1 - \min(x, 0))$ and $s(x) = \max(x, 0) + r(x)$. Nothing is subtracted from 1 or from a sum, so that
losses and gradients of well-fitted examples keep their digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LINEAR = 40.0
"""Where softplus is its argument, in float64 too."""


def label_losses(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Return the cross entropy of StableMax.

    Args:
        logits: $z$ in the precision of the computation, `[B, C, *]`, or `[C]` for one example.
        targets: Class indices `[B, *]`, or a scalar for one example.
        ignore_index: The class index that contributes nothing.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or for `"none"` losses of the shape of `targets`.

    Raises:
        IndexError: If an index is not that of a class (on a CPU; accelerators stop in a kernel).
    """
    F.nll_loss(logits.detach(), targets, ignore_index=ignore_index, reduction="none")  # only to check the indices
    dim = min(logits.ndim - 1, 1)
    indices = targets.long().clamp(0, logits.shape[dim] - 1).unsqueeze(dim)
    kept = targets != ignore_index
    if logits.ndim == 1:
        logits, indices, kept = logits.unsqueeze(0), indices.unsqueeze(0), kept.view(1)
    losses: Tensor = _Losses.apply(logits, indices, kept.unsqueeze(1))[0]
    if reduction == "none":
        return losses.view(targets.shape)
    weights = kept.to(losses.dtype) if reduction == "sum" else kept / kept.sum(dtype=losses.dtype)
    return losses.flatten().dot(weights.flatten())


class _Losses(torch.autograd.Function):
    """The loss of each example, and the sum of the other classes' $s$, scaled.

    For logits `[B, C, *]`, indices `[B, 1, *]` and whether examples count `[B, 1, *]`, both are `[B, 1, *]`.
    """

    @staticmethod
    def forward(z: Tensor, y: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        label, scale = z.gather(1, y), _scale(z)
        work = z.clamp_min(0).mul_(scale).scatter_(1, y, 0.0)
        others = work.sum(1, keepdim=True)
        torch.clamp_max(z, 0, out=work).sub_(1).reciprocal_().scatter_(1, y, 0.0)
        others.sub_(work.sum(1, keepdim=True), alpha=scale)
        infinite = others.add(label.clamp_min(0), alpha=scale)
        others.add_(infinite, alpha=0)  # NaN for infinite logits, as the softmax of them is
        log_odds = others.log().sub_(math.log(scale)).sub_(label.abs().log1p_().copysign_(label))
        return F.softplus(log_odds, threshold=_LINEAR).where(kept, 0.0), others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor | None, of_others: Tensor | None) -> tuple[Tensor, None, None]:
        """Differentiate in operations that can be differentiated again; only then the second output has a gradient."""
        z, y, kept, others = ctx.saved_tensors
        by_label, by_others = _slopes(z, y, others)
        of_losses = torch.zeros_like(others) if of_losses is None else of_losses.where(kept, 0.0)
        by_others = of_losses * by_others
        if of_others is not None:
            by_others = by_others + of_others * _scale(z)
        inverse = _negative_inverse(z)
        gradient = (inverse * by_others).mul_(inverse)  # in this order, lest squares of small numbers vanish
        # it puts them there as `scatter_` would, for which `vmap` has no rule
        return gradient.scatter_reduce_(1, y, of_losses * by_label, "sum", include_self=False), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        z, y, kept, others = ctx.saved_tensors
        by_label, by_others = _slopes(z, y, others)
        moved = (_negative_inverse(z).square() * tangent).scatter(1, y, 0.0).sum(1, keepdim=True)
        return (by_label * tangent.gather(1, y) + by_others * moved).where(kept, 0.0), _scale(z) * moved

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, tuple[int, int]]:
        """Take the examples of all as one batch."""
        size = info.batch_size
        moved = (
            t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(inputs, dims, strict=True)
        )
        found = _Losses.apply(*(t.flatten(0, 1) for t in moved))
        return tuple(t.unflatten(0, (size, -1)) for t in found), (0, 0)


def _scale(z: Tensor) -> float:
    """Return a power of two with which sums over classes do not overflow."""
    return 0.5 ** z.shape[1].bit_length()


def _slopes(z: Tensor, y: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the losses in the label's logit, and, divided by $r^2$, in those of other classes."""
    label, scale = z.gather(1, y), _scale(z)
    size = label.abs() + 1
    total = others + scale * torch.where(label < 0, 1 / size, 1 + label)  # which has slope 1 at 0, and `size` none
    return -others / total / size, (total / scale).reciprocal()


def _negative_inverse(z: Tensor) -> Tensor:
    """Return $-r(z)$; of `minimum` the slope at 0 is 1/2, so that the curvature there is the mean of both sides."""
    return torch.minimum(z, z.new_zeros(())).sub_(1).reciprocal_()
