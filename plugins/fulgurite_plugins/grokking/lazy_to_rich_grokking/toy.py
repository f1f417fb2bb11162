# SPDX-License-Identifier: Apache-2.0
r"""The paper's toy, a quadratic perceptron on a quadratic target, whose test loss is known in closed form.

Inputs are $x \sim N(0, I_D / D)$, targets $y = (\beta \cdot x)^2 / 2$. The network is
$f(x) = \frac{\alpha}{N} \sum_i \phi(w_i \cdot x)$ with $\phi(h) = h + \frac{\epsilon}{2} h^2$, or, centred, the same
minus what it was at the start. With $\bar w = \frac1N \sum_i w_i$ and $M = \frac1N W^\top W$ (of which the values at the
start are subtracted if it is centred), $A = (\alpha \epsilon M - \beta \beta^\top) / 2$ and $b = \alpha \bar w$,
$f(x) - y = x^\top A x + b \cdot x$, whose moments are exact.

| symbol | meaning | argument |
|---|---|---|
| $W$ | weights of the first layer, `[N, D]` | `weights` |
| $\alpha$ | output scale | `alpha` |
| $\epsilon$ | weight of the quadratic part: how well the first kernel is aligned | `epsilon` |
| $\beta$ | direction of the target, `[D]` | `beta` |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    r"""All that the test loss depends on.

    Attributes:
        mean: $\bar w$, `[D]`.
        second: $M$, `[D, D]`.
    """

    mean: Tensor
    second: Tensor


class Decomposition(NamedTuple):
    """The three parts of the test loss, scalars.

    Attributes:
        misalignment: What is missing in the learnt quadratic form.
        variance: What is missing in its trace.
        linear_power: What is left of the linear part.
    """

    misalignment: Tensor
    variance: Tensor
    linear_power: Tensor

    @property
    def total(self) -> Tensor:
        """The mean squared error on new examples."""
        return self.misalignment + self.variance + self.linear_power


def statistics(weights: Tensor) -> Statistics:
    r"""Return $\bar w$ and $M$ of weights `[N, D]`."""
    return Statistics(weights.mean(dim=0), weights.mT @ weights / len(weights))


def generalization_decomposition(
    weights: Tensor | Statistics, alpha: float, epsilon: float, beta: Tensor, initial: Tensor | Statistics | None = None
) -> Decomposition:
    r"""Return the mean squared error on new examples, in its parts.

    $E[(f - y)^2] = \frac{1}{D^2} [2 \operatorname{tr} A^2 + (\operatorname{tr} A)^2] + \frac1D |b|^2$.

    Args:
        weights: `[N, D]`, or their statistics.
        alpha: Output scale.
        epsilon: Weight of the quadratic part.
        beta: `[D]`.
        initial: Weights at the start, or their statistics, for the centred network; None for the plain one.
    """
    form, linear = _error_forms(weights, alpha, epsilon, beta, initial)
    dim = len(beta)
    return Decomposition(2 * form.square().sum() / dim**2, form.trace().square() / dim**2, linear.square().sum() / dim)


def population_gradient(
    weights: Tensor, alpha: float, epsilon: float, beta: Tensor, initial: Tensor | Statistics | None = None
) -> Tensor:
    r"""Return the gradient of half the test loss for the weights, `[N, D]`.

    $\partial_{w_i} = \frac{\alpha}{N} [\frac1D b + \frac{\epsilon}{D^2} (2 A + \operatorname{tr}(A)\, I)\, w_i]$.
    Arguments are those of `generalization_decomposition`.
    """
    form, linear = _error_forms(weights, alpha, epsilon, beta, initial)
    return alpha / len(weights) * (linear / len(beta) + epsilon * weights @ _pull(form))


def population_flow(
    weights: Tensor | Statistics,
    alpha: float,
    epsilon: float,
    beta: Tensor,
    time: float,
    steps: int,
    initial: Tensor | Statistics | None = None,
) -> Statistics:
    r"""Return the statistics after gradient flow on infinitely many examples, by Runge-Kutta steps of fourth order.

    In mean-field time, $\dot W = -\frac{N}{\alpha^2} \partial_W$ of half the test loss, the statistics obey equations of
    their own, with $S = \frac{1}{D^2} (2 A + \operatorname{tr}(A)\, I)$:
    $\dot{\bar w} = -\frac1\alpha (\frac1D b + \epsilon S \bar w)$ and
    $\dot M = -\frac1\alpha [\frac1D (b \bar w^\top + \bar w b^\top) + \epsilon (S M + M S)]$.

    Args:
        weights: The weights `[N, D]` at time 0, or their statistics.
        alpha: Output scale.
        epsilon: Weight of the quadratic part.
        beta: `[D]`.
        time: How long; $\eta t$ for $t$ small steps of gradient descent.
        steps: Steps of the integrator, at least 1.
        initial: Weights at the start of a centred network, or their statistics; None for the plain one.
    """

    def slope(at: Statistics) -> Statistics:
        form, linear = _error_forms(at, alpha, epsilon, beta, initial)
        pull, push = epsilon * _pull(form), linear / len(beta)
        turned = torch.outer(push, at.mean) + pull @ at.second
        return Statistics(-(push + pull @ at.mean) / alpha, -(turned + turned.mT) / alpha)

    def moved(at: Statistics, along: Statistics, by: float) -> Statistics:
        return Statistics(at.mean + by * along.mean, at.second + by * along.second)

    start = weights if isinstance(weights, Statistics) else statistics(weights)
    h = time / steps
    for _ in range(steps):
        first = slope(start)
        second = slope(moved(start, first, h / 2))
        third = slope(moved(start, second, h / 2))
        fourth = slope(moved(start, third, h))
        for part, weight in ((first, 1), (second, 2), (third, 2), (fourth, 1)):
            start = moved(start, part, weight * h / 6)
    return start


def quadratic_ntk(weights: Tensor, epsilon: float, inputs: Tensor, others: Tensor | None = None) -> Tensor:
    r"""Return $\frac1N (x \cdot x') \sum_i \phi'(w_i \cdot x)\, \phi'(w_i \cdot x')$, the toy's kernel without $\alpha$.

    It is $N$ times that of `fulgurite.landscape.ntk_gram`: the mean-field learning rate contains this factor.

    Args:
        weights: `[N, D]`.
        epsilon: Weight of the quadratic part.
        inputs: `[B, D]`.
        others: `[M, D]`; None for `inputs`.

    Returns:
        `[B, M]`.
    """
    others = inputs if others is None else others
    slopes, others_slopes = (1 + epsilon * x @ weights.mT for x in (inputs, others))
    return (inputs @ others.mT) * (slopes @ others_slopes.mT) / len(weights)


def _error_forms(
    weights: Tensor | Statistics, alpha: float, epsilon: float, beta: Tensor, initial: Tensor | Statistics | None
) -> tuple[Tensor, Tensor]:
    r"""Return $A$ `[D, D]` and $b$ `[D]`."""
    now = weights if isinstance(weights, Statistics) else statistics(weights)
    mean, second = now
    if initial is not None:
        then = initial if isinstance(initial, Statistics) else statistics(initial)
        mean, second = mean - then.mean, second - then.second
    return (alpha * epsilon * second - torch.outer(beta, beta)) / 2, alpha * mean


def _pull(form: Tensor) -> Tensor:
    r"""Return $S = (2 A + \operatorname{tr}(A)\, I) / D^2$."""
    identity = torch.eye(len(form), dtype=form.dtype, device=form.device)
    return (2 * form + form.trace() * identity) / len(form) ** 2
