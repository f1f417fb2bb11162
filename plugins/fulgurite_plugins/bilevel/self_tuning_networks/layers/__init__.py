# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights depend on the hyperparameters, per example."""

from fulgurite_plugins.bilevel.self_tuning_networks.layers.affine import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperEmbedding,
    HyperLinear,
)
from fulgurite_plugins.bilevel.self_tuning_networks.layers.cells import HyperGRUCell, HyperLSTMCell
from fulgurite_plugins.bilevel.self_tuning_networks.layers.gated import Gated, fuse

__all__ = [
    "Gated",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperEmbedding",
    "HyperGRUCell",
    "HyperLSTMCell",
    "HyperLinear",
    "fuse",
]
