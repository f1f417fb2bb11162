# SPDX-License-Identifier: Apache-2.0
"""`fulgurite.explain`: who runs when, what it may change, what it costs, what is refused; nothing is run or changed."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
import torch

import fulgurite
from fulgurite import Capabilities, Classification, Intervention
from fulgurite_plugins.distillation import PSKD
from tests.helpers import Manual, Plain, fit, trainer


class Smooth(Intervention):
    def on_loss(self, call: Any) -> Any:
        return call


class Everything(Intervention):
    capabilities = Capabilities(
        extra_forwards=1.0,
        extra_backwards=2.0,
        reads_loss=True,
        replays_step=True,
        exclusive=("head",),
        manual_optimization=False,
        refused_strategies={"single": "it needs company."},
        refused_precisions={"16-mixed": "it overflows.", "16-true": "it overflows."},
    )

    def constrain(self, module: Any, optimizer: Any) -> None: ...

    def penalty(self, step: Any) -> Any: ...

    def operate(self, module: Any) -> None: ...

    def transform_batch(self, batch: Any, step: Any) -> Any: ...


class Penalty(Intervention):
    def penalty(self, step: Any) -> Any: ...


def test_the_order_is_that_of_a_step_and_then_of_the_callbacks() -> None:
    explanation = fulgurite.explain(trainer([Smooth(), Everything(), PSKD()]), Plain())
    assert dict(explanation.order) == {
        "operate": ("everything",),
        "transform_batch": ("everything",),
        "on_loss": ("smooth", "pskd"),
        "penalty": ("everything",),
        "constrain": ("everything",),
    }
    assert list(explanation.order) == ["operate", "transform_batch", "on_loss", "penalty", "constrain"]
    assert dict(fulgurite.explain(trainer([PSKD(), Smooth()]), Plain()).order) == {"on_loss": ("pskd", "smooth")}


def test_it_names_hooks_changes_costs_and_refusals() -> None:
    one = fulgurite.explain(trainer([Everything()]), Plain()).interventions[0]
    assert one.hooks == ("operate", "transform_batch", "penalty", "constrain")
    assert one.may_change == ("the model", "the batch", "the loss, by adding to it", "the parameters")
    assert "1 extra forward pass per step; 2 extra backward passes per step" in one.cost
    assert "random state" in one.cost
    assert set(one.refuses) == {
        "strategy 'single'",
        "precision '16-mixed'",
        "precision '16-true'",
        "manual optimization",
        "a second one that takes the head",
    }
    assert "precision '16-mixed', precision '16-true': it overflows." in str(
        fulgurite.explain(trainer([Everything()]), Plain())
    )


def test_the_memory_and_the_collectives_of_a_plugin_come_from_its_manifest() -> None:
    one = fulgurite.explain(trainer([PSKD()]), Plain()).interventions[0]
    assert one.plugin == "ps_kd"
    assert any("one collective per epoch" in note for note in one.notes)
    assert "which examples are in the batch" in one.cost
    assert "1 extra forward" in fulgurite.explain(trainer([PSKD(teacher="snapshot")]), Plain()).interventions[0].cost
    assert fulgurite.explain(trainer([Smooth()]), Plain()).interventions[0].plugin is None


def test_the_criterion_is_the_users_word_else_the_tasks_else_to_be_found() -> None:
    def criterion(intervention: Intervention, module: pl.LightningModule | None) -> str | None:
        return fulgurite.explain(trainer([intervention]), module).interventions[0].criterion

    task = Classification(3, (4,))
    assert criterion(PSKD(), task) == "criterion (CrossEntropyLoss), that of the task"
    assert criterion(PSKD(criterion="net"), Plain()) == "net (Sequential), named by its argument `criterion`"
    assert "Plain.training_step calls" in str(criterion(PSKD(), Plain()))
    assert "the training step calls" in str(criterion(PSKD(), None))
    assert criterion(Penalty(), Plain()) is None


def test_a_refusal_is_reported_and_not_raised() -> None:
    refused = fulgurite.explain(trainer([Everything()]), Plain())
    assert "everything cannot be used with the strategy 'single': it needs company." in str(refused.refusal)
    assert "Training would be REFUSED: everything cannot" in str(refused)
    manual = fulgurite.explain(trainer([PSKD(teacher="snapshot")]), Manual())
    assert "automatic_optimization=False in Manual" in str(manual.refusal)
    assert fulgurite.explain(trainer([PSKD()]), Plain()).refusal is None


def test_two_of_one_class_are_told_apart_by_the_names_that_logs_use() -> None:
    explanation = fulgurite.explain(trainer([PSKD(), PSKD(teacher="snapshot")]), Plain())
    assert [one.name for one in explanation.interventions] == ["pskd", "pskd_2"]
    assert "1. pskd (PSKD, plugin ps_kd)" in str(explanation)
    assert "2. pskd_2 (PSKD, plugin ps_kd)" in str(explanation)


def test_ordinary_callbacks_are_listed() -> None:
    explanation = fulgurite.explain(trainer([pl.callbacks.LearningRateMonitor(), PSKD()]), Plain())
    assert explanation.callbacks == ("LearningRateMonitor",)
    assert "LearningRateMonitor." in str(explanation)


def test_without_interventions_it_says_that_nothing_changes() -> None:
    text = str(fulgurite.explain(trainer(), Plain()))
    assert text.startswith("No interventions in the training of Plain, strategy 'single', precision '32-true'.")
    assert "The training step is the module's own." in text
    assert "In the order of a step" not in text


def test_explaining_changes_nothing_and_works_during_and_after_training() -> None:
    # Breaks if explaining lays the splice, or lists it among the callbacks while it is in place.
    during: list[fulgurite.explanation.Explanation] = []  # type: ignore[name-defined]

    class Ask(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            during.append(fulgurite.explain(trainer))

    the_trainer, module = trainer([PSKD()]), Plain()
    found, state = list(the_trainer.callbacks), torch.get_rng_state()
    fulgurite.explain(the_trainer, module)
    assert the_trainer.callbacks == found
    assert "training_step" not in vars(module)
    assert torch.equal(torch.get_rng_state(), state)

    fitted = fit(Plain(), [PSKD(), Ask()], epochs=1)
    assert fulgurite.explain(fitted) == during[0]
    assert during[0].module == "Plain"
    assert during[0].callbacks == ("Ask",)


def test_the_plain_data_survive_json_and_rich_prints_the_same_facts() -> None:
    from rich.console import Console

    explanation = fulgurite.explain(trainer([Everything(), PSKD(), pl.callbacks.LearningRateMonitor()]), Plain())
    data = explanation.to_dict()
    assert json.loads(json.dumps(data))["interventions"][1]["hooks"] == ["on_loss"]
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(explanation)
    printed = console.export_text()
    for fact in (
        "REFUSED",
        "1. everything (Everything)",
        "one collective per epoch",
        "after training_step",
        "LearningRateMonitor",
    ):
        assert fact in printed
        assert fact in str(explanation)
