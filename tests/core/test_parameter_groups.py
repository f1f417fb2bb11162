# SPDX-License-Identifier: Apache-2.0
"""Parameters that a plugin wants optimised otherwise get groups of their own, in whatever optimizer the user builds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fulgurite import Intervention
from fulgurite.parameter_groups import grouped_apart
from tests.helpers import Plain, fit


def _options(**wanted: Any) -> tuple[nn.Parameter, nn.Parameter, Any]:
    plain, special = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    return plain, special, lambda: {special: wanted}


@pytest.mark.parametrize(
    "form", [list, lambda ps: [{"params": ps}], lambda ps: [(f"p{i}", p) for i, p in enumerate(ps)]]
)
def test_parameters_are_moved_out_of_the_users_group(form):
    plain, special, options = _options(weight_decay=0.0, lr_scale=0.1)
    with grouped_apart(options):
        optimizer = torch.optim.AdamW(form([plain, special]), lr=0.5, weight_decay=0.3)
    users, own = optimizer.param_groups
    assert users["params"] == [plain]
    assert users["lr"] == 0.5
    assert users["weight_decay"] == 0.3
    assert own["params"] == [special]
    assert own["lr"] == pytest.approx(0.05)
    assert own["weight_decay"] == 0.0


def test_schedulers_made_afterwards_scale_both_groups():
    plain, special, options = _options(lr_scale=0.1)
    with grouped_apart(options):
        optimizer = torch.optim.SGD([{"params": [plain], "lr": 1.0}, {"params": [special], "lr": 2.0}], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 1.0, 0.1])


def test_an_optimizer_around_another_does_not_split_twice():
    plain, special, options = _options(lr_scale=0.1)

    class Around(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0})
            self.inner = torch.optim.SGD(self.param_groups)

    with grouped_apart(options):
        optimizer = Around([plain, special])
    assert [group["lr"] for group in optimizer.inner.param_groups] == pytest.approx([1.0, 0.1])


def test_a_scheduler_that_sets_one_rate_for_all_groups_is_reported():
    plain, special, options = _options(lr_scale=0.01)
    with (
        pytest.warns(UserWarning, match=r"set the learning rate of 1 parameters .* where .* was meant"),
        grouped_apart(options),
    ):
        torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([plain, special], lr=1.0), max_lr=1.0, total_steps=10)
    with warnings.catch_warnings(), grouped_apart(options):
        warnings.simplefilter("error")
        optimizer = torch.optim.SGD([plain, special], lr=1.0)
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1.0, 0.01], total_steps=10)


def test_nothing_stays_patched_after_an_error():
    before = torch.optim.Optimizer.__init__
    with pytest.raises(KeyError), grouped_apart(dict):
        raise KeyError
    assert torch.optim.Optimizer.__init__ is before


class _Slow(Intervention):
    """Adds a parameter and wants it trained at a tenth of the rate."""

    def operate(self, module: Any) -> None:
        if not hasattr(module, "extra"):
            module.extra = nn.Parameter(torch.zeros(()))

    def parameter_options(self, module: Any) -> dict[nn.Parameter, dict[str, Any]]:
        return {module.extra: {"lr_scale": 0.1}}


def test_an_intervention_gives_options_to_parameters_that_it_added():
    found = []

    class Watch(_Slow):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.extend(trainer.optimizers[0].param_groups)

    module = Plain()
    fit(module, [Watch()])
    users, own = found
    assert len(own["params"]) == 1
    assert own["params"][0] is module.extra
    assert own["lr"] == pytest.approx(0.1 * users["lr"])
    assert "configure_optimizers" not in module.__dict__
