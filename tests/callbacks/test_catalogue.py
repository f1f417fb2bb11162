# SPDX-License-Identifier: Apache-2.0
"""The manifest of the callbacks, and their way through a command line and back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import fulgurite_callbacks
from fulgurite.intervention import Intervention
from fulgurite.spec import build
from fulgurite_callbacks import Calibration, LearningCurves, StepCost
from tests.helpers import Plain

ARGUMENTS: dict[type, dict[str, Any]] = {
    Calibration: {"measures": ["ece"], "n_bins": 15, "prefix": "fine/", "criterion": "main", "plot": True},
    StepCost: {"table": False},
    LearningCurves: {"path": "curves.png", "metrics": ["val*"], "every_n_epochs": 3},
}


def given(callback: Any) -> dict[str, Any]:
    names = ARGUMENTS[type(callback)]
    values = {name: getattr(callback, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def test_manifest_lists_what_is_exported():
    """Fails if a component cannot be imported, or is of another kind than it says."""
    assert dir(fulgurite_callbacks) == ["Calibration", "LearningCurves", "StepCost", "plugin"]
    for component in fulgurite_callbacks.plugin.components:
        kind = "intervention" if issubclass(component.load(), Intervention) else "callback"
        assert component.kind == kind


def test_the_manifest_is_light():
    """Fails if listing plugins imports torch."""
    code = "import sys, fulgurite_callbacks; fulgurite_callbacks.plugin; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("defaults", [True, False])
def test_command_line_round_trip(defaults: bool, monkeypatch: pytest.MonkeyPatch):
    """Fails if an argument is not typed so that LightningCLI can read it from YAML and write it again."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    callbacks = [
        {"class_path": f"fulgurite_callbacks.{cls.__name__}", "init_args": {} if defaults else arguments}
        for cls, arguments in ARGUMENTS.items()
    ]
    config: dict[str, Any] = {"trainer": {"logger": False, "accelerator": "cpu", "callbacks": callbacks}}
    first = LightningCLI(Plain, args=config, run=False)
    again = LightningCLI(Plain, args=yaml.safe_load(first.parser.dump(first.config)), run=False)
    for cli in (first, again):
        for cls, arguments in ARGUMENTS.items():
            found = next(callback for callback in cli.trainer.callbacks if isinstance(callback, cls))
            assert given(found) == (given(cls()) if defaults else arguments)


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_component_texts(cls: type):
    """Fails if the text that people write in `--add` or in the environment variable does not build the callback."""
    text = f"{cls.__name__}({', '.join(f'{name}={value!r}' for name, value in ARGUMENTS[cls].items())})"
    assert given(build(text)) == ARGUMENTS[cls]
