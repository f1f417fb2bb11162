# SPDX-License-Identifier: Apache-2.0
"""Step times: what is counted, with a clock that only the training moves."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from fulgurite import timing
from fulgurite.timing import StepTimer, peak_memory, reset_peak_memory
from tests import helpers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock


class Timed(helpers.Plain):
    """Takes 50 seconds for a step of the first epoch, then 1; validation takes 1000."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 50.0 if self.current_epoch == 0 else 1.0
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 1000.0


class BetweenSteps(pl.Callback):
    """Takes a quarter of a second after each step, as a callback may."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args):
        self.clock.now += 0.25


def fit(module, timer, *callbacks, epochs=3, **kwargs):
    helpers.trainer([*callbacks, timer], epochs=epochs, **kwargs).fit(
        module, helpers.loader(helpers.data(64)), helpers.loader(helpers.data(32), shuffle=False)
    )


def test_median_leaves_out_the_first_epoch_and_no_time_is_validation(clock):
    timer = StepTimer()
    fit(Timed(clock), timer)
    assert timer.median_seconds == 1.0
    assert timer.training_seconds == 4 * 50.0 + 2 * 4 * 1.0


def test_validation_inside_an_epoch_is_not_counted(clock):
    timer = StepTimer()
    fit(Timed(clock), timer, val_check_interval=2)
    assert timer.median_seconds == 1.0
    assert timer.training_seconds == 4 * 50.0 + 2 * 4 * 1.0


def test_what_callbacks_do_between_steps_is_part_of_the_step(clock):
    timer = StepTimer()
    fit(Timed(clock), timer, BetweenSteps(clock))
    assert timer.median_seconds == 1.25


def test_a_single_epoch_counts_without_its_first_ten_steps(clock):
    class Slow(Timed):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.clock.now += 7.0 if batch_idx >= 10 else 0.0
            return loss

    timer = StepTimer()
    helpers.trainer([timer], epochs=1).fit(Slow(clock), helpers.loader(helpers.data(16 * 14)))
    assert timer.median_seconds == 57.0
    assert timer.training_seconds == 14 * 50.0 + 4 * 7.0


def test_a_single_batch_is_timed_too(clock):
    timer = StepTimer()
    helpers.trainer([timer], epochs=2).fit(Timed(clock), helpers.loader(helpers.data(16)))
    assert timer.median_seconds == 1.0


def test_a_second_fit_starts_anew_and_before_the_first_there_is_no_median(clock):
    timer = StepTimer()
    assert timer.median_seconds is None
    for _ in range(2):
        fit(Timed(clock), timer, epochs=2)
        assert timer.training_seconds == 4 * 50.0 + 4 * 1.0


def test_a_device_is_synchronised_per_sequence_and_not_per_step(clock, monkeypatch):
    waits = []

    def synchronize(device):
        waits.append(device.type)
        clock.now += 4.0  # the device is behind by this much

    monkeypatch.setattr(timing, "_synchronize", synchronize)
    timer, trainer = StepTimer(), SimpleNamespace(current_epoch=0)
    module = SimpleNamespace(device=torch.device("cuda"))
    for epoch in range(2):
        trainer.current_epoch = epoch
        for index in range(8):
            timer.on_train_batch_start(trainer, module, None, index)
            clock.now += 1.0
            timer.on_train_batch_end(trainer, module, None, None, index)
        timer.on_train_epoch_end(trainer, module)
    assert len(waits) == 2 * 2
    assert timer.median_seconds == (8 * 1.0 + 4.0) / 8


def test_peak_memory_of_the_process_sees_an_allocation():
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    block = torch.ones(40_000_000)
    after = peak_memory(device)
    del block
    assert before > 10_000_000
    assert after - before > 100_000_000
