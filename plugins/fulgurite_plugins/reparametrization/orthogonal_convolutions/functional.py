# SPDX-License-Identifier: Apache-2.0
r"""The regularizer of Achour, Malgouyres, Mamalet (2022), Orthogonal Convolutional Neural Networks.

| symbol | meaning | argument |
|---|---|---|
| $K$ | kernel `[M, C, *k]` in PyTorch's layout: filters, channels, taps | `weight` |
| $S$ | stride per axis | `stride` |
| $\mathcal{K}$ | matrix of the convolution with circular padding, from $S N$ to $N$ positions per axis | |
| $W$ | polyphase rows `[G, R, Q, *k']` of the kernel, $R \le Q$ | `rows` |
| $R_d$ | correlation of the rows with themselves at lag $d$ | |

A convolution with stride $S$ on $C$ channels is one with stride 1 on the $C S^n$ channels that pixel-unshuffle makes,
and its kernel has $k' = \lceil k / S \rceil$ taps per axis. In the row case ($M \le C S^n$) the filters are the rows of
$W$, in the column case its channels are: the smaller side. In the row case the filters of $K$ itself, at lags that are
multiples of $S$, have the same correlations. With the lags $d$ from $1 - k'$ to $k' - 1$,

$$L_\text{orth}(K) = \sum_d \lVert R_d - [d = 0] I \rVert_F^2, \qquad R_d = \sum_u W_u W_{u+d}^T.$$

In the row case this is the paper's $\lVert \mathrm{conv}(K, K) - I \rVert_F^2$. In the column case the paper's form minus
$M - C S^n$ is the same number, but a small difference of large ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite_plugins.reparametrization.orthogonal_convolutions.correlation import (
    AtFrequencies,
    AtLags,
    squared_residuals,
)

Method = Literal["auto", "lags", "fft", "conv"]


def lorth(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    method: Method = "auto",
) -> Tensor:
    r"""Return $L_\text{orth}(K)$: zero if and only if the convolution is an isometry, or the adjoint of one (definition 3).

    For inputs of $S N \ge 2k - 1$ positions per axis, $N^n L_\text{orth}$ is exactly
    $\lVert \mathcal{K} \mathcal{K}^T - I \rVert_F^2$ in the row case and
    $\lVert \mathcal{K}^T \mathcal{K} - I \rVert_F^2$ in the column case (theorem A).

    Args:
        weight: Kernel `[M, C / groups, *k]`, with one to three axes or none (a linear layer `[M, C]`).
        stride: Stride $S$, one number or one per axis.
        dilation: Dilation; the kernel counts as stuffed with zeros.
        groups: Groups; their values are added.
        transposed: Whether `weight` belongs to a transposed convolution, `[C, M / groups, *k]`. That is the adjoint of the
            convolution with this very kernel, so that the value is the same.
        method: `"lags"`: a matrix product of the taps that meet for each lag. `"fft"`: the rows at the frequencies of the
            smallest grid that is exact, by real matrix products. `"auto"`: of these two, which takes fewer
            multiplications with the gradient. `"conv"`: the kernel convolved with itself.

    Returns:
        A scalar, at least in float32.

    Raises:
        ValueError: If `method` is unknown, or the arguments do not fit the kernel.

    Example:
        >>> lorth(torch.eye(4).view(4, 4, 1, 1))
        tensor(0.)
    """
    return residual(*correlated_rows(weight, stride, dilation, groups, method), method=method).sum()


class Correlated(NamedTuple):
    """Rows whose correlations at lags that are multiples of a step are to be zero.

    Args:
        rows: `[G, R, Q, *k]`.
        step: Step between lags per axis.
    """

    rows: Tensor
    step: tuple[int, ...]


def correlated_rows(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    method: Method = "auto",
) -> Correlated:
    """Return the rows from which `residual` computes the regularizer of a kernel by a method.

    They are the polyphase rows; but in the row case with a stride the filters as they are, correlated at multiples of the
    stride, if that takes fewer multiplications: the polyphase kernel is padded with zeros.

    Args:
        weight: Kernel `[M, C / groups, *k]`.
        stride: Stride, one number or one per axis.
        dilation: Dilation, one number or one per axis.
        groups: Groups.
        method: As for `lorth`.

    Raises:
        ValueError: If the arguments do not fit the kernel.
    """
    kernel, strides = _with_stuffing(weight, stride, dilation, groups)
    filters, channels = len(kernel) // groups, kernel.shape[1]
    depth = channels * math.prod(strides)
    if any(s > 1 for s in strides) and filters <= depth and method in ("auto", "lags"):
        size = tuple(kernel.shape[2:])
        frequencies = AtFrequencies(tuple(-(-k // s) for k, s in zip(size, strides, strict=True)))
        cost = AtLags(size, strides).cost(filters, channels)
        if method == "lags" or cost < frequencies.cost(filters, depth):
            return Correlated(kernel.reshape(groups, filters, channels, *size), strides)
    return Correlated(_smaller_side(_polyphase(kernel, strides, groups)), (1,) * len(strides))


def kernel_rows(weight: Tensor, groups: int = 1) -> Tensor:
    """Return the rows of the kernel as one matrix `[M, C k^n]`, for the penalty that does not know of the convolution.

    Args:
        weight: Kernel `[M, C / groups, *k]`.
        groups: Groups.

    Returns:
        Rows `[G, R, Q]` of the smaller side, for `residual`.
    """
    return _smaller_side(_at_least_float32(weight).reshape(groups, weight.shape[0] // groups, -1))


def wang_norm(weight: Tensor, stride: int | Sequence[int] = 1, groups: int = 1, padding: int = 1) -> Tensor:
    r"""Return $\lVert \mathrm{conv}(K, K) - I \rVert_F$ as the code of Wang et al. (2020) has it: a baseline.

    It is not squared, and its padding of 1 leaves out the outer lags of kernels with more than two taps. With
    stride 2, a 3x3 kernel and this padding, the output has no lag zero, and the identity is compared with another lag.

    Args:
        weight: Kernel `[M, C / groups, *k]`.
        stride: Stride, one number or one per axis.
        groups: Groups; their norms are added.
        padding: Padding on each side.

    Returns:
        A scalar, at least in float32.
    """
    axes = weight.ndim - 2
    if math.prod(weight.shape[2:]) == 1:
        return residual(kernel_rows(weight, groups)).sqrt().sum()
    kernel = _at_least_float32(weight).reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    lags = _self_convolution(kernel, padding=[padding] * axes, stride=per_axis("stride", stride, axes))
    centre = [size // 2 for size in lags.shape[3:]]
    lags[_at(centre)].diagonal(dim1=1, dim2=2).sub_(1.0)
    return torch.linalg.vector_norm(lags.flatten(1), dim=1).sum()


def polyphase_rows(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    smaller_side: bool = True,
) -> Tensor:
    r"""Return the polyphase kernel, whose stride is 1: tap $S u + \rho$ of channel $c$ is tap $u$ of channel $(c, \rho)$.

    Args:
        weight: Kernel `[M, C / groups, *k]`.
        stride: Stride $S$, one number or one per axis.
        dilation: Dilation, one number or one per axis. Where the stride is 1 it changes no product of rows, and is left out.
        groups: Groups $G$.
        smaller_side: Whether to exchange filters and channels in the column case.

    Returns:
        `[G, R, Q, *k']` with $R \le Q$; with `smaller_side=False` `[G, M / G, C S^n / G, *k']`. At least float32.

    Raises:
        ValueError: If the arguments do not fit the kernel.
    """
    rows = _polyphase(*_with_stuffing(weight, stride, dilation, groups), groups)
    return _smaller_side(rows) if smaller_side else rows


def residual(rows: Tensor, step: Sequence[int] | None = None, method: Method = "auto") -> Tensor:
    r"""Return $\sum_d \lVert R_d - [d = 0] I \rVert_F^2$ of each group of rows, without making the target.

    Args:
        rows: `[G, R, Q, *k]`.
        step: Step between lags per axis; None for all lags. With a step it is computed at lags, whatever the method.
        method: As for `lorth`.

    Returns:
        `[G]`.

    Raises:
        ValueError: If `method` is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"Expected `method` to be one of {', '.join(map(repr, get_args(Method)))}, but got {method!r}."
        )
    kernel = tuple(rows.shape[3:])
    if step is not None and any(s > 1 for s in step):
        return squared_residuals(rows, AtLags(kernel, tuple(step)))
    if method == "conv" and math.prod(kernel) > 1:
        lags = _self_convolution(rows, padding=[k - 1 for k in kernel])
        lags[_at(k - 1 for k in kernel)].diagonal(dim1=1, dim2=2).sub_(1.0)
        return lags.flatten(1).square().sum(dim=1)
    return squared_residuals(rows, _form(rows, method))


def _form(rows: Tensor, method: Method) -> AtLags | AtFrequencies:
    kernel = tuple(rows.shape[3:])
    lags, frequencies = AtLags(kernel, (1,) * len(kernel)), AtFrequencies(kernel)
    if math.prod(kernel) == 1 or method == "lags":
        return lags
    if method == "fft":
        return frequencies
    forms: tuple[AtLags | AtFrequencies, ...] = (lags, frequencies)
    return min(forms, key=lambda form: form.cost(rows.shape[1], rows.shape[2]))


def stuffed(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """Return a kernel `[M, C, *k]` with `dilation - 1` zeros between its taps."""
    if all(d == 1 for d in dilation):
        return weight
    spread = weight.new_zeros(
        *weight.shape[:2], *(d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))
    )
    spread[_at(slice(None, None, d) for d in dilation)] = weight
    return spread


def as_kernel(weight: Tensor) -> Tensor:
    """Return a kernel `[M, C, *k]` as it is, and the matrix `[M, C]` of a linear layer with one axis of one tap.

    Raises:
        ValueError: If it is neither.
    """
    if not 2 <= weight.ndim <= 5:
        raise ValueError(
            f"Expected `weight` to be a kernel [M, C, *k] with at most 3 axes, but got {list(weight.shape)}."
        )
    return weight.unsqueeze(-1) if weight.ndim == 2 else weight


def per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one positive integer per axis.

    Raises:
        ValueError: If it is not that.
    """
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or not all(isinstance(v, int) and v >= 1 for v in values):
        raise ValueError(f"Expected `{name}` to be a positive integer, or {axes} of them, but got {value!r}.")
    return values


def _self_convolution(kernel: Tensor, padding: list[int], stride: Sequence[int] = (1,)) -> Tensor:
    """Convolve each of `[G, R, Q, *k]` with itself, the rows being images with Q channels: `[G, R, R, *lags]`."""
    groups, rows = kernel.shape[:2]
    convolution = (F.conv1d, F.conv2d, F.conv3d)[kernel.ndim - 4]
    images = kernel.transpose(0, 1).flatten(1, 2)
    lags = convolution(images, kernel.flatten(0, 1), padding=padding, stride=tuple(stride), groups=groups)
    return lags.unflatten(1, (groups, rows)).transpose(0, 1)


def _with_stuffing(
    weight: Tensor, stride: int | Sequence[int], dilation: int | Sequence[int], groups: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the kernel `[M, C, *k]` with the zeros of its dilation, in float32 or better, and the stride per axis."""
    weight = as_kernel(weight)
    axes = weight.ndim - 2
    if groups < 1 or len(weight) % groups:
        raise ValueError(f"Expected `groups` to divide the {len(weight)} filters of `weight`, but got {groups!r}.")
    strides = per_axis("stride", stride, axes)
    dilations = [d if s > 1 else 1 for d, s in zip(per_axis("dilation", dilation, axes), strides, strict=True)]
    return stuffed(_at_least_float32(weight), dilations), strides


def _polyphase(kernel: Tensor, strides: Sequence[int], groups: int) -> Tensor:
    """Return the taps `[M, C, *k]` split by their remainders, `[G, M / G, C S^n, *k']`, padded with zeros."""
    axes = len(strides)
    if any(s > 1 for s in strides):
        padding = [-k % s for k, s in zip(kernel.shape[2:], strides, strict=True)]
        padded = F.pad(kernel, [p for pad in reversed(padding) for p in (0, pad)])
        split = padded.reshape(
            *kernel.shape[:2], *(x for k, s in zip(padded.shape[2:], strides, strict=True) for x in (k // s, s))
        )
        remainders, taps = range(3, 3 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
        kernel = split.permute(0, 1, *remainders, *taps).flatten(1, 1 + axes)
    return kernel.reshape(groups, len(kernel) // groups, *kernel.shape[1:])


def _smaller_side(rows: Tensor) -> Tensor:
    return rows.transpose(1, 2) if rows.shape[1] > rows.shape[2] else rows


def _at(places: Iterable[int | slice]) -> Any:
    """Return the index of places on the last axes."""
    return (..., *places)


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
