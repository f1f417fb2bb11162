# SPDX-License-Identifier: Apache-2.0
"""Every private part of Lightning and of torch that the adapter touches, one by one: a release that moves one fails here.

A failure names what is gone. Mend `fulgurite.lightning_adapter`, and nothing else.
"""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fulgurite import lightning_adapter
from tests import helpers
from tests.helpers import Plain, fit

VERSIONS = f"with lightning {pl.__version__} and torch {torch.__version__}"


def moved(what: str, used_by: str) -> str:
    return f"{what} is gone {VERSIONS}; lightning_adapter.{used_by} stands on it."


class AtBatch(pl.Callback):
    """Calls a function in the first training batch."""

    def __init__(self, function: Any) -> None:
        self.function, self.result = function, None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0:
            self.result = self.function(trainer)


def in_training(function: Any, **kwargs: Any) -> Any:
    watch = AtBatch(function)
    fit(Plain(), [watch], epochs=1, **kwargs)
    return watch.result


def test_should_accumulate():
    trainer = helpers.trainer()
    assert callable(getattr(trainer.fit_loop, "_should_accumulate", None)), moved(
        "fit_loop._should_accumulate", "completes_update"
    )
    assert in_training(lightning_adapter.completes_update) is True
    assert in_training(lightning_adapter.completes_update, accumulate_grad_batches=2) is False


def test_stage_of_training_is_called_train():
    assert in_training(lightning_adapter.is_training_stage) is True, moved(
        "the stage name 'train'", "is_training_stage"
    )
    assert not lightning_adapter.is_training_stage(helpers.trainer())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precision_names(precision):
    assert lightning_adapter.precision_name(helpers.trainer(precision=precision)) == precision


def test_strategy_names():
    from lightning.pytorch import strategies

    for name in lightning_adapter._STRATEGIES:
        assert hasattr(strategies, name), moved(f"the class {name}", "strategy_name")
    assert lightning_adapter.strategy_name(helpers.trainer()) == "single"
    assert lightning_adapter.strategy_name(helpers.trainer(strategy="ddp")) == "ddp"


def test_combined_loader():
    trainer = helpers.trainer()
    assert hasattr(trainer.fit_loop, "_combined_loader"), moved("fit_loop._combined_loader", "train_loaders")
    assert lightning_adapter.train_loaders(trainer) == []
    loader = helpers.loader()
    trainer.fit(Plain(), loader)
    assert lightning_adapter.train_loaders(trainer)[0] is loader, moved("CombinedLoader.flattened", "train_loaders")


def test_epoch_progress():
    trainer = helpers.trainer(epochs=2)
    assert hasattr(getattr(trainer.fit_loop, "epoch_progress", None), "current"), moved(
        "fit_loop.epoch_progress", "epochs_processed"
    )
    assert lightning_adapter.epochs_processed(trainer) == 0
    trainer.fit(Plain(), helpers.loader())
    assert lightning_adapter.epochs_processed(trainer) == 2


def test_dropping_the_combined_loader_makes_lightning_ask_again():
    class Asked(Plain):
        times = 0

        def train_dataloader(self) -> Any:
            self.times += 1
            return helpers.loader(helpers.data(16 * self.times))

    class Drop(pl.Callback):
        batches: list[int] = []

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.batches.append(int(trainer.num_training_batches))
            lightning_adapter.reload_train_loader(trainer)

    drop, module = Drop(), Asked()
    drop.batches = []
    helpers.trainer([drop], epochs=3).fit(module)
    assert drop.batches == [1, 2, 3], moved("setup_data after fit_loop._combined_loader = None", "reload_train_loader")


def test_data_source():
    loader = helpers.loader()
    trainer = helpers.trainer(epochs=1)
    assert hasattr(trainer.fit_loop, "_data_source"), moved("fit_loop._data_source", "train_source")
    trainer.fit(Plain(), loader)
    source = lightning_adapter.train_source(trainer)
    assert callable(getattr(source, "dataloader", None)), moved("_DataLoaderSource.dataloader", "train_source")
    assert source.dataloader() is loader


@pytest.mark.parametrize("cls", [DataLoader, StatefulDataLoader])
def test_update_dataloader(cls):
    from lightning.fabric.utilities import data

    assert hasattr(data, "_update_dataloader"), moved("fabric.utilities.data._update_dataloader", "with_sampler")
    loader = cls(helpers.data(20), batch_size=4, num_workers=0, drop_last=True)
    undo = lightning_adapter.replace_batch_sampler(
        loader, lambda inner: BatchSampler(SequentialSampler(range(3)), 3, False)
    )
    other = lightning_adapter.with_sampler(loader, [3, 1, 2, 7, 5])
    assert type(other) is cls
    assert list(other.batch_sampler) == [[3, 1, 2, 7]]
    undo()


def test_update_dataloader_takes_an_explicit_plain_batch_sampler_for_the_loaders_own():
    """When this fails, Lightning has mended it and `_ExplicitBatchSampler` can go."""
    from lightning.fabric.utilities.data import _update_dataloader

    batches = BatchSampler(SequentialSampler(helpers.data(20)), 4, False)
    loader = DataLoader(helpers.data(20), batch_sampler=batches)
    assert _update_dataloader(loader, range(8)).batch_size != 4
    assert list(lightning_adapter.with_sampler(loader, range(8)).batch_sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_use_distributed_sampler():
    trainer = helpers.trainer(use_distributed_sampler=False)
    connector = getattr(trainer, "_accelerator_connector", None)
    assert hasattr(connector, "use_distributed_sampler"), moved(
        "_accelerator_connector.use_distributed_sampler", "distributes_samples"
    )
    assert connector.use_distributed_sampler is False
    assert lightning_adapter.distributes_samples(trainer)  # one rank needs none


@pytest.mark.parametrize("cls", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("workers", [0, 1])
def test_parts_of_loader_iterators(cls, workers):
    loader = cls(helpers.data(20), batch_size=4, num_workers=workers)
    assert hasattr(loader, "_get_iterator"), moved(f"{cls.__name__}._get_iterator", "after_each_batch")
    iterator = iter(loader)
    name = type(iterator).__name__
    for attribute, user in (
        ("_next_data", "after_each_batch"), ("_sampler_iter", "index_iterator"), ("_index_sampler", "replace_batch_sampler"),
    ):  # fmt: skip
        assert hasattr(iterator, attribute), moved(f"{name}.{attribute}", user)
    if workers:
        for attribute in ("_send_idx", "_rcvd_idx"):
            assert hasattr(iterator, attribute), moved(f"{name}.{attribute}", "in_flight")
    next(iterator)
    assert lightning_adapter.in_flight(iterator) == 2 * workers
    list(iterator)


def test_iterator_of_persistent_workers():
    loader = DataLoader(helpers.data(20), batch_size=4, num_workers=1, persistent_workers=True)
    assert hasattr(loader, "_iterator"), moved("DataLoader._iterator", "replace_batch_sampler")
    first = iter(loader)
    assert loader._iterator is first
    assert first._index_sampler is loader.batch_sampler
    list(first)
    del loader._iterator, first


def test_batches_are_reported_as_they_leave_and_the_loader_is_left_as_found():
    loader = helpers.loader(shuffle=False)
    before, seen = dict(loader.__dict__), []
    undo = [
        lightning_adapter.replace_batch_sampler(loader, lambda inner: inner),
        lightning_adapter.after_each_batch(loader, seen.append),
    ]
    assert len(list(loader)) == len(seen) == 4
    for one in undo:
        one()
    assert loader.__dict__ == before


def test_compiled_module():
    module: Any = Plain()
    assert not lightning_adapter.is_compiled(module)
    compiled = torch.compile(module, backend="eager")
    unwrapped = pl.utilities.compile.from_compiled(compiled)
    assert lightning_adapter.is_compiled(unwrapped), moved("LightningModule._compiler_ctx", "is_compiled")
    laid = {name for name in lightning_adapter.COMPILED_METHODS if name in unwrapped.__dict__}
    assert laid == set(lightning_adapter.COMPILED_METHODS), moved(
        "compiled methods on the instance", "COMPILED_METHODS"
    )
    assert set(lightning_adapter.loggers_outside_graph(module)) == {"log", "log_dict"}


def test_iterator_step_is_recognised():
    class Fetches(Plain):
        def training_step(self, dataloader_iter: Any) -> Any: ...

    assert lightning_adapter.takes_iterator(Fetches())
    assert not lightning_adapter.takes_iterator(Plain())


class Found(Exception):
    pass


@pytest.mark.parametrize(
    ("arguments", "unit", "expected"),
    [
        ({"max_epochs": 7}, "epoch", (1, 7)),
        ({"max_epochs": -1, "max_steps": 10}, "epoch", (1, 3)),  # 4 batches an epoch
        ({"max_epochs": -1, "max_steps": 10, "accumulate_grad_batches": 2}, "epoch", (1, 5)),
        ({"max_epochs": 7}, "step", (1, 28.0)),
        ({"max_epochs": 7, "accumulate_grad_batches": 3}, "step", (1, 14.0)),
        ({"max_epochs": -1, "max_time": "00:00:01:00"}, "epoch", (1, float("inf"))),
    ],
)
def test_planned_length_of_training(arguments, unit, expected):
    class Once(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.found = lightning_adapter.train_progress(trainer, unit)
            raise Found

    once = Once()
    with pytest.raises(Found):
        helpers.trainer([once], **arguments).fit(Plain(), helpers.loader())
    assert once.found == expected


def test_the_step_of_a_module_is_called_through_the_instance():
    """What the splice stands on: an instance attribute `training_step`, laid in `setup`, is what Lightning calls."""
    calls = []

    class Lay(pl.Callback):
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            original = module.training_step

            def training_step(batch: Any, batch_idx: int) -> Any:
                calls.append(batch_idx)
                return original(batch, batch_idx)

            training_step.__wrapped__ = original  # type: ignore[attr-defined]
            assert inspect.signature(training_step) == inspect.signature(original)
            module.__dict__["training_step"] = training_step

    fit(Plain(), [Lay()], epochs=1)
    assert calls == [0, 1, 2, 3], moved("the call of an instance's own training_step", "(the splice)")
