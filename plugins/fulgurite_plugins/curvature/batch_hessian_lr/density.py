# SPDX-License-Identifier: Apache-2.0
r"""Spectral densities by stochastic Lanczos quadrature.

After $k$ Lanczos steps from a vector $v$ of norm 1, the eigenvalues $\theta_j$ of the tridiagonal matrix and the
squared first components $w_j$ of its eigenvectors are a Gauss quadrature: $\sum_j w_j \theta_j^m = v^T A^m v$ for $m
\le 2 k - 1$. For random $v$ that is, on average, the mean of $\lambda^m$ over the eigenvalues, so that $\sum_j w_j\,
\delta(\lambda - \theta_j)$ stands for their density.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulgurite.curvature import lanczos
from fulgurite.errors import check_argument


class SpectralDensity(NamedTuple):
    """A density of eigenvalues, as points with weights.

    Args:
        values: Ritz values `[M]` of all probes, in ascending order.
        weights: Their weights `[M]`, not negative, with the sum 1.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def averaged(cls, quadratures: Iterable[tuple[Tensor, Tensor]]) -> SpectralDensity:
        """Return the average of quadratures `(values, weights)`, each with weights of the sum 1."""
        pairs = list(quadratures)
        values = torch.cat([v for v, _ in pairs])
        order = values.argsort()
        return cls(values[order], torch.cat([w for _, w in pairs])[order] / len(pairs))

    @property
    def smallest(self) -> float:
        """The smallest Ritz value: an upper bound of the smallest eigenvalue, and soon close to it."""
        return float(self.values[0])

    @property
    def largest(self) -> float:
        """The largest Ritz value: a lower bound of the largest eigenvalue, and soon close to it."""
        return float(self.values[-1])

    def moment(self, power: int) -> float:
        """Return the mean of the eigenvalues to a power; the first times `P` estimates the trace."""
        return float(self.weights @ self.values**power)

    def smoothed(self, points: Tensor, width: float) -> Tensor:
        r"""Return the density at certain points, each Ritz value widened to a Gaussian.

        Args:
            points: Eigenvalues `[G]`.
            width: Standard deviation of the Gaussians, positive.

        Returns:
            The density `[G]`, with the integral 1 over the whole line.
        """
        check_argument(width > 0, "width", "SpectralDensity.smoothed", "positive", width)
        distance = (points.to(self.values).unsqueeze(1) - self.values) / width
        return (torch.exp(-(distance**2) / 2) @ self.weights) / (width * math.sqrt(2 * math.pi))

    def draw(self, path: str | Path, title: str = "", width: float | None = None) -> None:
        """Draw the smoothed density, on a logarithmic scale, and the Ritz values under it, into a PNG file.

        Args:
            path: The file.
            title: What stands above the picture.
            width: As for `smoothed`; a hundredth of the spectrum's length by default.
        """
        from fulgurite.report.pictures import new_figure
        from fulgurite_callbacks import pictures

        length = max(self.largest - self.smallest, 1e-12 * max(1.0, abs(self.largest)))
        width = length / 100 if width is None else width
        points = torch.linspace(self.smallest - 5 * width, self.largest + 5 * width, 800, dtype=torch.float64)
        density = self.smoothed(points, width)
        bottom = float(self.weights[self.weights > 0].min()) / (10 * width)
        figure = new_figure(5.6, 3.4, "white")
        axes = figure.subplots()
        axes.fill_between(points.tolist(), bottom, density.clamp_min(bottom).tolist(), color="#cfe2f3", linewidth=0)
        axes.plot(points.tolist(), density.clamp_min(bottom).tolist(), color=pictures.COLOURS[0], linewidth=1.4)
        axes.plot(
            self.values.tolist(),
            [0.03] * len(self.values),
            "|",
            color=pictures.TEXT,
            markersize=9,
            transform=axes.get_xaxis_transform(),
        )
        axes.set(yscale="log", ylim=(bottom, 3 * float(density.max())), xlabel="eigenvalue", ylabel="density")
        pictures.finish(axes, title)
        pictures.save(figure, Path(path))


def slq_density(operator: Any, steps: int = 50, probes: int = 1, seed: int = 0) -> SpectralDensity:
    """Estimate the spectral density of a symmetric operator by stochastic Lanczos quadrature.

    It costs `steps` products per probe. Eigenvalues at the ends of the spectrum are found first; a region in the middle
    is resolved to about its share of `steps`.

    Args:
        operator: A `fulgurite.curvature` operator, or a symmetric matrix, `[P, P]`.
        steps: Lanczos steps per probe, at least 1; fewer are made where the space is exhausted.
        probes: Gaussian start vectors over which it is averaged, at least 1.
        seed: Seeds them; they are the same on all ranks.

    Raises:
        ValueError: If `steps` or `probes` is not positive.
        FloatingPointError: If a product is not finite.

    Example:
        >>> round(slq_density(torch.diag(torch.tensor([1.0, 2.0, 4.0])), steps=3).largest, 5)
        4.0
    """
    for name, number in (("steps", steps), ("probes", probes)):
        check_argument(isinstance(number, int) and number >= 1, name, "slq_density", "a positive integer", number)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randn(probes, operator.shape[0], generator=generator, dtype=torch.float64)
    starts = starts.to(operator.device, operator.dtype)
    return SpectralDensity.averaged(lanczos(operator.__matmul__, steps, start).ritz() for start in starts)
