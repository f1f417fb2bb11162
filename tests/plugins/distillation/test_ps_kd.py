# SPDX-License-Identifier: Apache-2.0
"""PS-KD: its equations against closed forms and slow oracles, its state, and the mistakes that users make with it."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from fulgurite import Intervention, LossCall, Schedule
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_plugins.distillation import PSKD, progressive_weight, pskd_gradient_ratio, refine_targets
from tests import helpers
from tests.helpers import ModuleLoss, NegativeLogLikelihood, Plain, fit, weights


def random_case(n: int = 64, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, dtype=torch.float64, generator=generator)
    past = torch.randn(n, classes, dtype=torch.float64, generator=generator).softmax(1)
    return logits, past, torch.randint(0, classes, (n,), generator=generator)


# Functions


def test_progressive_weight_is_the_linear_ramp():
    assert [progressive_weight(t, 4, 0.8) for t in (0, 1, 2, 4)] == [0.0, 0.2, 0.4, 0.8]
    assert progressive_weight(-1, 4, 0.8) == 0.0
    assert Schedule(0.8).at(3, 300) == pytest.approx(progressive_weight(3, 300, 0.8), abs=1e-15)
    with pytest.raises(ValueError, match="`final` to be in"):
        progressive_weight(1, 4, 1.2)
    with pytest.raises(ValueError, match="`total` to be a positive"):
        progressive_weight(1, 0, 0.8)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_refined_targets_equal_the_equation_and_sum_to_one(alpha):
    _, past, labels = random_case()
    refined = refine_targets(labels, past, alpha)
    torch.testing.assert_close(refined, (1 - alpha) * F.one_hot(labels, 7).double() + alpha * past, rtol=0, atol=1e-12)
    torch.testing.assert_close(refined.sum(1), torch.ones(64, dtype=torch.float64))
    per_row = refine_targets(labels, past, torch.full((64, 1), alpha, dtype=torch.float64))
    torch.testing.assert_close(refined, per_row, rtol=0, atol=1e-12)


def test_refined_targets_of_dense_predictions_and_of_probabilities():
    past = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels = torch.randint(0, 5, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    hard = F.one_hot(labels, 5).movedim(-1, 1).float()
    expected = 0.6 * hard + 0.4 * past
    torch.testing.assert_close(refine_targets(labels, past, 0.4), expected)
    torch.testing.assert_close(refine_targets(hard, past, 0.4), expected)
    with pytest.raises(ValueError, match="describe the same examples"):
        refine_targets(labels[:1], past, 0.4)
    with pytest.raises(ValueError, match="`alpha` to be in"):
        refine_targets(labels, past, 1.5)
    with pytest.raises(ValueError, match=r"shape \[B, 6, \.\.\.\]"):
        refine_targets(labels, past, 0.5, num_classes=6)


def test_gradient_is_prediction_minus_refined_target():
    logits, past, labels = random_case()
    logits.requires_grad_()
    targets = refine_targets(labels, past, 0.7)
    F.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - targets) / 64, rtol=0, atol=1e-12)
    small = logits[:3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: F.cross_entropy(z, targets[:3]), small)


def test_perfect_past_is_plain_cross_entropy_and_uniform_past_is_label_smoothing():
    logits, _, labels = random_case()
    perfect = refine_targets(labels, F.one_hot(labels, 7).double(), 0.8)
    torch.testing.assert_close(F.cross_entropy(logits, perfect), F.cross_entropy(logits, labels), rtol=0, atol=1e-12)
    uniform = refine_targets(labels, torch.full((64, 7), 1 / 7, dtype=torch.float64), 0.3)
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(F.cross_entropy(logits, uniform), smoothed, rtol=0, atol=1e-12)


def test_gradient_ratio_identity_holds_inside_its_region_and_breaks_outside():
    alpha, labels = 0.6, torch.tensor([0, 0])
    r = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], dtype=torch.float64)
    p = torch.tensor([[0.5, 0.3, 0.2], [0.95, 0.03, 0.02]], dtype=torch.float64)
    hard = (p - F.one_hot(labels, 3)).abs().sum(1)
    soft = (p - refine_targets(labels, r, alpha)).abs().sum(1)
    ratio = pskd_gradient_ratio(p, r, alpha, labels)
    torch.testing.assert_close(ratio[0], (soft / hard)[0], rtol=0, atol=1e-10)
    formula = 1 - alpha * (1 - r[:, 0]) / (1 - p[:, 0])
    assert abs(float((soft / hard - formula)[1])) > 1e-3
    assert ratio[1].isnan()


def test_gradient_ratio_on_random_cases():
    logits, past, labels = random_case(n=2000)
    p = logits.softmax(1)
    ratio = pskd_gradient_ratio(p, past, 0.3, labels)
    inside = ~ratio.isnan()
    assert 50 < int(inside.sum()) < 2000
    soft = (p - refine_targets(labels, past, 0.3)).abs().sum(1) / (p - F.one_hot(labels, 7)).abs().sum(1)
    torch.testing.assert_close(ratio[inside], soft[inside], rtol=0, atol=1e-10)


# Exactness in training


def test_alpha_zero_and_the_first_epoch_are_bit_equal_to_training_without_it():
    plain, off = Plain(), Plain()
    fit(plain, epochs=3)
    fit(off, [PSKD(alpha=0.0)], epochs=3)
    assert torch.equal(weights(plain), weights(off))
    plain, first = Plain(), Plain()
    fit(plain, epochs=1)
    fit(first, [PSKD(alpha=1.0)], epochs=1)
    assert torch.equal(weights(plain), weights(first))


def test_memory_holds_the_softmax_of_the_very_logits_that_gave_the_loss():
    """After every step, bit for bit, and all other rows are unchanged."""
    plugin = PSKD()

    class Watch(Intervention):
        def on_loss(self, call: LossCall) -> LossCall:
            if plugin.memory is not None:
                self.indices, self.logits = call.step.indices, call.outputs.detach().clone()
            return call

        def on_train_batch_start(self, *_: Any) -> None:
            self.before = None if plugin.memory is None else plugin.memory.values.clone()

        def on_train_batch_end(self, *_: Any) -> None:
            assert torch.equal(plugin.memory.values[self.indices], self.logits.softmax(1))
            if self.before is not None:
                others = torch.ones(60, dtype=torch.bool)
                others[self.indices] = False
                assert torch.equal(plugin.memory.values[others], self.before[others])

    fit(Plain(), [plugin, Watch()], epochs=3)


def test_snapshot_equals_a_loop_with_deepcopy_at_the_ends_of_epochs():
    class ByHand(Plain):
        past: list[nn.Module] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            targets = F.one_hot(y, 5).float()
            if self.past:
                with torch.no_grad():
                    targets = refine_targets(y, self.past[0](x).softmax(1), 0.8 * (self.current_epoch + 1) / 3)
            return F.cross_entropy(self(x), targets)

        def on_train_epoch_end(self) -> None:
            self.past[:] = [copy.deepcopy(self.net).eval()]

    plugged, by_hand = Plain(dropout=0.3), ByHand(dropout=0.3)
    by_hand.past = []
    fit(plugged, [PSKD(teacher="snapshot")], epochs=3)
    fit(by_hand, epochs=3)
    torch.testing.assert_close(weights(plugged), weights(by_hand), rtol=1e-6, atol=1e-6)


class Noisy(Plain):
    """Augments inside its training step, and has batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 5))
        self.inputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0] + 0.1 * torch.randn_like(batch[0])
        self.inputs.append(x)
        self.log("x", x.mean())
        return F.cross_entropy(self(x), batch[1])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_snapshot_sees_the_same_augmentation_and_leaves_stream_and_statistics_alone(mode):
    plugin, module, alone = PSKD(teacher="snapshot", snapshot_mode=mode), Noisy(), Noisy()
    fit(alone, epochs=2)
    fit(module, [plugin], epochs=2)
    for ours, theirs in zip(module.inputs, alone.inputs, strict=True):
        assert torch.equal(ours, theirs)
    taught = plugin.snapshot.module.inputs[-len(module.inputs) // 2 :]
    for ours, theirs in zip(module.inputs[-4:], taught[-4:], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(module.net[1].running_mean, alone.net[1].running_mean, rtol=0.5, atol=0.5)
    assert plugin.snapshot.module.training is (mode == "train")


def test_snapshot_in_train_mode_keeps_its_running_statistics():
    plugin = PSKD(teacher="snapshot", snapshot_mode="train")
    statistics: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if plugin.snapshot is not None:
                statistics.append(plugin.snapshot.module.net[1].running_mean.clone())

    fit(Noisy(), [plugin, Watch()], epochs=2)
    assert all(torch.equal(statistics[0], s) for s in statistics[:4])


def test_snapshot_works_on_iterable_data_and_on_dense_predictions():
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(helpers.data())

    streamed, mapped = Plain(), Plain()
    fit(streamed, [PSKD(teacher="snapshot")], DataLoader(Stream(), batch_size=16), epochs=3)
    fit(mapped, [PSKD(teacher="snapshot")], helpers.loader(shuffle=False), epochs=3)
    assert torch.equal(weights(streamed), weights(mapped))

    class Dense(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = torch.stack([self(batch[0]), self(-batch[0])], dim=2)
            targets = torch.stack([batch[1], torch.full_like(batch[1], -100)], dim=1)
            return F.cross_entropy(logits, targets)

    dense, single = Dense(), Plain()
    fit(dense, [PSKD(teacher="snapshot")], epochs=3)
    fit(single, [PSKD(teacher="snapshot")], epochs=3)
    torch.testing.assert_close(weights(dense), weights(single), rtol=1e-5, atol=1e-6)


def test_snapshot_every_two_epochs_is_taken_at_their_ends():
    taken: list[int] = []
    plugin = PSKD(teacher="snapshot", snapshot_every=2)

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            state = None if plugin.snapshot is None else weights(plugin.snapshot.module)
            if state is not None and (not taken or not torch.equal(state, self.state)):
                taken.append(trainer.current_epoch)
            self.state = state

    fit(Plain(), [plugin, Watch()], epochs=5)
    assert taken == [2, 4]


CRITERIA = {
    "plain": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])),
    "ignore": nn.CrossEntropyLoss(ignore_index=2),
    "all": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]), ignore_index=2, label_smoothing=0.2, reduction="mean"
    ),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_softened_call_keeps_the_value_of_the_users_criterion(criterion, reduction):
    """With alpha 0 the softened loss is the user's loss; and any change of targets acts on smoothed, weighted rows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (8, 3), generator=generator)
    arguments = {
        "weight": None if criterion.weight is None else criterion.weight.double(),
        "ignore_index": criterion.ignore_index,
        "label_smoothing": criterion.label_smoothing,
        "reduction": reduction,
    }
    call = LossCall(F.cross_entropy, logits, labels, arguments, "cross_entropy", None)
    torch.testing.assert_close(call.soften().evaluate(), call.evaluate(), rtol=1e-12, atol=1e-12)
    kept = labels != criterion.ignore_index
    rows = call.soften().targets.movedim(1, -1)[kept]
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows), dtype=torch.float64))


def test_softened_probability_targets_keep_their_value():
    logits, past, _ = random_case()
    for smoothing in (0.0, 0.2):
        arguments = {"weight": torch.arange(1.0, 8.0, dtype=torch.float64), "label_smoothing": smoothing}
        call = LossCall(F.cross_entropy, logits, past, arguments, "cross_entropy", None)
        torch.testing.assert_close(call.soften().evaluate(), call.evaluate(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_class_weights_smoothing_and_ignored_labels_of_the_users_criterion_are_honoured(criterion):
    """Against the definition written out: smooth first, then mix; the denominator stays that of the hard labels."""
    alpha, plugin = 0.6, PSKD(alpha=Schedule.constant(0.6))
    seen: dict[str, Any] = {}

    class Before(Intervention):
        def on_loss(self, call: LossCall) -> LossCall:
            seen["past"] = plugin.memory.values[call.step.indices].clone() if plugin.memory is not None else None
            seen["hard"] = call
            return call

    class After(Intervention):
        def on_loss(self, call: LossCall) -> LossCall:
            hard = seen["hard"]
            if call.step.trainer.current_epoch > 0:
                y = F.one_hot(hard.targets, 5).float() * (1 - criterion.label_smoothing) + criterion.label_smoothing / 5
                q = (1 - alpha) * y + alpha * seen["past"]
                w = torch.ones(5) if criterion.weight is None else criterion.weight
                kept = hard.targets != criterion.ignore_index
                total = -(w * q * hard.outputs.log_softmax(1)).sum(1)[kept].sum()
                expected = total if criterion.reduction == "sum" else total / w[hard.targets][kept].sum()
                torch.testing.assert_close(call.evaluate(), expected, rtol=1e-5, atol=1e-6)
                seen["compared"] = True
            return call

    fit(ModuleLoss(copy.deepcopy(criterion)), [Before(), plugin, After()], epochs=2)
    assert seen["compared"]


def test_negative_log_likelihood_of_log_softmax_is_the_same_method():
    ours, theirs = Plain(), NegativeLogLikelihood()
    fit(ours, [PSKD()], epochs=3)
    fit(theirs, [PSKD()], epochs=3)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


def test_dict_batches_are_supported():
    class Named(torch.utils.data.Dataset):
        inner = helpers.data()

        def __len__(self) -> int:
            return len(self.inner)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = self.inner[index]
            return {"x": x, "y": y}

    plain, named = Plain(), helpers.DictBatch()
    fit(plain, [PSKD()], epochs=3)
    fit(named, [PSKD()], helpers.loader(Named()), epochs=3)
    assert torch.equal(weights(plain), weights(named))


def test_half_precision_memory_is_close_and_its_rows_are_normalised():
    full, half = PSKD(), PSKD(dtype="float16")
    a, b = Plain(), Plain()
    fit(a, [full], epochs=3)
    fit(b, [half], epochs=3)
    assert half.memory.values.dtype is torch.float16
    assert half.memory.values.nbytes * 2 == full.memory.values.nbytes
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=2e-3)
    assert not torch.equal(weights(a), weights(b))


def test_memmap_memory_trains_the_same_and_resumes_from_its_side_file(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    a, b, resumed = Plain(), Plain(), Plain()
    fit(a, [PSKD()], helpers.loader(shuffle=False), epochs=3)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(
        b,
        [PSKD(storage="memmap"), saver],
        helpers.loader(shuffle=False),
        epochs=3,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    assert torch.equal(weights(a), weights(b))
    assert list(tmp_path.glob("pskd-*.memory"))
    fit(
        resumed,
        [PSKD(storage="memmap")],
        helpers.loader(shuffle=False),
        ckpt=tmp_path / "epoch=1.ckpt",
        epochs=3,
        default_root_dir=tmp_path,
    )
    assert torch.equal(weights(a), weights(resumed))


def test_non_finite_predictions_are_not_remembered():
    class Explodes(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            if self.current_epoch == 1 and batch_idx == 3:
                logits = logits * torch.tensor([torch.nan, 1, 1, 1, 1])
            return F.cross_entropy(logits, batch[1])

    plugin = PSKD()
    fit(Explodes(), [plugin], epochs=2)
    assert plugin.memory.values.isfinite().all()
    assert int(plugin.memory.rejected) == 12  # the last batch


def test_logged_weight_and_target_entropy():
    plugin = PSKD(alpha=0.8)
    trainer = fit(Plain(), [plugin], epochs=4)
    assert trainer.callback_metrics["pskd/alpha"] == pytest.approx(0.8)
    assert 0.0 < float(trainer.callback_metrics["pskd/target_entropy"]) < torch.log(torch.tensor(5.0))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.constant(0.5), [0.5, 0.5, 0.5, 0.5]),
        (0.8, [0.2, 0.4, 0.6, 0.8]),
        (Schedule(0.8, shape="cosine"), [0.8 * (1 - 0.5**0.5) / 2, 0.4, 0.8 * (1 + 0.5**0.5) / 2, 0.8]),
        (Schedule(0.6, shape="warmup", warmup=0.5), [0.3, 0.6, 0.6, 0.6]),
    ],
)
def test_schedules_of_alpha_by_epoch(schedule, expected):
    seen: list[float] = []
    plugin = PSKD(alpha=schedule)

    class Watch(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            seen.append(plugin.weight)

    fit(Plain(), [plugin, Watch()], epochs=4)
    assert seen == pytest.approx(expected)


def test_schedule_by_step_and_total_epochs_and_max_steps():
    plugin = PSKD(alpha=Schedule(0.8, unit="step"))
    fit(Plain(), [plugin], epochs=2)
    assert plugin.weight == pytest.approx(0.8)
    plugin = PSKD(alpha=0.8, total_epochs=8)
    fit(Plain(), [plugin], epochs=2)
    assert plugin.weight == pytest.approx(0.2)
    plugin = PSKD(alpha=0.8)
    fit(Plain(), [plugin], epochs=-1, max_steps=16)  # 4 steps an epoch
    assert plugin.weight == pytest.approx(0.8)


# Composition, state, configuration


def test_two_changes_of_targets_apply_in_callback_order():
    class Smooth(Intervention):
        def on_loss(self, call: LossCall) -> LossCall:
            call = call.soften()
            return call.replace(targets=0.5 * call.targets + 0.1)

    first, second = Plain(), Plain()
    fit(first, [PSKD(), Smooth()], epochs=3)
    fit(second, [Smooth(), PSKD()], epochs=3)
    assert not torch.allclose(weights(first), weights(second), atol=1e-4)


def test_state_loads_safely_and_two_kinds_do_not_mix(tmp_path):
    trainer = fit(Plain(), [PSKD()], epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    states = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    key = PSKD().state_key
    assert key in states
    assert "PSKD" in key
    assert PSKD(teacher="snapshot").state_key != key
    assert states[key]["version"] == 1


def test_command_line_round_trip(tmp_path):
    def cli(*arguments: str) -> LightningCLI:
        return LightningCLI(
            Plain,
            run=False,
            args=["--trainer.logger=false", *arguments],
            save_config_callback=None,
            seed_everything_default=0,
        )

    first = cli(
        "--trainer.callbacks+=PSKD",
        "--trainer.callbacks.alpha=0.5",
        "--trainer.callbacks.teacher=snapshot",
        "--trainer.callbacks.dtype=float16",
    )
    path = tmp_path / "config.yaml"
    path.write_text(first.parser.dump(first.config))
    for parsed in (first, cli(f"--config={path}")):
        (plugin,) = [c for c in parsed.trainer.callbacks if isinstance(c, PSKD)]
        assert (plugin.alpha, plugin.teacher, plugin.dtype, plugin.storage) == (0.5, "snapshot", "float16", "auto")
    scheduled = cli("--trainer.callbacks+=PSKD", '--trainer.callbacks.alpha={"end": 0.3, "shape": "cosine"}')
    (plugin,) = [c for c in scheduled.trainer.callbacks if isinstance(c, PSKD)]
    assert plugin.schedule == Schedule(0.3, shape="cosine")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.2}, r"`alpha` of PSKD to be in \[0, 1\].*1.2"),
        ({"alpha": "0.8"}, "`alpha` of PSKD"),
        ({"alpha": Schedule(1.5)}, "`alpha` of PSKD.*1.5"),
        ({"teacher": "memmory"}, "`teacher` of PSKD to be one of 'memory', 'snapshot', but got 'memmory'"),
        ({"dtype": "int8"}, "`dtype` of PSKD"),
        ({"storage": "disk"}, "`storage` of PSKD"),
        ({"total_epochs": 0}, "`total_epochs` of PSKD to be a positive integer"),
        ({"snapshot_every": 1.5}, "`snapshot_every` of PSKD"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PSKD(**arguments)


def test_iterable_data_name_the_other_teacher():
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(helpers.data())

    with pytest.raises(RefusedError, match="Stream is an IterableDataset.*teacher='snapshot'"):
        fit(Plain(), [PSKD()], DataLoader(Stream(), batch_size=16))


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_other_losses_than_classification_are_refused(teacher, loss):
    class Other(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss(self(batch[0]), F.one_hot(batch[1], 5).float())

    with pytest.raises(FulguriteError, match=f"classification loss.*called '{loss.__name__}'"):
        fit(Other(), [PSKD(teacher=teacher)])


def test_unknown_number_of_epochs_is_refused():
    with pytest.raises(RefusedError, match="number of epochs is not known.*total_epochs"):
        fit(Plain(), [PSKD()], epochs=-1, max_time="00:00:00:05")


def test_changed_number_of_classes_is_named():
    class Grows(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            if self.current_epoch == 1:
                logits = torch.cat([logits, logits[:, :1]], dim=1)
            return F.cross_entropy(logits, batch[1])

    with pytest.raises(FulguriteError, match="over 5 classes, but the model now predicts 6"):
        fit(Grows(), [PSKD()])


def test_batches_that_lost_examples_on_their_way_are_named():
    class Drops(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0][1:]), batch[1][1:])

    with pytest.raises(RefusedError, match="drew 16 examples.*outputs for 15.*snapshot"):
        fit(Drops(), [PSKD()])


def test_mixed_examples_are_refused_by_the_memory():
    class Mixes(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            hard = F.one_hot(y, 5).float()
            return F.cross_entropy(self(0.7 * x + 0.3 * x.flip(0)), 0.7 * hard + 0.3 * hard.flip(0))

    with pytest.raises(RefusedError, match="not one-hot.*teacher='snapshot'"):
        fit(Mixes(), [PSKD()])
    fit(Mixes(), [PSKD(teacher="snapshot")], epochs=3)


def test_dense_predictions_are_refused_by_the_memory():
    class Dense(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]).unsqueeze(2), batch[1].unsqueeze(1))

    with pytest.raises(RefusedError, match="one per position.*teacher='snapshot'"):
        fit(Dense(), [PSKD()])


def test_dataset_of_another_length_at_resume_names_both(tmp_path):
    trainer = fit(Plain(), [PSKD()], epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(FulguriteError, match="has 50 examples.*remembers 60"):
        fit(Plain(), [PSKD()], helpers.loader(helpers.data(50)), ckpt=tmp_path / "a.ckpt", epochs=2)


def test_memory_that_does_not_fit_is_refused_with_the_number_of_bytes(monkeypatch):
    monkeypatch.setattr("fulgurite.samples.memory.free_bytes", lambda device: 1000)
    with pytest.raises(RefusedError, match="PSKD needs 1,200 bytes for 60 examples x 5 values.*float16.*snapshot"):
        fit(Plain(), [PSKD()])


def test_two_losses_ask_for_the_criterion():
    class Two(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            return F.cross_entropy(logits, batch[1]) + F.cross_entropy(-logits, batch[1])

    with pytest.raises(RefusedError, match="several losses.*criterion="):
        fit(Two(), [PSKD()])


def test_snapshot_under_manual_optimization_is_refused_by_name():
    with pytest.raises(RefusedError, match="pskd cannot be used with manual optimization"):
        fit(helpers.Manual(), [PSKD(teacher="snapshot")])
