# SPDX-License-Identifier: Apache-2.0
r"""When SGD stays at a minimum: the mathematics of Wu, Su (2023), on kernels of the features at that minimum.

The loss is $L = \frac1n \sum_i \ell(f(x_i), y_i)$. With $A_i = R_i R_i^\top$ its second derivative for the output, the
Gauss-Newton matrix is $H = \frac1n \sum_i g_i g_i^\top$ with $g_i = J_i^\top R_i$; for half the squared error
$R_i = I$.

| symbol | meaning | argument |
|---|---|---|
| $g_i$ | feature of example $i$: its gradient, `[P, C]` for `C` outputs | |
| $K_{ij} = g_i^\top g_j$ | the kernel of the features, `[N, N]` or `[N, C, N, C]` | `kernel` |
| $\eta$, $B$ | learning rate, batch size | `lr`, `batch_size` |
| $S$ | second moment of the distance from the minimum | |
| $w_d$, $w_r$ | weights of the noise and of the mean in a batch | `sampling_weights` |

One step of SGD at an interpolating minimum, linearised, maps $S$ to

$$\Phi(S) = S - \eta (HS + SH) + \eta^2 M(S), \quad
M(S) = \frac{w_d}{n} \sum_i g_i (g_i^\top S g_i) g_i^\top + w_r H S H.$$

$\Phi$ is self-adjoint and maps positive semi-definite matrices to such, so that its spectral radius is its largest
eigenvalue. All is computed in the span of the features: outside of it SGD does not move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite_plugins.curvature.dynamical_stability.eigenvalue import largest_eigenvalue


def sampling_weights(batch_size: int, examples: int, replacement: bool = False) -> tuple[float, float]:
    r"""Return how a batch weighs the noise of single examples and the mean, $(w_d, w_r)$.

    With replacement they are $(1/B, 1 - 1/B)$, without
    $\left(\frac{n - B}{B (n - 1)}, \frac{n (B - 1)}{B (n - 1)}\right)$.

    Args:
        batch_size: The batch size $B$ of one update, over all ranks and accumulated micro-batches.
        examples: The number $n$ of examples that batches are drawn from.
        replacement: Whether one example may stand several times in a batch.

    Raises:
        ValueError: If `batch_size` or `examples` is not positive, or a batch without replacement is larger than the
            data.

    Example:
        >>> sampling_weights(4, 4), sampling_weights(1, 4)
        ((0.0, 1.0), (1.0, 0.0))
    """
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"Expected `{name}` to be positive, but got {value!r}.")
    if replacement:
        return 1 / batch_size, 1 - 1 / batch_size
    if batch_size > examples:
        raise ValueError(
            f"Expected `batch_size` to be at most the number of examples, {examples}, that a batch is drawn from "
            f"without replacement, but got {batch_size}."
        )
    if examples == 1:
        return 0.0, 1.0
    return (
        (examples - batch_size) / (batch_size * (examples - 1)),
        examples * (batch_size - 1) / (batch_size * (examples - 1)),
    )


@dataclass(frozen=True)
class Features:
    """Features in the eigenbasis of $H$, in float64.

    Args:
        rows: `[N, C, R]`, for rank `R`.
        eigenvalues: Those of $H$ that are not zero, `[R]`, ascending.
        weight_decay: Added to $H$ in every step, without noise.
    """

    rows: Tensor
    eigenvalues: Tensor
    weight_decay: float = 0.0

    @classmethod
    def of(cls, kernel: Tensor, weight_decay: float = 0.0) -> Features:
        """Return the features that have a kernel; directions without curvature are left out."""
        matrix, outputs = _matrix(kernel.detach())
        examples = len(matrix) // outputs
        values, vectors = torch.linalg.eigh(matrix)
        noise = len(matrix) * torch.finfo(kernel.dtype).eps * values[-1].clamp_min(0)
        kept = values > noise
        rows = vectors[:, kept] * values[kept].sqrt()
        return cls(rows.unflatten(0, (examples, outputs)), values[kept] / examples, weight_decay)

    def second_order(self, moment: Tensor, noise: float, mean: float) -> Tensor:
        """Return $M(S)$ for `moment` $S$ `[R, R]`."""
        flat = self.rows.flatten(0, 1)
        blocks = (flat @ moment).view_as(self.rows) @ self.rows.mT
        of_examples = flat.mT @ (blocks @ self.rows).flatten(0, 1) / len(self.rows)
        h, decay = self.eigenvalues, self.weight_decay
        decayed = h + decay
        product = mean * torch.outer(h, h) + torch.outer(decayed, decayed) - torch.outer(h, h)
        return noise * of_examples + product * moment

    @property
    def first_order(self) -> Tensor:
        r"""The factors `[R, R]` by which $S \mapsto HS + SH$ multiplies."""
        decayed = self.eigenvalues + self.weight_decay
        return decayed.unsqueeze(0) + decayed.unsqueeze(1)


def stability_radius(
    kernel: Tensor,
    lr: float,
    batch_size: int,
    replacement: bool = False,
    *,
    examples: int | None = None,
    weight_decay: float = 0.0,
    tolerance: float = 1e-10,
) -> Tensor:
    r"""Return by how much one step of SGD multiplies the second moment at worst: the spectral radius of $\Phi$.

    At most 1 means mean-square stability. Directions in which no example has a gradient do not count.

    Args:
        kernel: $K$, `[N, N]` or `[N, C, N, C]`, symmetric.
        lr: Learning rate $\eta$, positive.
        batch_size: Batch size $B$ of an update.
        replacement: Whether batches are drawn with replacement.
        examples: How many examples batches are drawn from, if the kernel is of a sample of them; by default `N`.
        weight_decay: Weight decay of the optimizer, coupled to the gradient.
        tolerance: Relative error of the radius.

    Returns:
        A float64 scalar; 1 if there is no curvature at all.

    Raises:
        ValueError: If an argument is outside its range, or the kernel has no such shape, is empty or is not finite.

    Example:
        >>> stability_radius(torch.eye(1), 1.5, 1)
        tensor(0.2500, dtype=torch.float64)
    """
    _check_positive("lr", lr)
    features = Features.of(kernel, weight_decay)
    noise, mean = sampling_weights(batch_size, _examples(kernel) if examples is None else examples, replacement)
    if not len(features.eigenvalues):
        return features.eigenvalues.new_ones(())
    first = features.first_order

    def one_step(moment: Tensor) -> Tensor:
        return moment - lr * first * moment + lr**2 * features.second_order(moment, noise, mean)

    return largest_eigenvalue(one_step, torch.eye(len(first), dtype=first.dtype, device=first.device), tolerance)


def max_stable_lr(
    kernel: Tensor,
    batch_size: int,
    replacement: bool = False,
    *,
    examples: int | None = None,
    weight_decay: float = 0.0,
    tolerance: float = 1e-10,
) -> Tensor:
    r"""Return the largest learning rate at which SGD is mean-square stable, exactly.

    $\langle S, \Phi(S) \rangle \le \langle S, S \rangle$ for all $S$ says
    $\eta\, \langle S, M(S) \rangle \le \langle S, T(S) \rangle$ with $T(S) = HS + SH$, so that $1 / \eta^*$ is the
    largest eigenvalue of $T^{-1/2} M T^{-1/2}$. In the eigenbasis of $H$, $T$ multiplies entry by entry: one symmetric
    eigenvalue problem, no search for $\eta$.

    Arguments and errors are those of `stability_radius`.

    Returns:
        A float64 scalar; infinite if there is no curvature at all.

    Example:
        >>> max_stable_lr(torch.eye(4), 1)  # 2 / Tr(H): all examples have a gradient of length 1
        tensor(2., dtype=torch.float64)
    """
    features = Features.of(kernel, weight_decay)
    noise, mean = sampling_weights(batch_size, _examples(kernel) if examples is None else examples, replacement)
    if not len(features.eigenvalues):
        return features.eigenvalues.new_full((), math.inf)
    scale = features.first_order.rsqrt()

    def quotient(moment: Tensor) -> Tensor:
        return scale * features.second_order(scale * moment, noise, mean)

    return 1 / largest_eigenvalue(quotient, torch.diag(scale.diagonal().reciprocal()), tolerance)


def trace(kernel: Tensor) -> Tensor:
    r"""Return $\mathrm{Tr}(H)$ from the kernel, in float64."""
    matrix, outputs = _matrix(kernel)
    return matrix.trace() / (len(matrix) // outputs)


def frobenius_norm(kernel: Tensor) -> Tensor:
    """Return $|H|_F = |K|_F / n$ from the kernel, in float64."""
    matrix, outputs = _matrix(kernel)
    return matrix.norm() / (len(matrix) // outputs)


def lambda_max(kernel: Tensor) -> Tensor:
    r"""Return $\lambda_{\max}(H) = \lambda_{\max}(K) / n$, which gradient descent needs to be at most $2 / \eta$."""
    matrix, outputs = _matrix(kernel)
    return torch.linalg.eigvalsh(matrix)[-1] / (len(matrix) // outputs)


def refined_trace_bound(
    kernel: Tensor, batch_size: int, replacement: bool = False, *, examples: int | None = None
) -> Tensor:
    r"""Return the learning rate above which SGD is unstable for certain, by the refined bound on the trace.

    $S = I$ in $\langle S, \Phi(S) \rangle \le \langle S, S \rangle$ gives

    $$\eta \left[ \frac{w_d}{n} \sum_i |g_i^\top g_i|_F^2 + w_r |H|_F^2 \right] \le 2 \mathrm{Tr}(H).$$

    It lies between the exact limit, `max_stable_lr`, and `trace_bound`.

    Args:
        kernel: $K$, `[N, N]` or `[N, C, N, C]`.
        batch_size: Batch size $B$ of an update.
        replacement: Whether batches are drawn with replacement.
        examples: How many examples batches are drawn from; by default `N`.

    Returns:
        A float64 scalar; infinite if there is no curvature at all.

    Example:
        >>> refined_trace_bound(torch.eye(4), 1)
        tensor(2., dtype=torch.float64)
    """
    own = own_blocks(kernel)
    of_examples = own.square().sum(dim=(1, 2)).mean()
    return refined_bound(
        trace(kernel), frobenius_norm(kernel), of_examples, batch_size, examples or len(own), replacement
    )


def refined_bound(
    trace: Tensor, frobenius: Tensor, of_examples: Tensor, batch_size: int, examples: int, replacement: bool = False
) -> Tensor:
    r"""Return the refined bound from $\mathrm{Tr}(H)$, $|H|_F$ and the mean of $|g_i^\top g_i|_F^2$."""
    noise, mean = sampling_weights(batch_size, examples, replacement)
    return 2 * trace / (noise * of_examples + mean * frobenius.square())


def trace_bound(trace: Tensor, batch_size: int, outputs: int = 1) -> Tensor:
    r"""Return the learning rate above which SGD is unstable for certain by its trace alone, $2BC / \mathrm{Tr}(H)$.

    The refined bound and Jensen's inequality; of $C$ outputs, $|g_i^\top g_i|_F^2 \ge \mathrm{Tr}(g_i^\top g_i)^2 / C$.
    One output and $B = 1$ give the paper's $\mathrm{Tr}(H) \le 2 / \eta$.

    Args:
        trace: $\mathrm{Tr}(H)$.
        batch_size: Batch size $B$ of an update.
        outputs: Number of outputs $C$, or a bound on the rank of $A_i$: of cross entropy, classes less one.

    Example:
        >>> trace_bound(torch.tensor(4.0), batch_size=1)
        tensor(0.5000)
    """
    return 2 * batch_size * outputs / trace


def alignment_factor(kernel: Tensor, residuals: Tensor) -> Tensor:
    r"""Return how gradient noise lies in the sharp directions, $\mu = \mathrm{Tr}(H \hat\Sigma) / (2 L |H|_F^2)$.

    $\hat\Sigma = \frac1n \sum_i (g_i r_i)(g_i r_i)^\top - \nabla L \nabla L^\top$ is the noise of one example and $L =
    \frac{1}{2n} \sum_i |r_i|^2$. After a step, $\mathrm{E} L \ge \eta^2 \mu |H|_F^2 L /
    B$, so that a loss that does not blow up needs $|H|_F \le \frac1\eta \sqrt{B / \mu}$.

    Args:
        kernel: $K$, `[N, N]` or `[N, C, N, C]`.
        residuals: $r_i = f(x_i) - y_i$ (times $R_i^\top$ in general), `[N]` or `[N, C]`.

    Returns:
        A float64 scalar; NaN if all residuals are zero.

    Raises:
        ValueError: If there is not one residual per output of each example.

    Example:
        >>> alignment_factor(torch.eye(2), torch.tensor([1.0, -1.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    matrix, outputs = _matrix(kernel)
    examples = len(matrix) // outputs
    if residuals.numel() != len(matrix):
        raise ValueError(
            f"Expected `residuals` of shape [{examples}, {outputs}], one per output of the examples in the kernel, but "
            f"got {list(residuals.shape)}."
        )
    r = residuals.to(matrix).reshape(examples, outputs)
    pushed = (matrix.unflatten(1, (examples, outputs)) * r).sum(dim=2)  # [NC, N]: g_j^T (g_i r_i)
    noise = pushed.square().sum() / examples**2 - pushed.sum(dim=1).square().sum() / examples**3
    return noise / (r.square().sum() / examples * frobenius_norm(kernel).square())


def non_uniformity(kernel: Tensor) -> Tensor:
    r"""Return $s = \lambda_{\max}\left(\frac1n \sum_i H_i^2 - H^2\right)^{1/2}$.

    $H_i = g_i g_i^\top$ is the curvature of one example (Wu, Ma, E 2018). Together with the sharpness $a =
    \lambda_{\max}(H)$ it has to lie in the box of `stability_box`.

    Args:
        kernel: $K$, `[N, N]` or `[N, C, N, C]`.

    Example:
        >>> non_uniformity(torch.eye(4))
        tensor(0.4330, dtype=torch.float64)
    """
    features = Features.of(kernel)
    if not len(features.eigenvalues):
        return features.eigenvalues.new_zeros(())
    identity = torch.eye(len(features.eigenvalues)).to(features.rows)
    variance = features.second_order(identity, 1.0, 0.0) - torch.diag(features.eigenvalues.square())
    return torch.linalg.eigvalsh(variance)[-1].clamp_min(0).sqrt()


def stability_box(lr: float, batch_size: int, examples: int) -> tuple[float, float]:
    r"""Return the limits of sharpness and non-uniformity, $2 / \eta$ and $\frac1\eta \sqrt{B (n-1) / (n-B)}$ (2018).

    Args:
        lr: Learning rate $\eta$, positive.
        batch_size: Batch size $B$, drawn without replacement.
        examples: Number of examples $n$.

    Raises:
        ValueError: If `lr` is not positive, or the batch is empty or larger than the data.

    Example:
        >>> stability_box(0.5, 1, 10)
        (4.0, 2.0)
    """
    _check_positive("lr", lr)
    noise, _ = sampling_weights(batch_size, examples)
    return 2 / lr, math.inf if noise == 0 else 1 / (lr * math.sqrt(noise))


def path_norm(inner: Tensor, outer: Tensor) -> Tensor:
    r"""Return the path norm of a two-layer network, $\sum_j |a_j|\, |w_j|_2$.

    Args:
        inner: Weights $w_j$ of the hidden units, `[m, d]`.
        outer: Weights $a_j$ of the output, `[m]` or `[1, m]`.

    Raises:
        ValueError: If there is not one outer weight per hidden unit.

    Example:
        >>> path_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([-2.0]))
        tensor(10.)
    """
    if outer.numel() != len(inner):
        raise ValueError(
            f"Expected one number of `outer` for each of the {len(inner)} units of `inner`, but got {list(outer.shape)}."
        )
    return (outer.reshape(-1).abs() * inner.flatten(1).norm(dim=1)).sum()


def own_blocks(kernel: Tensor) -> Tensor:
    """Return the kernel of each example with itself, `[N, C, C]`, in float64."""
    matrix, outputs = _matrix(kernel)
    blocks = matrix.unflatten(0, (-1, outputs)).unflatten(2, (-1, outputs))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _examples(kernel: Tensor) -> int:
    return len(kernel)


def _matrix(kernel: Tensor) -> tuple[Tensor, int]:
    """Return the kernel as a matrix `[NC, NC]` in float64, and `C`."""
    square = kernel.ndim in (2, 4) and kernel.shape[: kernel.ndim // 2] == kernel.shape[kernel.ndim // 2 :]
    if not square or not kernel.numel():
        raise ValueError(
            f"Expected `kernel` of shape [N, N] or [N, C, N, C] with at least one example, but got {list(kernel.shape)}."
        )
    outputs = kernel.shape[1] if kernel.ndim == 4 else 1
    matrix = kernel.double().reshape(len(kernel) * outputs, -1)
    if not bool(matrix.isfinite().all()):
        raise ValueError("Expected `kernel` to be finite, but it has entries that are not.")
    return (matrix + matrix.mT) / 2, outputs


def _check_positive(name: str, value: float) -> None:
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"Expected `{name}` to be a positive number, but got {value!r}.")
