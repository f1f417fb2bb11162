# SPDX-License-Identifier: Apache-2.0
"""The ways to per-example gradient norms that the bench compares are ways to the same numbers."""

from __future__ import annotations

import pytest
import torch

from fulgurite.bench import Missing
from fulgurite_plugins.data_selection.data_diet import bench_gradients
from fulgurite_plugins.data_selection.data_diet.bench_gradients import GRADIENT_CASES


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("make", "shape"), [("_mlp", (4, 64)), ("_convnet", (4, 3, 8, 8))])
def test_all_ways_agree_and_a_missing_peer_says_how_to_install_it(make, shape):
    blocks = bench_gradients._norms(getattr(bench_gradients, make), shape)  # fails if one disagrees with the loop
    for name, block in blocks.items():
        if isinstance(block, Missing):
            assert "pip install --no-deps" in block.reason
        else:
            assert block() > 0, name
    targets = {target.variant for case in GRADIENT_CASES for target in case.targets}
    assert targets <= set(blocks)


def test_a_way_that_disagrees_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_gradients, "per_example_norms", lambda model, x, y: torch.zeros(len(x)))
    with pytest.raises(AssertionError, match="not close"):
        bench_gradients._norms(bench_gradients._mlp, (4, 64))
