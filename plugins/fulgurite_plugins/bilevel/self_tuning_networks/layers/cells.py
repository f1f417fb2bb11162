# SPDX-License-Identifier: Apache-2.0
"""Gated recurrent cells, in place of recurrent layers, whose time loop runs inside one kernel and cannot be gated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite_plugins.bilevel.self_tuning_networks.layers.gated import Gated


class _HyperCell(Gated):
    suffixes = ("_ih", "_hh")
    hidden_size: int

    def affine(self, x: Tensor, h: Tensor | None, suffix: str) -> Tensor:
        """Return one gated affine map of `[B, *]`; `h` is None if one weight serves all examples.

        In two products: within a time loop, copying the weights side by side would cost more than it saves.
        """
        if h is None:
            return F.linear(x, *self.effective(self.conditioning.h, suffix))
        u = F.linear(x, getattr(self, f"hyper_weight{suffix}"))
        return self.mixed(F.linear(x, *self.elementary(suffix)), u, h, -1, suffix)

    def zeros(self, x: Tensor) -> Tensor:
        """Return the state before the first step, for inputs `[B, *]`."""
        return x.new_zeros(*x.shape[:-1], self.hidden_size)


class HyperLSTMCell(_HyperCell, nn.LSTMCell):
    """`nn.LSTMCell` with weights for each example, gated by its hyperparameters; the arguments are those of `Gated`.

    Example:
        >>> cell = HyperLSTMCell(4, 3, num_hyper=2)
        >>> cell.conditioning.set(h=torch.randn(8, 2))
        >>> [state.shape for state in cell(torch.randn(8, 4))]
        [torch.Size([8, 3]), torch.Size([8, 3])]
    """

    plain = nn.LSTMCell

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # noqa: A002
        """Map `[B, input_size]` and the state, two times `[B, hidden_size]`, to the next state."""
        h = self.per_example()
        hidden, cell = hx if hx is not None else (self.zeros(input),) * 2
        i, f, g, o = (self.affine(input, h, "_ih") + self.affine(hidden, h, "_hh")).chunk(4, dim=-1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class HyperGRUCell(_HyperCell, nn.GRUCell):
    """`nn.GRUCell` with weights for each example, gated by its hyperparameters; the arguments are those of `Gated`."""

    plain = nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002
        """Map `[B, input_size]` and the state `[B, hidden_size]` to the next state."""
        h = self.per_example()
        hidden = self.zeros(input) if hx is None else hx
        r_i, z_i, n_i = self.affine(input, h, "_ih").chunk(3, dim=-1)
        r_h, z_h, n_h = self.affine(hidden, h, "_hh").chunk(3, dim=-1)
        candidate = torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h)
        return torch.lerp(candidate, hidden.to(candidate.dtype), torch.sigmoid(z_i + z_h))
