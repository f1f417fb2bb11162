# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: bfloat16, the loss scale of float16, and the steps that gradient scaling skips."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from fulgurite.testing.check import check, expect
from fulgurite.testing.lab import Lab, Run, copied_state, equal_states, non_finite


def _scaled(scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}


def _distance(a: Run, b: Run) -> float:
    return float((a.weights - b.weights).norm())


@check("intervention")
def check_bf16(lab: Lab) -> None:
    """Under bf16 autocast the method diverges, computes something else or nothing."""
    lab.needs_default("precision")
    full, half = lab.component_run(), lab.component_run("bf16", precision="bf16-mixed")
    expect(half.weights.isfinite().all(), "parameters are not finite under bf16-mixed")
    moved = _distance(full, lab.component_run("untrained", max_epochs=0))
    apart = _distance(full, half)
    expect(apart <= 0.15 * moved, f"bf16-mixed ends {apart / max(moved, 1e-12):.0%} of the way away from float32")
    plain, plain_half = lab.reference(), lab.reference("bf16", precision="bf16-mixed")
    if not full.has_the_weights_of(plain):
        return  # it trains another model, whose weights have no counterpart in the plain one
    effect, rounding = _distance(full, plain), _distance(plain, plain_half)
    if effect > 5.0 * rounding:
        changed = float(((half.weights - plain_half.weights) - (full.weights - plain.weights)).norm())
        expect(changed <= 0.8 * effect, f"under bf16-mixed its effect differs by {changed / effect:.0%} from float32's")


@check("intervention")
def check_fp16_loss_scale(lab: Lab) -> None:
    """In float16 training it takes the scaled loss or gradients for the real ones, or computes what overflows."""
    lab.needs_default("precision")
    one, many = (lab.fit([lab.make()], **_scaled(scale)) for scale in (1.0, 2.0**8))
    expect(many.weights.isfinite().all(), "parameters are not finite under 16-mixed")
    full = lab.component_run()
    moved = _distance(full, lab.component_run("untrained", max_epochs=0))
    apart, away = _distance(one, many), _distance(one, full)
    expect(
        apart <= 0.02 * moved,
        f"loss scales of 1 and 256 end {apart / max(moved, 1e-12):.0%} of the way apart: it sees scaled values",
    )
    expect(away <= 0.15 * moved, f"16-mixed ends {away / max(moved, 1e-12):.0%} of the way away from float32")


@check("intervention")
def check_fp16_skipped_step(lab: Lab) -> None:
    """A step that gradient scaling skips for overflow still counts as an update, or leaves infinities in the state."""
    lab.needs_default("precision")
    overflow, watch, intervention = _Overflow(), _Changes(), lab.make()
    watch.watched = intervention
    callbacks = [watch, intervention, overflow, _After(watch)]
    run = lab.fit(callbacks, accumulate_grad_batches=2, **_scaled(2.0**8))
    expect(run.weights.isfinite().all(), "parameters are not finite after a skipped step")
    skipped = watch.kinds.count("skipped")
    expect(skipped == 1, f"{skipped} steps were skipped instead of the one that overflowed")
    usual = non_finite(copied_state(lab.component_run().callbacks[0]))
    expect(
        non_finite(copied_state(intervention)) <= usual,
        "the state of the method holds infinities or NaN after a skipped step",
    )
    advanced = watch.advanced_when_skipped()
    expect(not advanced, f"a skipped step advances {', '.join(advanced)}, which otherwise changes with each update")


class _Overflow(pl.Callback):
    """Makes the gradients of the second micro-batch of the second epoch infinite."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.count = 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.count += 1
        if trainer.current_epoch == 1 and self.count == 2:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(torch.inf)


class _Changes(pl.Callback):
    """Records which numbers of an intervention a micro-batch changes; called first at its begin, last at its end."""

    def __init__(self) -> None:
        self.watched: Any = None
        self.updates = 0
        self.kinds: list[str] = []
        self.changed: list[set[str]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.strategy.optimizers:
            optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.updates += 1

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.before = numbers(self.watched)
        self.updates = 0
        self.steps = trainer.global_step

    def finish(self, trainer: Any) -> None:
        after = numbers(self.watched)
        names = self.before.keys() | after.keys()
        self.changed.append({n for n in names if not equal_states(self.before.get(n), after.get(n))})
        if trainer.global_step == self.steps:
            self.kinds.append("micro-batch")
        else:
            self.kinds.append("update" if self.updates else "skipped")

    def advanced_when_skipped(self) -> list[str]:
        """Return what changes in most updates and never between them, but changed in a skipped one too."""
        by_kind: dict[str, list[set[str]]] = {"micro-batch": [], "update": [], "skipped": []}
        for kind, names in zip(self.kinds, self.changed, strict=True):
            by_kind[kind].append(names)
        between = set().union(*by_kind["micro-batch"])
        often = len(by_kind["update"]) / 2
        suspects = set().union(*by_kind["skipped"]) - between
        return sorted(n for n in suspects if sum(n in names for names in by_kind["update"]) > often)


class _After(pl.Callback):
    def __init__(self, changes: _Changes) -> None:
        self.changes = changes

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.changes.finish(trainer)


def numbers(intervention: Any) -> dict[str, Any]:
    """Return the numbers among the attributes of an intervention, and all that its state holds, by name."""
    found = {f"`{name}`": value for name, value in vars(intervention).items() if type(value) in (int, float)}
    pending: list[tuple[str, Any]] = [("state", copied_state(intervention))]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(f"{name}[{i}]", item) for i, item in enumerate(value)]
        elif type(value) in (int, float) or (isinstance(value, Tensor) and value.dtype != torch.uint8):
            found[name] = value  # uint8: the state of a generator, which may go on
    return found
