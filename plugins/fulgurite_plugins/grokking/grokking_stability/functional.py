# SPDX-License-Identifier: Apache-2.0
r"""The equations of Prieto, Barsbey, Mediano, Birdal (2025), Grokking at the Edge of Numerical Stability.

| symbol | meaning | argument |
|---|---|---|
| $z$, $y$ | logits; class index or class probabilities | `logits`, `targets` |
| $s$, $g$ | StableMax's replacement of the exponential; its logarithm | `stable_logits` returns $g$ |

$s(x) = x + 1$ for $x \ge 0$ and $1 / (1 - x)$ for $x < 0$; $g(x) = \log s(x) = \mathrm{sign}(x) \log(1 + |x|)$.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fulgurite.errors import FulguriteError, check_argument, check_choice, is_number
from fulgurite.losses import without_autocast
from fulgurite_plugins.grokking.grokking_stability.label_losses import label_losses

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""The precisions in which a loss may be computed, by name."""


def precision(dtype: torch.dtype | str, owner: str, name: str = "compute_dtype") -> torch.dtype:
    """Return the precision that an argument names.

    Args:
        dtype: `"float16"`, `"bfloat16"`, `"float32"`, `"float64"`, or the dtype itself.
        owner: Whose argument it is.
        name: What the argument is called.

    Raises:
        ValueError: If it is none of them.
    """
    known = str(dtype).removeprefix("torch.")
    check_choice(known, PRECISIONS, name, owner)
    return PRECISIONS[known]


class _SignedLog1p(torch.autograd.Function):
    """`sign(x) log(1 + |x|)`; written as such, autograd would give 0 instead of 1 for its slope at 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.abs().log1p_().copysign_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (x.abs() + 1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent / (x.abs() + 1)


def stable_logits(logits: Tensor, alpha: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return $g(\alpha z)$, the logits whose softmax is the StableMax of $\alpha z$.

    They may stand in the place of logits in every softmax, cross entropy, and, as those of a class against a second one
    with logit 0, in every binary cross entropy.

    Args:
        logits: $z$, of any shape.
        alpha: What the logits are multiplied by, positive; an inverse temperature.
        dtype: The precision of the result; by default that of the logits, float32 at least.

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: If the logits are not floating-point numbers, or `alpha` is not positive.

    Example:
        >>> stable_logits(torch.tensor([0.0, torch.e - 1, 1 - torch.e]))
        tensor([ 0.,  1., -1.])
    """
    return _SignedLog1p.apply(_multiplied(logits, alpha, dtype))


def _multiplied(logits: Tensor, alpha: float, dtype: torch.dtype | None) -> Tensor:
    """Return logits in the precision of the computation, multiplied."""
    check_argument(logits.is_floating_point(), "logits", "StableMax", "floating-point numbers", logits.dtype)
    check_argument(is_number(alpha) and alpha > 0, "alpha", "StableMax", "a positive number", alpha)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32) if dtype is None else dtype)
    return logits if alpha == 1 else alpha * logits


def log_stablemax(logits: Tensor, dim: int = -1, alpha: float = 1.0) -> Tensor:
    r"""Return the logarithms of the StableMax probabilities, $g(z_k) - \log \sum_j s(z_j)$.

    Args:
        logits: $z$, with classes along `dim`.
        dim: The dimension of the classes.
        alpha: What the logits are multiplied by, positive.

    Returns:
        Log-probabilities of the same shape, in float32 at least.

    Raises:
        ValueError: If the logits are not floating-point numbers, or `alpha` is not positive.
    """
    with without_autocast(logits.device.type):
        return stable_logits(logits, alpha).log_softmax(dim)


def stablemax(logits: Tensor, dim: int = -1, alpha: float = 1.0) -> Tensor:
    r"""Return the StableMax probabilities $s(z_k) / \sum_j s(z_j)$.

    Args:
        logits: $z$, with classes along `dim`.
        dim: The dimension of the classes.
        alpha: What the logits are multiplied by, positive.

    Returns:
        Probabilities of the same shape, in float32 at least.

    Raises:
        ValueError: If the logits are not floating-point numbers, or `alpha` is not positive.

    Example:
        >>> stablemax(torch.tensor([1.0, 0.0, -1.0]))  # proportional to 2, 1 and 1/2
        tensor([0.5714, 0.2857, 0.1429])
    """
    with without_autocast(logits.device.type):
        return stable_logits(logits, alpha).softmax(dim)


def stablemax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    alpha: float = 1.0,
    compute_dtype: torch.dtype | str = "float64",
    chunk_rows: int | None = None,
    check_finite: bool = False,
) -> Tensor:
    r"""Return the cross entropy of StableMax, $-\log \mathrm{StableMax}(\alpha z)_y$.

    All arguments that `torch.nn.functional.cross_entropy` has mean what they mean there.

    Args:
        logits: $z$, `[B, C, *]`, or `[C]` for one example.
        targets: Class indices `[B, *]`, or class probabilities `[B, C, *]`.
        weight: Class weights `[C]`.
        reduction: `"mean"`, `"sum"` or `"none"`.
        ignore_index: The class index that contributes nothing.
        label_smoothing: In [0, 1].
        alpha: What the logits are multiplied by, positive.
        compute_dtype: The precision of the computation, and of the result.
        chunk_rows: Examples that are computed at once; the others wait, and are computed a second time in the backward
            pass, so that no more than this many rows of logits exist in `compute_dtype`. None for all.
        check_finite: Whether to look for logits that are not finite, which waits for the device.

    Returns:
        A scalar, or `[B, *]` for `"none"`.

    Raises:
        ValueError: If an argument is outside its range, or logits and targets do not fit together.
        FulguriteError: If `check_finite` finds some; it names the first example that has them.

    Example:
        >>> stablemax_cross_entropy(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))  # log(5 / 4)
        tensor(0.2231, dtype=torch.float64)
    """
    _check_call(logits, targets, reduction, chunk_rows)
    if check_finite:
        refuse_non_finite(logits)
    dtype = precision(compute_dtype, "StableMax")
    arguments: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if weight is not None:
        arguments["weight"] = weight.to(dtype)
    soft = targets.is_floating_point()
    rational = weight is None and label_smoothing == 0 and not soft and dtype in (torch.float32, torch.float64)

    def losses(rows: Tensor, wanted: Tensor, how: str) -> Tensor:
        if rational:
            return label_losses(_multiplied(rows, alpha, dtype), wanted, ignore_index, how)
        return F.cross_entropy(stable_logits(rows, alpha, dtype), wanted.to(dtype) if soft else wanted, reduction=how,
                               **arguments)  # fmt: skip

    with without_autocast(logits.device.type):
        if chunk_rows is None or logits.ndim == 1 or len(logits) <= chunk_rows:
            return losses(logits, targets, reduction)
        pairs = zip(logits.split(chunk_rows), targets.split(chunk_rows), strict=True)
        parts = [checkpoint(losses, *pair, "none", use_reentrant=False, preserve_rng_state=False) for pair in pairs]
        whole = torch.cat(parts)
        if reduction == "none":
            return whole
        return whole.sum() if reduction == "sum" else whole.sum() / _denominator(targets, weight, ignore_index, whole)


def _check_call(logits: Tensor, targets: Tensor, reduction: str, chunk_rows: int | None) -> None:
    check_choice(reduction, ("mean", "sum", "none"), "reduction", "StableMax")
    whole = chunk_rows is None or (isinstance(chunk_rows, int) and chunk_rows >= 1)
    check_argument(whole, "chunk_rows", "StableMax", "a positive whole number or None", chunk_rows)
    if targets.is_floating_point():
        fits = targets.shape == logits.shape
        check_argument(fits, "targets", "StableMax", "of the shape of the logits if they are floating-point numbers "
                       "(probabilities); class indices are whole numbers", list(targets.shape))  # fmt: skip
    else:
        shape = logits.shape[:0] if logits.ndim == 1 else (*logits.shape[:1], *logits.shape[2:])
        check_argument(targets.shape == shape, "targets", "StableMax", f"class indices of shape {list(shape)}, for "
                       f"logits {list(logits.shape)}", list(targets.shape))  # fmt: skip


def _denominator(targets: Tensor, weight: Tensor | None, ignore_index: int, losses: Tensor) -> Tensor | int:
    """Return what `cross_entropy` divides a mean by."""
    if targets.is_floating_point():
        return losses.numel()
    kept = targets != ignore_index
    return kept.sum() if weight is None else (weight.to(losses.dtype)[torch.where(kept, targets, 0)] * kept).sum()


def refuse_non_finite(logits: Tensor, where: str = "the batch") -> None:
    """Raise if some logits `[B, C, *]` are not finite; it waits for the device.

    Raises:
        FulguriteError: Naming the first example that has such logits.
    """
    rows = logits.detach().isfinite().reshape(len(logits), -1).all(dim=1)
    if not rows.all():
        first = int(rows.logical_not().nonzero()[0, 0])
        raise FulguriteError(
            f"Expected finite logits, but got {int(rows.logical_not().sum())} of {len(rows)} examples of {where} with "
            f"infinite or NaN logits, first example {first}. Lower the learning rate, or clip gradients."
        )
