# SPDX-License-Identifier: Apache-2.0
"""A frozen copy repeats the step without anybody noticing: statistics, random stream, logs, the module itself."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite import Step
from fulgurite.errors import FulguriteError
from fulgurite.random import get_random_state
from fulgurite.teachers import FrozenCopy
from tests import helpers
from tests.helpers import OneArgument, Plain


class Noisy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5))
        self.inputs: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0] + 0.1 * torch.randn_like(batch[0])
        self.inputs.append(x)
        self.log("mean", x.mean())
        self.log_dict({"max": x.max()})
        self.print("a line")
        logits = self(x)
        if self.fails:
            raise RuntimeError("in the middle")
        loss = F.cross_entropy(logits, batch[1])
        self.kept.append(loss)
        return loss


def step(module: pl.LightningModule) -> Step:
    batch = tuple(t[:8] for t in helpers.data().tensors)
    return Step(helpers.trainer(), module, batch, 0, 0, random_state=get_random_state(torch.device("cpu")))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_copy_sees_the_same_augmentation_and_leaves_everything_alone(mode, capsys):
    torch.manual_seed(0)
    module = Noisy()
    copy = FrozenCopy(module, mode)
    now = step(module)
    torch.rand(5)  # the student's own draws
    stream, statistics = torch.get_rng_state(), {k: v.clone() for k, v in copy.tensors().items()}
    call = copy.loss_call(now, "cross_entropy")
    assert torch.equal(stream, torch.get_rng_state())
    for name, tensor in copy.tensors().items():
        assert torch.equal(tensor, statistics[name]), name
    assert not call.outputs.requires_grad
    assert not any(p.requires_grad for p in copy.module.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert module.inputs == []
    assert capsys.readouterr().out == ""
    torch.manual_seed(0)
    Noisy()
    expected = now.batch[0] + 0.1 * torch.randn_like(now.batch[0])
    assert torch.equal(copy.module.inputs[0], expected)
    if mode == "eval":
        torch.testing.assert_close(call.outputs, module.eval().net(expected), rtol=0, atol=0)
    else:
        dropped = module.net[1](module.net[0](expected))
        assert not torch.equal(call.outputs, module.net[3](dropped))  # dropout acts
    assert copy.module.training is (mode == "train")


def test_exception_in_the_copy_leaves_its_statistics_and_holds_nothing():
    copy = FrozenCopy(Noisy(), "train")
    copy.module.fails = True
    before = copy.state_dict()
    now = step(copy.module)
    stream = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the middle"):
        copy.loss_call(now, "cross_entropy")
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in copy.tensors().items())
    assert copy.module._trainer is None
    assert copy._calls == []
    assert copy._step is None


def test_module_that_keeps_outputs_with_their_graph_can_be_copied():
    """Lightning's own advice for the outputs of an epoch is a list on the module; torch refuses to copy such tensors."""
    module = Noisy()
    module.kept.append(module(torch.zeros(4, 12)).sum())
    copy = FrozenCopy(module)
    assert not copy.module.kept[0].requires_grad
    assert module.kept[0].requires_grad
    assert torch.equal(copy.module.kept[0], module.kept[0].detach())


def test_a_module_that_holds_its_trainer_is_copied_without_it():
    """A CLI's modules do, through the function that makes their optimizer: data, loaders and all."""
    module, trainer = Noisy(), helpers.trainer()
    module.trainer = trainer
    trainer.datamodule = pl.LightningDataModule()
    trainer.in_mid_epoch = (number for number in range(3))  # a generator cannot be copied
    module.make_optimizer = functools.partial(print, {"trainer": trainer, "data": trainer.datamodule})
    copied = FrozenCopy(module).module
    assert copied.make_optimizer is not module.make_optimizer
    assert copied.make_optimizer.args[0]["trainer"] is trainer
    assert copied.make_optimizer.args[0]["data"] is trainer.datamodule
    assert copied._trainer is None


def test_no_such_call_is_named():
    class Other(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 5).float())

    for module, said in ((Other(), "it called mse_loss"), (NoLoss(), "it called no loss")):
        with pytest.raises(FulguriteError, match=rf"did not call cross_entropy on the same batch \({said}\)"):
            FrozenCopy(module).loss_call(step(module), "cross_entropy")


class NoLoss(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).sum()


def test_one_argument_step_and_state_round_trip():
    first, second = FrozenCopy(OneArgument()), FrozenCopy(OneArgument())
    second.load_state_dict(first.state_dict())
    now = step(first.module)
    outputs = [copy.loss_call(now, "cross_entropy").outputs for copy in (first, second)]
    assert torch.equal(*outputs)
    state = first.state_dict()
    state["net.0.weight"].zero_()
    assert first.module.net[0].weight.any(), "the state must not alias the copy"
