# SPDX-License-Identifier: Apache-2.0
"""Odd batches, and every way in which a trainer may be given them: short, empty, with NaN, limited, reloaded, combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset

from fulgurite.errors import RefusedError
from fulgurite.testing.check import check, expect
from fulgurite.testing.lab import BATCH, EXAMPLES, Lab, Plain, Run, copied_state, expect_close, non_finite


def _in_order(lab: Lab) -> Run:
    """Return the training with the component on batches in a fixed order."""
    return lab.component_run("in order", loader=DataLoader(lab.examples(), BATCH))


@check("intervention")
def check_odd_batches(lab: Lab) -> None:
    """A last batch of one example, or a loader that skips a batch, breaks it."""
    one = lab.fit([lab.make()], loader=lab.batches(0, 43, 44))
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
def check_empty_batch(lab: Lab) -> None:
    """A batch without examples, with which the user's module copes, makes the loss NaN or is an error."""
    lab.needs_default_module()
    nothing = [part[:0] for part in torch.utils.data.default_collate([lab.examples()[0]])]

    def collate(examples: list[Any]) -> Any:
        return torch.utils.data.default_collate(examples) if examples else nothing

    batches: Any = [list(range(8)), [], list(range(8, 20)), []]
    loader = DataLoader(lab.examples(), batch_sampler=batches, collate_fn=collate)
    module = _SumOverExamples()
    run = lab.fit([lab.make()], module=module, loader=loader)
    expect(torch.stack(module.losses).isfinite().all(), "it makes the loss of a batch without examples NaN or infinite")
    expect(run.weights.isfinite().all(), "parameters are not finite after a batch without examples")


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


@check("intervention")
def check_workers(lab: Lab) -> None:
    """With worker processes in the DataLoader, which fetch ahead and outlive the epoch, it trains otherwise."""
    loader = DataLoader(lab.examples(), BATCH, num_workers=2, persistent_workers=True)
    run = lab.fit([lab.make()], loader=loader)
    expect_close(_in_order(lab), run, "with two persistent workers it trains otherwise")


@check("intervention")
def check_limited_batches(lab: Lab) -> None:
    """`limit_train_batches` or `overfit_batches` makes it train otherwise than a loader with just these batches."""
    expected = lab.fit([lab.make()], loader=lab.batches(0, 8, 16, 24))
    limits: tuple[dict[str, Any], ...] = ({"limit_train_batches": 3}, {"overfit_batches": 3})
    for limit in limits:
        run = lab.fit([lab.make()], loader=DataLoader(lab.examples(), BATCH), **limit)
        expect_close(expected, run, f"{next(iter(limit))}=3 does not give what a loader of these three batches gives")


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
def check_combined_loader(lab: Lab) -> None:
    """On a CombinedLoader of several datasets it breaks or is silently without effect, instead of working or refusing."""
    lab.needs_default_module()
    halves = {name: Subset(lab.examples(), range(start, EXAMPLES, 2)) for start, name in enumerate("ab")}

    def train(callbacks: list[Any]) -> Run:
        loader = CombinedLoader({name: DataLoader(half, BATCH // 2) for name, half in halves.items()}, "min_size")
        return lab.fit(callbacks, module=_Joined(), loader=loader)

    run = _unless_refused(lab, train)
    if run is not None:
        _expect_effect(lab, run, lambda: train([]), "on a CombinedLoader")


class _Stream(IterableDataset[Any]):
    """Gives the examples one after the other, and says not how many they are."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(EXAMPLES))


@check("intervention")
def check_iterable_data(lab: Lab) -> None:
    """On a stream, whose length and indices nobody knows, it breaks or is without effect, instead of working or refusing."""

    def train(callbacks: list[Any]) -> Run:
        return lab.fit(callbacks, loader=DataLoader(_Stream(lab.examples()), BATCH))

    run = _unless_refused(lab, train)
    if run is not None:
        _expect_effect(lab, run, lambda: train([]), "on an iterable dataset")


class _Named(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"])


@check("intervention")
def check_dict_batches(lab: Lab) -> None:
    """On batches that are dicts it breaks or trains otherwise, instead of working or refusing."""
    lab.needs_default_module()

    def collate(examples: list[Any]) -> Any:
        return dict(zip("xy", torch.utils.data.default_collate(examples), strict=True))

    loader = DataLoader(lab.examples(), BATCH, collate_fn=collate)
    run = _unless_refused(lab, lambda callbacks: lab.fit(callbacks, module=_Named(), loader=loader))
    if run is not None:
        expect_close(_in_order(lab), run, "on batches that are dicts it trains otherwise")


def _unless_refused(lab: Lab, train: Callable[[list[Any]], Run]) -> Run | None:
    """Return the training with the component, or None if it refuses by name."""
    intervention = lab.make()
    try:
        return train([intervention])
    except RefusedError as refusal:
        expect(intervention.name.lower() in str(refusal).lower(), f"refused without its name: {refusal}")
        return None


def _expect_effect(lab: Lab, run: Run, alone: Callable[[], Run], where: str) -> None:
    """Expect an effect on the parameters here, if there is one in the kit's usual training."""
    expect(run.weights.isfinite().all(), f"{where}, parameters are not finite")
    if not torch.equal(lab.component_run().weights, lab.reference().weights):
        without = lab.remember(f"reference: {where}", alone)
        expect(not torch.equal(run.weights, without.weights), f"{where} it is silently without effect")
