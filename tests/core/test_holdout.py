# SPDX-License-Identifier: Apache-2.0
"""A part of the training set that training does not see, and a stream of it that never ends and goes on after a resume."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fulgurite import Capabilities, Intervention, distributed
from fulgurite.errors import RefusedError
from fulgurite.samples import EndlessStream, HoldOut, hold_out
from tests import helpers
from tests.helpers import Plain, fit


class Numbers(Dataset):
    """Example i is i, and a number from torch's global generator."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index), torch.rand(())


def stream(n: int = 10, batch_size: int = 4, seed: int = 0, **kwargs: Any) -> EndlessStream:
    return EndlessStream(DataLoader(Numbers(n), batch_size, **kwargs), "tester", seed)


def drawn(stream_: EndlessStream, batches: int) -> list[int]:
    return [int(i) for _ in range(batches) for i in stream_.next()[0]]


def test_split_is_a_partition_the_same_each_time_and_nested():
    train, held = hold_out(100, 0.2, seed=3)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(100))
    assert len(held) == 20
    assert torch.equal(held, hold_out(100, 0.2, seed=3)[1])
    assert not torch.equal(held, hold_out(100, 0.2, seed=4)[1])
    assert set(held.tolist()) < set(hold_out(100, 0.3, seed=3)[1].tolist())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_fraction_outside_its_range_is_named(fraction):
    with pytest.raises(ValueError, match=rf"`fraction` to be in \(0, 1\), but got {fraction}"):
        hold_out(10, fraction)


def test_each_pass_has_every_example_once_and_an_order_of_its_own():
    """Ten examples in batches of four: batches reach over the end of a pass, so that nothing is dropped or repeated."""
    numbers = drawn(stream(), 10)
    passes = [numbers[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(set(map(tuple, passes))) == 4
    assert numbers == drawn(stream(), 10)
    assert numbers != drawn(stream(seed=1), 10)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_divide_what_one_rank_with_larger_batches_draws(ranks, monkeypatch):
    def of(rank: int) -> list[list[int]]:
        monkeypatch.setattr(distributed, "world", lambda: (rank, ranks))
        one = stream(batch_size=4)
        return [[int(i) for i in one.next()[0]] for _ in range(5)]

    parts = [of(rank) for rank in range(ranks)]
    monkeypatch.setattr(distributed, "world", lambda: (0, 1))
    whole = stream(n=10 * ranks, batch_size=4 * ranks)  # only to have a loader of that batch size
    whole._batches.indices = stream()._batches.indices
    together = [list(chain(*step)) for step in zip(*parts, strict=True)]
    assert together == [[int(i) for i in whole.next()[0]] for _ in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_from_its_position(workers):
    expected = drawn(stream(), 9)
    first = stream(num_workers=workers)
    assert drawn(first, 4) == expected[:16]
    second = stream(num_workers=workers)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"position": 4}
    assert drawn(second, 5) == expected[16:]
    first.close()
    assert drawn(first, 5) == expected[16:], "closed, it can be read on"


def test_random_numbers_of_examples_are_resumed_too_and_the_global_stream_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = stream()
    numbers = [whole.next()[1] for _ in range(6)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    resumed = stream()
    resumed.load_state_dict({"position": 3})
    assert torch.equal(resumed.next()[1], numbers[3])
    assert not torch.equal(numbers[2], numbers[3])


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Endless()), "DataLoader over Endless"),
        ([1, 2], "list over list"),
        (DataLoader(Numbers(10), batch_size=None), "batch_size=None"),
        (DataLoader(Numbers(3), batch_size=4), "one batch of 4 held-out examples, but there are 3"),
    ],
)
def test_data_without_indices_or_fewer_than_a_batch_are_refused_by_name(loader, message):
    with pytest.raises(RefusedError, match=f"tester.*{message}"):
        EndlessStream(loader, "tester")


class Holds(Intervention):
    """Holds a quarter out, and notes what was trained on and what the stream gave."""

    capabilities = Capabilities(sample_indices=True)

    def __init__(self, fraction: float = 0.25) -> None:
        self.fraction = fraction
        self.drawn: list[int] = []
        self.given: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.holdout = HoldOut(trainer, "holds", self.fraction)

    def on_train_start(self, *_: Any) -> None:
        self.stream = self.holdout.stream(0)

    def transform_batch(self, batch: Any, step: Any) -> Any:
        self.drawn += step.indices.tolist()
        return batch

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.holdout.close()

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, **self.holdout.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.holdout.load_state_dict(state)


def test_training_sees_everything_but_the_held_out_part():
    holds = Holds()
    trainer = fit(Plain(), [holds], helpers.loader(helpers.data(32), batch_size=4), epochs=2)
    train, held = hold_out(32, 0.25)
    assert Counter(holds.drawn) == Counter(train.tolist() * 2)
    assert torch.equal(holds.holdout.held, held)
    assert trainer.global_step == 12
    assert "dataloader" not in trainer.fit_loop._data_source.__dict__


def test_stream_gives_the_held_out_part():
    holds = Holds()
    data = helpers.data(32)

    class Read(pl.Callback):
        def on_train_end(self, *_: Any) -> None:
            self.inputs = torch.cat([holds.stream.next()[0] for _ in range(2)])

    read = Read()
    fit(Plain(), [holds, read], helpers.loader(data, batch_size=4), epochs=1)
    expected = data.tensors[0][hold_out(32, 0.25)[1]]
    assert sorted(read.inputs[:, 0].tolist()) == sorted(expected[:, 0].tolist())


def test_optimizers_that_ask_for_the_length_of_training_are_told_the_shorter_one():
    class Asks(Plain):
        def configure_optimizers(self) -> Any:
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Asks()
    fit(module, [Holds()], helpers.loader(helpers.data(32), batch_size=4), epochs=2)
    assert module.steps == 12


def test_split_is_restored_and_other_data_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    fit(Plain(), [Holds()], helpers.loader(helpers.data(32), batch_size=4), epochs=1).save_checkpoint(path)
    resumed = Holds(fraction=0.5)  # the split that was made counts
    fit(Plain(), [resumed], helpers.loader(helpers.data(32), batch_size=4), epochs=2, ckpt=path)
    assert sorted(resumed.drawn) == hold_out(32, 0.25)[0].tolist()
    with pytest.raises(RefusedError, match="24 examples to train on and 8 held out, but the training set now has 40"):
        fit(Plain(), [Holds()], helpers.loader(helpers.data(40), batch_size=4), epochs=2, ckpt=path)


def test_iterable_training_data_are_refused_by_name():
    with pytest.raises(RefusedError, match="holds changes which training examples are used"):
        fit(Plain(), [Unindexed()], DataLoader(Endless(), batch_size=1))


class Unindexed(Holds):
    capabilities = Capabilities()

    def transform_batch(self, batch: Any, step: Any) -> Any:
        return batch
