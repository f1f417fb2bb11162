# SPDX-License-Identifier: Apache-2.0
"""The callbacks in a training on two processes, with gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from fulgurite.testing.processes import on_ranks
from fulgurite_callbacks import Calibration, LearningCurves, StepCost
from tests.callbacks.test_calibration import Quiet, batches, expected, logged, predictions
from tests.helpers import trainer


class Logs(Quiet):
    """Logs values that need a collective when they are read."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("rank", float(self.global_rank), on_step=False, on_epoch=True, sync_dist=True)
        return loss


def data() -> Any:
    """The second rank of Lightning's DistributedSampler gets every second example: ignored positions only."""
    logits, targets = predictions(n=24)
    targets[1::2] = -100
    return logits, targets


def _train(rank: int, folder: Path) -> dict[str, Any]:
    strategy = DDPStrategy(process_group_backend="gloo")
    curves, cost = LearningCurves(str(folder / "pictures" / f"{rank}.png")), StepCost()
    the_trainer = trainer([Calibration(plot=True), cost, curves], strategy=strategy, devices=2, default_root_dir=folder)
    module = Logs()
    module.scale.requires_grad_(True)
    the_trainer.fit(module, batches(*predictions(n=24)), batches(*data()))
    results = {name: float(value) for name, value in the_trainer.callback_metrics.items()}
    return {"results": results, "history": curves.history, "scale": module.scale.item()}


def test_two_processes_equal_one(tmp_path: Path):
    """Fails if ranks log measures of their own part (also where one has nothing to measure), if reading metrics blocks, or
    if another rank than the first writes a picture.
    """
    ranks = on_ranks(lambda rank: _train(rank, tmp_path))
    logits, targets = data()
    whole = expected(ranks[0]["scale"] * logits[::2], targets[::2])
    for rank in ranks:
        assert logged(rank["results"], "val") == pytest.approx(whole, rel=1e-4)
        assert rank["history"]["rank"] == [(2, 0.5), (4, 0.5)]
        assert rank["results"]["cost/step_seconds"] == ranks[0]["results"]["cost/step_seconds"]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["0.png"]
    assert (tmp_path / "calibration_val.png").is_file()
