# SPDX-License-Identifier: Apache-2.0
"""How the call of a criterion is read and softened, for every spelling of its arguments."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite import LossCall
from fulgurite.errors import FulguriteError
from fulgurite.loss_capture import LossCapture
from fulgurite.losses import FUNCTIONAL_LOSSES, soft_cross_entropy

WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


class StepOf:
    """What a message needs of a step."""

    module = nn.Identity()


def case(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, *shape, generator=generator, dtype=torch.float64)
    soft = torch.randn(6, 4, *shape, generator=generator, dtype=torch.float64).softmax(1)
    return logits, torch.randint(0, 4, (6, *shape), generator=generator), soft


def caught(compute: Any) -> tuple[LossCall, Tensor]:
    calls: list[LossCall] = []

    def handler(fn: Any, args: Any, kwargs: Any) -> Tensor:
        calls.append(LossCall.bound(fn, args, kwargs, StepOf()))
        return fn(*args, **kwargs)

    with warnings.catch_warnings(), LossCapture(handler):
        warnings.simplefilter("ignore")  # size_average and reduce are deprecated
        value = compute()
    (call,) = calls
    return call, value


LOGITS, LABELS, SOFT = case()
SPELLINGS = {
    "positional": lambda: F.cross_entropy(LOGITS, LABELS, WEIGHT, None, 1, None, "sum", 0.1),
    "keywords": lambda: F.cross_entropy(target=LABELS, input=LOGITS, ignore_index=2, weight=WEIGHT),
    "mixed": lambda: F.cross_entropy(LOGITS, target=LABELS, reduction="none"),
    "module": lambda: nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.2)(LOGITS, LABELS),
    "size_average=False": lambda: F.cross_entropy(LOGITS, LABELS, size_average=False),
    "size_average=True": lambda: F.cross_entropy(LOGITS, LABELS, size_average=True, reduction="sum"),
    "reduce=False": lambda: F.cross_entropy(LOGITS, LABELS, WEIGHT, reduce=False),
    "reduce=True, size_average=False": lambda: F.cross_entropy(LOGITS, LABELS, reduce=True, size_average=False),
    "module, reduce=False": lambda: nn.CrossEntropyLoss(reduce=False)(LOGITS, LABELS),
    "probabilities": lambda: F.cross_entropy(LOGITS, SOFT, WEIGHT, label_smoothing=0.1),
    "probabilities, none": lambda: F.cross_entropy(LOGITS, SOFT, reduction="none"),
    "nll": lambda: F.nll_loss(LOGITS.log_softmax(1), LABELS, WEIGHT, ignore_index=3),
    "nll, size_average=False": lambda: F.nll_loss(LOGITS.log_softmax(1), LABELS, size_average=False),
    "nll module": lambda: nn.NLLLoss(reduction="none")(LOGITS.log_softmax(1), LABELS),
}


@pytest.mark.parametrize("compute", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_is_bound_softened_and_keeps_its_value(compute):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call, value = caught(compute)
        torch.testing.assert_close(call.evaluate(), value, rtol=0, atol=0)
    torch.testing.assert_close(call.soften().evaluate(), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call.probabilities(), LOGITS.softmax(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call.soften().probabilities(), call.probabilities(), rtol=0, atol=0)
    soft = call.soften()
    assert soft.soften() is soft


@pytest.mark.parametrize("function", FUNCTIONAL_LOSSES, ids=lambda f: f.__name__)
def test_every_listed_loss_is_caught_and_takes_outputs_and_targets_first(function):
    names = FUNCTIONAL_LOSSES[function]
    assert names[:2] in (("input", "target"), ("input1", "input2")), names
    outputs, targets = torch.rand(3, 4), torch.rand(3, 4)
    if function in (F.cross_entropy, F.nll_loss, F.multi_margin_loss):
        targets = torch.tensor([0, 1, 2])
    elif function is F.multilabel_margin_loss:
        targets = torch.tensor([[0, -1, 1, 2]] * 3)
    extra = {"var": torch.ones(3, 4)} if function is F.gaussian_nll_loss else {}
    call, value = caught(lambda: function(outputs, targets, **extra))
    assert call.fn is function
    assert call.outputs is outputs
    assert call.targets is targets
    torch.testing.assert_close(call.evaluate(), value, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_cross_entropy_equals_torch_with_probability_targets(shape, weight, reduction):
    logits, _, soft = case(*shape)
    expected = F.cross_entropy(logits, soft, weight, reduction=reduction)
    found = soft_cross_entropy(logits, soft, weight, reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    logs = logits.log_softmax(1)
    torch.testing.assert_close(
        soft_cross_entropy(logs, soft, weight, reduction, log_probabilities=True), expected, rtol=1e-12, atol=1e-12
    )


def test_masked_positions_contribute_nothing_and_the_denominator_can_be_given():
    logits, _, soft = case(3)
    mask = torch.zeros(6, 3, dtype=torch.bool)
    mask[::2, 1] = True
    rows = -(soft * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(soft_cross_entropy(logits, soft, mask=mask, reduction="sum"), rows[mask].sum())
    torch.testing.assert_close(
        soft_cross_entropy(logits, soft, mask=mask, normalizer=mask.sum()), rows[mask].mean(), rtol=1e-12, atol=1e-12
    )
    none = soft_cross_entropy(logits, soft, mask=mask, reduction="none")
    assert not none[~mask].any()


def test_everything_ignored_is_not_a_number_as_in_torch():
    call, value = caught(lambda: F.cross_entropy(LOGITS, torch.full((6,), -100)))
    assert value.isnan()
    assert call.soften().evaluate().isnan()


@pytest.mark.parametrize("log_probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_soft_cross_entropy(log_probabilities, reduction):
    logits, _, soft = case(2)
    mask = torch.arange(12).view(6, 2) % 3 > 0

    def loss(outputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return soft_cross_entropy(outputs, targets, weight, reduction, mask, None, log_probabilities)

    inputs = tuple(t.clone().requires_grad_() for t in (logits, soft, WEIGHT))
    assert torch.autograd.gradcheck(loss, inputs)


def test_low_precision_is_computed_in_float32_also_under_autocast():
    logits, _, soft = (t.float() if t.is_floating_point() else t for t in case())
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_cross_entropy(logits.bfloat16(), soft)
        call, _ = caught(lambda: F.cross_entropy(logits.bfloat16(), LABELS))
        assert call.probabilities().dtype is torch.float32
        assert call.soften().targets.dtype is torch.float32
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, soft_cross_entropy(logits.bfloat16().float(), soft), rtol=0, atol=0)


def test_probabilities_carry_no_gradient():
    call = LossCall(F.cross_entropy, LOGITS.clone().requires_grad_(), LABELS, {}, "cross_entropy", StepOf())
    assert not call.probabilities().requires_grad


@pytest.mark.parametrize("outputs", [torch.zeros(4), torch.zeros(6, 4)])
def test_other_losses_are_named(outputs):
    fn = F.cross_entropy if outputs.ndim == 1 else F.mse_loss
    call = LossCall(fn, outputs, outputs, {}, fn.__name__, StepOf())
    for method in (call.soften, call.probabilities):
        with pytest.raises(FulguriteError, match=f"classification loss.*step of Identity called '{fn.__name__}'"):
            method()
