# SPDX-License-Identifier: Apache-2.0
"""Weight Compander in a trainer: optimizers, checkpoints, export, two ranks with sharded parameters."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.testing.processes import on_ranks
from fulgurite_plugins.reparametrization.weight_compander import (
    WeightCompander,
    WeightShape,
    fold,
    fold_state_dict,
    weight_shape,
)
from fulgurite_plugins.reparametrization.weight_compander.controls import HardClip
from fulgurite_plugins.reparametrization.weight_compander.selection import companded
from tests.helpers import Plain, data, fit, loader, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:WeightCompander. .* which were clipped:UserWarning")


class Watch(pl.Callback):
    """Looks at the free tensors when training ends, which are gone when `fit` returns."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.shapes = weight_shape(pl_module)


def test_training_ends_with_plain_weights_within_the_bound():
    module, plain, watch = Plain(), Plain(), Watch()
    fit(module, [WeightCompander(), watch], epochs=4)
    assert [*module.state_dict()] == [*plain.state_dict()]
    for place_name, shape in watch.shapes.items():
        weight = module.get_parameter(place_name)
        assert float(weight.detach().abs().max()) < float(shape["a"]) * torch.pi / 2
    folded = fold_state_dict(watch.state)
    assert all(torch.equal(folded[name], value) for name, value in module.state_dict().items())


def test_a_loop_by_hand_gives_the_same():
    module, watch = Plain(), Watch()
    fit(module, [WeightCompander(), watch], epochs=2, loader_=loader(shuffle=False))
    by_hand = Plain()
    pl.seed_everything(1, verbose=False)
    for parameter in by_hand.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    WeightCompander().operate(by_hand)
    optimizer = by_hand.configure_optimizers()
    for _ in range(2):
        for number, batch in enumerate(loader(shuffle=False)):
            optimizer.zero_grad()
            by_hand.training_step(batch, number).backward()
            optimizer.step()
    assert torch.equal(weights(fold(by_hand)), weights(module))


def test_export_false_leaves_the_model_and_another_fit_goes_on():
    module = Plain()
    fit(module, [WeightCompander(export=False)], epochs=1)
    assert len(companded(module)) == 2
    before = {name: value.clone() for name, value in module.state_dict().items()}
    watch = Watch()
    trainer([WeightCompander(relative=(3.0, 3.0)), watch], epochs=1).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in watch.begun.items())
    assert companded(module) == []


def test_an_error_leaves_free_tensors_for_the_next_fit():
    class Failing(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, [WeightCompander()])
    assert len(companded(module)) == 2


# Optimizers


class Decayed(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def test_learned_scales_have_a_group_without_decay_that_follows_the_schedule():
    rates: list[list[float]] = []

    class Rates(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.groups = trainer.optimizers[0].param_groups
            rates.append([group["lr"] for group in self.groups])
            self.learned = {id(p) for place in companded(pl_module) for p in place.compander.parameters()}

    seen, watch = Rates(), Watch()
    fit(Decayed(), [WeightCompander(learn=True, lr_scale=0.05), seen, watch], epochs=4)
    assert [group["weight_decay"] for group in seen.groups] == [0.1, 0.0]
    assert {id(p) for p in seen.groups[1]["params"]} == seen.learned
    assert all(scales == pytest.approx(0.05 * others) for others, scales in rates)
    assert rates[3][0] < rates[0][0]
    moved = [name for name in watch.state if "log_" in name and not torch.equal(watch.state[name], watch.begun[name])]
    assert len(moved) == 4


def test_fixed_scales_do_not_move_and_weight_decay_is_that_of_the_free_tensor():
    watch = Watch()
    fit(Decayed(), [WeightCompander(), watch], epochs=1, loader_=loader(batch_size=60), gradient_clip_val=1e-12)
    name = "net.0.parametrizations.weight.original"
    torch.testing.assert_close(watch.state[name], watch.begun[name] * (1 - 0.2 * 0.1), rtol=1e-6, atol=1e-9)
    assert torch.equal(
        watch.state["net.0.parametrizations.weight.0.a"], watch.begun["net.0.parametrizations.weight.0.a"]
    )


class Early(Plain):
    """Makes its optimizer in its constructor, as LightningCLI does when it parses."""

    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)

    def configure_optimizers(self) -> Any:
        return self.made


def test_an_optimizer_that_was_made_before():
    late, early = Plain(), Early()
    fit(late, [WeightCompander()])
    fit(early, [WeightCompander()])
    torch.testing.assert_close(weights(early), weights(late), rtol=1e-5, atol=1e-6)
    with pytest.raises(RefusedError, match="the optimizer moves `net.0.weight`, but not its `a` and `b`"):
        fit(Early(), [WeightCompander(learn=True)])


# Checkpoints


def test_resume_ignores_another_rule_for_the_scales(tmp_path):
    module, watch = Plain(), Watch()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    in_order = loader(shuffle=False)
    fit(module, [WeightCompander(), saver, watch], in_order, epochs=3, enable_checkpointing=True)
    resumed, again = Plain(), Watch()
    fit(resumed, [WeightCompander(relative=(3.0, 3.0)), again], in_order, ckpt=tmp_path / "epoch=1.ckpt", epochs=3)
    assert all(torch.equal(value, watch.state[name]) for name, value in again.state.items())
    assert torch.equal(weights(module), weights(resumed))


def test_best_checkpoint_of_the_training_is_evaluated_after_folding(tmp_path):
    module = Plain()
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    validation = loader(shuffle=False)
    the_trainer = fit(module, [WeightCompander(), saver], val=validation, epochs=4, enable_checkpointing=True)
    last = weights(module)
    (result,) = the_trainer.validate(module, validation, ckpt_path="best", verbose=False)
    assert result["val_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-6)
    assert companded(module) == []
    fresh = Plain()
    (again,) = trainer([WeightCompander()]).validate(fresh, validation, ckpt_path=saver.best_model_path, verbose=False)
    assert again == pytest.approx(result)
    alone = Plain()
    alone.load_state_dict(fold_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"]))
    assert torch.equal(weights(alone), weights(fresh))
    assert last.shape == weights(alone).shape
    assert not any(module._load_state_dict_pre_hooks for module in (module, fresh))


def test_evaluating_a_folded_model_changes_no_bit():
    module = Plain()
    the_trainer = fit(module, [WeightCompander()])
    before = weights(module)
    the_trainer.validate(module, loader(shuffle=False), verbose=False)
    assert torch.equal(before, weights(module))


def test_checkpoint_of_plain_weights_is_refused_for_resuming_and_taken_as_weights(tmp_path):
    alone = Plain()
    fit(alone, epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(RefusedError, match=r"WeightCompander cannot resume .* plain weights \(net.0.weight\)"):
        fit(Plain(), [WeightCompander()], ckpt=tmp_path / "plain.ckpt", epochs=2)
    module = Plain()
    module.load_state_dict(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"])
    watch = Watch()
    trainer([WeightCompander(relative=(3.0, 3.0)), watch], epochs=1).fit(module, loader())
    begun = fold_state_dict(watch.begun)
    assert all(torch.allclose(begun[name], value, atol=1e-6) for name, value in alone.state_dict().items())
    (result,) = trainer([WeightCompander()]).validate(
        Plain(), loader(shuffle=False), ckpt_path=tmp_path / "plain.ckpt", verbose=False
    )
    (expected,) = trainer().validate(alone, loader(shuffle=False), verbose=False)
    assert result == expected


# What is refused, and what is seen too late


def test_two_that_overlap_are_refused_and_two_that_do_not_work_together():
    with pytest.raises(RefusedError, match=r"Two WeightCompander callbacks both reparametrise net.2.weight"):
        fit(Plain(), [WeightCompander(), WeightCompander(modules="net.2")])
    watch = Watch()
    fit(Plain(), [WeightCompander(modules="net.0"), WeightCompander(modules="net.2", fn="tanh", learn=True), watch])
    assert "net.0.parametrizations.weight.0.a" in watch.state
    assert "net.2.parametrizations.weight.0.log_a" in watch.state


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_flatten_parameters_are_refused(strategy):
    assert "before `fully_shard`" in WeightCompander().capabilities.refused_strategies[strategy]


def test_free_tensor_that_is_not_finite_is_named_at_the_end_of_the_epoch():
    class Exploding(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                pl_module.net[2].parametrizations.weight.original.data[0, 0] = float("nan")

    with pytest.raises(FulguriteError, match=r"free tensor of `net.2.weight` \(1 of 2\) is not finite after step 4"):
        fit(Plain(), [WeightCompander(), Exploding()])


# Diagnostics and control


def test_weight_shape_is_logged_for_plain_and_companded_models():
    plain = fit(Plain(), [WeightShape()]).callback_metrics
    names = {f"weight_shape/{part}{s}" for part in ("", "net.0.weight/", "net.2.weight/") for s in ("kurtosis", "peak")}
    assert names <= plain.keys()
    both = fit(Plain(), [WeightCompander(), WeightShape(per_tensor=False)]).callback_metrics
    assert {name for name in both if name.startswith("weight_shape")} == {
        f"weight_shape/{s}" for s in ("kurtosis", "near_zero", "peak", "a", "b")
    }


def test_hard_clip_bounds_weights_by_where_they_began():
    module, watch = Plain(), Watch()
    fit(module, [HardClip(at=0.5), watch], epochs=3)
    for name in ("net.0.weight", "net.2.weight"):
        bound = 0.5 * float(watch.begun[name].std())
        assert float(watch.state[name].abs().max()) == pytest.approx(bound, rel=1e-6)


# Sharded parameters


class Sharded(Plain):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def configure_model(self) -> None:
        WeightCompander(**self.arguments).operate(self)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach() for k, v in state.items()}


@pytest.mark.parametrize("arguments", [{}, {"learn": True, "lr_scale": 0.5, "shared": True}])
def test_companded_before_sharding_equals_one_process(arguments):
    def train(rank: int) -> Any:
        sampler = DistributedSampler(data(44), num_replicas=2, rank=rank, shuffle=False)
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo", timeout=timedelta(seconds=60))
        module = Sharded(**arguments)
        callbacks = [WeightCompander(**arguments), WeightShape()]
        batches = DataLoader(data(44), 11, sampler=sampler)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            done = fit(module, callbacks, batches, strategy=strategy, devices=2, epochs=3)
        sharded = any(isinstance(p, DTensor) for p in module.parameters())
        said = any("leaves the weights reparametrised" in str(warning.message) for warning in caught)
        return whole(module.state_dict()), sharded, said, float(done.callback_metrics["weight_shape/kurtosis"])

    (state, sharded, said, kurtosis), (other, *_, again) = on_ranks(train)
    assert sharded
    assert said
    assert kurtosis == again
    alone, batches = Plain(), DataLoader(data(44), 22)
    done = fit(alone, [WeightCompander(**arguments), WeightShape()], batches, epochs=3)
    assert kurtosis == pytest.approx(float(done.callback_metrics["weight_shape/kurtosis"]), rel=1e-4)
    for name, value in fold_state_dict(state).items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=0, atol=1e-5)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
