# SPDX-License-Identifier: Apache-2.0
"""The same method in every loop: accumulation, clipping, odd parameters, weight averaging, other ways to write a module."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import RefusedError
from fulgurite.testing.check import InapplicableError, check, expect, refused
from fulgurite.testing.lab import BATCH, CLASSES, Lab, Plain, expect_close, small_network


@check("intervention")
def check_accumulation(lab: Lab) -> None:
    """Micro-batches are counted as steps: k of them do not give what one batch of k times the size gives."""
    lab.needs_default_module()
    whole = lab.component_run("two batches of 22", loader=lab.in_order(22), max_epochs=3)
    parts = lab.fit([lab.make()], loader=lab.in_order(11), max_epochs=3, accumulate_grad_batches=2)
    expect_close(whole, parts, "two micro-batches of 11 do not give what one batch of 22 gives", lab.rounding)


class _LastHalved(Plain):
    """Halves the gradients of each second batch, as Lightning does with a window of one batch instead of two.

    A penalty on parameters counts fully whatever the window is, so that then the loss is halved before it is added.
    """

    def __init__(self, penalised: bool) -> None:
        super().__init__()
        self.penalised = penalised

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.factor = 0.5 if batch_idx == 1 else 1.0
        loss = super().training_step(batch, batch_idx)
        return loss * self.factor if self.penalised else loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss if self.penalised else loss * self.factor).backward()


@check("intervention")
def check_short_last_window(lab: Lab) -> None:
    """In an accumulation window that the epoch's end cuts short it breaks, or does what belongs to a whole window."""
    run = lab.fit([lab.make()], loader=lab.in_order(BATCH), accumulate_grad_batches=4)
    expect(run.weights.isfinite().all(), "parameters are not finite")
    windows = 2 * math.ceil(run.trainer.num_training_batches / 4)  # it may have chosen fewer examples than there are
    expect(run.trainer.global_step == windows, f"made {run.trainer.global_step} updates instead of {windows}")
    if "accumulation" in lab.case.inapplicable or lab.case.module is not None:
        return
    parts = lab.fit([lab.make()], loader=lab.in_order(12, 36), accumulate_grad_batches=2, max_epochs=3)
    if parts.trainer.num_training_batches != 3:
        return  # it chooses the examples, and there is no last window of one micro-batch
    component = lab.make()
    module = _LastHalved(component.capabilities.penalises_parameters)
    whole = lab.fit([component], loader=lab.in_order(24, 36), module=module, max_epochs=3)
    expect_close(
        whole, parts, "a last window of one micro-batch does not give what that batch gives alone", lab.rounding
    )


@check("intervention")
def check_gradient_clipping(lab: Lab) -> None:
    """The method adds gradients after clipping, past the bound that the user has set."""
    norms: list[Tensor] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.on_train_batch_end(trainer, pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.cat(grads).norm())

    lab.fit([lab.make(), Watch()], gradient_clip_val=0.01)
    largest = float(torch.stack(norms).max())
    expect(largest <= 0.01 * 1.001, f"the norm of the gradients is {largest:.3g} in the step, clipped at 0.01")


class _Odd(Plain):
    """A frozen layer, an unused one, a tied one, and a module that has only buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(CLASSES, CLASSES)
        self.unused = nn.Linear(3, 3)
        self.tied = nn.Linear(CLASSES, CLASSES, bias=False)
        self.again = nn.Linear(CLASSES, CLASSES, bias=False)
        self.again.weight = self.tied.weight
        self.register_buffer("constant", torch.ones(CLASSES))
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.network(inputs)
        return logits + 0.1 * self.again(self.tied(self.frozen(logits))) * self.constant


@check("intervention")
def check_frozen_unused_tied(lab: Lab) -> None:
    """It trains what the user froze, unties weights, or fails on parameters without gradients."""
    lab.needs_default_module()
    _needs_odd_parameters(lab)
    initial: Any = lab.reference("odd parameters", module=_Odd(), max_epochs=0).module
    run = lab.fit([lab.make()], module=_Odd())
    trained: Any = run.module
    expect(torch.equal(trained.frozen.weight, initial.frozen.weight), "a frozen parameter has changed")
    expect(torch.equal(trained.constant, initial.constant), "a buffer that only the user writes has changed")
    expect(torch.equal(trained.again.weight, trained.tied.weight), "tied weights are not tied any more")
    expect(not trained.frozen.weight.requires_grad, "a frozen parameter requires gradients now")
    expect(trained.unused.weight.requires_grad, "a parameter that the user did not freeze is frozen now")
    expect(run.weights.isfinite().all(), "parameters are not finite beside frozen and unused ones")


@check("intervention")
def check_weight_averaging(lab: Lab) -> None:
    """Lightning's EMA callback, which copies the module in the middle of its life, does not go together with it."""
    averaged = lab.fit([lab.make(), EMAWeightAveraging(decay=0.0)])  # the average is the newest weights
    expect_close(lab.component_run(), averaged, "beside EMAWeightAveraging it trains otherwise")


@check("intervention")
def check_batch_norm(lab: Lab) -> None:
    """A forward pass of its own moves the running statistics of BatchNorm, or leaves layers in eval mode."""
    lab.needs_default_module()
    network: Any = small_network(convolutional=True)
    run = lab.fit([lab.make()], module=Plain(network))
    seen, steps = int(network[1].num_batches_tracked), run.trainer.global_step
    expect(seen == steps, f"BatchNorm's running statistics have seen {seen} batches in {steps} steps")
    expect(all(child.training for child in network.modules()), "layers are left in eval mode")
    expect(run.weights.isfinite().all(), "parameters are not finite")


def _needs_odd_parameters(lab: Lab) -> None:
    """Say that a strategy refuses unused parameters by itself, as DDP does unless it is told to look for them."""
    if lab.settings:
        try:
            lab.reference("odd parameters, trained", module=_Odd())
        except RuntimeError as error:
            raise InapplicableError(f"without the component it cannot be trained so either: {error}") from error


class _ModuleLoss(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self(batch[0]), batch[1])


class _OneArgument(Plain):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return F.cross_entropy(self(batch[0]), batch[1])


class _DictReturned(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}


class _Late(Plain):
    """Makes its layers in configure_model."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.made = False

    def configure_model(self) -> None:
        if not self.made:
            self.network, self.made = small_network(), True
            pl.seed_everything(1, verbose=False)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)


_SPELLINGS: dict[str, type[Plain]] = {
    "whose loss is a module": _ModuleLoss,
    "whose training_step takes only the batch": _OneArgument,
    "whose training_step returns a dict": _DictReturned,
    "that makes its layers in configure_model": _Late,
}


@check("intervention")
def check_spellings_of_the_module(lab: Lab) -> None:
    """It works on one way of writing a LightningModule and not on the others."""
    lab.needs_default_module()
    for words, kind in _SPELLINGS.items():
        run = lab.fit([lab.make()], module=kind(), loader=lab.in_order(BATCH))
        expect_close(
            lab.component_run("in order", loader=lab.in_order(BATCH)), run, f"on a module {words} it trains otherwise"
        )


class _Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@check("intervention")
def check_manual_optimization(lab: Lab) -> str | None:
    """On a module that steps its optimizer itself it is silently without effect."""
    lab.needs_default_module()
    intervention = lab.make()
    try:
        manual = lab.fit([intervention], module=_Manual())
    except RefusedError as refusal:
        return refused(intervention, refusal)
    expect_close(lab.component_run(), manual, "under manual optimization it trains otherwise")
    return None
