# SPDX-License-Identifier: Apache-2.0
r"""The random-matrix theory of batch Hessians (Granziol, Zohren, Roberts, 2022), as pure functions.

| symbol | meaning |
|---|---|
| $N$, $P$ | number of training examples, number of parameters |
| $B$, $b$ | batch size, and what it amounts to when drawn without replacement: $b = B / (1 - B / N)$ |
| $H$, $H_B$ | Hessian of the mean loss of all examples, and of a batch |
| $\sigma^2$ | variance of an entry of the Hessian of one example |
| $v = P \sigma^2$ | the Hessian variance, $E_i \lVert (H_i - H) z \rVert^2$ for a random unit vector $z$ |
| $\lambda_1$, $\lambda_P$ | largest and smallest eigenvalue of $H$; with a prime, of $H_B$ |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fulgurite.errors import check_argument, check_choice, is_number

Mode = Literal["linear", "sqrt", "rmt"]

ROUNDING = 1e-5
"""Eigenvalues that are smaller than this part of the largest in absolute value cannot be told from zero in float32."""


class Extremes(NamedTuple):
    """The ends of a spectrum."""

    smallest: float
    largest: float


def effective_batch_size(batch_size: float, dataset_size: float = math.inf) -> float:
    r"""Return the number of independent examples that a batch amounts to, $b = B / (1 - B / N)$.

    A mean over $B$ of $N$ examples drawn without replacement varies by $S^2 / b$, with $S^2$ the variance of the
    examples (with the divisor $N - 1$): not at all if the batch is the whole data set.

    Args:
        batch_size: Examples $B$ in a batch, at least 1 and at most $N$.
        dataset_size: Examples $N$; infinite for a stream.

    Raises:
        ValueError: If the batch is empty, or larger than the data set.

    Example:
        >>> effective_batch_size(50, 100), effective_batch_size(100, 100)
        (100.0, inf)
    """
    check_argument(batch_size >= 1, "batch_size", "effective_batch_size", "at least 1", batch_size)
    check_argument(
        batch_size <= dataset_size,
        "batch_size",
        "effective_batch_size",
        f"at most the {dataset_size} examples of the data set",
        batch_size,
    )
    return math.inf if batch_size == dataset_size else batch_size / (1.0 - batch_size / dataset_size)


def hessian_variance(products: Iterable[Tensor], batch_size: int, dataset_size: float = math.inf) -> Tensor:
    r"""Estimate $v = P \sigma^2$ without bias from products of several batch Hessians with the same vectors.

    It is the variance of $H_B z$ over batches (with the divisor $K - 1$), times the batch size that the batches amount
    to. $E \lVert (H_B - H) z \rVert^2 = v / b$ for batches that are drawn independently of each other. Batches without
    a common example, as an epoch deals them, are further apart by just as much as makes it $v / B$: leave
    `dataset_size` infinite.

    Args:
        products: $H_B z$ of $K \ge 2$ batches, `[P]` each or, for $R$ probes, `[R, P]`, with the same random vectors
            $z$ of norm 1; a tensor `[K, R, P]`, or a generator, of which one is in memory at a time. 8 probes or more
            are advised.
        batch_size: Examples $B$ in each batch.
        dataset_size: $N$, if the batches are drawn independently of each other, each without replacement.

    Returns:
        The estimate, a scalar tensor: the average over probes.

    Raises:
        ValueError: If there are fewer than two batches, or a batch is the whole data set.

    Example:
        >>> hessian_variance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), batch_size=4)
        tensor(8.)
    """
    owner = "hessian_variance"
    amounts_to = effective_batch_size(batch_size, dataset_size)
    check_argument(amounts_to < math.inf, "batch_size", owner, "below the data set's size", batch_size)
    batches = iter(products)
    mean, count = next(batches, torch.zeros(1)), 1
    spread = torch.zeros_like(mean).sum(dim=-1)
    for count, product in enumerate(batches, start=2):
        distance = product - mean
        mean = mean + distance / count
        spread = spread + (distance * (product - mean)).sum(dim=-1)
    check_argument(count >= 2, "products", owner, "those of at least 2 batches", count)
    return spread.mean() * (amounts_to / (count - 1))


def predict_batch_extremes(smallest: float, largest: float, variance: float, effective: float) -> Extremes:
    r"""Predict the extreme eigenvalues of a batch Hessian from those of the Hessian: the additive noise model.

    With noise of independent entries, $H_B = H + \epsilon$, and $s = \sqrt{v / b}$ the bulk is a semicircle with edges
    $\pm 2 s$. An eigenvalue leaves it if it is beyond $s$, and then is repelled:

    $$\lambda_1' = \lambda_1 + s^2 / \lambda_1 \text{ if } \lambda_1 > s, \text{ else } 2 s,$$

    and likewise, with signs reversed, for the smallest. So both are farther out than those of $H$, by an excess that
    falls like $1 / b$ (an outlier) or $b^{-1/2}$ (the bulk).

    Args:
        smallest: $\lambda_P$.
        largest: $\lambda_1$.
        variance: $v$, not negative.
        effective: $b$; infinite for the whole data set, whose extremes are given back.

    Example:
        >>> predict_batch_extremes(-0.1, 2.0, variance=16.0, effective=16.0)
        Extremes(smallest=-2.0, largest=2.5)
    """
    check_argument(variance >= 0, "variance", "predict_batch_extremes", "a number of at least 0", variance)
    check_argument(effective > 0, "effective", "predict_batch_extremes", "a positive batch size", effective)
    scale = math.sqrt(variance / effective)
    if scale == 0.0:
        return Extremes(smallest, largest)
    return Extremes(-_repelled(-smallest, scale), _repelled(largest, scale))


def _repelled(outlier: float, scale: float) -> float:
    return outlier + scale**2 / outlier if outlier > scale else 2.0 * scale


def predict_ggn_extremes(largest: float, noise: float, parameters: int, effective: float) -> Extremes:
    r"""Predict the extreme eigenvalues of a batch Gauss-Newton matrix: the multiplicative noise model.

    The matrix of a batch is a sample covariance of $b$ rows in $P$ dimensions (Marchenko, Pastur), of a population with
    all eigenvalues $s^2$ but for outliers. With $q = P / b$, an outlier $\ell > s^2 (1 + \sqrt q)$ is found at

    $$\ell' = \ell\, \Bigl(1 + \frac{q\, s^2}{\ell - s^2}\Bigr),$$

    and others in the bulk, which ends at $s^2 (1 + \sqrt q)^2$ and begins at $s^2 (1 - \sqrt q)^2$, or at 0 for $q \ge
    1$.

    Args:
        largest: $\ell$, the largest eigenvalue over all examples.
        noise: $s^2$, the mean of the eigenvalues that are no outliers; not negative.
        parameters: $P$.
        effective: $b$; infinite for the whole data set.

    Example:
        >>> predict_ggn_extremes(4.0, noise=1.0, parameters=100, effective=100)
        Extremes(smallest=0.0, largest=5.333333333333333)
    """
    check_argument(noise >= 0, "noise", "predict_ggn_extremes", "a number of at least 0", noise)
    check_argument(parameters >= 1, "parameters", "predict_ggn_extremes", "at least 1", parameters)
    check_argument(effective > 0, "effective", "predict_ggn_extremes", "a positive batch size", effective)
    q = parameters / effective
    smallest = noise * max(0.0, 1.0 - math.sqrt(q)) ** 2
    if largest > noise * (1.0 + math.sqrt(q)):
        return Extremes(smallest, largest * (1.0 + q * noise / (largest - noise)))
    return Extremes(smallest, noise * (1.0 + math.sqrt(q)) ** 2)


@dataclass(frozen=True)
class ExcessLaw:
    r"""By how much the largest eigenvalue of a batch exceeds that of all examples.

    $\lambda_1' = \lambda_1 + c\, b^{-\gamma}$.

    Args:
        empirical: $\lambda_1$.
        scale: $c$.
        exponent: $\gamma$; 1 for an outlier and 1/2 for the bulk of the additive noise model.
    """

    empirical: float
    scale: float
    exponent: float

    def largest(self, effective: float) -> float:
        """Return the largest eigenvalue of batches that amount to `effective` examples."""
        return self.empirical + self.scale * effective**-self.exponent


def fit_excess(effective: Sequence[float], measured: Sequence[float], empirical: float) -> ExcessLaw:
    """Fit the law of the excess to largest eigenvalues that were measured at two batch sizes or more.

    Least squares of logarithms; exact for two. The noise of real Hessians has a low rank, so that the models with
    independent entries underestimate it; the law takes its size and its exponent from measurements instead.

    Args:
        effective: Effective batch sizes, finite, at least two of them different.
        measured: The mean largest eigenvalue at each.
        empirical: The largest eigenvalue over all examples, below all of `measured`.

    Raises:
        ValueError: If there are fewer than two sizes, or an eigenvalue does not exceed `empirical`.

    Example:
        >>> law = fit_excess([4, 16], [5.0, 2.0], empirical=1.0)
        >>> round(law.exponent, 6), round(law.largest(64), 6)
        (1.0, 1.25)
    """
    sizes = list(effective)
    fits = len(set(sizes)) >= 2 and len(sizes) == len(measured) and all(0 < size < math.inf for size in sizes)
    check_argument(fits, "effective", "fit_excess", "two different finite batch sizes or more", sizes)
    above = all(value > empirical for value in measured)
    check_argument(above, "measured", "fit_excess", f"above the {empirical} of all examples", list(measured))
    logs = [(math.log(b), math.log(value - empirical)) for b, value in zip(sizes, measured, strict=True)]
    x, y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope = sum((a - x) * (c - y) for a, c in logs) / sum((a - x) ** 2 for a, _ in logs)
    return ExcessLaw(empirical, math.exp(y - slope * x), -slope)


def saturation_batch_size(largest: float, variance: float, dataset_size: float = math.inf) -> float:
    r"""Return the batch size $B^*$ at which the noise only just reaches the outlier, $v / b = \lambda_1^2$.

    With larger batches the learning rate soon stops growing, at about $1 / \lambda_1$.

    Args:
        largest: $\lambda_1$, positive.
        variance: $v$, not negative.
        dataset_size: $N$.

    Returns:
        $B^*$, at least 1 and at most $N$.

    Example:
        >>> saturation_batch_size(2.0, 400.0), saturation_batch_size(2.0, 400.0, dataset_size=100)
        (100.0, 50.0)
    """
    check_argument(largest > 0, "largest", "saturation_batch_size", "positive", largest)
    check_argument(variance >= 0, "variance", "saturation_batch_size", "a number of at least 0", variance)
    effective = variance / largest**2
    return max(1.0, effective / (1.0 + effective / dataset_size))


def scale_learning_rate(
    lr: float,
    batch_size: float,
    new_batch_size: float,
    mode: Mode = "linear",
    *,
    largest: Callable[[float], float] | None = None,
    saturation: float = math.inf,
) -> float:
    r"""Return the learning rate for another batch size.

    - `linear`: $\eta' = \eta\, B' / B$, for stochastic gradient descent;
    - `sqrt`: $\eta' = \eta \sqrt{B' / B}$, for optimizers of the type of Adam;
    - `rmt`: $\eta' = \eta\, \lambda_1'(B) / \lambda_1'(B')$, which keeps the distance from the largest stable rate,
      $2 / \lambda_1'$. Of a Gauss-Newton matrix this tends to the linear rule for small batches, of the additive noise
      model to the square root, and with both to a constant rate for large ones.

    Args:
        lr: The rate $\eta$ at `batch_size`.
        batch_size: $B$.
        new_batch_size: $B'$.
        mode: The rule.
        largest: For `rmt`: gives the largest eigenvalue of the Hessian of a batch of so many examples.
        saturation: For the others: a larger batch than this counts as one of this size (`saturation_batch_size`).

    Raises:
        ValueError: If a number is not positive, or `rmt` has no `largest`.

    Example:
        >>> [scale_learning_rate(0.1, 64, 256, mode) for mode in ("linear", "sqrt")]
        [0.4, 0.2]
    """
    owner = "scale_learning_rate"
    check_choice(mode, ("linear", "sqrt", "rmt"), "mode", owner)
    numbers = {"lr": lr, "batch_size": batch_size, "new_batch_size": new_batch_size, "saturation": saturation}
    for name, number in numbers.items():
        check_argument(number > 0, name, owner, "positive", number)
    if mode == "rmt":
        check_argument(largest is not None, "largest", owner, "given for mode='rmt'", largest)
        assert largest is not None
        return lr * largest(batch_size) / largest(new_batch_size)
    ratio = min(new_batch_size, saturation) / min(batch_size, saturation)
    return lr * (ratio if mode == "linear" else math.sqrt(ratio))


def heavy_ball_parameters(smallest: float, largest: float) -> tuple[float, float]:
    r"""Return the learning rate and momentum with which the heavy ball converges fastest (Polyak, 1964).

    On a quadratic function with eigenvalues in $[\mu, L]$, $\eta = 4 / (\sqrt L + \sqrt \mu)^2$ and
    $\beta = ((\sqrt L - \sqrt \mu) / (\sqrt L + \sqrt \mu))^2$ shrink the error by $\sqrt \beta$ per step,
    asymptotically.

    Args:
        smallest: $\mu$, positive.
        largest: $L$, at least $\mu$.

    Example:
        >>> heavy_ball_parameters(1.0, 1.0), heavy_ball_parameters(1.0, 9.0)
        ((1.0, 0.0), (0.25, 0.25))
    """
    check_argument(smallest > 0, "smallest", "heavy_ball_parameters", "positive", smallest)
    check_argument(largest >= smallest, "largest", "heavy_ball_parameters", f"at least {smallest}", largest)
    root, small = math.sqrt(largest), math.sqrt(smallest)
    return 4.0 / (root + small) ** 2, ((root - small) / (root + small)) ** 2


def usable_extremes(ritz: Sequence[float], floor: float = 1e-3) -> Extremes | None:
    r"""Return the largest eigenvalue, and the smallest above `floor` times it.

    Args:
        ritz: Eigenvalues.
        floor: What is below this fraction of the largest counts as noise or negative curvature.

    Returns:
        The two, or None if there is no largest that is positive beyond rounding, or an eigenvalue is not finite.

    Example:
        >>> usable_extremes([-3.0, 0.001, 0.5, 2.0])
        Extremes(smallest=0.5, largest=2.0)
    """
    values = list(ritz)
    if not values or not all(map(is_number, values)):
        return None
    largest = max(values)
    if largest <= ROUNDING * max(map(abs, values)):
        return None
    return Extremes(min(value for value in values if value > floor * largest), largest)


def rule_parameters(rule: str, smallest: float, largest: float) -> tuple[float, float]:
    r"""Return the learning rate and momentum that a rule of `SLQLearningRate` gives.

    - `inverse`: $1 / \lambda_1$, with the momentum of the heavy ball;
    - `polyak`: both of the heavy ball (`heavy_ball_parameters`);
    - `two_over_sum`: $2 / (\lambda_1 + \mu)$ without momentum, the optimum of plain gradient descent.

    Args:
        rule: Its name.
        smallest: $\mu$, positive.
        largest: $\lambda_1$, at least $\mu$.

    Example:
        >>> rule_parameters("inverse", 1.0, 9.0), rule_parameters("two_over_sum", 1.0, 9.0)
        ((0.1111111111111111, 0.25), (0.2, 0.0))
    """
    check_choice(rule, ("inverse", "polyak", "two_over_sum"), "rule", "rule_parameters")
    lr, momentum = heavy_ball_parameters(smallest, largest)
    if rule == "inverse":
        return 1.0 / largest, momentum
    return (lr, momentum) if rule == "polyak" else (2.0 / (largest + smallest), 0.0)


def unit_probes(number: int, size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random vectors `[number, size]` of norm 1, equally likely in all directions, on the generator's device."""
    probes = torch.randn(number, size, generator=generator, dtype=dtype, device=generator.device)
    return probes / probes.norm(dim=1, keepdim=True)
