# SPDX-License-Identifier: Apache-2.0
"""The two-layer network of the paper's analytic example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fulgurite.errors import check_argument, is_number


class QuadraticPerceptron(nn.Module):
    r"""A perceptron $f(x) = \frac{\alpha}{N} \sum_i \phi(w_i \cdot x)$ with $\phi(h) = h + \frac{\epsilon}{2} h^2$.

    The weights of the first layer are drawn from $N(0, 1)$, those of the readout are all $1 / N$ and stay so. In mean-field
    scaling gradient descent on half the mean squared error takes a learning rate of $N \eta / \alpha^2$, on `nn.MSELoss`
    half of that, with $\eta$ of order 1.

    Args:
        input_dim: Dimension $D$ of the inputs.
        width: Hidden units $N$.
        epsilon: Weight of the quadratic part; a small one makes the first kernel nearly linear.
        alpha: Output scale; leave it at 1 under `OutputScaling`.
        train_readout: Whether the readout is trained too.

    Raises:
        ValueError: If a size is not a positive integer, or a number is not finite (`alpha`: positive).

    Example:
        >>> QuadraticPerceptron(3, 5)(torch.zeros(2, 3)).shape
        torch.Size([2, 1])
    """

    alpha: Tensor

    def __init__(
        self, input_dim: int, width: int, epsilon: float = 0.25, alpha: float = 1.0, train_readout: bool = False
    ) -> None:
        super().__init__()
        for name, size in (("input_dim", input_dim), ("width", width)):
            whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
            check_argument(whole, name, "QuadraticPerceptron", "a positive integer", size)
        check_argument(is_number(epsilon), "epsilon", "QuadraticPerceptron", "a finite number", epsilon)
        good = is_number(alpha) and alpha > 0
        check_argument(good, "alpha", "QuadraticPerceptron", "a positive number", alpha)
        self.epsilon = epsilon
        self.hidden = nn.Linear(input_dim, width, bias=False)
        self.readout = nn.Linear(width, 1, bias=False)
        self.readout.requires_grad_(train_readout)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        nn.init.normal_(self.hidden.weight)
        nn.init.constant_(self.readout.weight, 1 / width)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs `[B, D]` to outputs `[B, 1]`."""
        h = self.hidden(x)
        return self.alpha * self.readout(h + 0.5 * self.epsilon * h.square())
