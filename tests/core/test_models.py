# SPDX-License-Identifier: Apache-2.0
"""The small networks."""

from __future__ import annotations

from torch import nn

from fulgurite.models import MLP


def test_perceptron_has_dropout_after_each_hidden_layer_only_if_asked_for():
    layers = list(MLP((1, 8, 8), 10, (6, 5), dropout=0.3))
    assert [type(layer) for layer in layers] == [nn.Flatten, *(nn.Linear, nn.ReLU, nn.Dropout) * 2, nn.Linear]
    assert {layer.p for layer in MLP((4,), 2, dropout=0.3) if isinstance(layer, nn.Dropout)} == {0.3}
    assert not any(isinstance(layer, nn.Dropout) for layer in MLP((4,), 2))
