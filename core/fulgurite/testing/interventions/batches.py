# SPDX-License-Identifier: Apache-2.0
"""Odd batches, and every way in which a trainer may be given them: short, empty, with NaN, limited, reloaded, combined."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.testing.check import check, expect, refused
from fulgurite.testing.lab import (
    BATCH,
    EXAMPLES,
    Lab,
    Plain,
    Run,
    copied_state,
    equal_states,
    expect_close,
    non_finite,
)


def _in_order(lab: Lab) -> Run:
    """Return the training with the component on batches in a fixed order."""
    return lab.component_run("in order", loader=lab.in_order(BATCH))


@check("intervention")
def check_odd_batches(lab: Lab) -> None:
    """A last batch of one example, or a loader that skips a batch, breaks it."""
    one = lab.fit([lab.make()], loader=lab.in_order(43))
    expect(one.weights.isfinite().all(), "parameters are not finite after a batch of one example")
    skipping = lab.fit([lab.make()], loader=lab.loader(collate_fn=_skip_small))
    expect(skipping.weights.isfinite().all(), "parameters are not finite when the loader gives no batch at times")


def _skip_small(examples: list[Any]) -> Any:
    return torch.utils.data.default_collate(examples) if len(examples) == BATCH else None


class _SumOverExamples(Plain):
    """Copes with a batch without examples: its loss is a sum, divided by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Any] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / BATCH


@check("intervention")
def check_empty_batch(lab: Lab) -> str | None:
    """A batch without examples, with which the user's module copes, makes the loss NaN or is an error."""
    lab.needs_default_module()
    nothing = [part[:0] for part in torch.utils.data.default_collate([lab.examples()[0]])]

    def collate(examples: list[Any]) -> Any:
        return torch.utils.data.default_collate(examples) if examples else nothing

    batches: Any = [list(range(8)), [], list(range(8, 20)), []]
    loader = DataLoader(lab.examples(), batch_sampler=batches, collate_fn=collate)
    module = _SumOverExamples()
    # Lightning cannot put a sampler of its own beside such batches.
    arguments: dict[str, Any] = {"module": module, "loader": loader, "use_distributed_sampler": False}
    run = _unless_refused(lab, functools.partial(lab.fit, **arguments))
    if isinstance(run, str):
        return run
    expect(torch.stack(module.losses).isfinite().all(), "it makes the loss of a batch without examples NaN or infinite")
    expect(run.weights.isfinite().all(), "parameters are not finite after a batch without examples")
    return None


@check("intervention")
def check_last_batch_counts(lab: Lab) -> None:
    """The examples of a short last batch are dropped."""
    full = EXAMPLES - EXAMPLES % BATCH
    changed = Subset(lab.examples(), [*range(full), *range(EXAMPLES - full)])
    other = lab.fit([lab.make()], loader=DataLoader(changed, BATCH))
    same = torch.equal(_in_order(lab).weights, other.weights)
    expect(not same, f"what is in a last batch of {EXAMPLES % BATCH} examples makes no difference: it is dropped")


class _Poisoned(Plain):
    """Has NaN in one batch of the first epoch, and steps over them."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        if self.current_epoch == 0 and batch_idx == 2:
            logits = logits.detach() * torch.nan + 0 * logits.sum()
        return F.cross_entropy(logits, batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


@check("intervention")
def check_nan_batch(lab: Lab) -> None:
    """One batch with NaN poisons what the method remembers, and with it all later steps."""
    lab.needs_default_module()
    run = lab.fit([lab.make()], module=_Poisoned())
    poisoned, usual = (non_finite(copied_state(r.callbacks[0])) for r in (run, lab.component_run()))
    expect(poisoned <= usual, "its state holds NaN from a batch that had them")
    expect(run.weights.isfinite().all(), "the parameters became NaN, though the user's module zeroes NaN gradients")


class _Still(Plain):
    """Does not move, so that what a method remembers depends only on the batches that it sees."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@check("intervention")
def check_nan_is_reported(lab: Lab) -> None:
    """It silently leaves out a batch with NaN, and nobody learns that what it remembers is incomplete."""
    lab.needs_default_module()
    component = lab.make()
    try:
        run = lab.fit([component], module=_Poisoned(rate=0.0), max_epochs=1)
    except FulguriteError as error:
        expect(_names_nan(str(error)), f"it stops at a batch with NaN, and does not say that it was for that: {error}")
        return
    usual = lab.fit([lab.make()], module=_Still(), max_epochs=1)
    if equal_states(copied_state(component), copied_state(usual.callbacks[0])):
        return  # it remembers nothing of that batch
    names = (component.name.lower(), type(component).__name__.lower())
    said = [text for text in run.said if _names_nan(text) and any(name in text.lower() for name in names)]
    logged = [name for name, value in run.trainer.callback_metrics.items() if _names_nan(name) and float(value) > 0]
    expect(said or logged, "a batch with NaN is missing from its state, and no warning or logged count says so")


def _names_nan(text: str) -> bool:
    return re.search(r"finite|(?<![a-z])nans?(?![a-z])", text, re.IGNORECASE) is not None


@check("intervention")
def check_workers(lab: Lab) -> None:
    """With worker processes in the DataLoader, which fetch ahead and outlive the epoch, it trains otherwise."""
    loader = DataLoader(lab.examples(), BATCH, num_workers=2, persistent_workers=True)
    run = lab.fit([lab.make()], loader=loader)
    expect_close(_in_order(lab), run, "with two persistent workers it trains otherwise")


@check("intervention")
def check_limited_batches(lab: Lab) -> str | None:
    """`limit_train_batches` or `overfit_batches` makes it train otherwise than a loader with just these batches."""
    expected = lab.fit([lab.make()], loader=lab.in_order(BATCH, 3 * BATCH))
    limits: tuple[dict[str, Any], ...] = ({"limit_train_batches": 3}, {"overfit_batches": 3})
    note = None
    for limit in limits:
        run = _unless_refused(lab, functools.partial(lab.fit, loader=lab.in_order(BATCH), **limit))
        if isinstance(run, str):
            note = run
            continue
        expect_close(expected, run, f"{next(iter(limit))}=3 does not give what a loader of these three batches gives")
    return note


class _Reloaded(pl.LightningDataModule):
    """Makes a new loader whenever it is asked."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.lab = lab

    def train_dataloader(self) -> Any:
        return DataLoader(self.lab.examples(), BATCH)


@check("intervention")
def check_reloaded_loader(lab: Lab) -> None:
    """With `reload_dataloaders_every_n_epochs` it goes on with a loader that nobody reads any more."""
    run = lab.fit([lab.make()], loader=_Reloaded(lab), reload_dataloaders_every_n_epochs=1)
    expect_close(_in_order(lab), run, "with a new loader every epoch it trains otherwise")


class _Joined(Plain):
    """Trains on the batches of two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = (torch.cat([batch["a"][i], batch["b"][i]]) for i in (0, 1))
        return F.cross_entropy(self(inputs), targets)


@check("intervention")
def check_combined_loader(lab: Lab) -> str | None:
    """On a CombinedLoader of several datasets it breaks or is silently without effect, instead of working or refusing."""
    lab.needs_default_module()
    halves = {name: Subset(lab.examples(), range(start, EXAMPLES, 2)) for start, name in enumerate("ab")}

    def train(callbacks: list[Any]) -> Run:
        loader = CombinedLoader({name: DataLoader(half, BATCH // 2) for name, half in halves.items()}, "min_size")
        return lab.fit(callbacks, module=_Joined(), loader=loader)

    run = _unless_refused(lab, train)
    if isinstance(run, str):
        return run
    _expect_effect(lab, run, lambda: train([]), "on a CombinedLoader")
    return None


class _Stream(IterableDataset[Any]):
    """Gives the examples one after the other, and says not how many they are."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(EXAMPLES))


@check("intervention")
def check_iterable_data(lab: Lab) -> str | None:
    """On a stream, whose length and indices nobody knows, it breaks or is without effect, instead of working or refusing."""

    def train(callbacks: list[Any]) -> Run:
        return lab.fit(callbacks, loader=DataLoader(_Stream(lab.examples()), BATCH))

    run = _unless_refused(lab, train)
    if isinstance(run, str):
        return run
    _expect_effect(lab, run, lambda: train([]), "on an iterable dataset")
    return None


class _Named(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"])


@check("intervention")
def check_dict_batches(lab: Lab) -> str | None:
    """On batches that are dicts it breaks or trains otherwise, instead of working or refusing."""
    lab.needs_default_module()

    def collate(examples: list[Any]) -> Any:
        return dict(zip("xy", torch.utils.data.default_collate(examples), strict=True))

    loader = DataLoader(lab.examples(), BATCH, collate_fn=collate)
    run = _unless_refused(lab, lambda callbacks: lab.fit(callbacks, module=_Named(), loader=loader))
    if isinstance(run, str):
        return run
    expect_close(_in_order(lab), run, "on batches that are dicts it trains otherwise")
    return None


def _unless_refused(lab: Lab, train: Callable[[list[Any]], Run]) -> Run | str:
    """Return the training with the component, or a note if it refuses by name."""
    intervention = lab.make()
    try:
        return train([intervention])
    except RefusedError as refusal:
        return refused(intervention, refusal)


def _expect_effect(lab: Lab, run: Run, alone: Callable[[], Run], where: str) -> None:
    """Expect an effect on the parameters here, if there is one in the kit's usual training."""
    expect(run.weights.isfinite().all(), f"{where}, parameters are not finite")
    if not torch.equal(lab.component_run().weights, lab.reference().weights):
        without = lab.remember(f"reference: {where}", alone)
        expect(not torch.equal(run.weights, without.weights), f"{where} it is silently without effect")
