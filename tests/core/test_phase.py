# SPDX-License-Identifier: Apache-2.0
"""The user's own training step on another batch: the right loss and gradients, and nobody notices that it has run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from fulgurite.errors import FulguriteError
from fulgurite.lightning_adapter import to_device
from fulgurite.phase import mean_gradients, training_loss, unnoticed
from fulgurite.testing.processes import on_ranks
from tests import helpers
from tests.helpers import DictReturned, OneArgument, Plain, fit, trainer, weights


class Busy(Plain):
    """Everything that a step can move: batch norm, dropout, metrics of both kinds, a counter, logs, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5))
        self.net[1].eval()  # a layer that the user froze
        self.metrics = MetricCollection(
            {"acc": MulticlassAccuracy(5), "auroc": MulticlassAUROC(5)}, compute_groups=False
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.draws: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        self.draws.append(torch.rand(2))
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log_dict(self.metrics(logits.softmax(1), batch[1]), on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_epoch=True)
        self.print("a line")
        return loss


class Phase(pl.Callback):
    """Runs the phase after each batch, on a batch of its own."""

    def __init__(self, runs: bool = True, fails: bool = False) -> None:
        self.runs = runs
        self.fails = fails
        self.gradients: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.batch = tuple(t[:8] for t in helpers.data(seed=5).tensors)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.runs:
            return
        shift = torch.zeros(12, requires_grad=True)
        inputs, targets = to_device(trainer, self.batch)
        with unnoticed(module, seed=7):
            loss = training_loss(trainer, module, (inputs + shift, targets), batch_idx)
            if self.fails:
                raise RuntimeError("in the middle")
            (gradient,), (mean,) = mean_gradients(loss, [shift], loss)
        self.gradients.append(gradient)
        self.losses.append(mean)


def state(module: Any) -> dict[str, Any]:
    metrics = {f"{n}.{k}": v for n, m in module.metrics.items() for k, v in m.metric_state.items()}
    return {**module.state_dict(), **metrics, "modes": [child.training for child in module.modules()]}


def equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_training_goes_on_as_if_the_phase_had_not_run():
    without, with_it, phase = Busy(), Busy(), Phase()
    first, second = fit(without, [Phase(runs=False)]), fit(with_it, [phase])
    stream = torch.rand(3)
    fit(Busy(), [Phase(runs=False)])
    equal(stream, torch.rand(3))
    equal(weights(without), weights(with_it))
    equal(without.state_dict(), with_it.state_dict())
    assert first.global_step == second.global_step
    equal(dict(first.callback_metrics), dict(second.callback_metrics))
    assert len(phase.gradients) == 8
    assert all(gradient.any() for gradient in phase.gradients)


def test_everything_is_put_back_also_after_an_exception():
    module, phase = Busy(), Phase(fails=True)
    the_trainer = trainer([phase], epochs=1)
    before: dict[str, Any] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any, **__: Any) -> None:
            before.update({k: v.clone() if isinstance(v, Tensor) else list(v) for k, v in state(module).items()})
            before["stream"] = torch.get_rng_state()

    the_trainer.callbacks.insert(0, Watch())
    with pytest.raises(RuntimeError, match="in the middle"):
        the_trainer.fit(module, helpers.loader())
    equal(before.pop("stream"), torch.get_rng_state())
    equal(before, state(module))
    assert not {"log", "log_dict", "print"} & module.__dict__.keys()
    assert module.metrics["acc"]._update_count == 1


def test_gradients_are_those_of_the_evaluation_mode_and_no_parameter_gets_one():
    module = Busy()
    the_trainer = fit(module, [phase := Phase()], epochs=1)
    phase.gradients.clear()
    found = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    module._trainer = the_trainer
    phase.on_train_batch_end(the_trainer, module, None, None, 0)
    equal(found, [p.grad for p in module.parameters()])
    shift = torch.zeros(12, requires_grad=True)
    module.eval()
    loss = F.cross_entropy(module(phase.batch[0] + shift), phase.batch[1])
    equal(phase.gradients[-1], torch.autograd.grad(loss, shift)[0])
    equal(phase.losses[-1], loss.detach())


def test_what_the_block_draws_depends_on_its_seed_alone():
    module = Busy()
    fit(module, [Phase()], epochs=1)
    draws = module.draws[1::2]
    equal(draws[0], draws[1])
    assert not torch.equal(module.draws[0], module.draws[2])


@pytest.mark.parametrize("kind", [OneArgument, DictReturned])
def test_other_spellings_of_the_step(kind):
    module, phase = kind(), Phase()
    fit(module, [phase], epochs=1)
    assert len(phase.losses) == 4


def test_tensor_on_which_the_loss_does_not_depend_gets_zeros():
    x, unused = torch.tensor(3.0, requires_grad=True), torch.ones(2, requires_grad=True)
    gradients, values = mean_gradients(x * x, [x, unused], torch.tensor([4.0]))
    equal(gradients, [torch.tensor(6.0), torch.zeros(2)])
    equal(values, [torch.tensor([4.0])])


@pytest.mark.parametrize(("precision", "autocast"), [("32-true", False), ("bf16-mixed", True), ("16-mixed", False)])
def test_runs_in_the_precision_of_the_trainer_but_never_in_float16(precision, autocast):
    seen: list[Any] = []

    class Notes(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            seen.append(logits.dtype)
            return F.cross_entropy(logits, batch[1])

    plugins: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        plugins = {"plugins": [pl.plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}
    fit(Notes(), [Phase()], epochs=1, **plugins)
    assert seen[1] == (torch.bfloat16 if autocast else torch.float32)


def test_batches_go_through_the_hooks_of_the_module_in_the_order_of_the_training_loop():
    calls: list[str] = []

    class Hooked(Plain):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("before")
            return batch

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            calls.append("transfer")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("after")
            return batch

    fit(Hooked(), [Phase()], epochs=1)
    assert calls == ["before", "transfer", "after"] * 8


def test_gradients_and_values_are_averaged_over_ranks_in_one_collective():
    def on_rank(rank: int) -> Any:
        dist.init_process_group("gloo")
        calls: list[int] = []
        original = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        (gradient,), (value,) = mean_gradients((rank + 1) * x.square().sum(), [x], torch.tensor(4.0 * rank))
        dist.destroy_process_group()
        return gradient, value, calls

    for gradient, value, calls in on_ranks(on_rank):
        equal(gradient, torch.tensor([3.0, 6.0], dtype=torch.float64))
        equal(value, torch.tensor(2.0))
        assert calls == [3]


def test_step_without_a_loss_is_named():
    class Nothing(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if self.training else None

    with pytest.raises(FulguriteError, match=r"Nothing.training_step returned no loss .* but a NoneType"):
        fit(Nothing(), [Phase()])


def test_recurrent_layers_keep_their_training_mode_without_dropout():
    """cuDNN has no backward pass for them in evaluation mode."""
    module = Plain()
    module.rnn = nn.LSTM(3, 3, num_layers=2, dropout=0.5)
    with unnoticed(module, 0):
        assert module.rnn.training
        assert module.rnn.dropout == 0.0
        assert not module.net.training
    assert module.rnn.dropout == 0.5
    assert module.net.training
