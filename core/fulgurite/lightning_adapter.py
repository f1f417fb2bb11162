# SPDX-License-Identifier: Apache-2.0
"""Everything that Fulgurite does with the private parts of Lightning and of torch's DataLoader, and why.

`tests/core/test_lightning_adapter.py` fails when a release moves one of them. Objects are recognised by what they are called
and not by `isinstance`, because `lightning.pytorch` and `pytorch_lightning` are two copies of the same classes.
"""

from __future__ import annotations

import copy
import inspect
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader

if TYPE_CHECKING:
    import lightning.pytorch as pl

COMPILED_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""What Lightning sets on the instance of a module that was passed through `torch.compile`."""

_ORIGINAL_BATCH_SAMPLER = "_fulgurite_batch_sampler"
"""Attribute under which a DataLoader keeps its own batch sampler while another one stands in its place."""

_STRATEGIES = {
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp",
    "ModelParallelStrategy": "model_parallel",
    "DDPStrategy": "ddp",
    "XLAStrategy": "xla",
    "SingleDeviceStrategy": "single",
}


class _ExplicitBatchSampler(BatchSampler):
    """A plain batch sampler that Lightning does not mistake for one that the DataLoader has made itself."""


def strategy_name(trainer: pl.Trainer) -> str:
    """Return the family of the strategy: `single`, `ddp`, `fsdp`, `model_parallel`, `deepspeed`, `xla` or its class name."""
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    return next((short for full, short in _STRATEGIES.items() if full in names), names[0])


def precision_name(trainer: pl.Trainer) -> str:
    """Return the precision as Lightning writes it: `"32-true"`, `"bf16-mixed"`, `"16-mixed"` ..."""
    return str(trainer.precision)


def completes_update(trainer: pl.Trainer) -> bool:
    """Return whether the micro-batch in progress completes an accumulation window (also a short last one).

    Private: `fit_loop._should_accumulate`; there is no public way to ask.
    """
    return not trainer.fit_loop._should_accumulate()


def leave_hook(module: pl.LightningModule) -> None:
    """Let a module forget the hook that an error has ended; Lightning does so only when a hook returns.

    Private: `_current_fx_name`; `log` reads it.
    """
    module._current_fx_name = None


def is_training_stage(trainer: pl.Trainer) -> bool:
    """Return whether the trainer is in its training loop, not in the sanity check or in validation."""
    return trainer.state.stage == "train"


def takes_iterator(module: pl.LightningModule) -> bool:
    """Return whether the training step fetches its own batches (`training_step(self, dataloader_iter)`)."""
    return "dataloader_iter" in inspect.signature(module.training_step).parameters


def present_train_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the training loaders, in training; new ones if those in use were given back, to be asked for again."""
    found = train_loaders(trainer)
    if found:
        return found
    return list(tree_leaves(train_source(trainer).dataloader(), is_leaf=lambda part: isinstance(part, DataLoader)))


def train_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the training loaders after Lightning has processed them; empty before that.

    Private: `fit_loop._combined_loader`.
    """
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def reload_train_loader(trainer: pl.Trainer) -> None:
    """Make Lightning ask for the training loader again before the next epoch, with new limits and validation interval.

    Private: `fit_loop._combined_loader`. Without this, the number of batches and the validation interval stay what they
    were when training began. To be called in `on_train_epoch_end` or before training.
    """
    trainer.fit_loop._combined_loader = None


def epochs_processed(trainer: pl.Trainer) -> int:
    """Return the number of the epoch for which a training loader that is begun now draws, counted from 0.

    Private: `fit_loop.epoch_progress`. `trainer.current_epoch` lags behind by one when a loader is begun in a run that was
    resumed at the end of an epoch.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def train_source(trainer: pl.Trainer) -> Any:
    """Return the object whose `dataloader()` Lightning calls for training data.

    Private: `fit_loop._data_source`.
    """
    return trainer.fit_loop._data_source


def restore_loader_classes() -> None:
    """Undo what Lightning does to DataLoader, BatchSampler and their subclasses while it asks for a loader.

    Private: `lightning.fabric.utilities.data._replace_dunder_methods`, which undoes nothing if an exception passes through.
    """
    from lightning.fabric.utilities.data import get_all_subclasses

    for base in (DataLoader, BatchSampler):
        for cls in get_all_subclasses(base) | {base}:
            for name in ("__setattr__", "__delattr__", "__init__"):
                if f"__old{name}" in cls.__dict__:
                    setattr(cls, name, cls.__dict__[f"__old{name}"])
                    delattr(cls, f"__old{name}")


def with_sampler(loader: Any, sampler: Any) -> Any:
    """Return a DataLoader like `loader` with another sampler; also of a loader whose batch sampler has been replaced.

    Private: `lightning.fabric.utilities.data._update_dataloader`, the function with which Lightning itself puts in its
    DistributedSampler; it knows about subclasses and custom batch samplers. Only a plain `BatchSampler` that was passed
    explicitly it takes for the DataLoader's own, and loses its batch size.
    """
    from lightning.fabric.utilities.data import _update_dataloader

    found = copy.copy(loader)
    batches = found.__dict__.pop(_ORIGINAL_BATCH_SAMPLER, found.batch_sampler)
    if type(batches) is BatchSampler and found.batch_size is None:
        batches = _ExplicitBatchSampler(batches.sampler, batches.batch_size, batches.drop_last)
    found.__dict__["batch_sampler"] = batches
    return _update_dataloader(found, sampler)


def distributes_samples(trainer: pl.Trainer) -> bool:
    """Return whether all ranks train on different parts of the data: one rank, or Lightning's DistributedSampler.

    Private: `_accelerator_connector.use_distributed_sampler`.
    """
    return trainer.world_size == 1 or trainer._accelerator_connector.use_distributed_sampler


def in_flight(iterator: Any) -> int:
    """Return how many batches a DataLoader's iterator has asked its workers for and not yet delivered.

    Private: `_send_idx` and `_rcvd_idx` of the multi-process iterator; an iterator without workers is never ahead.
    """
    return getattr(iterator, "_send_idx", 0) - getattr(iterator, "_rcvd_idx", 0)


def index_iterator(iterator: Any) -> Any:
    """Return the iterator over the batch sampler from which a DataLoader's iterator draws. Private: `_sampler_iter`."""
    return iterator._sampler_iter


def replace_batch_sampler(loader: Any, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Put `make(batch_sampler)` in the place of a DataLoader's batch sampler; return the undo.

    Private: the attribute cannot be set after construction, and the iterator of persistent workers (`_iterator`) keeps a
    reference of its own (`_index_sampler`).
    """
    original = loader.batch_sampler
    replacement = make(original)

    def put(sampler: Any, instead_of: Any) -> None:
        loader.__dict__["batch_sampler"] = sampler
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None and iterator._index_sampler is instead_of:
            iterator._index_sampler = sampler

    def undo() -> None:
        put(original, replacement)
        del loader.__dict__[_ORIGINAL_BATCH_SAMPLER]

    put(replacement, original)
    loader.__dict__[_ORIGINAL_BATCH_SAMPLER] = original
    return undo


def after_each_batch(loader: Any, callback: Callable[[Any], None]) -> Callable[[], None]:
    """Call `callback(iterator)` whenever a batch leaves the loader; return the undo.

    None is no batch: Lightning skips it. Private: `DataLoader._get_iterator` and `_next_data` of its iterators (torch and
    torchdata alike). A stateful loader that replays batches while it restores its state does so before `_get_iterator`
    returns, and is not seen here.
    """
    make = loader._get_iterator
    watched: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(iterator: Any) -> Any:
        # No reference cycle: an iterator that is dropped in the middle of an epoch must stop its workers at once.
        fetch, this = type(iterator)._next_data, weakref.ref(iterator)

        def next_data() -> Any:
            data = fetch(this())
            if data is not None:
                callback(this())
            return data

        iterator._next_data = next_data
        watched.add(iterator)
        return iterator

    def undo() -> None:
        del loader.__dict__["_get_iterator"]
        for iterator in watched:
            del iterator.__dict__["_next_data"]

    loader.__dict__["_get_iterator"] = lambda: watch(make())
    if getattr(loader, "_iterator", None) is not None:
        watch(loader._iterator)
    return undo


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch as the training loop would hand it to the training step: converted, through the module's hooks, moved.

    Private: `LightningModule._on_before_batch_transfer`; the loop calls the three in this order.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def is_compiled(module: pl.LightningModule) -> bool:
    """Return whether the whole LightningModule was passed through `torch.compile`. Private: `_compiler_ctx`."""
    return getattr(module, "_compiler_ctx", None) is not None


def loggers_outside_graph(module: pl.LightningModule) -> dict[str, Any]:
    """Return replacements of `log` and `log_dict` that do not crash inside a compiled LightningModule.

    With lightning 2.6.6 and torch 2.12 or newer, `self.log` in a compiled module ends in an internal error of the compiler
    (Lightning inspects the signature of `training_step` inside `log`); it was fixed after 2.6.6.
    """
    return {name: torch.compiler.disable(getattr(module, name)) for name in ("log", "log_dict")}


def train_progress(trainer: pl.Trainer, unit: str) -> tuple[int, float]:
    """Return the position and the planned length of training, counted in epochs or in optimizer steps.

    The position counts from 1 during the first epoch or step. The length is infinite if nothing bounds it. An epoch count
    that only `max_steps` bounds is estimated from the number of batches per epoch, and infinite if that is not known.
    """
    if unit == "epoch":
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            total: float = trainer.max_epochs
        else:
            batches = trainer.num_training_batches
            if trainer.max_steps <= 0 or math.isinf(batches):
                total = math.inf
            else:
                total = math.ceil(trainer.max_steps / max(1, math.ceil(batches / trainer.accumulate_grad_batches)))
        return trainer.current_epoch + 1, total
    return trainer.global_step + 1, float(trainer.estimated_stepping_batches)
