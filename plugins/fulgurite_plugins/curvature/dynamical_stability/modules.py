# SPDX-License-Identifier: Apache-2.0
"""Networks in which flatness is a norm: what SGD's stability limits can be read off their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.errors import check_argument, check_choice, is_number
from fulgurite_plugins.curvature.dynamical_stability.functional import path_norm


class DiagonalLinearNetwork(nn.Module):
    r"""A linear model whose coefficients are products: $f(x) = \beta^\top x$ with $\beta = a \odot b$, or $u^D - v^D$.

    For half the squared error and inputs with $\frac1n X^\top X = I$, $\mathrm{Tr}(H) = |a|^2 + |b|^2 \ge 2 |\beta|_1$
    and $\lambda_{\max}(H) = \max_k (a_k^2 + b_k^2) \ge 2 |\beta|_\infty$: SGD limits the sparsity-seeking norm,
    gradient descent the largest coefficient only. For $u^2 - v^2$,
    $\mathrm{Tr}(H) = 4 (|u|^2 + |v|^2) \ge 4 |\beta|_1$.

    Args:
        dim: Number of inputs $d$.
        depth: Number of factors $D$ of a coefficient, at least 2: `depth` vectors for `"ab"`, powers for `"uv"`.
        form: `"ab"`: a product of different vectors. `"uv"`: $u^D - v^D$, which has both signs at any depth.
        init_scale: Standard deviation of the initial factors, one for all or one for each; `"uv"` starts at this constant,
            where $\beta = 0$.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> DiagonalLinearNetwork(3, form="uv")(torch.ones(2, 3))
        tensor([[0.],
                [0.]], grad_fn=<UnsqueezeBackward0>)
    """

    def __init__(
        self, dim: int, depth: int = 2, form: Literal["ab", "uv"] = "ab", init_scale: float | Sequence[float] = 0.1
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_argument(isinstance(dim, int) and dim >= 1, "dim", name, "a positive integer", dim)
        check_argument(isinstance(depth, int) and depth >= 2, "depth", name, "an integer of at least 2", depth)
        check_choice(form, ("ab", "uv"), "form", name)
        scales = [init_scale] if isinstance(init_scale, int | float) else [*init_scale]
        fits = all(is_number(s) and s > 0 for s in scales) and (
            len(scales) == 1 or (form, len(scales)) == ("ab", depth)
        )
        check_argument(fits, "init_scale", name, "positive, or such a number for each factor of 'ab'", init_scale)
        self.dim, self.depth, self.form, self.init_scale = dim, depth, form, init_scale
        self.factors = nn.Parameter(torch.empty(depth if form == "ab" else 2, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew."""
        with torch.no_grad():
            if self.form == "ab":
                nn.init.normal_(self.factors)
            else:
                nn.init.ones_(self.factors)
            self.factors.mul_(torch.as_tensor(self.init_scale).reshape(-1, 1).to(self.factors))

    @property
    def coefficients(self) -> Tensor:
        r"""$\beta$, `[dim]`."""
        if self.form == "ab":
            return self.factors.prod(dim=0)
        powers = self.factors.pow(self.depth)
        return powers[0] - powers[1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[N, dim]` to `[N, 1]`."""
        return (inputs @ self.coefficients).unsqueeze(1)

    def trace(self) -> Tensor:
        r"""Return $\mathrm{Tr}(H)$ for half the squared error and inputs with $\frac1n X^\top X = I$."""
        return self._curvatures().sum()

    def frobenius_norm(self) -> Tensor:
        r"""Return $|H|_F$ likewise: $H$ has one block of rank one per input."""
        return self._curvatures().norm()

    def lambda_max(self) -> Tensor:
        r"""Return $\lambda_{\max}(H)$ likewise."""
        return self._curvatures().max()

    def _curvatures(self) -> Tensor:
        r"""Return $|\partial \beta_k / \partial \theta|^2$ for every coefficient, `[dim]`."""
        if self.form == "uv":
            return (self.depth * self.factors.pow(self.depth - 1)).square().sum(dim=0)
        others = [torch.cat([self.factors[:k], self.factors[k + 1 :]]).prod(dim=0) for k in range(self.depth)]
        return torch.stack(others).square().sum(dim=0)


class TwoLayerReLU(nn.Module):
    r"""A network with one hidden layer, $f(x) = \sum_j a_j \mathrm{relu}(w_j^\top x)$.

    For half the squared error and $x \sim N(0, I_d)$ without bias,
    $\mathrm{E}\, \mathrm{Tr}(H) = \frac12 (|W|_F^2 + d |a|^2) \ge \sqrt d \sum_j |a_j| |w_j|$: what bounds the trace
    bounds the path norm.

    Args:
        dim: Number of inputs $d$.
        width: Number of hidden units $m$.
        bias: Whether hidden units have a bias.
        init_scale: Standard deviation of $a_j$ is this over $\sqrt m$, of the entries of $w_j$ this over $\sqrt d$.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> TwoLayerReLU(10, 40)(torch.ones(2, 10)).shape
        torch.Size([2, 1])
    """

    def __init__(self, dim: int, width: int, bias: bool = False, init_scale: float = 1.0) -> None:
        super().__init__()
        name = type(self).__name__
        check_argument(isinstance(dim, int) and dim >= 1, "dim", name, "a positive integer", dim)
        check_argument(isinstance(width, int) and width >= 1, "width", name, "a positive integer", width)
        check_argument(is_number(init_scale) and init_scale > 0, "init_scale", name, "positive", init_scale)
        self.dim, self.width, self.init_scale = dim, width, init_scale
        self.hidden = nn.Linear(dim, width, bias=bias)
        self.output = nn.Linear(width, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; biases begin at zero."""
        nn.init.normal_(self.hidden.weight, std=self.init_scale * self.dim**-0.5)
        nn.init.normal_(self.output.weight, std=self.init_scale * self.width**-0.5)
        if self.hidden.bias is not None:
            nn.init.zeros_(self.hidden.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[N, dim]` to `[N, 1]`."""
        return self.output(self.hidden(inputs).relu())

    def path_norm(self) -> Tensor:
        r"""Return $\sum_j |a_j| |w_j|_2$, the bias not counted."""
        return path_norm(self.hidden.weight, self.output.weight)

    def trace(self, inputs: Tensor) -> Tensor:
        r"""Return $\mathrm{Tr}(H)$ for half the squared error on `inputs` `[N, dim]`.

        It is $\frac1n \sum_i \sum_j \big[\mathrm{relu}(w_j^\top x_i)^2 + a_j^2 1(w_j^\top x_i > 0) (|x_i|^2 + b)\big]$,
        where $b$ is 1 with a bias.
        """
        before = self.hidden(inputs)
        length = inputs.square().sum(dim=1, keepdim=True) + (self.hidden.bias is not None)
        active = (before > 0).to(before.dtype)
        return (before.relu().square() + self.output.weight.square() * active * length).sum(dim=1).mean()

    def expected_trace(self) -> Tensor:
        r"""Return the mean of the trace over inputs $x \sim N(0, I_d)$, without bias: $\frac12 (|W|_F^2 + d |a|^2)$."""
        return (self.hidden.weight.square().sum() + self.dim * self.output.weight.square().sum()) / 2
