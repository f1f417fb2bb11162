# SPDX-License-Identifier: Apache-2.0
"""The tracker gives each training batch exactly the dataset indices it was made of; the data carry their own index."""

from __future__ import annotations

import gc
import inspect
import multiprocessing
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fulgurite.errors import RefusedError
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.samples import SampleTracker
from tests.helpers import Plain, trainer

SIZE = 11


class Numbered(Dataset):
    """Each item says which one it is."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((12,), float(index)), index


class Watch(Intervention):
    """Notes, for every batch, the indices that it carries and those that the tracker gave."""

    capabilities = Capabilities(sample_indices=True)

    def __init__(self) -> None:
        self.carried: list[list[int]] = []
        self.tracked: list[list[int]] = []

    def transform_batch(self, batch: Any, step: Any) -> Any:
        self.carried.append(batch[1].tolist())
        self.tracked.append(step.indices.tolist())
        return batch


class Module(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def watch(train: Any, val: Any = None, module: Any = None, callbacks: Any = (), **kwargs: Any) -> Watch:
    """Train two epochs and check that what was tracked is what was carried."""
    torch.manual_seed(0)
    found = Watch()
    trainer([found, *callbacks], **kwargs).fit(Module() if module is None else module, train, val)
    assert found.tracked == found.carried
    return found


def numbered(cls: Any = DataLoader, **kwargs: Any) -> Any:
    kwargs = {"batch_size": 3, **kwargs} if "batch_sampler" not in kwargs else kwargs
    return cls(Numbered(), **kwargs)


class Pairs:
    """A batch sampler that inherits from nothing and has no attributes."""

    def __iter__(self) -> Any:
        return iter([[9, 2], [4, 4], [0, 10]])

    def __len__(self) -> int:
        return 3


LOADERS = {
    "in_order": {},
    "shuffled": {"shuffle": True},
    "drop_last": {"shuffle": True, "drop_last": True},
    "batch_sampler": {"batch_sampler": BatchSampler(RandomSampler(range(SIZE)), 4, False)},
    "own_batch_sampler": {"batch_sampler": Pairs()},
    "list_of_lists": {"batch_sampler": [[1, 2, 3], [7]]},
    "weighted": {"sampler": WeightedRandomSampler(torch.arange(SIZE).float(), 13)},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_indices_without_workers(kind):
    found = watch(numbered(**LOADERS[kind]))
    lengths = {
        "drop_last": [3, 3, 3],
        "batch_sampler": [4, 4, 3],
        "own_batch_sampler": [2, 2, 2],
        "list_of_lists": [3, 1],
        "weighted": [3, 3, 3, 3, 1],
    }
    assert [len(batch) for batch in found.tracked] == 2 * lengths.get(kind, [3, 3, 3, 2])


@pytest.mark.parametrize("kind", ["drop_last", "batch_sampler", "weighted"])
def test_indices_with_workers_that_fetch_ahead(kind):
    found = watch(numbered(num_workers=2, **LOADERS[kind]))
    assert len(found.tracked) == 2 * {"drop_last": 3, "batch_sampler": 3, "weighted": 5}[kind]


def test_batch_sampler_without_a_length_makes_lightning_fetch_ahead():
    class Endless(Pairs):
        __len__ = None  # type: ignore[assignment]

    assert len(watch(numbered(batch_sampler=Endless())).tracked) == 6


def test_none_batches_are_skipped_as_lightning_skips_them():
    """A collate function that returns None for a bad batch must not shift the indices of the batches after it."""

    def collate(items: Any) -> Any:
        batch = torch.utils.data.default_collate(items)
        return None if 4 in batch[1] else batch

    found = watch(numbered(collate_fn=collate))
    assert found.tracked == 2 * [[0, 1, 2], [6, 7, 8], [9, 10]]


@pytest.mark.parametrize("workers", [0, 2])
def test_limit_train_batches_leaves_no_stale_indices(workers):
    found = watch(numbered(shuffle=True, num_workers=workers), limit_train_batches=2)
    assert len(found.tracked) == 4


def test_overfit_batches_turn_shuffling_off():
    found = watch(numbered(shuffle=True), overfit_batches=2)
    assert found.tracked == 2 * [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_reloaded_every_epoch(workers):
    """Each epoch has a new DataLoader, or the same one again: neither may keep what the tracker laid on it."""

    class Reloading(Module):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[DataLoader] = []

        def train_dataloader(self) -> DataLoader:
            if len(self.made) < 2:
                self.made.append(numbered(shuffle=True, num_workers=workers))
            return self.made[-1]

    module = Reloading()
    found = watch(None, module=module, epochs=3, reload_dataloaders_every_n_epochs=1)
    assert len(found.tracked) == 12
    assert len(module.made) == 2
    for loader in module.made:
        assert type(loader.batch_sampler) is BatchSampler
        assert "_get_iterator" not in loader.__dict__


@pytest.mark.parametrize("persistent", [False, True])
def test_fit_twice_with_one_loader_that_is_left_as_found(persistent):
    """The loader has been iterated before: persistent workers have an iterator, which refers to the batch sampler."""
    loader = numbered(shuffle=True, num_workers=2, persistent_workers=persistent)
    found = {name: value for name, value in loader.__dict__.items() if name != "_iterator"}
    assert len(list(loader)) == 4
    for _ in range(2):
        assert len(watch(loader).tracked) == 8
        assert {name: value for name, value in loader.__dict__.items() if name != "_iterator"} == found
        assert loader.batch_sampler is found["batch_sampler"]


def test_iterator_of_persistent_workers_is_tracked_and_left_as_found():
    loader = numbered(shuffle=True, num_workers=1, persistent_workers=True)
    list(loader)
    iterator, found = loader._iterator, set(loader._iterator.__dict__)
    tracker = SampleTracker("Test")
    tracker.attach(loader)
    for batch in loader:
        assert tracker.next().tolist() == batch[1].tolist()
    assert tracker.next() is None
    tracker.detach()
    assert loader._iterator is iterator
    assert iterator._index_sampler is loader.batch_sampler
    assert set(iterator.__dict__) == found
    assert sorted(torch.cat([batch[1] for batch in loader]).tolist()) == list(range(SIZE))


def test_workers_of_a_pass_that_is_cut_short_stop_without_the_garbage_collector():
    """A reference cycle through the iterator would leave its worker processes alive until some later collection."""
    alive = []

    class Count(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            alive.append(len(multiprocessing.active_children()))

    gc.disable()
    try:
        watch(numbered(num_workers=1), callbacks=[Count()], limit_train_batches=1, epochs=3)
        assert alive == [1, 1, 1]
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_in_the_middle_of_an_epoch_and_sanity_check(workers):
    found = watch(
        numbered(shuffle=True, num_workers=workers),
        numbered(batch_size=2),
        val_check_interval=2,
        num_sanity_val_steps=2,
    )
    assert len(found.tracked) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_one_loader_for_training_and_validation(workers):
    """Validation in the middle of an epoch iterates the very loader; its batches are not the training batches."""
    loader = numbered(num_workers=workers)
    found = watch(loader, loader, val_check_interval=2, num_sanity_val_steps=2)
    assert found.tracked == 2 * [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


@pytest.mark.parametrize("workers", [0, 2])
def test_somebody_else_iterates_the_training_loader_meanwhile(workers):
    class Peek(pl.Callback):
        def peek(self, trainer: pl.Trainer, *_: Any) -> None:
            assert sum(len(batch[1]) for batch in trainer.train_dataloader) == SIZE
            next(iter(trainer.train_dataloader))

        on_train_epoch_start = on_train_batch_end = peek

    assert len(watch(numbered(shuffle=True, num_workers=workers), callbacks=[Peek()]).tracked) == 8


def test_loader_made_early_for_estimated_stepping_batches():
    class Early(Module):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 8
            return super().configure_optimizers()

    assert len(watch(numbered(shuffle=True, num_workers=2), module=Early()).tracked) == 8


def test_attribute_set_on_the_batch_sampler_during_training_reaches_the_users_own():
    class Grow(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.train_dataloader.batch_sampler.batch_size = 4

    loader = numbered()
    found = watch(loader, callbacks=[Grow()])
    assert [len(batch) for batch in found.tracked] == [3, 3, 3, 2, 4, 4, 3]
    assert loader.batch_sampler.batch_size == 4


# Resume


class Resumable(BatchSampler):
    """Somebody's batch sampler that can save its own state."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.yielded = self.skip = 0

    def __iter__(self) -> Any:
        self.yielded, self.skip = self.skip, 0
        for batch in list(super().__iter__())[self.yielded :]:
            self.yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["yielded"]


STATEFUL = {
    "shuffled": lambda: {"shuffle": True, "batch_size": 2},
    "every_2": lambda: {"batch_size": 2, "snapshot_every_n_steps": 2},
    "stateless_batch_sampler": lambda: {"batch_sampler": BatchSampler(range(SIZE), 2, False)},
    "stateful_batch_sampler": lambda: {"batch_sampler": Resumable(range(SIZE), 2, False)},
}


def interrupted(tmp_path: Any, make: Any, at: int) -> tuple[list[list[int]], list[list[int]]]:
    """The batches of an uninterrupted run after step `at`, and those of a run that was resumed there."""
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    whole, rest = Watch(), Watch()
    torch.manual_seed(0)
    trainer([whole, save], enable_checkpointing=True).fit(Module(), make())
    torch.manual_seed(0)
    trainer([rest]).fit(Module(), make(), ckpt_path=tmp_path / f"step={at}.ckpt")
    assert rest.tracked == rest.carried
    return whole.tracked[at:], rest.tracked


@pytest.mark.parametrize("at", [2, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_resumes_with_the_indices_of_the_batches_that_follow(tmp_path, workers, at):
    """In the first epoch and in the second; torchdata skips ahead, and the tracker with it."""
    expected, found = interrupted(
        tmp_path, lambda: numbered(StatefulDataLoader, num_workers=workers, **STATEFUL["shuffled"]()), at
    )
    assert found == expected


@pytest.mark.parametrize("kind", ["every_2", "stateless_batch_sampler", "stateful_batch_sampler"])
def test_stateful_loader_resumes_however_it_skips_ahead(tmp_path, kind):
    """By replaying batches, by slicing the sampler, or by the sampler's own state, which the recorder passes through."""
    workers = 1 if kind == "every_2" else 0
    expected, found = interrupted(
        tmp_path, lambda: numbered(StatefulDataLoader, num_workers=workers, **STATEFUL[kind]()), 3
    )
    assert found == expected


def test_plain_loader_resumes_with_the_batches_that_it_really_gives(tmp_path):
    """Lightning begins a plain loader again at its first batch and only counts on: the indices follow what is trained."""
    _, found = interrupted(tmp_path, numbered, 2)
    assert found[:2] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("stateful", [False, True])
def test_recorder_is_stateful_exactly_if_the_batch_sampler_is(stateful):
    """Also for `inspect.getattr_static`, with which typing.Protocol looks from Python 3.12 on."""
    loader = numbered(batch_sampler=(Resumable if stateful else BatchSampler)(range(SIZE), 2, False))
    tracker = SampleTracker("Test")
    tracker.attach(loader)
    for name in ("state_dict", "load_state_dict"):
        assert (inspect.getattr_static(loader.batch_sampler, name, None) is not None) is stateful
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert len(loader.batch_sampler) == 6
    tracker.detach()


# Refusals


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Numbered())


class Unsized(Dataset):
    def __getitem__(self, index: int) -> Any:
        return Numbered()[index]


class Named(Numbered):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(int(index))


REFUSED = {
    "iterable": (lambda: DataLoader(Stream(), batch_size=3), "Stream is an IterableDataset.*no index"),
    "whole_batches": (lambda: numbered(batch_size=None), "batch_size=None.*one index stands for a whole batch"),
    "several": (lambda: {"a": numbered(), "b": numbered()}, "CombinedLoader of 2 training loaders.*concatenate"),
    "no_loader": (lambda: range(4), "training data are of type range"),
    "no_length": (lambda: DataLoader(Unsized(), sampler=range(4)), "Unsized has no length"),
    "out_of_order": (lambda: numbered(num_workers=1, in_order=False), "in_order=False. Remove that argument"),
    "names": (lambda: DataLoader(Named(), sampler=["3", "4"]), "other keys, such as '3'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_plugin_and_say_what_to_do(case):
    make, message = REFUSED[case]
    loader = make()
    with pytest.raises(RefusedError, match=message) as error:
        watch(loader)
    assert str(error.value).startswith("watch needs")
    if case != "out_of_order":
        assert "teacher='snapshot'" in str(error.value)
    if isinstance(loader, DataLoader):
        assert type(loader.batch_sampler) in (BatchSampler, type(None))
