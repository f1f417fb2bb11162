# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvalue of a self-adjoint map of matrices, in little memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fulgurite.curvature import lanczos

_STEPS = (20, 100)
"""Steps of Lanczos to the first restart, and later at most; as many matrices are in memory."""

_NUMBERS = 1 << 25
"""Numbers in memory, where the least number of steps allows it."""

_RESTARTS = 200


def largest_eigenvalue(operator: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    r"""Return the largest eigenvalue of a self-adjoint map by Lanczos, restarted from the best vector.

    The residual $r$ of a Ritz pair and its gap $\delta$ to the next Ritz value bound the error by $r$ and, once the two
    largest eigenvalues are told apart, by $r^2 / \delta$.

    Args:
        operator: The map, of tensors of the shape of `start`.
        start: Where to begin; must not be orthogonal to the eigenvector that is looked for.
        tolerance: Relative error at which to stop.

    Returns:
        A scalar in the dtype of `start`.
    """
    vector = start.reshape(-1)
    values = vector
    steps, most = _STEPS[0], min(max(_NUMBERS // len(vector), _STEPS[0]), _STEPS[1])
    for _ in range(_RESTARTS):
        found = lanczos(lambda flat: operator(flat.view_as(start)).reshape(-1), steps, vector)
        off = found.off_diagonal
        values, vectors = torch.linalg.eigh(torch.diag(found.diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
        residual = found.remainder * vectors[-1, -1].abs()
        gap = values[-1] - values[-2] if len(values) > 1 else values[-1].abs()
        if torch.minimum(residual, residual.square() / gap) <= tolerance * values[-1].abs():
            break
        vector = found.basis @ vectors[:, -1].to(vector)
        steps = min(2 * steps, most)
    return values[-1].to(start)
