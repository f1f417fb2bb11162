# SPDX-License-Identifier: Apache-2.0
"""Runs that are not a plain `fit`: evaluation only, tuners, cut short, empty, repeated, broken off in mid-step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite import Capabilities, Intervention, LossCall, Splice
from fulgurite.errors import RefusedError
from fulgurite_plugins.distillation import PSKD
from tests import helpers
from tests.helpers import Manual, Plain, fit, weights


class Evaluated(Plain):
    lr = 0.5

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def found(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Nothing of Fulgurite is left on module or trainer."""
    assert not {"training_step", "validation_step", "test_step", "__getstate__", "configure_model"} & set(
        module.__dict__
    )
    assert Splice.of(trainer) is None
    assert "process_dataloader" not in trainer.strategy.__dict__


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
def test_evaluation_before_between_and_after_training_changes_nothing(teacher, tmp_path):
    def run(evaluate: bool) -> Tensor:
        module, plugin = Evaluated(), PSKD(teacher=teacher, total_epochs=4)
        data = helpers.loader(shuffle=False)
        trainer = helpers.trainer([plugin], epochs=2)
        pl.seed_everything(1, verbose=False)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)

        def look() -> None:
            if evaluate:
                for method in (trainer.validate, trainer.test, trainer.predict):
                    method(module, data, **({"verbose": False} if method != trainer.predict else {}))
                    found(module, trainer)

        look()
        trainer.fit(module, data)
        look()
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, data)
        look()
        assert plugin.weight == 0.8
        return weights(module)

    assert torch.equal(run(True), run(False))


def test_predict_only_run_of_what_training_would_refuse():
    """Training with it is refused; to evaluate such a module with the same callbacks is harmless."""
    module, data = Manual(), helpers.loader(shuffle=False)
    trainer = helpers.trainer([PSKD(teacher="snapshot")])
    trainer.validate(module, data, verbose=False)
    with pytest.raises(RefusedError, match="manual optimization"):
        trainer.fit(module, data)
    found(module, trainer)


class Counting(Intervention):
    """Counts the steps that it constrains."""

    def __init__(self) -> None:
        self.constrained, self.updates = 0, []

    def constrain(self, module: Any, optimizer: Any) -> None:
        self.constrained += 1

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.updates.append(Splice.of(trainer).updates - trainer.global_step)


def test_trial_steps_of_the_learning_rate_finder_are_neither_constrained_nor_counted(tmp_path):
    counting = Counting()
    trainer = fit(
        Evaluated(), [counting, PSKD(), LearningRateFinder(num_training_steps=5)], enable_checkpointing=True,
        default_root_dir=tmp_path,
    )  # fmt: skip
    assert counting.constrained == trainer.global_step == 8
    assert set(counting.updates) == {0}


def test_tuner_leaves_nothing_and_the_training_that_follows_is_complete(tmp_path):
    module, plugin, counting = Evaluated(), PSKD(), Counting()
    trainer = helpers.trainer([plugin, counting], default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, helpers.loader(), num_training=5)
    found(module, trainer)
    trainer.fit(module, helpers.loader())
    found(module, trainer)
    assert counting.constrained == 8
    assert plugin.memory is not None
    assert plugin.memory.seen.all()


def test_updates_go_on_where_they_were(tmp_path):
    """In a second fit, and from a checkpoint that was saved after training, when the splice is gone."""
    counting = Counting()
    trainer, module = helpers.trainer([counting]), Plain()
    trainer.fit(module, helpers.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, helpers.loader())
    resumed = Counting()
    fit(Plain(), [resumed], ckpt=tmp_path / "a.ckpt", epochs=4)
    assert set(counting.updates) == set(resumed.updates) == {0}
    assert (counting.constrained, resumed.constrained) == (16, 8)


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
@pytest.mark.parametrize(
    "arguments",
    [{"limit_train_batches": 0}, {"fast_dev_run": True}, {"max_steps": 3}, {"num_sanity_val_steps": 0}],
    ids=lambda a: next(iter(a)),
)
def test_short_and_empty_runs(teacher, arguments):
    module = Plain()
    trainer = fit(module, [PSKD(teacher=teacher)], val=helpers.loader(shuffle=False), **arguments)
    found(module, trainer)


def test_barebones_trainer():
    module, plain = Plain(), Plain()
    for one, callbacks in ((module, [PSKD()]), (plain, [])):
        pl.seed_everything(1, verbose=False)
        for parameter in one.parameters():
            nn.init.normal_(parameter, std=0.3)
        trainer = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=callbacks)
        trainer.fit(one, helpers.loader())
        found(one, trainer)
    assert not torch.equal(weights(module), weights(plain))


def test_early_stopping_does_not_shorten_the_ramp():
    plugin = PSKD(alpha=0.8)
    stop = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    trainer = fit(Plain(), [plugin, stop], val=helpers.loader(shuffle=False), epochs=8)
    assert trainer.current_epoch == 2
    assert plugin.weight == pytest.approx(0.2)


def test_snapshot_with_accumulated_micro_batches_equals_large_batches():
    def run(batch_size: int, accumulate: int) -> Tensor:
        module = Plain()
        loader = helpers.loader(batch_size=batch_size, shuffle=False)
        fit(module, [PSKD(teacher="snapshot")], loader, epochs=3, accumulate_grad_batches=accumulate)
        return weights(module)

    torch.testing.assert_close(run(20, 1), run(10, 2), rtol=1e-5, atol=1e-6)


def test_surgery_happens_once_beside_weight_averaging_and_the_average_has_it():
    class AddLayer(Intervention):
        calls = 0

        def operate(self, module: Any) -> None:
            self.calls += 1
            module.net.append(nn.PReLU())

    surgery, average = AddLayer(), EMAWeightAveraging(decay=0.5)
    module = Plain()
    fit(module, [surgery, average, PSKD()], val=helpers.loader(shuffle=False))
    assert surgery.calls == 1
    assert isinstance(module.net[-1], nn.PReLU)


def test_two_optimizers_count_one_update_per_step():
    class Two(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            first.zero_grad(), second.zero_grad()
            self.manual_backward(loss)
            first.step(), second.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    counting, plugin = Counting(), PSKD()
    trainer = fit(Two(), [counting, plugin], epochs=2)
    assert trainer.global_step == 16
    assert counting.constrained == 16
    assert counting.updates[-1] == 8 - 16
    assert plugin.memory is not None
    assert plugin.memory.seen.all()


class Breaks(Plain):
    """Fails in the middle of a step, after its loss has been computed, once."""

    broken = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch == 1 and batch_idx == 1 and torch.is_grad_enabled() and not self.broken:
            self.broken = True
            raise RuntimeError("in the middle")
        return loss


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
def test_module_plugin_and_loader_can_be_used_again_after_an_exception_in_a_step(teacher):
    module, plugin, data = Breaks(), PSKD(teacher=teacher), helpers.loader(shuffle=False)
    trainer = helpers.trainer([plugin])
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(module, data)
    found(module, trainer)
    again = helpers.trainer([plugin], epochs=3)
    again.fit(module, data)
    found(module, again)


def test_memory_of_another_training_is_forgotten_also_when_a_checkpoint_has_none(tmp_path):
    fit(Plain(), epochs=2).save_checkpoint(tmp_path / "without.ckpt")
    used, fresh = PSKD(), PSKD()
    fit(Plain(), [used], helpers.loader(helpers.data(seed=5)), epochs=2)
    modules = [Plain(), Plain()]
    for module, plugin in zip(modules, (used, fresh), strict=True):
        fit(module, [plugin], ckpt=tmp_path / "without.ckpt", epochs=4)
    assert torch.equal(*map(weights, modules))


def test_one_loader_in_two_trainers_in_turn():
    data = helpers.loader(shuffle=False)
    once, twice = Plain(), Plain()
    fit(once, [PSKD()], data, epochs=3)
    before = dict(data.__dict__)
    fit(twice, [PSKD()], data, epochs=3)
    assert data.__dict__ == before
    assert torch.equal(weights(once), weights(twice))


def test_criterion_with_outputs_that_are_no_tensor_is_left_to_the_plugin():
    class Heads(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = lambda outputs, targets: sum(F.cross_entropy(o, targets) for o in outputs)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            return self.criterion((logits, -logits), batch[1])

    seen = []

    class Watch(Intervention):
        criterion = "criterion"
        capabilities = Capabilities()

        def on_loss(self, call: LossCall) -> LossCall:
            seen.append(len(call.outputs))
            return call

    fit(Heads(), [Watch()], epochs=1)
    assert seen == [2] * 4
