# SPDX-License-Identifier: Apache-2.0
"""Gated linear layers, convolutions and embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite_plugins.bilevel.self_tuning_networks.layers.gated import Gated


def in_one(x: Tensor) -> bool:
    """Return whether both halves of a layer are made by one kernel, with the weights side by side.

    An accelerator is kept busier by it and reads the input once. On the CPU two kernels were measured to be as fast or
    faster, save the copy of the weights, and give exactly the elementary outputs of the plain layer.
    """
    return x.device.type != "cpu"


class HyperLinear(Gated, nn.Linear):
    """`nn.Linear` with a weight for each example, gated by its hyperparameters; the arguments are those of `Gated`.

    Example:
        >>> layer = HyperLinear(4, 3, num_hyper=2)
        >>> layer.conditioning.set(h=torch.randn(8, 2))
        >>> layer(torch.randn(8, 4)).shape
        torch.Size([8, 3])
    """

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map `[B, *, in_features]` to `[B, *, out_features]`."""
        h = self.per_example()
        if h is None:
            return F.linear(input, *self.effective(self.conditioning.h))
        weight, bias = self.elementary()
        if in_one(input):
            bias = None if bias is None else F.pad(bias, (0, len(bias)))
            y, u = F.linear(input, torch.cat([weight, self.hyper_weight]), bias).chunk(2, dim=-1)
        else:
            y, u = F.linear(input, weight, bias), F.linear(input, self.hyper_weight)
        return self.mixed(y, u, h, channel=-1)


class _HyperConv(Gated):
    """What the convolutions have in common."""

    groups: int

    def add_gates(self, *args: Any, **kwargs: Any) -> None:
        super().add_gates(*args, **kwargs)
        if self.layout == "time,batch":
            raise ValueError(
                f"Expected `layout` of {type(self).__name__} to have one leading dimension, but got 'time,batch'."
            )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map `[B, in_channels, *]` to `[B, out_channels, *]`."""
        h = self.per_example()
        if h is None:
            return self._conv_forward(input, *self.effective(self.conditioning.h))  # type: ignore[operator]
        weight, bias = self.elementary()
        channel = 1 - weight.ndim
        if in_one(input):
            # In a layer of groups both kernels of a channel stand side by side, to see the inputs of the same group.
            grouped = int(self.groups > 1)
            both = torch.stack([weight, self.hyper_weight], grouped).flatten(0, 1)
            bias = None if bias is None else torch.stack([bias, torch.zeros_like(bias)], grouped).flatten()
            outputs = self._conv_forward(input, both, bias).unflatten(channel, (-1, 2) if grouped else (2, -1))  # type: ignore[operator]
            y, u = outputs.unbind(channel - 1 + grouped)
        else:
            y = self._conv_forward(input, weight, bias)  # type: ignore[operator]
            u = self._conv_forward(input, self.hyper_weight, None)  # type: ignore[operator]
        return self.mixed(y, u, h, channel)


class HyperConv1d(_HyperConv, nn.Conv1d):
    """`nn.Conv1d` with a kernel for each example, gated by its hyperparameters; the arguments are those of `Gated`."""

    plain = nn.Conv1d


class HyperConv2d(_HyperConv, nn.Conv2d):
    """`nn.Conv2d` with a kernel for each example, gated by its hyperparameters; the arguments are those of `Gated`."""

    plain = nn.Conv2d


class HyperConv3d(_HyperConv, nn.Conv3d):
    """`nn.Conv3d` with a kernel for each example, gated by its hyperparameters; the arguments are those of `Gated`."""

    plain = nn.Conv3d


class HyperEmbedding(Gated, nn.Embedding):
    r"""`nn.Embedding` whose rows are $e + (V h) \odot u$; the arguments are those of `Gated`."""

    plain = nn.Embedding

    def add_gates(self, *args: Any, **kwargs: Any) -> None:
        """Add the gates; the row of `padding_idx` stays what it is."""
        super().add_gates(*args, **kwargs)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.hyper_weight[self.padding_idx].zero_()

    @staticmethod
    def fan_in(weight: Tensor) -> int:
        """Return the width of a row, which stands for the fan-in of a table."""
        return weight.shape[1]

    @staticmethod
    def outputs(weight: Tensor) -> int:
        """Return the width of a row."""
        return weight.shape[1]

    @staticmethod
    def over_weight(scale: Tensor, weight: Tensor) -> Tensor:
        """Leave `scale` `[O]` as it is: it broadcasts over the rows."""
        return scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map indices `[B, *]` to `[B, *, embedding_dim]`."""
        weight, _ = self.elementary()
        y = self._rows(input, weight, self.max_norm)
        h = self.conditioning.h
        if h is None:
            return y
        u = self._rows(input, self.hyper_weight, None)
        several = self.per_example()
        if several is not None:
            return self.mixed(y, u, several, channel=-1)
        self._check_number(h)
        scale, _ = self.gates(h.reshape(-1))
        return torch.addcmul(y, scale.to(y.dtype), u)

    def _rows(self, indices: Tensor, table: Tensor, max_norm: float | None) -> Tensor:
        return F.embedding(
            indices, table, self.padding_idx, max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
