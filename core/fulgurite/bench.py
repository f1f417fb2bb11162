# SPDX-License-Identifier: Apache-2.0
"""Interleaved, side-by-side measurement of variants: training steps, pure functions, memory.

All variants of a case run in one process, one block each per round, in an order that changes from round to round. What is
compared is paired by round, so that a busy machine slows both sides of a pair; medians over rounds do the rest.

Example:
    >>> rows = interleave(calls({"sum": lambda: sum(range(100)), "len": lambda: len(range(100))}), 6, reference="sum")
    >>> [row.variant for row in rows]
    ['sum', 'len']
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fulgurite.intervention import Intervention
from fulgurite.losses import LossCall

Block = Callable[[], float]
"""Measures one block of a variant and returns one number: seconds per step, seconds per call, bytes."""

Unit = Literal["seconds", "bytes"]
Comparison = Literal["ratio", "difference"]


@dataclass(frozen=True)
class Estimate:
    """The median of a quantity over rounds, with a distribution-free interval from order statistics.

    Args:
        median: The median.
        low: Lower end of the interval that holds the true median with 95 % confidence; the minimum for fewer than 6 rounds.
        high: Upper end; the maximum for fewer than 6 rounds.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from one value per round."""
        from scipy.stats import binom

        ordered = sorted(values)
        outside = max(1, int(binom.ppf(0.025, len(ordered), 0.5)))
        return cls(statistics.median(ordered), ordered[outside - 1], ordered[-outside])


@dataclass(frozen=True)
class Row:
    """One variant of a case, beside the reference.

    Args:
        variant: Its name.
        values: What it measured, by round.
        reference: What the reference measured in the same rounds.
    """

    variant: str
    values: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def value(self) -> Estimate:
        """The quantity itself."""
        return Estimate.of(self.values)

    @property
    def difference(self) -> Estimate:
        """Variant minus reference, paired by round."""
        return Estimate.of([value - other for value, other in zip(self.values, self.reference, strict=True)])

    @property
    def ratio(self) -> Estimate:
        """Variant divided by reference, paired by round."""
        return Estimate.of([value / other for value, other in zip(self.values, self.reference, strict=True)])


@dataclass(frozen=True)
class Target:
    """What a variant is held to.

    Args:
        variant: The variant.
        comparison: What is bounded: its `"ratio"` to the reference, or its `"difference"` from it.
        at_most: Upper bound, in the unit of the case for a difference.
        at_least: Lower bound.

    Raises:
        ValueError: If `comparison` is neither of the two.
    """

    variant: str
    comparison: Comparison
    at_most: float = math.inf
    at_least: float = -math.inf

    def __post_init__(self) -> None:
        if self.comparison not in get_args(Comparison):
            raise ValueError(
                f"Expected `comparison` of Target to be 'ratio' or 'difference', but got {self.comparison!r}."
            )

    def judge(self, row: Row) -> Literal["met", "missed", "unclear"]:
        """Return whether the whole interval lies within the bounds, wholly outside, or across one of them."""
        estimate: Estimate = getattr(row, self.comparison)
        if self.at_least <= estimate.low and estimate.high <= self.at_most:
            return "met"
        return "missed" if estimate.high < self.at_least or estimate.low > self.at_most else "unclear"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: One line for the head of the table.
        blocks: Builds the variants, by name, when the case is run: data and models are not made before.
        reference: The variant that the others are compared with.
        targets: What some of them are held to.
        unit: What the blocks measure.
        rounds: Rounds unless the caller says otherwise; one is enough for a count of bytes.
    """

    name: str
    blocks: Callable[[], Mapping[str, Block]]
    reference: str
    targets: tuple[Target, ...] = ()
    unit: Unit = "seconds"
    rounds: int = 60


@dataclass(frozen=True)
class Bench:
    """The cases of a plugin: what `Plugin.bench` names.

    Args:
        cases: The cases, in the order in which they are run.
    """

    cases: tuple[Case, ...]


def interleave(
    blocks: Mapping[str, Block],
    rounds: int,
    reference: str,
    warm_up: int = 1,
    after_block: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Run one block of every variant per round, in an order that rotates and turns around, and pair them by round.

    Args:
        blocks: The variants by name.
        rounds: Rounds that count.
        reference: The variant that the others are compared with.
        warm_up: Rounds before them that do not count.
        after_block: Called after every block, for a progress bar.

    Returns:
        One row per variant, in the order of `blocks`.

    Raises:
        ValueError: If `reference` is not a variant, or `rounds` is not positive.
    """
    if reference not in blocks:
        raise ValueError(f"Expected `reference` to be one of {', '.join(map(repr, blocks))}, but got {reference!r}.")
    if rounds < 1:
        raise ValueError(f"Expected `rounds` to be positive, but got {rounds!r}.")
    values: dict[str, list[float]] = {name: [] for name in blocks}
    for number in range(-warm_up, rounds):
        for name in _order(list(blocks), number):
            value = blocks[name]()
            if number >= 0:
                values[name].append(value)
            after_block()
    return [Row(name, tuple(found), tuple(values[reference])) for name, found in values.items()]


def _order(names: list[str], number: int) -> list[str]:
    """A B C, C B A, B C A, A C B ...: over 2n rounds every variant has every place twice."""
    start = number // 2 % len(names)
    rotated = names[start:] + names[:start]
    return rotated[::-1] if number % 2 else rotated


def run_case(case: Case, rounds: int | None = None, after_block: Callable[[], None] = lambda: None) -> list[Row]:
    """Build the variants of a case and measure them; a count of bytes keeps its own number of rounds."""
    timed = case.unit == "seconds"
    with _quiet(), torch.random.fork_rng():
        blocks = case.blocks()
        try:
            return interleave(
                blocks,
                rounds if rounds is not None and timed else case.rounds,
                case.reference,
                warm_up=int(timed),
                after_block=after_block,
            )
        finally:
            for block in blocks.values():
                if isinstance(block, _PausedTraining):
                    block.close()


# Blocks: pure functions


def calls(functions: Mapping[str, Callable[[], object]], block_seconds: float = 0.02) -> dict[str, Block]:
    """Return blocks that time functions: seconds per call, over as many calls as fill `block_seconds`."""
    return {name: _calls(function, block_seconds) for name, function in functions.items()}


def _calls(function: Callable[[], object], block_seconds: float) -> Block:
    number = 0

    def seconds(repeats: int) -> float:
        _synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        _synchronize()
        return time.perf_counter() - start

    def block() -> float:
        nonlocal number
        if not number:
            function()
            number = max(1, math.ceil(block_seconds / seconds(3) * 3))
        return seconds(number) / number

    return block


# Blocks: training


Callbacks = Callable[[], Sequence[pl.Callback]]
"""Makes the callbacks of one training run."""


@dataclass(frozen=True)
class Training:
    """What the variants of a case train: everything but the callbacks.

    Args:
        module: Makes the LightningModule.
        loader: Makes the training DataLoader; `batches` makes one that costs next to nothing.
        untimed_epochs: Epochs before the first step that is timed: warm-up, or a method's first epoch that does less.
        steps: Steps of one block.
    """

    module: Callable[[], pl.LightningModule]
    loader: Callable[[], DataLoader[Any]]
    untimed_epochs: int = 1
    steps: int = 20

    def fit(self, callbacks: Sequence[pl.Callback], epochs: int) -> None:
        """Train without logger, checkpoints, progress bar and validation, from a seed that is always the same."""
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module(), self.loader())


def trainers(training: Training, variants: Mapping[str, Callbacks]) -> dict[str, Block]:
    """Return blocks that continue a training run with certain callbacks, and give the seconds of one training step.

    Every variant has a trainer that is paused while the others have their turn, so that blocks can be short: what slows
    the machine for longer than a round slows all variants. A step is timed inside `fit`, from one `on_train_batch_start`
    to the next: all that Lightning and the callbacks do for a batch. A block gives the median of its steps; on an
    accelerator, where steps are enqueued and not awaited, their mean between two synchronisations.
    """
    return {name: _PausedTraining(training, callbacks) for name, callbacks in variants.items()}


class _PausedTraining:
    """A `fit` in a thread of its own, which advances only while its block is measured."""

    def __init__(self, training: Training, callbacks: Callbacks) -> None:
        self._training = training
        self._callbacks = callbacks
        self._timer = _StepTimer(training.untimed_epochs, training.steps)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __call__(self) -> float:
        if self._thread is None:
            self._thread = threading.Thread(target=self._fit, daemon=True)
            self._thread.start()
        self._timer.resume.release()
        self._timer.paused.acquire()
        if self._error is not None:
            raise self._error
        return self._timer.seconds

    def close(self) -> None:
        """Let the training end."""
        self._timer.stop = True
        self._timer.resume.release()
        if self._thread is not None:
            self._thread.join()

    def _fit(self) -> None:
        self._timer.resume.acquire()
        try:
            self._training.fit([self._timer, *self._callbacks()], epochs=_UNLIMITED)
        except BaseException as error:
            self._error = error
        finally:
            self._timer.paused.release()


_UNLIMITED = 10_000
"""More epochs than anybody measures; a number, because a method may need the planned length of training."""


class _StepTimer(pl.Callback):
    def __init__(self, untimed_epochs: int, steps: int) -> None:
        self.untimed_epochs = untimed_epochs
        self.steps = steps
        self.resume = threading.Semaphore(0)
        self.paused = threading.Semaphore(0)
        self.stop = False
        self.seconds = math.nan
        self._starts: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch < self.untimed_epochs:
            return
        if len(self._starts) == self.steps:
            self._end_block(pl_module.device)
            self.paused.release()
            self.resume.acquire()
            trainer.should_stop = self.stop
        if not self._starts:
            _synchronize()
        self._starts.append(time.perf_counter())

    def _end_block(self, device: torch.device) -> None:
        if device.type != "cpu":
            _synchronize()
        starts = [*self._starts, time.perf_counter()]
        if device.type == "cpu":
            self.seconds = statistics.median(after - before for before, after in pairwise(starts))
        else:
            self.seconds = (starts[-1] - starts[0]) / self.steps
        self._starts.clear()


def training_memory(training: Training, variants: Mapping[str, Callbacks], epochs: int = 2) -> dict[str, Block]:
    """Return blocks that train with certain callbacks, and give the bytes of all tensors alive when training ends."""

    def block(callbacks: Callbacks) -> float:
        counter = _TensorBytes()
        training.fit([*callbacks(), counter], epochs)
        return counter.bytes

    return {name: functools.partial(block, callbacks) for name, callbacks in variants.items()}


class _TensorBytes(pl.Callback):
    bytes = math.nan

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()
        # Of these types alone: the compiler's stand-ins for tensors are tensors too, and have no storage.
        tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter) and not found.is_sparse]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.bytes = float(sum(storages.values()))


class Classifier(pl.LightningModule):
    """A multi-layer perceptron trained by SGD with momentum; it knows nothing of Fulgurite.

    Args:
        widths: Width of the input, of each hidden layer, and of the output.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.network = nn.Sequential(*layers[:-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class _InMemory(Dataset[Any]):
    """Gives whole batches by one indexing operation each, so that loading hides nothing of a step's time."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices)
        return tuple(tensor[index] for tensor in self.tensors)


def _as_is(batch: Any) -> Any:
    return batch


def batches(size: int, features: int, classes: int, batch_size: int) -> Callable[[], DataLoader[Any]]:
    """Return a maker of shuffling DataLoaders over a fixed random classification set that lies in memory.

    Args:
        size: Examples `N` of the set.
        features: Values per example.
        classes: Classes.
        batch_size: Batch size; an incomplete last batch is dropped.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, features, generator=generator)
    targets = torch.randint(0, classes, (size,), generator=generator)
    dataset = _InMemory(inputs, targets)
    return functools.partial(
        DataLoader, dataset, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=_as_is
    )


# Where it ran


def machine() -> dict[str, str]:
    """Return the facts about this machine and its software without which a time means nothing."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    facts = {
        "CPU": _cpu(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "torch threads": str(torch.get_num_threads()),
        "load average at the start": load,
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def device() -> torch.device:
    """Return the device that a Trainer uses by default."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's messages and warnings out of the tables."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# Core's own cases


class _EmptyOnLoss(Intervention):
    """Changes nothing, but wants to see the call of the criterion."""

    def on_loss(self, call: LossCall) -> LossCall:
        return call


class _EmptyPenalty(Intervention):
    """Adds nothing to the loss, but wraps the training step to find that out."""

    def penalty(self, step: Any) -> None:
        return None


def _empty_interventions() -> dict[str, Block]:
    training = Training(lambda: Classifier((16, 32, 10)), batches(6400, 16, 10, 16), steps=100)
    return trainers(
        training,
        {
            "trainer alone": lambda: (),
            "pl.Callback()": lambda: (pl.Callback(),),
            "Intervention()": lambda: (Intervention(),),
            "empty penalty": lambda: (_EmptyPenalty(),),
            "empty on_loss": lambda: (_EmptyOnLoss(),),
        },
    )


BENCH = Bench(
    cases=(
        Case(
            name="An intervention that does nothing, on a very small network (batch 16)",
            blocks=_empty_interventions,
            reference="trainer alone",
            targets=(Target("Intervention()", "difference", at_most=30e-6),),
        ),
    )
)
"""Core's own cases."""
