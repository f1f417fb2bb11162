# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters that are being tuned, and the optimizer that moves them, on the device and without waiting for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite_plugins.bilevel.self_tuning_networks.functional import softplus_inverse

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class Adam(NamedTuple):
    """What Adam knows of some parameters: `mean` and `square` of the gradients, and the number of `steps` (a scalar)."""

    mean: Tensor
    square: Tensor
    steps: Tensor


def adam_step(theta: Tensor, gradient: Tensor, state: Adam, lr: Tensor) -> tuple[Tensor, Adam]:
    """Return the parameters and the state after one step of Adam (Kingma and Ba, 2015).

    Args:
        theta: The parameters `[*]`.
        gradient: Their gradient `[*]`.
        state: The state before the step.
        lr: Learning rates, which broadcast to `theta`.
    """
    steps = state.steps + 1
    mean = torch.lerp(state.mean, gradient, 1 - _BETAS[0])
    square = torch.lerp(state.square, gradient.square(), 1 - _BETAS[1])
    root = (square / (1 - _BETAS[1] ** steps)).sqrt() + _EPSILON
    return theta - lr * (mean / (1 - _BETAS[0] ** steps)) / root, Adam(mean, square, steps)


class Tuner:
    r"""$\lambda$ and $\rho$, where the scale of the perturbation is $s = \text{softplus}(\rho)$, and Adam over both.

    A step whose loss or gradient is not finite is none: nothing moves, and it is counted.

    Args:
        lam: Initial hyperparameters $\lambda$ `[H]`, on the whole real line.
        scale: Initial scales $s$ `[H]`, positive.
        lr: Learning rate of $\lambda$.
        scale_lr: Learning rate of $\rho$; 0 keeps the scales.
        max_grad_norm: Bound on the norm of the gradient for both; None for none.

    Attributes:
        theta: $\lambda$ and $\rho$ `[2, H]`.
        skipped: Number of steps that were none, a scalar.
        in_a_row: How many of the last ones were none, a scalar.
    """

    def __init__(
        self, lam: Tensor, scale: Tensor, lr: float, scale_lr: float, max_grad_norm: float | None = None
    ) -> None:
        self.theta = torch.stack([lam, softplus_inverse(scale.to(lam))])
        self.adam = Adam(torch.zeros_like(self.theta), torch.zeros_like(self.theta), lam.new_zeros(()))
        self.skipped = lam.new_zeros((), dtype=torch.long)
        self.in_a_row = lam.new_zeros((), dtype=torch.long)
        self.max_grad_norm = max_grad_norm
        self._lr = torch.tensor([[lr], [scale_lr]], dtype=lam.dtype)

    @property
    def lam(self) -> Tensor:
        r"""The hyperparameters $\lambda$ `[H]`."""
        return self.theta[0]

    @property
    def scale(self) -> Tensor:
        """The scales `[H]`."""
        return F.softplus(self.theta[1])

    def step(self, gradient: Tensor, loss: Tensor) -> None:
        r"""Move $\lambda$ and $\rho$, unless loss or gradient are not finite.

        Args:
            gradient: Gradient of the objective for `theta` `[2, H]`.
            loss: The loss, a scalar.
        """
        finite = gradient.isfinite().all() & loss.isfinite()
        if self.max_grad_norm is not None:
            gradient = gradient * (self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        theta, adam = adam_step(self.theta, gradient, self.adam, self._lr)
        self.theta = torch.where(finite, theta, self.theta)
        self.adam = Adam(*(torch.where(finite, new, old) for new, old in zip(adam, self.adam, strict=True)))
        self.skipped = self.skipped + ~finite
        self.in_a_row = torch.where(finite, 0, self.in_a_row + 1)

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.theta, self._lr = self.theta.to(device), self._lr.to(device)
        self.adam = Adam(*(tensor.to(device) for tensor in self.adam))
        self.skipped, self.in_a_row = self.skipped.to(device), self.in_a_row.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that moves, on the CPU."""
        state = {"theta": self.theta, "skipped": self.skipped, "in_a_row": self.in_a_row, **self.adam._asdict()}
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        device = self.theta.device
        self.theta, self.skipped, self.in_a_row = (state[name].clone() for name in ("theta", "skipped", "in_a_row"))
        self.adam = Adam(*(state[name].clone() for name in Adam._fields))
        self.to(device)
