# SPDX-License-Identifier: Apache-2.0
"""Two ranks (gloo, CPU): the same hyperparameters, other noise, other held-out examples, one collective a step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist

from fulgurite.testing.lab import equal_states
from fulgurite.testing.processes import on_ranks
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import gated_layers
from tests import helpers
from tests.helpers import weights
from tests.plugins.bilevel import stn

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
]


def train(rank: int) -> dict[str, Any]:
    """Train, and note what each step saw, and the collectives between the end of an update and the next batch."""
    shown: list[Any] = []
    reduced: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    class Notes(stn.Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            h = next(iter(gated_layers(self).values())).conditioning.h
            shown.append((self.training, batch[0][:, 0].clone(), h.detach().clone()))
            return super().training_step(batch, batch_idx)

    tuner, module = stn.tuner(stn.rate(), stn.decay(), train_steps=1, warmup_epochs=0.25), Notes()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    dist.all_reduce = counted
    stn.fit(
        [tuner], module, loader=helpers.loader(helpers.data(163), batch_size=8), strategy=strategy, devices=2, epochs=2
    )
    return {
        "weights": weights(module),
        "state": tuner.state_dict(),
        "shown": shown,
        "reduced": reduced,
        "values": tuner.final_values(),
        "steps": tuner._validation.steps,
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(train)


def test_ranks_end_with_the_same_weights_hyperparameters_and_state(ranks):
    first, second = ranks
    assert torch.equal(first["weights"], second["weights"])
    assert first["values"] == second["values"]
    assert equal_states(first["state"], second["state"])
    assert first["values"] != pytest.approx({"rate": 0.3, "decay": 0.01})


def test_ranks_see_other_examples_and_other_noise(ranks):
    for training in (True, False):
        first, second = ([s for s in rank["shown"] if s[0] is training] for rank in ranks)
        assert len(first) == len(second) > 0
        for (_, x, h), (_, y, k) in zip(first, second, strict=True):
            assert not torch.equal(x, y)
            assert not torch.equal(h, k)


def test_held_out_examples_are_those_that_no_rank_trains_on(ranks):
    trained, held = (
        {x for rank in ranks for s in rank["shown"] if s[0] is t for x in s[1].tolist()} for t in (True, False)
    )
    assert not trained & held
    assert len(held) == 33
    assert trained | held == set(helpers.data(163).tensors[0][:, 0].tolist())


def test_validation_step_costs_one_collective_of_the_hyperparameters_and_the_loss(ranks):
    for rank in ranks:
        assert rank["reduced"].count(2 * 2 + 1) == rank["steps"]
