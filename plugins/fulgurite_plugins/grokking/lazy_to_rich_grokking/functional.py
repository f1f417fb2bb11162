# SPDX-License-Identifier: Apache-2.0
r"""What tangent kernels say of a training: alignment with the targets, kernel regression, the lazy trajectory, the delay.

The kernels themselves are those of `fulgurite.landscape.ntk_gram`; how far one has turned is
`fulgurite.landscape.kernel_velocity`.

| symbol | meaning | argument |
|---|---|---|
| $K$ | tangent kernel of the $N$ examples, `[N, N]` (summed over outputs) or `[N, C, N, C]` | `kernel` |
| $k$ | kernel of other examples with these, `[M, N]` or `[M, C, N, C]` | `cross` |
| $Y$ | targets, `[N]` or `[N, C]` | `targets` |
| $f_0$ | outputs of the network at the start | `initial`, `cross_initial` |
| $\tau$ | loss at which data count as learnt, relative to the trivial predictor's | `tau` |
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def kernel_alignment(kernel: Tensor, targets: Tensor, centered: bool = False) -> Tensor:
    r"""Return $\langle K, Y Y^\top \rangle_F\, /\, (|K|_F\, |Y Y^\top|_F)$: how much of the kernel serves the targets.

    Args:
        kernel: Positive semi-definite kernel, `[N, N]`, or `[N, C, N, C]`, which is compared with that of all `NC` targets.
        targets: `[N]` or `[N, C]`.
        centered: Whether to compare $H K H$ and $H Y$ instead, with $H = I - 1 1^\top / N$.

    Returns:
        A scalar in [0, 1], in the kernel's dtype; NaN if the kernel or the targets are zero.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> kernel_alignment(torch.eye(4), torch.ones(4))
        tensor(0.5000)
    """
    if centered:
        kernel = _centered(kernel, range(0, kernel.ndim, kernel.ndim // 2))
        targets = _centered(targets, (0,))
    matrix, columns = _as_matrix(kernel, targets)
    columns = columns / columns.norm()
    # Not through Y Y^T, which has N^2 numbers: |Y Y^T|_F = |Y^T Y|_F.
    return (columns * (matrix @ columns)).sum() / (matrix.norm() * (columns.mT @ columns).norm())


def kernel_regression(
    kernel: Tensor,
    targets: Tensor,
    cross: Tensor | None = None,
    *,
    ridge: float | None = None,
    initial: Tensor | None = None,
    cross_initial: Tensor | None = None,
) -> Tensor:
    r"""Return $f_0(x) + k(x)\,(K + \lambda I)^{-1}(Y - f_0(X))$: what training fits if the kernel does not change.

    Args:
        kernel: The kernel of the training examples, `[N, N]` or `[N, C, N, C]`.
        targets: Their targets, `[N]` or `[N, C]`.
        cross: The kernel of those to predict with the training examples, `[M, N]` or `[M, C, N, C]`; None predicts the
            training examples.
        ridge: $\lambda$, not negative; None for $10^{-6}$ of the mean of the kernel's diagonal. Where rounding is larger,
            directions in which the kernel is nothing but rounding are left out.
        initial: Outputs of the network at the start for the training examples, of the shape of `targets`; None for zero.
        cross_initial: Likewise for those to predict, `[M]` or `[M, C]`; needed with `cross` and `initial`.

    Returns:
        Predictions `[M]` or `[M, C]` in the dtype of `kernel`; computed in float64.

    Raises:
        ValueError: If the shapes do not fit together, `ridge` is negative, or the system is singular.
    """
    matrix, columns = _as_matrix(kernel.double(), targets.double())
    if ridge is not None and not ridge >= 0:
        raise ValueError(f"Expected `ridge` to be at least 0, but got {ridge!r}.")
    added = 1e-6 * matrix.diagonal().mean() if ridge is None else ridge
    matrix = (matrix + matrix.mT) / 2
    residual = columns if initial is None else columns - initial.double().reshape(columns.shape)
    factor, failed = torch.linalg.cholesky_ex(matrix + added * torch.eye(len(matrix), dtype=matrix.dtype).to(matrix))
    if not bool(failed):
        solution = torch.cholesky_solve(residual, factor)
    elif added > 0:
        solution = _solved_within_rank(matrix, residual, float(added), torch.finfo(kernel.dtype).eps)
    else:
        raise ValueError(f"The kernel with ridge {float(added):g} is not positive definite. Give a larger `ridge`.")
    return _predicted(solution, kernel, targets, cross, initial, cross_initial)


def _solved_within_rank(matrix: Tensor, columns: Tensor, ridge: float, rounding: float) -> Tensor:
    """Solve with a kernel that is positive semi-definite but for rounding; directions of no more than that are left out."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > len(matrix) * rounding * values[-1]
    vectors = vectors[:, kept]
    return vectors @ ((vectors.mT @ columns) / (values[kept] + ridge).unsqueeze(1))


def lazy_trajectory(
    kernel: Tensor,
    targets: Tensor,
    initial: Tensor,
    times: Tensor,
    *,
    lr: float | None = None,
    cross: Tensor | None = None,
    cross_initial: Tensor | None = None,
) -> Tensor:
    r"""Return the outputs during a training in which the kernel does not change, through one eigendecomposition.

    The loss is half the squared error, summed over outputs and averaged over the $N$ examples. Gradient flow gives
    $f_t(X) = Y + e^{-K t / N} (f_0 - Y)$, gradient descent $f_t(X) = Y + (I - \eta K / N)^t (f_0 - Y)$, and elsewhere
    $f_t(x) = f_0(x) + k(x)\, K^{-1} (f_t(X) - f_0(X))$. (`nn.MSELoss` averages over the $C$ outputs and has no half:
    multiply times or `lr` by $2 / C$.)

    Args:
        kernel: The kernel $K$ of the training examples, `[N, N]` or `[N, C, N, C]`.
        targets: Their targets, `[N]` or `[N, C]`.
        initial: The outputs $f_0(X)$, of the same shape.
        times: Times `[T]` of the flow, $\eta t$ for $t$ small steps; or with `lr` numbers of steps.
        lr: The learning rate $\eta$ of gradient descent; None for gradient flow.
        cross: The kernel of other examples with these, `[M, N]` or `[M, C, N, C]`; None for the training examples.
        cross_initial: Outputs $f_0(x)$ for them, needed with `cross`.

    Returns:
        `[T, M]` or `[T, M, C]`, in the dtype of `kernel`; computed in float64.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> lazy_trajectory(torch.eye(1), torch.ones(1), torch.zeros(1), torch.tensor([0.0, 1.0]))
        tensor([[0.0000],
                [0.6321]])
    """
    matrix, columns = _as_matrix(kernel.double(), targets.double())
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values = values.clamp_min(0.0)
    rates = values / len(kernel)
    steps = times.double().unsqueeze(1).to(values)
    learnt = -torch.expm1(-rates * steps) if lr is None else 1 - (1 - lr * rates) ** steps
    at_zero = steps / len(kernel) * (1.0 if lr is None else lr)
    tiny = values <= values.max() * torch.finfo(values.dtype).eps * len(values)
    weights = torch.where(tiny, at_zero, learnt / torch.where(tiny, 1.0, values))
    residual = vectors.mT @ (columns - initial.double().reshape(columns.shape))
    solutions = vectors @ (weights.unsqueeze(2) * residual)
    found = [_predicted(solution, kernel, targets, cross, initial, cross_initial) for solution in solutions]
    return torch.stack(found)


class Delay(NamedTuple):
    """When training and test loss became small.

    Attributes:
        train: The first step at which the training loss is small; infinite if it never is.
        test: Likewise for the test loss.
    """

    train: float
    test: float

    @property
    def decades(self) -> float:
        r"""$\log_{10}(t_\text{test} / t_\text{train})$; infinite if only the test loss never is small, NaN if neither is."""
        if math.isinf(self.train):
            return math.nan if math.isinf(self.test) else -math.inf
        return math.log10(max(self.test, 1.0) / max(self.train, 1.0))


def generalization_delay(
    curve_train: Tensor,
    curve_test: Tensor,
    tau: float = 0.1,
    *,
    steps: Tensor | None = None,
    trivial: float = 1.0,
    smoothing: float = 0.0,
) -> Delay:
    r"""Return when each of two loss curves first lies at or below $\tau$ times the loss of the trivial predictor.

    Of losses, not of accuracies: thresholds on accuracy can make a delay appear where there is none. What follows a loss
    that is not finite is not counted.

    Args:
        curve_train: Training losses `[T]`.
        curve_test: Test losses `[T]`.
        tau: The threshold, relative to `trivial`; positive.
        steps: The steps `[T]` at which they were measured; None for 1, 2, 3 ...
        trivial: The loss of the best constant predictor (for the squared error, the variance of the targets).
        smoothing: Weight of the past in a running mean of each curve, in [0, 1); 0 for none.

    Raises:
        ValueError: If the curves differ in length, or an argument is outside its range.

    Example:
        >>> generalization_delay(torch.tensor([0.5, 0.05, 0.0]), torch.tensor([0.9, 0.5, 0.01]))
        Delay(train=2.0, test=3.0)
    """
    if curve_train.ndim != 1 or curve_train.shape != curve_test.shape:
        raise ValueError(
            f"Expected two curves of one length, but got {list(curve_train.shape)} and {list(curve_test.shape)}."
        )
    check_threshold("generalization_delay", tau, smoothing)
    steps = torch.arange(1, len(curve_train) + 1) if steps is None else steps
    crossed = [_first(curve, tau * trivial, steps, smoothing) for curve in (curve_train, curve_test)]
    return Delay(*crossed)


def check_threshold(owner: str, tau: float, smoothing: float) -> None:
    """Check the threshold and the smoothing of a delay.

    Raises:
        ValueError: If `tau` is not positive or `smoothing` is outside [0, 1).
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"Expected `tau` of {owner} to be positive, but got {tau!r}.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"Expected `smoothing` of {owner} to be in [0, 1), but got {smoothing!r}.")


def _first(curve: Tensor, threshold: float, steps: Tensor, smoothing: float) -> float:
    mean = math.nan
    for step, value in zip(steps.tolist(), curve.tolist(), strict=True):
        if not math.isfinite(value):
            return math.inf
        mean = value if math.isnan(mean) else smoothing * mean + (1 - smoothing) * value
        if mean <= threshold:
            return float(step)
    return math.inf


def _centered(tensor: Tensor, dimensions: range | tuple[int, ...]) -> Tensor:
    for dimension in dimensions:
        tensor = tensor - tensor.mean(dim=dimension, keepdim=True)
    return tensor


def _as_matrix(kernel: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return a square kernel and the targets as a matrix and columns: `[N, N]` and `[N, C]`, or `[NC, NC]` and `[NC, 1]`."""
    if kernel.ndim == 4 and kernel.shape[:2] == kernel.shape[2:] and targets.shape == kernel.shape[:2]:
        return kernel.flatten(2).flatten(0, 1), targets.to(kernel.dtype).reshape(-1, 1)
    square = kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1]
    if not square or targets.ndim not in (1, 2) or len(targets) != len(kernel):
        raise ValueError(
            f"Expected a kernel [N, N] with targets [N] or [N, C], or [N, C, N, C] with [N, C], but got "
            f"{list(kernel.shape)} and {list(targets.shape)}."
        )
    return kernel, targets.to(kernel.dtype).reshape(len(targets), -1)


def _predicted(
    solution: Tensor,
    kernel: Tensor,
    targets: Tensor,
    cross: Tensor | None,
    initial: Tensor | None,
    cross_initial: Tensor | None,
) -> Tensor:
    """Return what the solution `[N, C]` or `[NC, 1]` of the kernel's system predicts."""
    block, start = (kernel, initial) if cross is None else (cross, cross_initial)
    if block.shape[1:] != kernel.shape[1:]:
        raise ValueError(
            f"Expected `cross` to be [M, {', '.join(map(str, kernel.shape[1:]))}], but got {list(block.shape)}."
        )
    if initial is not None and start is None:
        raise ValueError("Expected `cross_initial`, the first outputs for the examples to predict, with `initial`.")
    rows = block.double() if block.ndim == 2 else block.double().flatten(2).flatten(0, 1)
    predictions = (rows @ solution).reshape(len(block), *targets.shape[1:])
    return (predictions if start is None else predictions + start.double()).to(kernel.dtype)
