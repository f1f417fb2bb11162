# SPDX-License-Identifier: Apache-2.0
"""What Achour, Malgouyres, Mamalet (2022) prove: which orthogonal convolutions exist, and how near to an isometry one is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fulgurite_plugins.reparametrization.orthogonal_convolutions.correlation import frequency_response
from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import (
    as_kernel,
    per_axis,
    polyphase_rows,
    residual,
    stuffed,
)

Padding = Literal["circular", "zeros", "valid"]

_CHUNK = 2**24
"""Numbers that one batch of matrices of `conv_singular_values` may have."""


class Existence(NamedTuple):
    """Whether an orthogonal convolution of a shape exists, and why."""

    exists: bool
    reason: str


class IsometryBounds(NamedTuple):
    r"""How near to an isometry a convolution is, on inputs of any size.

    Args:
        eps: $\varepsilon$ by which $\lVert \mathcal{K} x \rVert^2$ differs from $\lVert x \rVert^2$ at most, relative to it,
            in the column case; in the row case the same for the adjoint.
        lipschitz_upper: $\sqrt{1 + \varepsilon}$, an upper bound of the Lipschitz constant in both cases.
    """

    eps: Tensor
    lipschitz_upper: Tensor


def orthogonal_conv_exists(
    out_channels: int,
    in_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding_mode: Padding = "circular",
    dilation: int | Sequence[int] = 1,
) -> Existence:
    r"""Return whether an orthogonal convolution of this shape exists (theorem 4), and the inequality that says so.

    With circular padding, of the $S$ inputs per stride and axis a kernel reaches $r = \min(k, S)$. In the row case
    ($M \le C S^n$) an orthogonal kernel exists if and only if $M \le C \prod r$; in the column case if and only if
    $S \le k$ on every axis. With zeros around the image, only taps that never meet them can be other than zero, which are
    at most $S$ per axis; `valid` padding is as circular in the row case, and needs $k = S$ in the column case.

    Args:
        out_channels: Filters $M$ (of one group).
        in_channels: Channels $C$ (of one group).
        kernel_size: Taps $k$; an integer is the size on two axes.
        stride: Stride $S$, one number or one per axis.
        padding_mode: `"circular"`, `"zeros"` (as many outputs as inputs per stride), or `"valid"` (no padding).
        dilation: Dilation; with a factor in common with the stride, fewer inputs are reached.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> orthogonal_conv_exists(8, 3, 3)
        Existence(exists=True, reason='column case, M = 8 >= C*S^n = 3; S <= k')
        >>> orthogonal_conv_exists(129, 8, 3, 4).exists
        False
    """
    if padding_mode not in get_args(Padding):
        choices = ", ".join(map(repr, get_args(Padding)))
        raise ValueError(f"Expected `padding_mode` to be one of {choices}, but got {padding_mode!r}.")
    for name, number in (("out_channels", out_channels), ("in_channels", in_channels)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"Expected `{name}` to be a positive integer, but got {number!r}.")
    axes = 2 if isinstance(kernel_size, int) else len(kernel_size)
    kernel = per_axis("kernel_size", kernel_size, axes)
    strides, dilations = per_axis("stride", stride, axes), per_axis("dilation", dilation, axes)
    depth = in_channels * math.prod(strides)
    if out_channels > depth and padding_mode == "valid":
        fits = [k == s and (d == 1 or k == 1) for k, s, d in zip(kernel, strides, dilations, strict=True)]
        text = "without padding, inputs at the border meet fewer taps than others unless k = S"
        return Existence(all(fits), f"column case, M = {out_channels} >= C*S^n = {depth}; {text}")
    reach = [_reach(k, s, d, padding_mode == "zeros") for k, s, d in zip(kernel, strides, dilations, strict=True)]
    return _existence(out_channels, in_channels, depth, math.prod(reach), padding_mode == "zeros")


def _reach(k: int, s: int, d: int, zeros: bool) -> int:
    """Return how many of the S inputs of a stride the taps reach, of those taps that never meet the zeros around."""
    if not zeros:
        return min(k, s // math.gcd(s, d))
    before = d * (k - 1) // 2
    return sum(before <= a * d < before + s for a in range(k))


def _existence(filters: int, channels: int, depth: int, reach: int, zeros: bool) -> Existence:
    most = channels * reach
    among = "taps that never meet the zeros around the image" if zeros else "taps"
    if filters <= depth:
        case = f"row case, M = {filters} <= C*S^n = {depth}"
        if filters <= most:
            return Existence(True, f"{case}; M <= {most}, the inputs per stride that {among} reach")
        return Existence(
            False, f"{case}, but M > {most}, the inputs per stride that {among} reach: at most {most} filters"
        )
    case = f"column case, M = {filters} >= C*S^n = {depth}"
    if most == depth:
        return Existence(True, f"{case}; S <= k")
    return Existence(
        False,
        f"{case}, but S > k on some axis: of {depth} inputs per stride the {among} reach {most}: at most {most} filters",
    )


def isometry_constant(
    out_channels: int,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    sharp: bool = True,
) -> int:
    r"""Return $\alpha$ with $\mathrm{err}_s^2 \le \alpha L_\text{orth}$ for the spectral norm of the residual (theorem B).

    The residual has one block $E_d$ per lag, and its norm at any frequency is at most $\sum_d \lVert E_d \rVert_F$. So, by
    Cauchy and Schwarz, the number of lags $\prod (2 \lceil k / S \rceil - 1)$ will do: the sharp constant. The paper's is
    $M \prod (2 \lfloor (k-1)/S \rfloor + 1)$ in the row case, $C \prod (2k - 1)$ in the column case, the smaller if
    $M = C S^n$.

    Args:
        out_channels: Filters $M$.
        in_channels: Channels $C$.
        kernel_size: Taps per axis, after dilation.
        stride: Stride, one number or one per axis.
        sharp: Whether to return the sharp constant, or the paper's.
    """
    strides = per_axis("stride", stride, len(kernel_size))
    lags = math.prod(2 * ((k - 1) // s) + 1 for k, s in zip(kernel_size, strides, strict=True))
    if sharp:
        return lags
    depth = in_channels * math.prod(strides)
    rows, columns = out_channels * lags, in_channels * math.prod(2 * k - 1 for k in kernel_size)
    return min(rows, columns) if out_channels == depth else rows if out_channels < depth else columns


def isometry_bounds(
    weight: Tensor, stride: int | Sequence[int] = 1, dilation: int | Sequence[int] = 1, groups: int = 1
) -> IsometryBounds:
    r"""Return $\varepsilon = \sqrt{\alpha L_\text{orth}}$ and $\sqrt{1 + \varepsilon}$, for inputs of any size (theorem C).

    Args:
        weight: Kernel `[M, C / groups, *k]`.
        stride: Stride, one number or one per axis.
        dilation: Dilation.
        groups: Groups; the worst of them counts.

    Raises:
        ValueError: If the arguments do not fit the kernel.

    Example:
        >>> isometry_bounds(torch.eye(4).view(4, 4, 1, 1)).lipschitz_upper
        tensor(1.)
    """
    rows = polyphase_rows(weight, stride, dilation, groups)
    lags = math.prod(2 * k - 1 for k in rows.shape[3:])
    eps = (lags * residual(rows).amax()).sqrt()
    return IsometryBounds(eps, (1 + eps).sqrt())


def conv_singular_values(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    input_size: int | Sequence[int] = 8,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return all singular values of a convolution with circular padding, exactly, by Fourier transform.

    Args:
        weight: Kernel `[M, C / groups, *k]`.
        stride: Stride, one number or one per axis.
        input_size: Positions of the input per axis, a multiple of the stride.
        dilation: Dilation.
        groups: Groups.

    Returns:
        Singular values in falling order: `min(M, C S^n)` for each position of the output.

    Raises:
        ValueError: If the arguments do not fit the kernel or the stride does not divide the size.

    Example:
        >>> conv_singular_values(2 * torch.eye(3).view(3, 3, 1), input_size=2)
        tensor([2., 2., 2., 2., 2., 2.])
    """
    parts = []
    for real, imaginary, count in _responses(weight, stride, input_size, dilation, groups):
        values = torch.linalg.svdvals(torch.complex(real, imaginary))
        parts.append(values.repeat_interleave(count.to(torch.int64), dim=0).flatten())
    return torch.cat(parts).sort(descending=True).values


def certified_norm(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    grid: int = 32,
) -> Tensor:
    r"""Return an upper bound of the norm of a convolution on inputs of any size, close to it.

    $\lVert A_f u \rVert^2$ is a trigonometric polynomial of degree $k' - 1$ per axis in the frequency $f$. Such a polynomial
    is, at the point of a grid of $N$ points that lies next to its maximum, at least that times $\cos(\pi (k' - 1) / N)$
    (Riesz; Ehlich and Zeller). So the square of the norm is at most its maximum on the grid, over the product of these
    cosines.

    Args:
        weight: Kernel `[M, C / groups, *k]`.
        stride: Stride, one number or one per axis.
        dilation: Dilation.
        groups: Groups.
        grid: Frequencies per axis at least; raised to eight times the degree.
    """
    rows = polyphase_rows(weight, stride, dilation, groups)
    degrees = [k - 1 for k in rows.shape[3:]]
    sizes = [1 if d == 0 else max(grid, 8 * d) for d in degrees]
    slack = math.prod(math.cos(math.pi * d / n) for d, n in zip(degrees, sizes, strict=True))
    largest = [_norms(real, imaginary).amax() for real, imaginary, _ in _chunks(rows, sizes)]
    bound = torch.stack(largest).amax() / math.sqrt(slack)
    return torch.minimum(bound, isometry_bounds(weight, stride, dilation, groups).lipschitz_upper)


def conv_operator_matrix(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    input_size: int | Sequence[int] = 8,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return the matrix of a convolution with circular padding: the slow way, for small sizes.

    Args:
        weight: Kernel `[M, C / groups, *k]`; its middle tap lies on the output's own position.
        stride: Stride, one number or one per axis.
        input_size: Positions of the input per axis, a multiple of the stride.
        dilation: Dilation.
        groups: Groups.

    Returns:
        `[M N^n, C (S N)^n]`.

    Raises:
        ValueError: If the arguments do not fit the kernel or the stride does not divide the size.
    """
    weight = as_kernel(weight)
    axes = weight.ndim - 2
    strides, sizes = per_axis("stride", stride, axes), per_axis("input_size", input_size, axes)
    _check_divides(sizes, strides)
    kernel = stuffed(weight, per_axis("dilation", dilation, axes))
    filters, depth = weight.shape[0] // groups, weight.shape[1]
    inputs = torch.eye(groups * depth * math.prod(sizes), dtype=weight.dtype, device=weight.device)
    images = inputs.view(-1, groups, depth, *sizes)
    total: Tensor | float = 0.0
    for index, tap in enumerate(itertools.product(*map(range, kernel.shape[2:]))):
        shift = [(k - 1) // 2 - a for a, k in zip(tap, kernel.shape[2:], strict=True)]
        moved = images.roll(shift, dims=tuple(range(3, 3 + axes)))[_every(strides)]
        values = kernel.flatten(2)[..., index].view(groups, filters, depth)
        total = total + torch.einsum("gmc,bgc...->bgm...", values, moved)
    assert isinstance(total, Tensor)
    return total.flatten(1).mT


def _responses(
    weight: Tensor,
    stride: int | Sequence[int],
    input_size: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    weight = as_kernel(weight)
    axes = weight.ndim - 2
    strides, sizes = per_axis("stride", stride, axes), per_axis("input_size", input_size, axes)
    _check_divides(sizes, strides)
    kernel = stuffed(weight, per_axis("dilation", dilation, axes))
    rows = polyphase_rows(kernel, strides, groups=groups)
    yield from _chunks(rows, [size // s for size, s in zip(sizes, strides, strict=True)])


def _chunks(rows: Tensor, grid: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the frequency response in batches `[F, G, R, Q]` of bounded size."""
    real, imaginary, count = frequency_response(rows, grid)
    yield from zip(
        *(t.split(max(1, _CHUNK // math.prod(rows.shape[:3]))) for t in (real, imaginary, count)), strict=True
    )


def _norms(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return the spectral norms of complex matrices `[..., R, Q]` from their Hermitian products, which are smaller."""
    response = torch.complex(real, imaginary)
    return torch.linalg.eigvalsh(response @ response.mH).amax(dim=-1).clamp_min(0.0).sqrt()


def _every(steps: Sequence[int]) -> Any:
    """Return the index of every so many positions on the last axes."""
    return (..., *(slice(None, None, step) for step in steps))


def _check_divides(sizes: Sequence[int], strides: Sequence[int]) -> None:
    if any(size % s for size, s in zip(sizes, strides, strict=True)):
        raise ValueError(
            f"Expected `input_size` to be a multiple of the stride {tuple(strides)}, but got {tuple(sizes)}."
        )
