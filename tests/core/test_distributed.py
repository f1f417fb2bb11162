# SPDX-License-Identifier: Apache-2.0
"""One process alone: every function works without a process group, and says what one rank would (two ranks elsewhere)."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from fulgurite import distributed


def check() -> None:
    rows = torch.arange(6).view(3, 2)
    assert not distributed.is_distributed()
    assert distributed.world() == (0, 1)
    assert distributed.gather_rows(rows, capacity=1)[0] is rows
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    tensor = torch.ones(2)
    distributed.broadcast_([tensor])
    assert torch.equal(tensor, torch.ones(2))


def test_without_a_process_group():
    check()


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_in_a_group_of_one_rank_nothing_is_sent(group, monkeypatch):
    def sent(*_: object, **__: object) -> None:
        raise AssertionError("one rank has nobody to talk to")

    for name in ("all_gather", "all_gather_object", "broadcast"):
        monkeypatch.setattr(dist, name, sent)
    check()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64, torch.bool, torch.int64])
@pytest.mark.parametrize(("rows", "capacity", "collectives"), [(0, 2, 1), (1, 2, 1), (2, 2, 1), (5, 2, 3), (3, 1, 3)])
def test_packing_survives_a_collective_of_one_rank(group, monkeypatch, dtype, rows, capacity, collectives):
    """The real `all_gather`, on one rank that is taken for several: rows of every type and number come back whole."""
    calls = []
    real = dist.all_gather
    monkeypatch.setattr(dist, "all_gather", lambda *a, **k: (calls.append(1), real(*a, **k)))
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    sent = (torch.arange(rows * 6).view(rows, 3, 2) % 2).to(dtype)
    (received,) = distributed.gather_rows(sent, capacity)
    assert received.dtype is dtype
    assert received.shape == sent.shape
    assert torch.equal(received, sent)
    assert len(calls) == collectives
