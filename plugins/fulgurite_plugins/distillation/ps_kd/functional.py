# SPDX-License-Identifier: Apache-2.0
r"""The equations of Kim, Ji, Yoon, Hwang (2021), Self-Knowledge Distillation with Progressive Refinement of Targets.

| symbol | meaning | argument |
|---|---|---|
| $t$, $T$ | epoch, counted from 1; planned number of epochs | `step`, `total` |
| $\alpha_t$, $\alpha_T$ | trust in the past prediction; its final value | `alpha`, `final` |
| $y$, $q$ | one-hot label; refined target | `targets`; result |
| $M$ | prediction of the previous epoch | `past` |
| $p$ | present prediction | `p` |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def progressive_weight(step: float, total: float, final: float) -> float:
    r"""Return $\alpha_t = \max(0, \alpha_T\, t / T)$ (section 3.2).

    Args:
        step: The epoch $t$, counted from 1.
        total: The planned number of epochs $T$, positive.
        final: The weight at the end, $\alpha_T$ in [0, 1].

    Raises:
        ValueError: If `total` is not positive or `final` is outside [0, 1].

    Example:
        >>> progressive_weight(150, 300, 0.8)
        0.4
    """
    if total <= 0:
        raise ValueError(f"Expected `total` to be a positive number of epochs, but got {total!r}.")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"Expected `final` to be in [0, 1], but got {final!r}.")
    return max(0.0, final * step / total)


def refine_targets(targets: Tensor, past: Tensor, alpha: float | Tensor, num_classes: int | None = None) -> Tensor:
    r"""Return the refined targets $q = (1 - \alpha)\, y + \alpha\, M$ (equation 2).

    Args:
        targets: Class indices `[B, *]`, or probabilities `[B, C, *]` (floating point).
        past: Past predictions `[B, C, *]`; rows along dimension 1 sum to 1.
        alpha: Trust in the past: a number in [0, 1], or a tensor that broadcasts to `past`, such as `[B, 1]`.
        num_classes: Number of classes $C$; by default that of `past`.

    Returns:
        Probabilities `[B, C, *]` in the dtype of `past`, at least float32.

    Raises:
        ValueError: If the shapes do not fit together or `alpha` is a number outside [0, 1].

    Example:
        >>> refine_targets(torch.tensor([0]), torch.tensor([[0.5, 0.5]]), 0.4)
        tensor([[0.8000, 0.2000]])
    """
    classes = past.shape[1] if num_classes is None else num_classes
    if past.ndim < 2 or past.shape[1] != classes:
        raise ValueError(f"Expected `past` of shape [B, {classes}, ...], but got {list(past.shape)}.")
    if not isinstance(alpha, Tensor) and not 0.0 <= alpha <= 1.0:
        raise ValueError(f"Expected `alpha` to be in [0, 1], but got {alpha!r}.")
    dtype = torch.promote_types(past.dtype, torch.float32)
    if not targets.is_floating_point():
        targets = F.one_hot(targets.long(), classes).movedim(-1, 1)
    if targets.shape != past.shape:
        raise ValueError(
            f"Expected `targets` and `past` to describe the same examples, but got shapes {list(targets.shape)} (as "
            f"probabilities) and {list(past.shape)}."
        )
    weight = alpha.to(dtype) if isinstance(alpha, Tensor) else float(alpha)
    return torch.lerp(targets.to(dtype), past.to(dtype), weight)


def pskd_gradient_ratio(p: Tensor, r: Tensor, alpha: float | Tensor, target: Tensor) -> Tensor:
    r"""Return by how much refinement scales the L1 norm of the logits' gradient of each example (section 3.3).

    With $g$ the true class and $r$ the past prediction, the gradient is $p_g - (1 - \alpha + \alpha r_g)$ for $g$ and
    $p_c - \alpha r_c$ for the others. Where $p_g \le 1 - \alpha (1 - r_g)$ and $p_c \ge \alpha r_c$ for all $c \ne g$, the
    ratio of its L1 norm to that of the hard-label gradient is

    $$1 - \alpha\, \frac{1 - r_g}{1 - p_g},$$

    so that well-known examples get a smaller gradient and examples that got worse a relatively larger one.

    Args:
        p: Present predictions `[B, C]`.
        r: Past predictions `[B, C]`.
        alpha: Trust in the past, in [0, 1].
        target: True classes `[B]`.

    Returns:
        The ratio `[B]`; NaN outside the region in which the identity holds.
    """
    index = target.unsqueeze(1)
    p_true, r_true = p.gather(1, index).squeeze(1), r.gather(1, index).squeeze(1)
    others = (p >= alpha * r).scatter(1, index, True).all(dim=1)
    inside = others & (p_true <= 1 - alpha * (1 - r_true)) & (p_true < 1)
    ratio = 1 - alpha * (1 - r_true) / (1 - p_true)
    return torch.where(inside, ratio, torch.nan)
