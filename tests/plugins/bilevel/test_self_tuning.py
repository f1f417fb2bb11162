# SPDX-License-Identifier: Apache-2.0
"""The callback in a trainer: phases, held-out data, resume, what it leaves behind, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from fulgurite import spec
from fulgurite.errors import RefusedError
from fulgurite.testing.lab import equal_states
from fulgurite_plugins.bilevel.self_tuning_networks.course import Course
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.intervention import SelfTuning
from fulgurite_plugins.bilevel.self_tuning_networks.layers import HyperLinear
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import gated_layers
from fulgurite_plugins.bilevel.self_tuning_networks.targets import (
    Dropout,
    GaussianNoise,
    InterventionWeight,
    LabelSmoothing,
)
from fulgurite_plugins.distillation import PSKD
from tests import helpers
from tests.helpers import weights
from tests.plugins.bilevel import stn


def test_cycles_are_counted_in_updates_after_the_warm_up():
    """Eight updates an epoch; a warm-up of six; then two steps after every third update."""
    tuner = stn.tuner(warmup_epochs=0.75, train_steps=3, valid_steps=2)
    stn.fit([tuner], epochs=2)
    assert tuner.course.updates == [0, 9, 12, 15]
    assert tuner._validation.steps == 6
    accumulating = stn.tuner(warmup_epochs=1.0, train_steps=1)
    trainer = stn.fit([accumulating], epochs=2, accumulate_grad_batches=3)  # windows of 3, 3 and 2 batches
    assert trainer.global_step == 6
    assert accumulating.course.updates == [0, 4, 5, 6]


def test_validation_set_is_never_touched_and_held_out_examples_never_trained_on():
    seen: dict[bool, list[float]] = {True: [], False: []}

    class Notes(stn.Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen[self.training] += batch[0][:, 0].tolist()
            return super().training_step(batch, batch_idx)

    stn.fit(
        [stn.tuner(stn.rate(), warmup_epochs=0.0, train_steps=1)],
        Notes(),
        epochs=3,
        val=helpers.loader(helpers.data(20, seed=9)),
    )
    trained, held = set(seen[True]), set(seen[False])
    assert len(trained) == 128
    assert len(held) == 32
    assert trained | held == set(helpers.data(160).tensors[0][:, 0].tolist())


def test_hyperparameters_move_and_are_logged_and_written(tmp_path):
    tuner = stn.tuner(schedule_file="found.json")
    trainer = stn.fit([tuner], epochs=3, default_root_dir=tmp_path, log_every_n_steps=3)
    names = {"stn/rate", "stn/noise", "stn/rate_scale", "stn/noise_scale", "stn/entropy", "stn/valid_loss"}
    assert names <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["stn/rate"]) == pytest.approx(tuner.final_values()["rate"])
    assert tuner.final_values() != {"rate": 0.3, "noise": 0.2}
    course, described = Course.read(tmp_path / "found.json")
    assert course.values[-1] == pytest.approx(list(tuner.final_values().values()), abs=1e-6)
    assert course.updates == tuner.course.updates
    assert [Hyper.from_dict(each) for each in described] == tuner.hyperparameters
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_learning_rates_of_zero_keep_the_start():
    tuner = stn.tuner(lr=0.0, scale_lr=0.0)
    stn.fit([tuner])
    assert tuner.final_values() == pytest.approx({"rate": 0.3, "noise": 0.2})
    assert torch.allclose(tuner.tuner.scale, torch.tensor([0.5, 0.5]))


def test_fixed_scales_show_the_unperturbed_hyperparameters_in_validation_steps():
    shown: list[Any] = []

    class Notes(stn.Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.training:
                shown.append(self.net[0].conditioning.h.shape)
            return super().training_step(batch, batch_idx)

    tuner = stn.tuner(tune_scales=False)
    stn.fit([tuner], Notes())
    assert set(shown) == {(2,)}
    assert torch.allclose(tuner.tuner.scale, torch.tensor([0.5, 0.5]))
    assert tuner.final_values() != pytest.approx({"rate": 0.3, "noise": 0.2})


def test_after_training_the_module_stays_gated_at_the_final_hyperparameters_and_can_be_fused():
    tuner, module = stn.tuner(), stn.Slow()
    trainer = stn.fit([tuner], module)
    x = helpers.data().tensors[0]
    module.eval()
    layer = gated_layers(module)["net.0"]
    assert torch.equal(layer.conditioning.h, tuner.tuner.lam)
    fused = tuner.fuse(module)
    assert type(fused.net[0]) is nn.Linear
    assert isinstance(module.net[0], HyperLinear)
    torch.testing.assert_close(fused(x), module(x), rtol=1e-6, atol=1e-6)
    expected = F.cross_entropy(module(x), helpers.data().tensors[1]).detach()
    found = trainer.validate(module, helpers.loader(shuffle=False, batch_size=60), verbose=False)[0]["val_loss"]
    assert found == pytest.approx(float(expected))
    assert type(module.net[2]) is nn.Dropout


def test_plain_checkpoint_can_be_trained_on_and_a_gated_one_validated(tmp_path):
    plain = stn.Slow()
    stn.fit([], plain).save_checkpoint(tmp_path / "plain.ckpt")
    module = stn.Slow()
    module.load_state_dict(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"])
    tuner = stn.tuner()
    trainer = helpers.trainer([tuner], epochs=2)
    trainer.fit(module, helpers.loader(helpers.data(160)))
    trainer.save_checkpoint(tmp_path / "gated.ckpt")
    loader = helpers.loader(shuffle=False)
    expected = trainer.validate(module, loader, verbose=False)
    other = helpers.trainer([stn.tuner()])
    assert other.validate(stn.Slow(), loader, ckpt_path=tmp_path / "gated.ckpt", verbose=False) == expected


@pytest.mark.parametrize("at", [5, 11, 12])
def test_resume_in_the_middle_of_a_cycle_is_exact(tmp_path, at):
    class Save(pl.Callback):
        count = 0

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            self.count += 1
            if self.count == at:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def train(callbacks: Any = (), ckpt: Any = None) -> tuple[SelfTuning, Any, Any]:
        tuner, module = stn.tuner(stn.rate(), stn.noise(), stn.decay(), train_steps=3, valid_steps=2), stn.Slow()
        loader = StatefulDataLoader(helpers.data(160), batch_size=16, shuffle=True)
        stn.fit([tuner, *callbacks], module, loader=loader, epochs=3, ckpt=ckpt)
        return tuner, module, tuner.state_dict()

    whole, expected, state = train([Save()])
    resumed, found, again = train(ckpt=tmp_path / "a.ckpt")
    assert torch.equal(weights(expected), weights(found))
    assert equal_states(state, again)
    assert whole.course == resumed.course
    assert whole.final_values() == resumed.final_values()


def test_other_hyperparameters_than_those_of_the_checkpoint_are_refused(tmp_path):
    stn.fit([stn.tuner()]).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        RefusedError, match="tunes rate, decay, but the checkpoint is of a training that tuned rate, noise"
    ):
        stn.fit([stn.tuner(stn.rate(), stn.decay())], epochs=3, ckpt=tmp_path / "a.ckpt")


def test_copies_keep_arguments_and_state_and_train_on_their_own():
    tuner = stn.tuner()
    stn.fit([tuner])
    for twin in (copy.deepcopy(tuner), pickle.loads(pickle.dumps(tuner))):
        assert equal_states(twin.state_dict(), tuner.state_dict())
        assert twin.hyperparameters == tuner.hyperparameters


class Diverges(stn.Slow):
    """Its loss is NaN from the second epoch on, on held-out batches only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.current_epoch and not self.training else loss


def test_held_out_loss_that_is_not_finite_moves_nothing_and_at_last_stops_training():
    tuner = stn.tuner(train_steps=1, warmup_epochs=0.0)
    with pytest.warns(
        UserWarning, match=r"held-out loss was not finite in the last 16 validation steps.*last good values"
    ):
        trainer = stn.fit([tuner], Diverges(), epochs=9)
    assert trainer.current_epoch == 3, "after sixteen failures, ten of which are enough"
    assert int(tuner.tuner.skipped) == 16
    assert tuner.course.values[8] == tuner.course.values[-1] == list(tuner.final_values().values())


def test_label_smoothing_changes_the_criterion_and_other_losses_are_not_asked_for():
    smoothing = Hyper("smoothing", LabelSmoothing(), init=0.1)
    tuner, module = stn.tuner(smoothing), stn.Slow()
    stn.fit([tuner], module)
    off = stn.Slow()
    stn.fit([stn.tuner(Hyper("smoothing", LabelSmoothing(), init=1e-6, scale=1e-6), lr=0.0, scale_lr=0.0)], off)
    assert not torch.equal(weights(module), weights(off))

    class OwnLoss(stn.Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0]).square().mean()

    stn.fit([stn.tuner()], OwnLoss())
    with pytest.raises(RefusedError, match="no call of"):
        stn.fit([stn.tuner(smoothing)], OwnLoss())


@pytest.mark.parametrize("first", [True, False])
def test_weight_of_another_plugin_is_tuned(first):
    """The alpha of PS-KD follows the hyperparameter while training lasts, and is given back."""
    alpha = Hyper("alpha", InterventionWeight("PSKD"), init=0.3, range=(0.0, 1.0))
    used: list[float] = []

    class Spy(PSKD):
        def _from_memory(self, call: Any) -> Any:
            used.append(self.weight)
            return super()._from_memory(call)

    Spy.__name__ = "PSKD"
    other = Spy(alpha=0.8)
    found = other.schedule
    tuner = stn.tuner(alpha, stn.rate())
    stn.fit([other, tuner] if first else [tuner, other], epochs=3)
    assert other.schedule is found
    assert 0.2 < sum(used) / len(used) < 0.4
    assert len(set(used)) == len(used) == 24
    assert tuner.final_values()["alpha"] != pytest.approx(0.3)


def test_tuning_on_the_validation_data_warns_and_needs_them():
    tuner = stn.tuner(holdout="val")
    with pytest.warns(UserWarning, match="tunes on the validation data: metrics on them become optimistic"):
        trainer = stn.fit([tuner], val=helpers.loader(helpers.data(40), shuffle=False))
    assert trainer.global_step == 20
    assert tuner.final_values() != pytest.approx({"rate": 0.3, "noise": 0.2})
    with pytest.raises(RefusedError, match="needs one validation DataLoader, but the trainer has none"):
        stn.fit([stn.tuner(holdout="val")])


def held_out() -> Any:
    return helpers.loader(helpers.data(48, seed=4))


def test_held_out_data_of_ones_own():
    by_path, by_function = (stn.tuner(holdout=h) for h in (f"{__name__}:held_out", held_out))
    modules = [stn.Slow(), stn.Slow()]
    for tuner, module in zip((by_path, by_function), modules, strict=True):
        assert stn.fit([tuner], module).global_step == 20
    assert torch.equal(*map(weights, modules))
    assert by_path.final_values() == by_function.final_values()
    with pytest.raises(RefusedError, match="'package.module:function'.*'no.such:thing'"):
        stn.fit([stn.tuner(holdout="no.such:thing")])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(helpers.data(64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"module": helpers.Manual()}, "stn cannot be used with manual optimization"),
        ({"loader": DataLoader(Stream(), batch_size=8)}, "SelfTuning.*DataLoader over Stream"),
        ({"n": 60}, "one batch of 16 held-out examples, but there are 12"),
        (
            {"epochs": 1, "tuner": {"warmup_epochs": 5.0}},
            "warm-up of 5.0 epochs takes 40 updates.*only 8: nothing would",
        ),
        (
            {"loader": [helpers.loader(), helpers.loader()], "tuner": {"holdout": held_out}},
            "one DataLoader.*CombinedLoader",
        ),
        ({"tuner": {"gate": ["nothing.*"]}}, r"SelfTuning \(stn\): No layer of Slow matches .nothing"),
    ],
)
def test_what_would_train_wrongly_is_refused_by_name(arguments, message):
    tuner = stn.tuner(stn.noise(), **arguments.pop("tuner", {}))
    with pytest.raises(RefusedError, match=message):
        stn.fit([tuner], **arguments)


def test_dropout_that_is_not_there_is_refused_by_name():
    with pytest.raises(
        RefusedError, match=r"SelfTuning \(stn\): Dropout\('\*'\) matches no dropout layer of Plain.*F.dropout"
    ):
        stn.fit([stn.tuner(stn.rate())], helpers.Plain())


def test_sharded_strategies_and_float16_are_refused():
    capabilities = stn.tuner().capabilities
    assert {"fsdp", "model_parallel", "deepspeed"} <= capabilities.refused_strategies.keys()
    assert "16-true" in capabilities.refused_precisions
    with pytest.raises(RefusedError, match="both take the gates"):
        stn.fit([stn.tuner(), Second([stn.noise()])])


def test_configuration_files_and_texts_spell_hyperparameters_as_plain_data():
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    text = """
    callback:
      class_path: fulgurite_plugins.bilevel.self_tuning_networks.intervention.SelfTuning
      init_args:
        hyperparameters:
          - {name: hidden, target: {class_path: Dropout, init_args: {pattern: "network.*"}}, init: 0.05}
    """
    from_file = parser.instantiate_classes(parser.parse_string(text)).callback
    from_text = spec.build("self_tuning_networks.SelfTuning([Hyper('hidden', Dropout('network.*'), 0.05)])")
    expected = [Hyper("hidden", Dropout("network.*"), 0.05)]
    assert from_file.hyperparameters == from_text.hyperparameters == expected


class Second(SelfTuning):
    """Another one, with a state of its own."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hyperparameters": []}, "`hyperparameters` of SelfTuning to be at least one"),
        ({"hyperparameters": [stn.noise(), stn.noise()]}, "distinct names"),
        ({"holdout": 0.0}, r"`holdout` of SelfTuning to be a fraction in \(0, 1\)"),
        ({"holdout": 1}, "but got 1"),
        ({"train_steps": 0}, "`train_steps` of SelfTuning to be a positive integer, but got 0"),
        ({"valid_steps": 1.5}, "`valid_steps`"),
        ({"warmup_epochs": -1.0}, "`warmup_epochs` of SelfTuning to be a number that is not negative"),
        ({"lr": float("nan")}, "`lr`"),
        ({"entropy_weight": -1e-3}, "`entropy_weight`"),
        ({"embed": "other"}, "`embed` of SelfTuning to be one of 'unconstrained', 'constrained'"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm`"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfTuning(**{"hyperparameters": [Hyper("noise", GaussianNoise(), 0.1)], **arguments})
