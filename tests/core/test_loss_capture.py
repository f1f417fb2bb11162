# SPDX-License-Identifier: Apache-2.0
"""Every loss is seen, however the code came by the function, at first and later; nothing of torch stays replaced."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.overrides import _get_current_function_mode_stack

from fulgurite.loss_capture import LossCapture

LOGITS, LABELS = torch.zeros(3, 4), torch.tensor([0, 1, 2])
ORIGINAL = F.cross_entropy


class Recorder:
    """Counts the calls and doubles the loss."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.modes: list[int] = []
        self.capture = LossCapture(self)

    def __call__(self, fn: Any, args: Any, kwargs: Any) -> Tensor:
        self.names.append(fn.__name__)
        return 2 * fn(*args, **kwargs)

    def step(self, compute: Any) -> float:
        with self.capture:
            self.modes.append(len(_get_current_function_mode_stack()))
            return float(compute())


BY_ATTRIBUTE = {
    "function": lambda: F.cross_entropy(LOGITS, LABELS),
    "module": lambda: nn.CrossEntropyLoss()(LOGITS, LABELS),
}
BY_REFERENCE = {
    "imported": lambda: cross_entropy(LOGITS, LABELS),
    "both": lambda: F.cross_entropy(LOGITS, LABELS) + 0 * cross_entropy(LOGITS, LABELS),
}


@pytest.mark.parametrize("spelling", BY_ATTRIBUTE | BY_REFERENCE)
def test_each_loss_is_seen_once_in_every_step(spelling):
    recorder = Recorder()
    compute = (BY_ATTRIBUTE | BY_REFERENCE)[spelling]
    values = [recorder.step(compute) for _ in range(3)]
    assert values == pytest.approx([2 * float(compute())] * 3)
    assert recorder.names == ["cross_entropy"] * (6 if spelling == "both" else 3)
    assert recorder.modes == ([1, 0, 0] if spelling in BY_ATTRIBUTE else [1, 1, 1]), (
        "the mode is dropped where it can be"
    )
    assert F.cross_entropy is ORIGINAL


def test_other_losses_are_seen_once_the_mode_is_gone():
    recorder = Recorder()
    recorder.step(BY_ATTRIBUTE["function"])
    recorder.step(lambda: F.mse_loss(LOGITS, LOGITS) + F.cross_entropy(LOGITS, LABELS))
    assert recorder.names == ["cross_entropy", "mse_loss", "cross_entropy"]


def test_the_mode_stays_until_a_loss_was_seen():
    recorder = Recorder()
    recorder.step(lambda: LOGITS.sum())
    recorder.step(BY_REFERENCE["imported"])
    assert recorder.names == ["cross_entropy"]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_exception_leaves_nothing_replaced(steps_before):
    recorder = Recorder()
    for _ in range(steps_before):
        recorder.step(BY_ATTRIBUTE["function"])
    with pytest.raises(IndexError):
        recorder.step(lambda: F.cross_entropy(LOGITS, LABELS + 9))
    assert F.cross_entropy is ORIGINAL
    assert not _get_current_function_mode_stack()
    assert recorder.step(BY_ATTRIBUTE["function"]) == pytest.approx(2 * float(BY_ATTRIBUTE["function"]()))


@pytest.mark.parametrize("steps_before", [0, 1])
def test_captures_nest_and_the_handler_is_not_handed_its_own_calls(steps_before):
    inner = Recorder()

    def handler(fn: Any, args: Any, kwargs: Any) -> Tensor:
        return F.cross_entropy(*args, **kwargs) + inner.step(BY_ATTRIBUTE["module"])

    outer = LossCapture(handler)
    plain = float(BY_ATTRIBUTE["function"]())
    for _ in range(steps_before + 1):
        with outer:
            assert float(F.cross_entropy(LOGITS, LABELS)) == pytest.approx(3 * plain)
            assert float(F.cross_entropy(LOGITS, LABELS)) == pytest.approx(3 * plain)
    assert inner.names == ["cross_entropy"] * 2 * (steps_before + 1)
    assert F.cross_entropy is ORIGINAL


def test_another_thread_is_left_alone():
    recorder, found = Recorder(), []
    recorder.step(BY_ATTRIBUTE["function"])
    with recorder.capture:
        thread = threading.Thread(target=lambda: found.append(float(F.cross_entropy(LOGITS, LABELS))))
        thread.start()
        thread.join()
    assert found == pytest.approx([float(BY_ATTRIBUTE["function"]())])
    assert recorder.names == ["cross_entropy"]
