# SPDX-License-Identifier: Apache-2.0
"""Trainings that run on one rank (in the test process) or on two (in `worker.py`), and what each rank saw of them.

A scenario is called with the number of ranks and a folder that all ranks share; its result is a dict that `torch.save`
takes. The global batch is the same on any number of ranks, and in ordered data the ranks' batches together are the batch of
one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fulgurite import Capabilities, Intervention, LossCall, Step
from fulgurite.samples import TrainingSubset
from fulgurite_plugins.distillation import PSKD
from tests import helpers
from tests.helpers import Plain, fit, weights

GLOBAL_BATCH = 16
Scenario = Callable[[int, Path], dict[str, Any]]


def ddp(start_method: str = "popen") -> DDPStrategy:
    return DDPStrategy(start_method=start_method, process_group_backend="gloo", timeout=timedelta(seconds=40))


def on(ranks: int, start_method: str = "popen") -> dict[str, Any]:
    return {} if ranks == 1 else {"strategy": ddp(start_method), "devices": ranks}


def shuffled_loader(ranks: int, n: int) -> DataLoader:
    return helpers.loader(helpers.data(n), batch_size=GLOBAL_BATCH // ranks)


class Ordered(pl.LightningDataModule):
    """Data in their order. Lightning's own DistributedSampler always shuffles; only in a rank is its number known."""

    def __init__(self, ranks: int, n: int = 64, cls: type[DataLoader] = DataLoader) -> None:
        super().__init__()
        self.ranks, self.n, self.cls = ranks, n, cls

    def train_dataloader(self) -> DataLoader:
        dataset = helpers.data(self.n)
        rank = dist.get_rank() if self.ranks > 1 else 0
        sampler = DistributedSampler(dataset, self.ranks, rank, shuffle=False) if self.ranks > 1 else None
        return self.cls(dataset, batch_size=GLOBAL_BATCH // self.ranks, sampler=sampler)


def stateful(ranks: int) -> Ordered:
    return Ordered(ranks, cls=StatefulDataLoader)


def train(ranks: int, callbacks: Any = (), data: Any = None, **kwargs: Any) -> tuple[Plain, pl.Trainer]:
    module = Plain()
    trainer = fit(module, callbacks, Ordered(ranks) if data is None else data, **{**on(ranks), **kwargs})
    return module, trainer


def stored(plugin: PSKD) -> dict[str, Tensor]:
    assert plugin.memory is not None
    return {"values": plugin.memory.values.clone(), "seen": plugin.memory.seen.clone()}


class Report(pl.Callback):
    """Writes what a rank has learnt into a file, for strategies whose ranks never come back."""

    def __init__(self, folder: Path, plugin: PSKD) -> None:
        self.folder, self.plugin = folder, plugin

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        result = {"weights": weights(pl_module), **stored(self.plugin), "world": trainer.world_size}
        torch.save(result, self.folder / f"child-{trainer.global_rank}.pt")


class Indices(Intervention):
    """Notes the indices of every batch, by epoch."""

    capabilities = Capabilities(sample_indices=True)

    def __init__(self) -> None:
        self.epochs: list[list[list[int]]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epochs.append([])

    def transform_batch(self, batch: Any, step: Step) -> Any:
        assert step.indices is not None
        self.epochs[-1].append(step.indices.tolist())
        return batch


def save_epochs(folder: Path, name: str) -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1)


def memory(ranks: int, folder: Path, start_method: str = "popen") -> dict[str, Any]:
    """Three epochs of PS-KD on data that divide evenly."""
    plugin = PSKD(alpha=0.8)
    callbacks = [plugin, Report(folder, plugin), save_epochs(folder, "memory")]
    module, _ = train(ranks, callbacks, epochs=3, enable_checkpointing=True, **on(ranks, start_method))
    patched = [name for name in ("training_step", "__getstate__") if name in module.__dict__]
    back = stored(plugin) if plugin.memory is not None else {}
    return {"weights": weights(module), "patched": patched, **back}


def padded(ranks: int, folder: Path) -> dict[str, Any]:
    """61 examples on two ranks: the sampler draws one of them a second time, on the other rank and in the last batch."""
    plugin, indices = PSKD(alpha=0.8), Indices()
    train(ranks, [plugin, indices], Ordered(ranks, 61), epochs=1)
    first = stored(plugin)
    again = PSKD(alpha=0.8)
    module, _ = train(ranks, [again], Ordered(ranks, 61), epochs=3)
    return {**first, "indices": indices.epochs[0], "later": stored(again), "weights": weights(module)}


def shuffled(ranks: int, folder: Path) -> dict[str, Any]:
    """Every row must be the prediction made in the epoch, on whichever rank."""
    plugin, made = PSKD(alpha=0.8), {}

    class Watch(Intervention):
        def on_loss(self, call: LossCall) -> LossCall:
            assert call.step.indices is not None
            if call.step.batch_idx == 0:
                made.clear()
            made.update(zip(call.step.indices.tolist(), call.outputs.detach().softmax(1), strict=True))
            return call

    module, _ = train(ranks, [Watch(), plugin], shuffled_loader(ranks, 53), epochs=2)
    return {**stored(plugin), "made": made, "weights": weights(module)}


def off(ranks: int, folder: Path) -> dict[str, Any]:
    """Without the callback, and with it switched off."""
    without, _ = train(ranks, [], shuffled_loader(ranks, 61), epochs=3)
    with_it, _ = train(ranks, [PSKD(alpha=0.0)], shuffled_loader(ranks, 61), epochs=3)
    return {"without": weights(without), "with": weights(with_it)}


def snapshot(ranks: int, folder: Path) -> dict[str, Any]:
    plugin = PSKD(teacher="snapshot")
    module, _ = train(ranks, [plugin, save_epochs(folder, "snapshot")], epochs=3, enable_checkpointing=True)
    assert plugin.snapshot is not None
    return {"weights": weights(module), "snapshot": weights(plugin.snapshot.module)}


class Penalised(Intervention):
    capabilities = Capabilities(reads_loss=True)

    def penalty(self, step: Step) -> dict[str, Tensor]:
        assert step.outputs is not None
        total = sum(p.square().sum() for p in step.module.parameters())
        return {"logits": 0.1 * step.outputs.square().mean(), "l2": 0.01 * torch.as_tensor(total)}


class Gradients(Intervention):
    """Notes the gradients, and changes them in a way that only equal gradients on all ranks survive."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def transform_gradients(self, module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters()]
        self.seen.append(torch.cat([g.flatten() for g in gradients]).clone())
        for gradient in gradients:
            gradient.copy_(gradient.sign() * 0.01)


def penalties(ranks: int, folder: Path) -> dict[str, Any]:
    module, _ = train(ranks, [Penalised()])
    return {"weights": weights(module)}


def gradients(ranks: int, folder: Path) -> dict[str, Any]:
    watch = Gradients()
    module, _ = train(ranks, [watch], accumulate_grad_batches=2, epochs=1)
    return {"weights": weights(module), "gradients": watch.seen}


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


class Count(pl.Callback):
    """Notes (epoch, batch or None between batches, function) of every call of torch.distributed while it is in place."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int | None, str]] = []
        self.undo: list[Callable[[], None]] = []
        self.epoch = 0
        self.batch: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for owner in (dist, distributed_c10d):
            for name in COLLECTIVES:
                self._watch(owner, name)

    def _watch(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((self.epoch, self.batch, name))
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        self.undo.append(lambda: setattr(owner, name, original))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch = trainer.current_epoch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch_idx

    def on_train_batch_end(self, *_: Any) -> None:
        self.batch = None

    def on_train_end(self, *_: Any) -> None:
        for undo in self.undo:
            undo()


def collectives(ranks: int, folder: Path) -> dict[str, Any]:
    calls = {}
    for name, plugins in (("without", []), ("with", [PSKD(alpha=0.8)])):
        count = Count()
        train(ranks, [*plugins, count], Ordered(ranks, 61), epochs=3)
        calls[name] = count.calls
    return calls


class Save(pl.Callback):
    """Saves a checkpoint once, after a number of batches."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches, self.count = path, batches, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)


def resumed(ranks: int, folder: Path) -> dict[str, Any]:
    """Stopped after 6 of 12 batches, in the middle of the second of three epochs."""
    result: dict[str, Any] = {}
    for teacher in ("memory", "snapshot"):
        path = folder / f"middle-{teacher}.ckpt"
        first, second = PSKD(teacher=teacher), PSKD(teacher=teacher)
        whole, _ = train(ranks, [first, Save(path, 6)], stateful(ranks), epochs=3)
        part, trainer = train(ranks, [second], stateful(ranks), epochs=3, ckpt=path)
        result[teacher] = {"whole": weights(whole), "resumed": weights(part), "steps": trainer.global_step}
        if teacher == "memory":
            result["memories"] = [stored(first), stored(second)]
    return result


def resumed_at_epoch_end(ranks: int, folder: Path) -> dict[str, Any]:
    """Shuffled by Lightning's DistributedSampler; the checkpoint is that of an ordinary ModelCheckpoint."""
    first, second = PSKD(alpha=0.8), PSKD(alpha=0.8)
    whole, _ = train(
        ranks, [first, save_epochs(folder, "end")], shuffled_loader(ranks, 61), epochs=3, enable_checkpointing=True
    )
    part, _ = train(ranks, [second], shuffled_loader(ranks, 61), epochs=3, ckpt=folder / "end/epoch=1.ckpt")
    return {"whole": weights(whole), "resumed": weights(part), "memories": [stored(first), stored(second)]}


class Halve(Intervention):
    """Trains on a part, then by weight, then on everything again."""

    def __init__(self) -> None:
        self.subset: TrainingSubset | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.subset = TrainingSubset(trainer, "halve", seed=7)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.subset is not None
        if trainer.current_epoch == 0:
            self.subset.restrict(torch.arange(1, 60, 2)[:27])
        elif trainer.current_epoch == 1:
            self.subset.reweight(torch.tensor([1.0, 0.0] * 30 + [0.0]))
        elif trainer.current_epoch == 2:
            self.subset.reset()


def subset(ranks: int, folder: Path) -> dict[str, Any]:
    indices, plugin = Indices(), PSKD(alpha=0.8)
    train(ranks, [indices, plugin, Halve()], shuffled_loader(ranks, 61), epochs=4)
    return {"epochs": indices.epochs, **stored(plugin)}


def unequal_datasets(ranks: int, folder: Path) -> dict[str, Any]:
    """Every rank brings its own data, of its own length: the index of an example means another one on each rank."""
    rank = dist.get_rank() if ranks > 1 else 0
    own = helpers.loader(helpers.data(48 + 4 * rank), batch_size=16, shuffle=False)
    try:
        train(ranks, [PSKD(alpha=0.8)], own, epochs=2, use_distributed_sampler=False, limit_train_batches=3)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


SCENARIOS: dict[str, Scenario] = {
    function.__name__: function
    for function in (
        memory, padded, shuffled, off, snapshot, penalties, gradients, collectives, resumed, resumed_at_epoch_end,
        subset, unequal_datasets,
    )
}  # fmt: skip
