# SPDX-License-Identifier: Apache-2.0
"""`StepCost`: what is timed, logged, printed and kept. No test depends on how fast the machine is."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from fulgurite import timing
from fulgurite.intervention import Intervention
from fulgurite.losses import LossCall
from fulgurite.splice import Splice
from fulgurite_callbacks import StepCost
from tests import helpers
from tests.helpers import Plain, fit, weights


class Clock:
    """Stands in for the module `time`: moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from fulgurite import splice

    fake = Clock()
    for module in (timing, splice):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=fake.perf_counter))
    return fake


class Slow(Plain):
    """Takes 6 seconds of the clock in a training step and 100 in a validation step."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.__dict__["clock"] = clock

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock.now += 6
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 100
        super().validation_step(batch, batch_idx)


class Costly(Intervention):
    """Takes 3 seconds of the clock in one hook and 1 in another."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_loss(self, call: LossCall) -> LossCall:
        self.clock.now += 3
        return call

    def penalty(self, step: Any) -> Tensor:
        self.clock.now += 1
        return torch.zeros(())

    def on_evaluation_loss(self, call: LossCall) -> None:
        self.clock.now += 100


class Free(Intervention):
    pass


def test_median_shares_and_logged_values(clock: Clock):
    """Fails if hooks are not timed, shares have the wrong denominator, or validation counts: 6 + 3 + 1 seconds a step."""
    cost = StepCost(table=False)
    the_trainer = fit(Slow(clock), [Costly(clock), cost, Free()], val=helpers.loader(shuffle=False))
    results = cost.results
    assert results["step_seconds"] == pytest.approx(10)
    assert results["training_seconds"] == pytest.approx(10 * 8)
    assert results["shares"] == pytest.approx({"costly": 0.4, "free": 0.0})
    assert results["hook_shares"]["costly"] == pytest.approx({"on_loss": 0.3, "penalty": 0.1})
    assert results["hook_shares"]["free"] == {}
    assert results["device"] == "cpu"
    logged = {name: float(v) for name, v in the_trainer.callback_metrics.items() if name.startswith("cost/")}
    memory = logged.pop("cost/peak_memory", None)
    assert logged == pytest.approx({"cost/step_seconds": 10, "cost/share_costly": 0.4, "cost/share_free": 0.0})
    assert memory == results["peak_memory"] or abs(memory / results["peak_memory"] - 1) < 1e-6


def test_two_interventions_of_one_class_are_told_apart(clock: Clock):
    """Fails if the seconds of two instances are added up under one name."""
    cost = StepCost(table=False)
    fit(Slow(clock), [Costly(clock), Costly(clock), cost])
    assert cost.results["shares"] == pytest.approx({"costly": 4 / 14, "costly_2": 4 / 14})


def test_a_trainer_without_interventions(clock: Clock):
    """Fails if a splice is needed, or laid only to measure."""
    cost = StepCost(table=False)
    fit(Slow(clock), [cost])
    assert cost.results["step_seconds"] == pytest.approx(6)
    assert cost.results["shares"] == {}


def test_a_second_fit_begins_afresh(clock: Clock):
    """Fails if steps or hooks of an earlier fit are counted again."""
    cost, costly = StepCost(table=False), Costly(clock)
    fit(Slow(clock), [costly, cost])
    module = Slow(clock)
    module.training_step = lambda batch, batch_idx: Plain.training_step(module, batch, batch_idx)
    fit(module, [costly, cost])
    assert cost.results["step_seconds"] == pytest.approx(4)
    assert cost.results["shares"] == pytest.approx({"costly": 1.0})


def test_the_table_is_printed_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]):
    """Fails if a row is missing or printed when it is not wanted."""
    fit(Slow(clock), [Costly(clock), StepCost()])
    printed = capsys.readouterr().out
    for text in (
        "step (median)",
        "10.0 s",
        "costly.on_loss",
        "3.00 s",
        "30.0 %",
        "costly.penalty",
        "10.0 %",
        "peak memory",
    ):
        assert text in printed
    fit(Slow(clock), [StepCost(table=False)])
    assert "Cost of" not in capsys.readouterr().out


def test_the_table_before_any_epoch_says_what_to_do():
    with pytest.raises(RuntimeError, match="`results` of StepCost .* call `fit` first"):
        StepCost().print_table()


def test_two_instances_agree(clock: Clock):
    """Fails if the second instance disturbs the first, or both double a value that they log."""
    first, second = StepCost(table=False), StepCost(table=False)
    the_trainer = fit(Slow(clock), [first, Costly(clock), second])
    assert first.results["shares"] == pytest.approx(second.results["shares"])
    assert float(the_trainer.callback_metrics["cost/step_seconds"]) == pytest.approx(10)


def test_validate_and_test_alone_do_nothing(capsys: pytest.CaptureFixture[str]):
    """Fails if the callback needs a training."""

    class Tested(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    cost = StepCost()
    the_trainer = helpers.trainer([cost])
    the_trainer.validate(Tested(), helpers.loader(shuffle=False), verbose=False)
    the_trainer.test(Tested(), helpers.loader(shuffle=False), verbose=False)
    assert cost.results == {}
    assert "Cost of" not in capsys.readouterr().out


def test_training_is_bit_identical_and_the_module_left_as_found(tmp_path: Path):
    """Fails if measuring shifts the random numbers, changes a parameter or stays in the trainer."""
    modules, states = [Plain(dropout=0.3), Plain(dropout=0.3)], []
    for module, callbacks in zip(modules, [[Free()], [Free(), StepCost()]], strict=True):
        the_trainer = fit(module, callbacks, val=helpers.loader(shuffle=False))
        states.append(torch.get_rng_state())
        assert Splice.of(the_trainer) is None
        assert "training_step" not in module.__dict__
    assert torch.equal(weights(modules[0]), weights(modules[1]))
    assert torch.equal(*states)


def test_bad_argument_and_pickle():
    with pytest.raises(ValueError, match="`table` of StepCost to be a bool, but got 1"):
        StepCost(table=1)
    cost = StepCost(table=False)
    fit(Plain(), [cost])
    assert pickle.loads(pickle.dumps(cost)).results == cost.results


def test_trainer_of_the_other_copy_of_lightning():
    """Fails if something recognises classes of `lightning.pytorch` only."""
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(12, 5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    cost = StepCost(table=False)
    the_trainer = other.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[cost, Costly(Clock())],
    )
    the_trainer.fit(Other(), helpers.loader())
    assert cost.results["step_seconds"] > 0
    assert set(cost.results["shares"]) == {"costly"}
    assert "cost/step_seconds" in the_trainer.callback_metrics


def test_peak_memory_counts_bytes():
    """Fails if kilobytes are taken for bytes: an interpreter with torch needs more than 50 MB."""
    cost = StepCost(table=False)
    fit(Plain(), [cost], epochs=1)
    assert cost.results["peak_memory"] is None or cost.results["peak_memory"] > 50e6


def test_is_a_plain_callback():
    """Fails if measuring becomes an intervention itself, which would lay a splice."""
    assert not issubclass(StepCost, Intervention)
    assert issubclass(StepCost, pl.Callback)
