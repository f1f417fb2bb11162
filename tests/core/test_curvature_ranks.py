# SPDX-License-Identifier: Apache-2.0
"""Curvature on two ranks: every product, and so every Ritz value, is that of one process with all the examples."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from fulgurite.curvature import EmpiricalFisher, GaussNewton, Hessian, hutchinson_trace, lanczos, step_loss
from fulgurite.samples import FixedBatches
from fulgurite.testing.processes import on_ranks
from tests import helpers
from tests.helpers import Plain, fit

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


class Frozen(Plain):
    """Does not move, so that one rank and two have the same weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Measure(pl.Callback):
    """Measures on 53 examples in batches of 8: 27 and 26 for the ranks, and a last batch that is short."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = FixedBatches(trainer, "Measure", batch_size=8, share=True)
        source = step_loss(trainer, pl_module, batches, "Measure")
        self.found: dict[str, Any] = {"examples": sum(e.examples for e in source())}
        for kind in (Hessian, GaussNewton, EmpiricalFisher):
            with kind(source, pl_module.parameters()) as operator:
                self.found[kind.__name__] = operator @ torch.ones(operator.shape[0])
        with Hessian(source, pl_module.parameters()) as hessian:
            self.found["ritz"] = lanczos(hessian, 6).ritz()[0]
            self.found["trace"] = hutchinson_trace(hessian, 4).value


def measured(**trainer: Any) -> dict[str, Any]:
    measure = Measure()
    fit(Frozen(), [measure], helpers.loader(helpers.data(53), batch_size=8), epochs=1, **trainer)
    return measure.found


def test_two_ranks_measure_what_one_process_does_and_agree_bit_by_bit():
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)), "devices": 2}
    first, second = on_ranks(lambda rank: measured(**strategy))
    alone = measured()
    assert (first.pop("examples"), second.pop("examples"), alone.pop("examples")) == (27, 26, 53)
    for name, value in alone.items():
        assert torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
