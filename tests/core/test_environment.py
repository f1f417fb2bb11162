# SPDX-License-Identifier: Apache-2.0
"""The environment variable FULGURITE in trainers of both packages, and its absence."""

from __future__ import annotations

import os
import subprocess
import sys

import lightning.pytorch as pl
import pytest

from fulgurite.environment import callbacks
from fulgurite.errors import FulguriteError
from fulgurite_plugins.distillation import PSKD
from tests import helpers
from tests.third_party.install import installed

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def make_trainer(package: str):
    return pytest.importorskip(package).Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_the_variable_nothing_is_imported(value):
    """Fails if merely being installed costs every trainer of a machine an import."""
    code = (
        "import __future__, importlib, os, sys, typing; before = set(sys.modules);"
        "from fulgurite.environment import callbacks; assert callbacks() == [];"
        "print(*sorted(set(sys.modules) - before))"
    )
    environment = {key: text for key, text in os.environ.items() if key != "FULGURITE"}
    if value is not None:
        environment["FULGURITE"] = value
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["fulgurite", "fulgurite.environment"], result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_trainer_gets_callbacks_of_its_own(package, monkeypatch):
    """Fails if a trainer of either package gets none, or two trainers share one callback and its state."""
    monkeypatch.setenv("FULGURITE", "PSKD(alpha=0.3), lightning.pytorch.callbacks.Timer()")
    first, second = (
        [callback for callback in make_trainer(package).callbacks if type(callback).__name__ in ("PSKD", "Timer")]
        for _ in range(2)
    )
    assert [type(callback).__name__ for callback in first] == ["PSKD", "Timer"]
    assert first[0].alpha == 0.3
    assert not set(map(id, first)) & set(map(id, second))


def test_a_script_is_trained_with_it(monkeypatch):
    """Fails if the callback is there but does not act, or acts otherwise than the one that is passed in Python."""
    by_hand = helpers.Plain()
    helpers.fit(by_hand, [PSKD(alpha=0.6)], epochs=3)
    without = helpers.Plain()
    helpers.fit(without, epochs=3)
    monkeypatch.setenv("FULGURITE", "PSKD(alpha=0.6)")
    module = helpers.Plain()
    trainer = helpers.fit(module, epochs=3)
    assert "pskd/alpha" in trainer.callback_metrics
    assert helpers.weights(module).equal(helpers.weights(by_hand))
    assert not helpers.weights(module).equal(helpers.weights(without))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PSKD(alpha=", "never closed"),
        ("PSDK", "Did you mean 'PSKD'"),
        ("PSKD(alhpa=0.8)", "Did you mean 'alpha'"),
        ("PSKD(alpha=3)", r"Expected `alpha` of PSKD to be in \[0, 1\]"),
        ("PSKD, Digits", "object of type Digits, which a trainer does not take"),
        ("fulgurite.Classification(3, [4])", "object of type Classification"),
    ],
)
@pytest.mark.parametrize("package", PACKAGES)
def test_what_cannot_be_used_stops_before_training(package, text, message, monkeypatch):
    """Fails if a trainer is made in spite of a wrong variable, or the message does not say where the text came from."""
    monkeypatch.setenv("FULGURITE", text)
    with pytest.raises(FulguriteError, match=message) as error:
        make_trainer(package)
    assert f"FULGURITE={text!r}" in str(error.value)


def test_a_third_party_callback_by_its_short_name(monkeypatch):
    """Fails if only built-in plugins can be named in the variable."""
    monkeypatch.setenv("FULGURITE", "Counter(every=1)")
    with installed("good"):
        trainer = helpers.fit(helpers.Plain(), epochs=1)
    (counter,) = (callback for callback in trainer.callbacks if type(callback).__name__ == "Counter")
    assert counter.seen == trainer.num_training_batches


def test_a_broken_plugin_that_is_not_named_stops_nobody(monkeypatch):
    """Fails if a broken distribution makes trainers fail that ask for another plugin, or for none."""
    with installed("broken", "clash_a", "clash_b"):
        assert isinstance(make_trainer("lightning.pytorch"), pl.Trainer)
        monkeypatch.setenv("FULGURITE", "PSKD")
        assert [type(callback) for callback in callbacks()] == [PSKD]
