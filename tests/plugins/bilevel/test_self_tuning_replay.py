# SPDX-License-Identifier: Apache-2.0
"""A schedule in an ordinary training: the values that were found, on the plain model; and its rivals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.testing.lab import equal_states
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.replay import JitterSchedule, ReplaySchedule, SinusoidSchedule
from fulgurite_plugins.bilevel.self_tuning_networks.targets import InputFunction
from tests.helpers import weights
from tests.plugins.bilevel import stn

SEEN: list[Tensor] = []


def watch(x: Tensor, value: Tensor) -> Tensor:
    """A transform of the inputs that only notes the values."""
    SEEN.append(value.clone())
    return x


def watched(**kwargs: Any) -> Hyper:
    return Hyper("watched", InputFunction(watch), **{"init": 0.3, "range": (0.0, 1.0), **kwargs})


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


def values() -> list[float]:
    """The value of each step, the same for all of its examples."""
    assert all((value == value[0]).all() for value in SEEN)
    return [float(value[0]) for value in SEEN]


def found(folder: Path, *hypers: Hyper) -> tuple[Path, Any]:
    """Tune, and return the file and the tuner."""
    tuner = stn.tuner(*hypers, schedule_file="schedule.json", train_steps=1, warmup_epochs=0.5)
    stn.fit([tuner], epochs=2, default_root_dir=folder)
    SEEN.clear()
    return folder / "schedule.json", tuner


def test_replay_gives_each_update_the_value_that_was_in_force_there(tmp_path):
    path, tuner = found(tmp_path, watched(), stn.rate())
    module = stn.Slow()
    trainer = stn.fit([ReplaySchedule(str(path))], module, n=128, epochs=3)
    expected = [tuner.course.at(update)[0] for update in range(24)]
    assert values() == pytest.approx(expected, abs=1e-6)
    assert len(set(values())) == 13, "the start, and a value after each of twelve updates"
    assert [type(layer) for layer in module.net] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert module.net[2].p == 0.2
    assert float(trainer.callback_metrics["replayschedule/watched"]) == pytest.approx(tuner.final_values()["watched"])
    assert len(module.state_dict()) == 4


def test_final_values_throughout(tmp_path):
    path, tuner = found(tmp_path, watched())
    stn.fit([ReplaySchedule(str(path), final=True)], epochs=1)
    assert len(set(values())) == 1
    assert values()[0] == pytest.approx(tuner.final_values()["watched"], abs=1e-6)


def test_replayed_rate_is_what_dropout_uses(tmp_path):
    path, tuner = found(tmp_path, stn.rate(init=0.6))
    kept: list[float] = []

    class Notes(stn.Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net[2].register_forward_hook(
                lambda layer, args, out: kept.append(float((out != 0).sum() / (args[0] != 0).sum()))
            )
            return super().training_step(batch, batch_idx)

    stn.fit([ReplaySchedule(str(path), final=True)], Notes(), n=1600, epochs=1)
    assert sum(kept) / len(kept) == pytest.approx(1 - tuner.final_values()["rate"], abs=0.02)


def test_discrete_values_are_rounded_down_as_in_the_search(tmp_path):
    path, _ = found(tmp_path, watched(init=2, range=(0, 8), discrete=True, scale=1.0))
    stn.fit([ReplaySchedule(str(path))], epochs=1)
    assert all(value == math.floor(value) for value in values())


def test_jitter_has_its_mean_and_its_spread_and_stays_in_the_range():
    stn.fit([JitterSchedule([watched()], std=0.05)], n=1600, epochs=3)
    drawn = torch.tensor(values())
    assert abs(float(drawn.mean()) - 0.3) < 5 * 0.05 / 300**0.5
    assert abs(float(drawn.std()) - 0.05) < 5 * 0.05 / 600**0.5
    SEEN.clear()
    stn.fit([JitterSchedule([watched(init=0.01)], std=0.3)], epochs=2)
    assert all(0.0 <= value <= 1.0 for value in values())
    SEEN.clear()
    stn.fit([JitterSchedule([watched()], std=0.0)], epochs=1)
    assert values() == pytest.approx([0.3] * 10)


def test_sinusoid_has_its_amplitude_and_its_period():
    stn.fit([SinusoidSchedule([watched()], amplitude=0.1, period=8)], n=256, epochs=2)
    expected = [0.3 + 0.1 * math.sin(2 * math.pi * update / 8) for update in range(32)]
    assert values() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [lambda: JitterSchedule([stn.rate()]), lambda: SinusoidSchedule([stn.rate()])])
def test_resume_is_exact_and_copies_keep_the_state(tmp_path, make):
    whole, module = make(), stn.Slow()
    trainer = stn.fit([whole], module, epochs=1, shuffle=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = whole.state_dict()
    assert equal_states(copy.deepcopy(whole).state_dict(), state)
    longer, resumed = stn.Slow(), stn.Slow()
    stn.fit([make()], longer, epochs=2, shuffle=False)
    stn.fit([make()], resumed, epochs=2, shuffle=False, ckpt=tmp_path / "a.ckpt")
    assert torch.equal(weights(longer), weights(resumed))


def test_other_models_and_missing_files_are_refused(tmp_path):
    path, _ = found(tmp_path, stn.rate())

    class Deeper(stn.Slow):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.Dropout(0.1))

    module = Deeper()
    with pytest.raises(RefusedError, match="is a schedule of rate, but Deeper has rate/net.2, rate/net.4"):
        stn.fit([ReplaySchedule(str(path))], module)
    assert type(module.net[2]) is nn.Dropout
    with pytest.raises(FulguriteError, match="There is no schedule file"):
        ReplaySchedule(str(tmp_path / "none.json"))
    one = ReplaySchedule(str(path), hyperparameters=[stn.rate()])
    assert one.hyperparameters == [stn.rate()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JitterSchedule([stn.rate()], std=-0.1), "`std` of JitterSchedule not to be negative, but got -0.1"),
        (lambda: SinusoidSchedule([stn.rate()], period=0), "`period` of SinusoidSchedule to be positive, but got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
