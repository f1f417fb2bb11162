# SPDX-License-Identifier: Apache-2.0
"""`--strategy` and `--precision`: every training of the kit gets them, and none leaves anything of them behind."""

from __future__ import annotations

import os
import sys

import lightning.pytorch as pl
import pytest
from torch import distributed

from fulgurite.cli import main
from fulgurite.errors import FulguriteError
from fulgurite.testing import Case, CheckError, InapplicableError, check_component, parametrize_with_checks
from fulgurite.testing.check import CHECKS, check
from fulgurite.testing.lab import Lab
from fulgurite.testing.processes import elsewhere, on_ranks
from fulgurite.testing.trainers import contained, make_trainer, trainer_settings


@pytest.fixture
def spy():
    """A check that says how it trained."""

    @check("callback")
    def check_how_it_trains(lab: Lab) -> None:
        """Something would break."""
        run = lab.fit([lab.make()])
        raise CheckError(f"{type(run.trainer.strategy).__name__} {run.trainer.precision}")

    yield "how_it_trains"
    del CHECKS["how_it_trains"]


@pytest.mark.parametrize(
    ("given", "trains"),
    [
        ({}, "SingleDeviceStrategy 32-true"),
        ({"strategy": "auto", "precision": "32-true"}, "SingleDeviceStrategy 32-true"),
        ({"precision": "bf16-mixed"}, "SingleDeviceStrategy bf16-mixed"),
        ({"precision": "64-true"}, "SingleDeviceStrategy 64-true"),
        ({"strategy": "ddp"}, "DDPStrategy 32-true"),
        ({"strategy": "ddp", "precision": "bf16-mixed"}, "DDPStrategy bf16-mixed"),
    ],
)
def test_every_training_gets_them_and_leaves_nothing(spy, given, trains):
    """Fails if a training is another one than was asked for, or its process group or variables meet the next one."""
    before = dict(os.environ), sys.excepthook
    (result,) = check_component(pl.Callback, cases=[Case()], names=[spy], **given)
    assert result.reason == trains
    assert not distributed.is_initialized()
    assert (dict(os.environ), sys.excepthook) == before


def test_the_process_group_ends_with_each_training():
    """Fails if the ranks of a later check are forked from a process that is a rank itself."""
    with contained():
        trainer = make_trainer(strategy="ddp")
        trainer.strategy.setup_environment()
        assert distributed.is_initialized()
    assert not distributed.is_initialized()
    assert "MASTER_PORT" not in os.environ


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "16-mixed"}, "'16-mixed' needs a GPU. Use bf16-mixed; the loss scale of 16-mixed"),
        ({"precision": "bf17"}, "cannot train with precision='bf17': .*Precisions: 32-true, 64-true, bf16-mixed"),
        ({"strategy": "dpp"}, "cannot train with strategy='dpp': .*Strategies of the kit: auto, ddp"),
        ({"strategy": "fsdp"}, "cannot train with strategy='fsdp': .*GPU"),
        ({"strategy": "ddp_spawn"}, "which shards the model or starts processes of its own"),
    ],
)
def test_what_the_kit_cannot_train_with_is_refused(given, message):
    """Fails if Lightning's substitute for fp16 on a CPU, which is bf16, is reported as fp16."""
    with pytest.raises(FulguriteError, match=message):
        trainer_settings(**{"strategy": None, "precision": None, **given})
    with pytest.raises(FulguriteError, match=message):
        parametrize_with_checks("ps_kd", **given)


def test_the_command_takes_them(capsys):
    assert main(["check", "StepCost", "--only", "watches_only", "--precision", "bf16-mixed", "--strategy", "ddp"]) == 0
    assert "1 passed" in capsys.readouterr().out
    assert main(["check", "StepCost", "--precision", "16-mixed"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_check_that_sets_one_itself_says_so():
    """Fails if a comparison of precisions is made between one and itself, and passes."""
    from tests.conformance.forms import Decays

    names = ["bf16", "resume_when_restored_late", "frozen_unused_tied"]
    results = check_component(Decays, cases=[Case()], names=names, strategy="ddp", precision="bf16-mixed")
    reasons = {result.check: (result.status, result.reason) for result in results}
    assert reasons["bf16"] == (
        "inapplicable",
        "the check sets the precision itself, and 'bf16-mixed' was asked for",
    )
    assert reasons["resume_when_restored_late"][0] == "inapplicable"
    assert (
        reasons["frozen_unused_tied"][0] == "inapplicable"
    )  # DDP refuses unused parameters, with or without the method
    assert "without the component it cannot be trained so either" in reasons["frozen_unused_tied"][1]


def test_what_cannot_be_forked_says_why(monkeypatch):
    """Fails if a process that uses CUDA is forked, whose children cannot."""
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(InapplicableError, match="CUDA is in use in this process"):
        on_ranks(lambda rank: rank)
    with elsewhere(lambda: 3) as wait:
        assert wait() == 3


def test_elsewhere_is_another_process():
    """Fails if what is computed there knows what has been remembered here, or its error is lost."""
    with elsewhere(os.getpid) as wait:
        assert wait() != os.getpid()

    def fail():
        raise ValueError("no such data")

    with elsewhere(fail) as wait, pytest.raises(CheckError, match="ValueError: no such data"):
        wait()
