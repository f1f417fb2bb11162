# SPDX-License-Identifier: Apache-2.0
"""The networks of the study, for pairs of integers modulo p, and its loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import check_argument, check_choice


class QuadraticMLP(nn.Module):
    r"""$f(m, n) = W\, \sigma(U e_m + V e_n)$ with $\sigma(x) = x^2$, no biases.

    It takes tokens `[B, 2]` (int64), whose columns of `U` and `V` it looks up, or one-hot vectors `[B, 2 p]`; the result is
    the same.

    Args:
        p: The modulus, the number of classes.
        width: Number of neurons `N`.
        dropout: Rate of dropout, of what goes into the square.
        norm: Normalisation of what comes out of the square: `"batch"`, `"layer"` or None.
        activation: `"square"` or `"relu"`.

    Attributes:
        U: Linear layer of the first number, `p` to `N`; `V` is that of the second, `W` leads from `N` to `p`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        p: int,
        width: int = 500,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] | None = None,
        activation: Literal["square", "relu"] = "square",
    ) -> None:
        super().__init__()
        check_argument(p >= 2, "p", "QuadraticMLP", "at least 2", p)
        check_argument(width >= 1, "width", "QuadraticMLP", "at least 1", width)
        check_argument(0 <= dropout < 1, "dropout", "QuadraticMLP", "in [0, 1)", dropout)
        check_choice(norm, ("batch", "layer", None), "norm", "QuadraticMLP")
        check_choice(activation, ("square", "relu"), "activation", "QuadraticMLP")
        self.p = p
        self.activation = activation
        self.U, self.V = nn.Linear(p, width, bias=False), nn.Linear(p, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm: nn.Module = nn.Identity()
        if norm is not None:
            self.norm = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.W = nn.Linear(width, p, bias=False)
        for layer in (self.U, self.V, self.W):
            nn.init.normal_(layer.weight, std=0.5 / (2 * width) ** (1 / 3))

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return what the outgoing layer is given `[B, N]`."""
        x = self.dropout(self._sum(inputs))
        return self.norm(x.square() if self.activation == "square" else x.relu())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map tokens `[B, 2]` or one-hot vectors `[B, 2 p]` to outputs `[B, p]`."""
        return self.W(self.hidden(inputs))

    def _sum(self, inputs: Tensor) -> Tensor:
        if inputs.is_floating_point():
            first, second = inputs.split(self.p, dim=1)
            return self.U(first) + self.V(second)
        # The rows that are looked up must be contiguous; transposing p rows costs nothing beside B of them.
        first, second = self.U.weight.mT.contiguous(), self.V.weight.mT.contiguous()
        return F.embedding(inputs[:, 0], first) + F.embedding(inputs[:, 1], second)


class TokenTransformer(nn.Module):
    """A causal transformer on the tokens `m`, `n`, `=`, read at the last; ReLU, no biases.

    Args:
        p: The modulus, the number of classes; the token `=` has the number `p`.
        n_layer: Number of blocks.
        d: Width.
        heads: Heads of attention.
        mlp_factor: Neurons of each perceptron, in units of `d`.
        layer_norm: Whether blocks and outputs are normalised first.

    Raises:
        ValueError: If an argument is outside its range, or the heads do not divide the width.
    """

    def __init__(
        self, p: int, n_layer: int = 1, d: int = 128, heads: int = 4, mlp_factor: int = 4, layer_norm: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("p", p), ("n_layer", n_layer), ("d", d), ("heads", heads), ("mlp_factor", mlp_factor)):
            check_argument(value >= 1, name, "TokenTransformer", "at least 1", value)
        check_argument(d % heads == 0, "d", "TokenTransformer", f"a multiple of its {heads} heads", d)
        self.p = p
        self.tokens, self.positions = nn.Embedding(p + 1, d), nn.Embedding(3, d)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=d**-0.5)
        self.blocks = nn.Sequential(*(_Block(d, heads, mlp_factor, layer_norm) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(d) if layer_norm else nn.Identity()
        self.head = nn.Linear(d, p, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map tokens `[B, 2]` to logits `[B, p]`.

        Raises:
            ValueError: If the inputs are not pairs of tokens.
        """
        if inputs.is_floating_point() or inputs.ndim != 2 or inputs.shape[1] != 2:
            raise ValueError(
                f"Expected tokens [B, 2] (int64), but TokenTransformer got {inputs.dtype} {list(inputs.shape)}. Use "
                f"ModularArithmetic(encoding='tokens')."
            )
        x = self.tokens(F.pad(inputs, (0, 1), value=self.p)) + self.positions.weight
        return self.head(self.norm(self.blocks(x)[:, -1]))


class _Block(nn.Module):
    def __init__(self, d: int, heads: int, mlp_factor: int, layer_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(d) if layer_norm else nn.Identity() for _ in range(2))
        self.qkv, self.project = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d, mlp_factor * d, bias=False), nn.ReLU(), nn.Linear(mlp_factor * d, d, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class OneHotMSE(nn.Module):
    """Mean squared error from one-hot targets, averaged over examples and classes.

    The learning rates and weight decays of the study belong to this average.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar in float32 at least.

        Args:
            outputs: `[B, C]`.
            targets: Classes `[B]`.

        Raises:
            ValueError: If the targets are not classes.
        """
        if targets.is_floating_point() or targets.ndim != 1 or outputs.ndim != 2:
            raise ValueError(
                f"Expected outputs [B, C] and integer classes [B], but OneHotMSE got {list(outputs.shape)} and "
                f"{targets.dtype} {list(targets.shape)}."
            )
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        classes = targets.unsqueeze(1)
        return outputs.scatter_add(1, classes, -torch.ones_like(classes, dtype=outputs.dtype)).square().mean()
