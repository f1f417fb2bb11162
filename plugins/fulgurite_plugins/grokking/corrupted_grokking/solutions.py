# SPDX-License-Identifier: Apache-2.0
r"""Weights that solve modular arithmetic in closed form (Gromov, 2023, arXiv:2301.02679).

The network is $f(m, n) = W (U e_m + V e_n)^2$. With $A = 2\pi s m / p + a$ and $B = 2\pi s n / p + b$, the square of a
neuron's $c (\cos A + \cos B)$ holds $c^2 \cos(A + B)$, and its outgoing weight $c \cos(2\pi s q / p + a + b)$ makes of this
$\tfrac{c^3}{2} \cos(2\pi s (m + n - q) / p)$. All that is left depends on the phases and goes to zero over many neurons;
over the frequencies $s = 1 \dots p - 1$ the cosines add up to $p - 1$ for $q = m + n$ and to $-1$ for all other $q$.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Weights of a quadratic network.

    Attributes:
        U: Weights of the first number `[N, p]`.
        V: Weights of the second number `[N, p]`.
        W: Outgoing weights `[p, N]`.
    """

    U: Tensor
    V: Tensor
    W: Tensor


def modular_addition_solution(
    p: int, width: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Solution:
    r"""Return weights with which $W (U e_m + V e_n)^2$ is largest at $m + n$ modulo $p$.

    Over all pairs the mean of the output at $m + n$ is 1, and that of all others $-1 / (p - 1)$. Single outputs deviate by
    about $2 / \sqrt N$, so that every pair is right if the network is wide enough: for $p = 97$, 500 neurons are.

    Args:
        p: The modulus, an odd number of at least 3.
        width: Number of neurons `N`, at least 1; frequencies are used in turn.
        generator: The source of the phases; None for one seeded with 0.
        dtype: The type of the weights.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if p < 3 or p % 2 == 0:
        raise ValueError(f"Expected `p` of modular_addition_solution to be an odd number of at least 3, but got {p!r}.")
    return Solution(*_waves(p, p, width, generator, dtype))


def modular_multiplication_solution(
    p: int, width: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Solution:
    r"""Return weights with which $W (U e_m + V e_n)^2$ is largest at $m n$ modulo $p$.

    Numbers other than 0 are powers $g^x$ of a primitive root, and multiplying them is adding exponents modulo $p - 1$: it is
    the solution of addition in exponents. Products with 0 have two neurons of their own, for
    $\tfrac34 (z_m - z_n)^2 + \tfrac14 (z_m + z_n)^2$, which is 1 if one of the numbers is 0 ($z = 1$) and else 0.

    Args:
        p: The modulus, an odd prime.
        width: Number of neurons `N`, at least 3: two for the zero, and the waves.
        generator: The source of the phases; None for one seeded with 0.
        dtype: The type of the weights.

    Raises:
        ValueError: If `p` is no odd prime, or the width too small.
    """
    if width < 3:
        raise ValueError(f"Expected `width` of modular_multiplication_solution to be at least 3, but got {width!r}.")
    powers = powers_of_primitive_root(p)
    u, v, w = _waves(p, p - 1, width - 2, generator, dtype)
    U, V, W = torch.zeros(width, p, dtype=dtype), torch.zeros(width, p, dtype=dtype), torch.zeros(p, width, dtype=dtype)
    U[:-2, powers], V[:-2, powers], W[powers, :-2] = u, v, w
    U[-2:, 0] = 1
    V[-2:, 0] = torch.tensor([-1, 1], dtype=dtype)
    W[0, -2:] = torch.tensor([0.75, 0.25], dtype=dtype)
    return Solution(U, V, W)


def _waves(
    p: int, period: int, width: int, generator: torch.Generator | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the waves of `width` neurons over `0 ... period - 1`: `[N, period]`, `[N, period]` and `[period, N]`."""
    if width < 1:
        raise ValueError(f"Expected `width` to be at least 1, but got {width!r}.")
    generator = generator or torch.Generator().manual_seed(0)
    a, b = math.pi * (2 * torch.rand(2, width, 1, generator=generator, dtype=torch.float64) - 1)
    frequency = torch.arange(width).unsqueeze(1) % (period - 1) + 1
    # Whole numbers modulo the period first: the angles of large products would lose digits.
    angle = (frequency * torch.arange(period) % period).double() * (2 * math.pi / period)
    scale = (2 / width) ** (1 / 3)
    U, V, W = (scale * torch.cos(angle + phase) for phase in (a, b, a + b))
    return U.to(dtype), V.to(dtype), W.mT.contiguous().to(dtype)


def powers_of_primitive_root(p: int) -> Tensor:
    """Return `[p - 1]` the powers `g^0, g^1, ... g^(p - 2)` modulo `p` of the smallest primitive root of an odd prime.

    Raises:
        ValueError: If `p` is no odd prime.

    Example:
        >>> powers_of_primitive_root(7)
        tensor([1, 3, 2, 6, 4, 5])
    """
    if p < 3 or any(p % divisor == 0 for divisor in range(2, math.isqrt(p) + 1)):
        raise ValueError(f"Expected `p` to be an odd prime, of which there is a primitive root, but got {p!r}.")
    factors = [q for q in range(2, p) if (p - 1) % q == 0]
    root = next(g for g in range(2, p) if p == 3 or all(pow(g, (p - 1) // q, p) != 1 for q in factors))
    return torch.tensor([pow(root, exponent, p) for exponent in range(p - 1)])


class MultiplicativeBasis:
    """The basis in which multiplication modulo `p` has single frequencies, for the inverse participation ratio.

    It is the Fourier transform over the exponents of a primitive root, of the weights of all numbers but 0.

    Args:
        p: An odd prime.

    Raises:
        ValueError: If `p` is none.
    """

    def __init__(self, p: int) -> None:
        self.p = p
        self._powers = powers_of_primitive_root(p)

    def __call__(self, weights: Tensor) -> Tensor:
        """Return the components `[..., K]` of weights `[..., p]`.

        Raises:
            ValueError: If there are not `p` weights.
        """
        if weights.shape[-1] != self.p:
            raise ValueError(f"Expected neurons with {self.p} inputs for this basis, but got {weights.shape[-1]}.")
        return torch.fft.rfft(weights[..., self._powers.to(weights.device)])
