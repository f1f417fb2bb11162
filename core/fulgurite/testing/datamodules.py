# SPDX-License-Identifier: Apache-2.0
"""The checks of datamodules."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset

from fulgurite.testing.check import InapplicableError, check, expect
from fulgurite.testing.lab import Lab, RandomStreams
from fulgurite.testing.processes import elsewhere, on_ranks
from fulgurite.testing.trainers import contained, make_trainer

_PARTS = ("train", "val", "test")
_MOST = 200
"""Examples of a part that are compared."""


def _make(lab: Lab) -> Any:
    """Make the data as a Trainer does."""
    data = lab.make()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


@dataclass
class _Made:
    """The data, made once for all checks; whether that moved the global random streams; what it tried to connect to."""

    data: Any
    moved: bool
    tried: list[str]


def _ready(lab: Lab) -> _Made:
    """Return the data made under a seed: without a network if they can be, else with it."""
    made = _without_network(lab)
    return made if made.data is not None else lab.remember("data, from the network", lambda: _seeded(lab, seed=1))


def _without_network(lab: Lab) -> _Made:
    """Return the data made as on a machine without a network; None for the data if it needs one."""

    def make() -> _Made:
        with _no_network() as tried:
            try:
                made = _seeded(lab, seed=1)
            except Exception:
                if not tried:
                    raise
                return _Made(None, False, tried)
        return replace(made, tried=tried)

    return lab.remember("data", make)


def _seeded(lab: Lab, seed: int) -> _Made:
    """Make the data under a seed, and take a batch."""
    torch.manual_seed(seed)
    before = RandomStreams.now()
    data = _make(lab)
    moved = not RandomStreams.now().same_as(before)
    next(iter(data.train_dataloader()))
    return _Made(data, moved, [])


def _loaders(data: Any, part: str) -> list[Any]:
    """Return the loaders of a part; none if the datamodule has no such part."""
    try:
        found = getattr(data, f"{part}_dataloader")()
    except MisconfigurationException:  # Lightning's own hook, which was not overridden
        return []
    if isinstance(found, Mapping):
        return list(found.values())
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _examples(data: Any, part: str) -> list[Any]:
    """Return the first examples of a part in the order of its datasets, in a form that compares."""
    found = []
    for loader in _loaders(data, part):
        dataset = loader.dataset
        first = islice(dataset, _MOST) if isinstance(dataset, IterableDataset) else _first(dataset)
        found += [_frozen(example) for example in first]
    return found


def _first(dataset: Any) -> Iterator[Any]:
    return (dataset[i] for i in range(min(len(dataset), _MOST)))


def _frozen(example: Any) -> Any:
    """Return an example as nested tuples of bytes and plain values."""
    if isinstance(example, Tensor):
        return str(example.dtype), tuple(example.shape), example.numpy().tobytes()
    if isinstance(example, np.ndarray):
        return _frozen(torch.as_tensor(example))
    if isinstance(example, Mapping):
        return tuple((key, _frozen(value)) for key, value in example.items())
    if isinstance(example, (list, tuple)):
        return tuple(map(_frozen, example))
    return example


@check("datamodule")
def check_splits_are_seeded(lab: Lab) -> None:
    """Another training seed gives another test set, so that test examples of one run were trained on in another."""

    def other() -> dict[str, Any]:
        return _compared(_seeded(lab, seed=2).data)

    with elsewhere(
        other
    ) as wait:  # in a process that has not made them yet: a datamodule may keep what it has drawn once
        first = _compared(_ready(lab).data)
        second = wait()
    for part in _PARTS[1:]:
        expect(first[part] == second[part], f"the {part} part depends on the global seed")
    expect(first["labels"] == second["labels"], "the training labels, or their order, depend on the global seed")


def _compared(data: Any) -> dict[str, Any]:
    """Return what must not depend on the seed: the parts that are held out, and the training labels."""
    labels = [example[1] for example in _examples(data, "train") if isinstance(example, tuple)]
    return {"labels": labels, **{part: _examples(data, part) for part in _PARTS[1:]}}


@check("datamodule")
def check_setup_draws_nothing(lab: Lab) -> None:
    """Making the data moves the global random streams, so that a run depends on where its data were made."""
    expect(not _ready(lab).moved, "making it draws from the global random streams")


@check("datamodule")
def check_splits_are_disjoint(lab: Lab) -> None:
    """Examples of validation or test are trained on."""
    data = _ready(lab).data
    indices = _indices(data)
    if indices is None:
        raise InapplicableError(
            "it has no `train_indices`, `val_indices` and `test_indices` to compare, and its parts are no Subsets of one "
            "dataset"
        )
    together = torch.cat(indices)
    expect(len(together.unique()) == len(together), "an example is in two parts")


def _indices(data: Any) -> list[Tensor] | None:
    named = [getattr(data, f"{part}_indices", None) for part in _PARTS]
    if all(value is not None for value in named):
        return [torch.as_tensor(value) for value in named]
    parts = [loader.dataset for part in _PARTS for loader in _loaders(data, part)]
    if not all(isinstance(part, Subset) and part.dataset is parts[0].dataset for part in parts):
        return None
    return [torch.as_tensor(part.indices) for part in parts]


@check("datamodule")
def check_it_pickles(lab: Lab) -> None:
    """Spawned processes cannot get the data."""
    data = _ready(lab).data
    copied = pickle.loads(pickle.dumps(data))
    for part in _PARTS:
        found = []
        for one in (data, copied):
            torch.manual_seed(1)  # for augmentations
            found.append(_examples(one, part))
        expect(found[0] == found[1], f"a pickled copy has other {part} examples")


@contextmanager
def _no_network() -> Iterator[list[str]]:
    """Make connections fail as on a machine that has none, and name those that were tried."""
    tried: list[str] = []

    def connect(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:  # processes of this machine, such as workers of a DataLoader
            original(self, address)
            return
        tried.append(str(address))
        raise OSError("no network")

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(str(host))
        raise socket.gaierror("no network")

    original, resolver = socket.socket.connect, socket.getaddrinfo
    socket.socket.connect, socket.getaddrinfo = connect, resolve  # type: ignore[method-assign, assignment]
    try:
        yield tried
    finally:
        del socket.socket.connect  # what lies below is the method of the C class
        socket.getaddrinfo = resolver


@check("datamodule")
def check_no_network(lab: Lab) -> None:
    """It downloads when it is used, and fails on a machine without a connection."""
    tried = _without_network(lab).tried
    expect(not tried, f"it connects to {', '.join(dict.fromkeys(tried))}")


class _Idle(pl.LightningModule):
    """Has a parameter, as DDP demands, and stops at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def on_train_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        if isinstance(loader.dataset, IterableDataset):
            self.seen = [_frozen(batch) for batch in islice(loader, _MOST)]
        else:
            batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            self.seen = [index for batch in batches for index in torch.as_tensor(batch).flatten().tolist()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@check("datamodule")
def check_ranks_partition_the_data(lab: Lab) -> None:
    """Two ranks see the same examples, or leave some out."""

    def shard(rank: int) -> list[Any]:
        module, data = _Idle(), lab.make()
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        trainer = make_trainer(strategy=strategy, devices=2, max_steps=1, limit_val_batches=0)
        with contained():
            trainer.fit(module, datamodule=data)
        return module.seen

    loaders = _loaders(_ready(lab).data, "train")
    if len(loaders) != 1:
        raise InapplicableError("its training takes several loaders")
    (loader,) = loaders
    first, second = map(set, on_ranks(shard))
    twice = len(first & second)
    if isinstance(loader.dataset, IterableDataset):
        expect(twice == 0, f"{twice} batches are seen by both ranks: an iterable dataset must divide itself")
        return
    expect(twice <= len(loader.dataset) % 2, f"{twice} examples are seen by both ranks")
    missing = len(loader.dataset) - len(first | second)
    allowed = 2 * (loader.batch_size or 1) if loader.drop_last else 0
    expect(missing <= allowed, f"{missing} examples are seen by no rank")


@check("datamodule")
def check_batches(lab: Lab) -> None:
    """Its batches are not what it says of itself."""
    data = _ready(lab).data
    for part in _PARTS:
        for loader in _loaders(data, part):
            _check_batch(data, part, next(iter(loader)))


def _check_batch(data: Any, part: str, batch: Any) -> None:
    if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
        raise InapplicableError("its batches are not pairs (inputs, targets) of tensors")
    inputs, targets = batch
    expect(len(inputs) == len(targets), f"a {part} batch has {len(inputs)} inputs and {len(targets)} targets")
    expect(bool(inputs.isfinite().all()), f"{part} inputs are not finite")
    shape = tuple(inputs.shape[1:])
    expected = tuple(getattr(data, "input_shape", shape))
    expect(shape == expected, f"{part} inputs are {list(shape)}, but `input_shape` is {list(expected)}")
    if hasattr(data, "num_classes"):
        lowest, highest = int(targets.min()), int(targets.max())
        inside = lowest >= 0 and highest < data.num_classes
        expect(inside, f"a {part} target is outside 0 ... num_classes - 1")
