# SPDX-License-Identifier: Apache-2.0
"""Changing the training set between epochs: the right examples, numbers of batches and validations (two ranks elsewhere)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fulgurite import Capabilities, Intervention, lightning_adapter
from fulgurite.errors import RefusedError
from fulgurite.samples import TrainingSubset
from tests import helpers
from tests.helpers import Plain, fit, weights


class Change(Intervention):
    """Changes the training set at the ends of epochs, and notes what was trained on and how often there was validation."""

    capabilities = Capabilities(sample_indices=True)

    def __init__(self, changes: dict[int, Any], seed: int = 0) -> None:
        self.changes, self.seed = changes, seed
        self.drawn: list[list[int]] = [[]]  # resumed in the middle of an epoch, Lightning announces no start of it
        self.batches = [0]
        self.validations = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.subset = TrainingSubset(trainer, "change", self.seed)
        if -1 in self.changes:
            self.changes[-1](self.subset)

    def on_train_epoch_start(self, *_: Any) -> None:
        if self.drawn[-1]:
            self.drawn.append([])
            self.batches.append(0)

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches[-1] += 1

    def transform_batch(self, batch: Any, step: Any) -> Any:
        self.drawn[-1] += step.indices.tolist()
        return batch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validations += not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in self.changes:
            self.changes[trainer.current_epoch](self.subset)


def to(*indices: int) -> Any:
    return lambda subset: subset.restrict(torch.tensor(indices))


def reset(subset: TrainingSubset) -> None:
    subset.reset()


def run(changes: dict[int, Any], loader: Any = None, epochs: int = 3, **kwargs: Any) -> Change:
    change = Change(changes, kwargs.pop("seed", 0))
    loader = helpers.loader(helpers.data(8), batch_size=2, shuffle=False) if loader is None else loader
    fit(Plain(), [change], loader, val=helpers.loader(helpers.data(4), shuffle=False), epochs=epochs, **kwargs)
    return change


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ({0: to(1, 3, 5, 7)}, [4, 2, 2]),  # a smaller set, mutated by hand, ends validation for good
        ({0: to(1, 3, 5, 7), 1: reset}, [4, 2, 4]),
        ({-1: to(6, 7), 0: to(0, 1, 2, 3, 4, 5)}, [1, 3, 3]),  # a larger one is cut off at the old limit
        ({-1: to(6, 7), 0: reset}, [1, 4, 4]),
        ({0: lambda subset: subset.reweight(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1]))}, [4, 4, 4]),
        ({0: to(2)}, [4, 1, 1]),
    ],
)
def test_numbers_of_batches_and_validations_follow_the_change(changes, batches):
    change = run(changes)
    assert change.batches == batches
    assert change.validations == 3


def test_validation_twice_an_epoch_follows_the_change():
    change = run({0: to(0, 1, 2, 3)}, val_check_interval=0.5)
    assert change.validations == 6


def test_limits_apply_to_the_new_length():
    assert run({0: to(0, 1, 2, 3)}, limit_train_batches=0.5).batches == [2, 1, 1]
    assert run({-1: to(0, 1), 0: reset}, limit_train_batches=3).batches == [1, 3, 3]


def test_examples_are_those_that_were_chosen():
    change = run({0: to(5, 1, 6), 1: lambda s: s.reweight(torch.tensor([0.0, 0, 1, 0, 1, 0, 0, 0]))})
    assert change.drawn[0] == list(range(8))
    assert change.drawn[1] == [5, 1, 6]
    assert len(change.drawn[2]) == 8
    assert set(change.drawn[2]) == {2, 4}


def test_shuffled_order_is_new_in_each_epoch_and_the_same_for_the_same_seed():
    def drawn(seed: int) -> list[list[int]]:
        loader = helpers.loader(helpers.data(40), batch_size=5)
        return run({-1: to(*range(20))}, loader, epochs=2, seed=seed).drawn

    first, second = drawn(0)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    assert drawn(0) == [first, second]
    assert drawn(1)[0] != first


def test_kept_length_repeats_the_part_until_the_epoch_is_as_long_as_with_everything():
    """Counts differ by at most one in an epoch; each round is a permutation of its own; steps and epochs stay."""
    change = run({-1: lambda s: s.restrict(torch.tensor([0, 2, 5]), keep_length=True)}, helpers.loader(helpers.data(8)))
    for drawn in change.drawn:
        assert len(drawn) == 8
        assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 2, 5]
        assert set(drawn[6:]) < {0, 2, 5}
        assert len(set(drawn[6:])) == 2
    assert len({tuple(drawn[start : start + 3]) for drawn in change.drawn for start in (0, 3)}) > 2
    assert change.batches == [1, 1, 1]
    ordered = run({-1: lambda s: s.restrict(torch.tensor([0, 2, 5]), keep_length=True)}, epochs=1)
    assert ordered.drawn == [[0, 2, 5, 0, 2, 5, 0, 2]]
    assert ordered.batches == [4]


def test_kept_length_ends_with_the_restriction():
    keep = {-1: lambda s: s.restrict(torch.tensor([1, 3]), keep_length=True), 0: to(1, 3), 1: reset}
    assert run(keep).batches == [4, 1, 4]


def test_choice_is_made_from_the_loader_when_lightning_asks_for_it():
    """Once, with the user's own loader; None stands for everything; a wrong choice is named like a wrong restriction."""
    seen = []

    def choose(loader: Any) -> torch.Tensor:
        seen.append(loader)
        return torch.arange(len(loader.dataset))[1::2]

    change = run({-1: lambda s: s.restrict_by(choose)})
    assert change.drawn == [[1, 3, 5, 7]] * 3
    assert [type(loader.sampler).__name__ for loader in seen] == ["SequentialSampler"]
    assert run({-1: lambda s: s.restrict_by(lambda loader: None)}).batches == [4, 4, 4]
    assert run({-1: lambda s: s.restrict_by(choose, keep_length=True)}, epochs=1).drawn == [[1, 3, 5, 7] * 2]
    with pytest.raises(RefusedError, match="none twice"):
        run({-1: lambda s: s.restrict_by(lambda loader: torch.tensor([1, 1]))})


def test_the_whole_loader_can_be_asked_for_while_a_part_is_trained_on():
    lengths = []

    def look(subset: TrainingSubset) -> None:
        lengths.append(len(subset.unrestricted_loader()))

    change = run({-1: to(1, 3), 0: look})
    assert lengths == [4]
    assert change.batches == [1, 1, 1]


def test_draws_by_weight_have_the_right_frequencies():
    weights_ = torch.tensor([1.0, 2.0, 3.0, 4.0] * 500)
    change = run({-1: lambda s: s.reweight(weights_)}, helpers.loader(helpers.data(2000), batch_size=500), epochs=1)
    counts = torch.bincount(torch.tensor(change.drawn[0]) % 4, minlength=4) / 2000
    torch.testing.assert_close(
        counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.04
    )  # four standard deviations


@pytest.mark.parametrize("workers", [0, 1])
def test_with_workers_and_a_stateful_loader(workers):
    for cls in (DataLoader, StatefulDataLoader):
        loader = cls(helpers.data(8), batch_size=2, num_workers=workers)
        assert run({0: to(5, 1, 6)}, loader, epochs=2).drawn[1] == [5, 1, 6]


def test_global_random_stream_is_left_alone():
    def after(changes: dict[int, Any]) -> Any:
        run(changes, helpers.loader(helpers.data(8), batch_size=2, generator=torch.Generator()), epochs=2)
        return torch.rand(3)

    assert torch.equal(after({}), after({-1: to(1, 2, 3)}))


def test_close_leaves_the_trainer_as_found_and_later_epochs_use_everything():
    change = run({0: to(1, 2), 1: lambda subset: subset.close()})
    assert change.batches == [4, 1, 4]
    assert "dataloader" not in lightning_adapter.train_source(change.subset.trainer).__dict__
    change.subset.close()  # twice does no harm


class Resumable(Change):
    """The part changes again after the checkpoint; its state is that of the subset."""

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, **self.subset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.subset.load_state_dict(state)


@pytest.mark.parametrize("at", [3, 6, 8])
def test_resume_is_exact(tmp_path, at):
    """In the first epoch, in the middle of a restricted one and at its end; 4 + 4 + 2 batches."""

    class Save(pl.Callback):
        count = 0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.count += 1
            if self.count == at != 8:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if self.count == at == 8:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def train(callbacks: Any, ckpt: Any = None) -> tuple[Resumable, Any]:
        change = Resumable({0: to(*range(4, 20)), 1: to(1, 2, 3, 5, 7, 11, 13)})
        module = Plain()
        loader = StatefulDataLoader(helpers.data(20), batch_size=5, shuffle=True)
        fit(module, [change, *callbacks], loader, epochs=3, ckpt=ckpt)
        return change, weights(module)

    whole, expected = train([Save()])
    resumed, found = train([], tmp_path / "a.ckpt")
    assert whole.batches == [4, 4, 2]
    assert resumed.drawn[-1] == whole.drawn[-1]
    assert torch.equal(expected, found)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(helpers.data(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to(), "at least one example.*0 indices"),
        (to(1, 1), "2 indices of 1 examples"),
        (to(-1), "no negative number"),
        (to(1, 8), "index 8 is outside the training set of 8"),
        (lambda s: s.reweight(torch.ones(7)), "7 weights for 8"),
        (lambda s: s.reweight(torch.zeros(8)), "not all zero"),
        (lambda s: s.reweight(torch.tensor([1.0, -1.0])), "from -1.0 to 1.0"),
        (lambda s: s.reweight(torch.tensor([1.0, float("nan")])), "finite"),
    ],
)
def test_wrong_choices_are_named(change, message):
    with pytest.raises(RefusedError, match=f"change: .*{message}|change.*{message}"):
        run({-1: change})


@pytest.mark.parametrize(
    ("loader", "arguments", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=2), {}, "IterableDataset|DataLoader over Stream"),
        (lambda: [torch.zeros(2, 12)], {}, "of type list"),
        (
            lambda: DataLoader(helpers.data(8), sampler=WeightedRandomSampler([1.0] * 8, 8)),
            {},
            "WeightedRandomSampler, which would be lost",
        ),
        (lambda: helpers.loader(helpers.data(8)), {"overfit_batches": 1}, "overfit_batches=1"),
    ],
)
def test_data_that_cannot_be_restricted_are_refused_by_name(loader, arguments, message):
    class Unindexed(Change):
        capabilities = Capabilities()

        def transform_batch(self, batch: Any, step: Any) -> Any:
            return batch

    with pytest.raises(RefusedError, match=message):
        fit(Plain(), [Unindexed({-1: to(1)})], loader(), **arguments)
    assert "__old__setattr__" not in DataLoader.__dict__, "Lightning's changes to the class are left after an error"
