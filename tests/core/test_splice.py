# SPDX-License-Identifier: Apache-2.0
"""Interventions in somebody's training: what they may do, in which order, and that nothing is left behind."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite import Capabilities, Intervention, LossCall, Splice, Step
from fulgurite.errors import RefusedError
from tests import helpers
from tests.helpers import DictReturned, Late, Manual, ModuleLoss, OneArgument, Plain, fit, weights


class Nothing(Intervention):
    """Overrides every hook and changes nothing."""

    def operate(self, module: pl.LightningModule) -> None:
        pass

    def transform_batch(self, batch: Any, step: Step) -> Any:
        return batch

    def on_loss(self, call: LossCall) -> LossCall:
        return call

    def penalty(self, step: Step) -> None:
        return None

    def transform_gradients(self, module: Any, optimizer: Any) -> None:
        pass

    def constrain(self, module: Any, optimizer: Any) -> None:
        pass


class Indexed(Nothing):
    capabilities = Capabilities(sample_indices=True)


class Smooth(Intervention):
    """Mixes the targets with the uniform distribution."""

    def __init__(self, amount: float = 0.3) -> None:
        self.amount = amount

    def on_loss(self, call: LossCall) -> LossCall:
        call = call.soften()
        return call.replace(targets=call.targets * (1 - self.amount) + self.amount / call.targets.shape[1])


class Square(Intervention):
    """Squares the targets and normalises them: does not commute with Smooth."""

    def on_loss(self, call: LossCall) -> LossCall:
        call = call.soften()
        squared = call.targets.square()
        return call.replace(targets=squared / squared.sum(1, keepdim=True))


class LogitPenalty(Intervention):
    capabilities = Capabilities(reads_loss=True)

    def penalty(self, step: Step) -> Tensor:
        return 0.1 * step.outputs.square().mean()


class TwoPenalties(Intervention):
    def penalty(self, step: Step) -> dict[str, Tensor]:
        total = sum(p.square().sum() for p in step.module.parameters())
        return {"l2": 0.01 * total, "half": 0.005 * total}


MODULES = [Plain, ModuleLoss, OneArgument, DictReturned, Late, Manual]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("intervention", [Nothing, Indexed])
def test_intervention_that_changes_nothing_leaves_parameters_and_random_stream_bit_identical(module, intervention):
    if module is Manual:
        intervention = type("OnLossOnly", (Intervention,), {"on_loss": intervention.on_loss})
    alone, accompanied = module(), module()
    fit(alone, val=helpers.loader(shuffle=False))
    stream = torch.rand(3)
    fit(accompanied, [intervention()], val=helpers.loader(shuffle=False))
    assert torch.equal(stream, torch.rand(3))
    assert torch.equal(weights(alone), weights(accompanied))


class Snapshot:
    """What must be as it was found."""

    def __init__(self, module: pl.LightningModule, loader: Any, callbacks: list[Any]) -> None:
        self.module_keys = dict.fromkeys(module.__dict__)
        self.step = module.training_step.__func__
        self.loader = dict(loader.__dict__)
        self.callbacks = list(callbacks)

    def check(self, module: pl.LightningModule, loader: Any, trainer: pl.Trainer) -> None:
        assert set(module.__dict__) <= set(self.module_keys) | {"_hparams"}  # Lightning's own
        assert module.training_step.__func__ is self.step
        changed = {k for k in loader.__dict__ if loader.__dict__[k] is not self.loader.get(k)}
        assert changed <= {"_iterator", "_IterableDataset_len_called"}
        assert "process_dataloader" not in trainer.strategy.__dict__
        assert not any(isinstance(callback, Splice) for callback in trainer.callbacks)
        assert [c for c in trainer.callbacks if isinstance(c, Intervention)] == self.callbacks


class Failing(Plain):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise self.error("stop")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_after_fit_exception_or_interrupt(error):
    module = Plain() if error is None else Failing(error)
    loader, interventions = helpers.loader(), [Indexed(), Smooth()]
    trainer = helpers.trainer(interventions)
    before = Snapshot(module, loader, interventions)
    if error is None:
        trainer.fit(module, loader)
    else:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer.fit(module, loader)
    before.check(module, loader, trainer)


def test_users_own_list_of_callbacks_is_put_back():
    mine: list[Any] = [Nothing()]
    trainer = pl.Trainer(callbacks=mine, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    found = trainer.callbacks
    trainer.fit(Plain(), helpers.loader())
    assert trainer.callbacks is found


def test_instance_attribute_training_step_of_the_user_is_put_back():
    module = Plain()
    own = module.training_step
    module.training_step = own
    fit(module, [Smooth()])
    assert module.__dict__["training_step"] is own


def test_targets_change_in_callback_order():
    """Both orders are tried: the second must see what the first has made."""
    seen: dict[str, Tensor] = {}

    class Last(Intervention):
        def on_loss(self, call: LossCall) -> LossCall:
            seen["targets"] = call.targets
            return call

    def targets(*interventions: Intervention) -> Tensor:
        fit(Plain(), [*interventions, Last()], epochs=1, limit_train_batches=1)
        return seen["targets"].sort(dim=1, descending=True).values[0]

    smooth = torch.tensor([0.7 + 0.06, 0.06, 0.06, 0.06, 0.06])
    first_smooth = smooth.square() / smooth.square().sum()
    torch.testing.assert_close(targets(Smooth(), Square()), first_smooth)
    torch.testing.assert_close(targets(Square(), Smooth()), smooth)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("module", [Plain, DictReturned])
def test_penalties_add_and_are_logged_by_name(order, module):
    class ByHand(module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            loss = output["loss"] if isinstance(output, dict) else output
            total = sum(p.square().sum() for p in self.parameters())
            return loss + 0.1 * self(batch[0]).square().mean() + 0.015 * total

    interventions = [LogitPenalty(), TwoPenalties()][::order]
    plugged, by_hand = module(), ByHand()
    trainer = fit(plugged, interventions)
    fit(by_hand)
    torch.testing.assert_close(weights(plugged), weights(by_hand), rtol=1e-5, atol=1e-6)
    logged = trainer.callback_metrics
    assert {"logitpenalty/penalty", "twopenalties/l2", "twopenalties/half"} <= set(logged)
    torch.testing.assert_close(logged["twopenalties/l2"], 2 * logged["twopenalties/half"])


def test_two_instances_of_one_class_both_act_and_are_logged_apart():
    trainer = fit(Plain(), [LogitPenalty(), LogitPenalty()], epochs=1)
    assert {"logitpenalty/penalty", "logitpenalty_2/penalty"} <= set(trainer.callback_metrics)


def test_transform_batch_replaces_the_batch_also_when_it_is_a_tuple():
    class Zero(Intervention):
        def transform_batch(self, batch: Any, step: Step) -> Any:
            return (torch.zeros_like(batch[0]), batch[1])

    class Seen(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert not batch[0].any()
            return super().training_step(batch, batch_idx)

    fit(Seen(), [Zero()], epochs=1)


def test_gradients_are_changed_before_clipping():
    norms: list[float] = []

    class Scale(Intervention):
        def transform_gradients(self, module: Any, optimizer: Any) -> None:
            torch._foreach_mul_([p.grad for p in module.parameters()], 100.0)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_: Any) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm()))

    fit(Plain(), [Scale(), Watch()], epochs=1, gradient_clip_val=0.5)
    torch.testing.assert_close(torch.tensor(norms), torch.full((len(norms),), 0.5), rtol=1e-3, atol=0)


def test_constraint_follows_every_true_update_and_updates_are_counted():
    class UnitNorm(Intervention):
        def constrain(self, module: Any, optimizer: Any) -> None:
            with torch.no_grad():
                module.net[0].weight.div_(module.net[0].weight.norm())

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_: Any) -> None:
            due = trainer.global_step - self.before
            self.before = trainer.global_step
            if due:
                torch.testing.assert_close(module.net[0].weight.norm(), torch.tensor(1.0))
            assert Splice.of(trainer).updates == trainer.global_step

    watch = Watch()
    watch.before = 0
    trainer = fit(Plain(), [UnitNorm(), watch], accumulate_grad_batches=3)
    assert trainer.global_step == 4  # 4 batches per epoch: a window of three and a short one


def test_completes_update_knows_the_short_last_window():
    seen: list[bool] = []

    class Watch(Intervention):
        def transform_batch(self, batch: Any, step: Step) -> Any:
            seen.append(step.completes_update)
            return batch

    fit(Plain(), [Watch()], accumulate_grad_batches=3)
    assert seen == [False, False, True, True] * 2


def test_operate_comes_before_the_optimizer_and_only_once_per_fit():
    calls: list[str] = []

    class AddLayer(Intervention):
        def operate(self, module: Any) -> None:
            calls.append(type(module.net[-1]).__name__)
            if not isinstance(module.net[-1], nn.PReLU):
                module.net.append(nn.PReLU())

    for module in (Plain(), Late()):
        calls.clear()
        trainer = fit(module, [AddLayer()], epochs=1)
        optimised = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert any(p is module.net[-1].weight for p in optimised)
        assert calls == ["Linear"]


def test_setup_without_super_still_lays_the_splice():
    class Forgetful(Smooth):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.was_set_up = True

    plain, smoothed, forgetful = Plain(), Plain(), Plain()
    fit(plain)
    fit(smoothed, [Smooth()])
    intervention = Forgetful()
    fit(forgetful, [intervention])
    assert intervention.was_set_up
    assert torch.equal(weights(smoothed), weights(forgetful))
    assert not torch.equal(weights(plain), weights(forgetful))


def test_copies_and_pickles_of_the_module_during_training_are_plain():
    """WeightAveraging deep-copies the module while the splice is in place; a copy must not run the original's step."""
    copies: list[pl.LightningModule] = []

    class Copier(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_: Any) -> None:
            assert "training_step" in module.__dict__
            copies[:] = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]

    module = Plain()
    fit(module, [Smooth(), Copier()], epochs=1)
    for one in copies:
        assert "training_step" not in one.__dict__
        assert "__getstate__" not in one.__dict__
        assert one.training_step.__self__ is one


def test_works_beside_weight_averaging():
    module = Plain()
    fit(module, [Smooth(), EMAWeightAveraging(decay=0.5)])
    assert weights(module).isfinite().all()


def test_learning_rate_finder_runs_without_interventions():
    """The finder swaps the callbacks away; an intervention must not act on its trial steps, and act afterwards."""
    calls = {"finder": 0, "after": 0}

    class Watch(Intervention):
        def on_loss(self, call: LossCall) -> LossCall:
            calls["after" if call.step.trainer.global_step or self.began else "finder"] += 1
            return call

        began = False

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.began = True

    class WithRate(Plain):
        lr = 0.1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    fit(WithRate(), [Watch(), LearningRateFinder(num_training_steps=5)], enable_checkpointing=True)
    assert calls == {"finder": 0, "after": 8}


def test_fit_twice_continues_and_leaves_nothing():
    module, loader, interventions = Plain(), helpers.loader(), [Indexed(), Smooth()]
    trainer = helpers.trainer(interventions, epochs=1)
    before = Snapshot(module, loader, interventions)
    trainer.fit(module, loader)
    first = weights(module).clone()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    before.check(module, loader, trainer)
    assert not torch.equal(first, weights(module))


def test_loss_in_no_grad_is_not_the_criterion():
    class Monitoring(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            with torch.no_grad():
                F.mse_loss(logits.softmax(1), F.one_hot(batch[1], 5).float())
            return F.cross_entropy(logits, batch[1])

    fit(Monitoring(), [Smooth()], epochs=1)


class TwoLosses(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.main_loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return (
            self.main_loss(logits, batch[1])
            + 0.1 * F.cross_entropy(logits.flip(1), batch[1])
            + F.l1_loss(logits, torch.zeros_like(logits))
        )


def test_several_losses_need_a_name():
    with pytest.raises(RefusedError, match=r"calls several losses \(cross_entropy, cross_entropy\).*main_loss"):
        fit(TwoLosses(), [Smooth()])


@pytest.mark.parametrize("name", ["main_loss", "l1_loss"])
def test_named_criterion_is_the_only_one_that_changes(name):
    seen: list[str] = []

    class Watch(Intervention):
        criterion = name

        def on_loss(self, call: LossCall) -> LossCall:
            seen.append(call.fn.__name__)
            return call

    fit(TwoLosses(), [Watch()], epochs=1)
    assert seen == ["cross_entropy" if name == "main_loss" else "l1_loss"] * 4


def test_interventions_on_one_loss_keep_their_order_however_they_name_it():
    seen: list[str] = []

    def watch(label: str, criterion: str | None) -> Intervention:
        def on_loss(self: Intervention, call: LossCall) -> LossCall:
            seen.append(label)
            return call

        return type(label, (Intervention,), {"on_loss": on_loss, "criterion": criterion})()

    fit(
        ModuleLoss(),
        [watch("A", None), watch("B", "criterion"), watch("C", "cross_entropy")],
        epochs=1,
        limit_train_batches=1,
    )
    assert seen == ["A", "B", "C"]


def test_custom_criterion_is_found_by_name():
    class Focal(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            p = outputs.softmax(1).gather(1, targets[:, None])
            return (-(1 - p).square() * p.log()).mean()

    class Double(Intervention):
        criterion = "criterion"

        def on_loss(self, call: LossCall) -> LossCall:
            return call.replace(outputs=2 * call.outputs)

    class ByHand(ModuleLoss):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.net(x)

    plugged, by_hand = ModuleLoss(Focal()), ByHand(Focal())
    fit(plugged, [Double()])
    fit(by_hand)
    assert torch.equal(weights(plugged), weights(by_hand))


def test_missing_criterion_says_what_was_looked_for():
    class NoLoss(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return -self(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    with pytest.raises(RefusedError, match="no call of a loss of torch.nn.functional.*criterion="):
        fit(NoLoss(), [Smooth()])


def test_unknown_criterion_is_refused_before_the_first_step():
    smooth = Smooth()
    smooth.criterion = "los"
    with pytest.raises(RefusedError, match="expected `criterion` to name.*'los'.*criterion"):
        fit(ModuleLoss(), [smooth])


def test_on_loss_that_returns_nothing_is_named():
    class Forgets(Intervention):
        def on_loss(self, call: LossCall) -> Any:
            pass

    with pytest.raises(TypeError, match="`on_loss` of forgets to return a LossCall"):
        fit(Plain(), [Forgets()])


def test_penalty_under_manual_optimization_is_refused_by_name():
    with pytest.raises(RefusedError, match="twopenalties adds a penalty.*Manual optimises manually"):
        fit(Manual(), [TwoPenalties()])


def test_dataloader_iter_is_refused_by_name():
    class Fetches(Plain):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(RefusedError, match="takes `dataloader_iter`"):
        fit(Fetches(), [Smooth()])


def test_exclusive_resources_strategies_and_precisions_are_refused_by_name():
    def wants(name: str, **capabilities: Any) -> Intervention:
        return type(name, (Smooth,), {"capabilities": Capabilities(**capabilities)})()

    with pytest.raises(RefusedError, match="a and b both take the head"):
        fit(Plain(), [wants("A", exclusive=("head",)), wants("B", exclusive=("head",))])
    with pytest.raises(RefusedError, match="strategy 'single': because"):
        fit(Plain(), [wants("A", refused_strategies={"single": "because"})])
    with pytest.raises(RefusedError, match="precision='bf16-mixed': because"):
        fit(Plain(), [wants("A", refused_precisions={"bf16-mixed": "because"})], precision="bf16-mixed")


def test_trace_tells_what_each_intervention_changed(caplog):
    with caplog.at_level(logging.DEBUG, logger="fulgurite.splice"):
        fit(Plain(), [Smooth(), LogitPenalty()], epochs=1, limit_train_batches=1)
    assert "smooth.on_loss: fn cross_entropy -> soft_cross_entropy; targets int64[16] -> float32[16, 5]" in caplog.text
    assert "logitpenalty.penalty" in caplog.text


def test_penalty_is_computed_outside_autocast():
    seen: list[torch.dtype] = []

    class Watch(Intervention):
        def penalty(self, step: Step) -> Tensor:
            weight = step.module.net[0].weight
            seen.append((weight @ weight.T).dtype)
            return 0 * weight.sum()

    fit(Plain(), [Watch()], epochs=1, precision="bf16-mixed")
    assert set(seen) == {torch.float32}


def test_no_graph_is_kept_from_step_to_step():
    """A step that outlived its batch would hold the whole graph and its activations."""

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer, module, *_: Any) -> None:
            pass

        def on_train_batch_start(self, trainer, module, *_: Any) -> None:
            self.at_start = Splice.of(trainer)._step

        def on_validation_start(self, trainer, module) -> None:
            assert Splice.of(trainer)._step is None

    fit(Plain(), [LogitPenalty(), Watch()], val=helpers.loader(shuffle=False))


def test_pytorch_lightning_trainer_takes_interventions():
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(12, 5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    def run(callbacks: Any) -> Tensor:
        pytorch_lightning.seed_everything(1, verbose=False)
        module = Other()
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer.fit(module, helpers.loader())
        assert "training_step" not in module.__dict__
        return weights(module)

    plain = run([])
    assert torch.equal(plain, run([Indexed()]))
    assert not torch.equal(plain, run([Smooth()]))


class WeightNorm(Intervention):
    """A penalty on parameters, which knows how often it was asked."""

    capabilities = Capabilities(penalises_parameters=True)

    def __init__(self) -> None:
        self.asked = 0

    def penalty(self, step: Step) -> Tensor:
        if self.asked == 0:
            self.before = weights(step.module).clone()
        self.asked += 1
        return 0.1 * sum(p.square().sum() for p in step.module.parameters())


@pytest.mark.parametrize("windows", [1, 3])
def test_a_penalty_on_parameters_counts_once_per_update_whatever_the_accumulation(windows):
    class ZeroLoss(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0.0 * super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    penalty, module = WeightNorm(), ZeroLoss()
    trainer = fit(module, [penalty], accumulate_grad_batches=windows)
    updates = trainer.global_step
    assert (trainer.num_training_batches % windows > 0) == (windows > 1)  # the last window is short
    assert penalty.asked == updates
    torch.testing.assert_close(weights(module), penalty.before * 0.9**updates)
