# SPDX-License-Identifier: Apache-2.0
"""Two ranks: the same probe on both, products averaged, and so the curvature of the global batch."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from fulgurite.testing.processes import on_ranks
from fulgurite_plugins.curvature import BatchSizeLRScaling, HessianSpectrum, SLQLearningRate
from tests.helpers import fit, weights
from tests.plugins.curvature.test_batch_hessian_training import FREE, Small, data

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


class Ordered(pl.LightningDataModule):
    """The same global batches on any number of ranks."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def train_dataloader(self) -> DataLoader:
        rank = dist.get_rank() if self.ranks > 1 else 0
        sampler = DistributedSampler(data(), self.ranks, rank, shuffle=False)
        return DataLoader(data(), 16 // self.ranks, sampler=sampler)


def run(ranks: int, callback: Any) -> Tensor:
    arguments: dict[str, Any] = {}
    if ranks > 1:
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        arguments = {"strategy": strategy, "devices": ranks}
    module = Small()
    fit(module, [callback], Ordered(ranks), epochs=1, **arguments)
    return weights(module)


def learn(ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, arguments in {
        "batch": {},
        "dataset": {"on": "dataset"},
        "rayleigh": {"rule": "rayleigh"},
        "fisher": {"operator": "fisher"},
    }.items():
        learner = SLQLearningRate(**{**FREE, "steps": 8, **arguments})
        found[name] = {"weights": run(ranks, learner), "lr": learner.lr, "momentum": learner.momentum}
        found[name]["extremes"] = learner.extremes
    for batches in (1, "all"):
        spectrum = HessianSpectrum(num_batches=batches, steps=6, every_n_epochs=1)  # type: ignore[arg-type]
        run(ranks, spectrum)
        found[f"spectrum of {batches}"] = tuple(spectrum.densities[0][1])
    for mode, where in (("linear", "predicted"), ("rmt", "predicted"), ("rmt", "measured")):
        scaling = BatchSizeLRScaling(4, mode, spectrum=where)  # type: ignore[arg-type]
        run(ranks, scaling)
        found[f"{mode}, {where}"] = scaling.factor
    return found


@pytest.fixture(scope="module")
def seen() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    one, other = on_ranks(lambda rank: learn(2), seconds=200)
    return learn(1), one, other


@pytest.mark.parametrize("name", ["batch", "dataset", "rayleigh", "fisher"])
def test_learner(seen: Any, name: str) -> None:
    alone, one, other = (found[name] for found in seen)
    assert (one["lr"], one["momentum"], one["extremes"]) == (other["lr"], other["momentum"], other["extremes"])
    assert torch.equal(one["weights"], other["weights"])
    assert one["lr"] == pytest.approx(alone["lr"], rel=1e-3)
    if name != "rayleigh":
        assert one["extremes"].largest == pytest.approx(alone["extremes"].largest, rel=1e-4)
    torch.testing.assert_close(one["weights"], alone["weights"], rtol=1e-3, atol=1e-4)


def test_spectrum_of_the_whole_data(seen: Any) -> None:
    alone, one, other = (found["spectrum of all"] for found in seen)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[0], alone[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one[1], alone[1], rtol=1e-2, atol=1e-4)


def test_spectrum_of_a_batch_is_that_of_the_global_one(seen: Any) -> None:
    alone, one, other = (found["spectrum of 1"] for found in seen)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[0], alone[0], rtol=1e-3, atol=1e-4)


def test_scaling_counts_the_ranks(seen: Any) -> None:
    alone, one, other = seen
    assert one["linear, predicted"] == other["linear, predicted"] == alone["linear, predicted"] == 4.0
    for name in ("rmt, predicted", "rmt, measured"):
        assert one[name] == other[name]
    # Of batches of 4 and 16 on any number of ranks.
    assert one["rmt, measured"] == pytest.approx(alone["rmt, measured"], rel=1e-4)
    assert one["rmt, predicted"] == pytest.approx(alone["rmt, predicted"], rel=0.2)
