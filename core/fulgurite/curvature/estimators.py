# SPDX-License-Identifier: Apache-2.0
"""Traces and norms of matrices that are known by their products, from random probes, with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.curvature.operators import Operator
from fulgurite.random import derived_seed


@dataclass(frozen=True)
class MonteCarlo:
    """An estimate.

    Args:
        value: The mean over probes.
        standard_error: Its standard error; NaN for a single probe.
        probes: Number of probes.
    """

    value: float
    standard_error: float
    probes: int


def rademacher(size: int, probes: int, seed: int, like: Operator | Tensor) -> Tensor:
    """Return probes `[size, probes]` of independent signs; the same on all ranks."""
    generator = torch.Generator().manual_seed(derived_seed(seed))
    signs = torch.randint(0, 2, (size, probes), generator=generator).mul_(2).sub_(1)
    return signs.to(like.device, like.dtype)


def hutchinson_trace(matrix: Operator, probes: int, seed: int = 0) -> MonteCarlo:
    r"""Estimate the trace, $\mathbb E\, v^\top A v$ over vectors of random signs (Hutchinson 1990)."""
    signs = rademacher(matrix.shape[0], probes, seed, matrix)
    return _mean((signs * (matrix @ signs)).sum(dim=0))


def hutchinson_frobenius(matrix: Operator, probes: int, seed: int = 0) -> MonteCarlo:
    r"""Estimate the Frobenius norm, the root of $\mathbb E\, |A v|^2$; the error is that of the root to first order."""
    square = _mean((matrix @ rademacher(matrix.shape[0], probes, seed, matrix)).square().sum(dim=0))
    norm = math.sqrt(square.value)
    return MonteCarlo(norm, square.standard_error / (2 * norm) if norm else math.nan, probes)


def hutchinson_diagonal(matrix: Operator, probes: int, seed: int = 0) -> Tensor:
    r"""Estimate the diagonal `[P]`, $\mathbb E\, v \odot A v$ (Bekas, Kokiopoulou and Saad 2007)."""
    signs = rademacher(matrix.shape[0], probes, seed, matrix)
    return (signs * (matrix @ signs)).mean(dim=1)


def _mean(values: Tensor) -> MonteCarlo:
    values = values.double()
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
    return MonteCarlo(values.mean().item(), error, len(values))
