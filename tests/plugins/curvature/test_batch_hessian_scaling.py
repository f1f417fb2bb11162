# SPDX-License-Identifier: Apache-2.0
"""BatchSizeLRScaling: the factor, what it is multiplied into, and what it measures."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F

from fulgurite.errors import RefusedError
from fulgurite_plugins.curvature import (
    BatchSizeLRScaling,
    effective_batch_size,
    fit_excess,
    predict_batch_extremes,
    saturation_batch_size,
)
from tests import helpers
from tests.helpers import fit, weights
from tests.plugins.curvature.test_batch_hessian_training import SCHEDULERS, Small, Watch, data, dense, loader, scheduled


def factor(scaling: BatchSizeLRScaling, module: Any = None, data: Any = None, **arguments: Any) -> float:
    trainer = fit(
        Small() if module is None else module,
        [scaling],
        loader() if data is None else data,
        **{"epochs": 1, **arguments},
    )
    assert scaling.factor is not None
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * scaling.factor)
    assert float(trainer.callback_metrics["batch_size_lr/factor"]) == pytest.approx(scaling.factor)
    return scaling.factor


def adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3)


class TestFactor:
    def test_optimizer_decides(self) -> None:
        assert factor(BatchSizeLRScaling(4)) == 4.0
        assert factor(BatchSizeLRScaling(4), Small(adam)) == 2.0
        assert factor(BatchSizeLRScaling(4, optimizer_kind="sgd"), Small(adam)) == 4.0
        assert factor(BatchSizeLRScaling(64, "sqrt")) == 0.5
        assert factor(BatchSizeLRScaling(16)) == 1.0

    def test_batch_of_an_update(self) -> None:
        assert factor(BatchSizeLRScaling(16), accumulate_grad_batches=3) == 3.0
        assert factor(BatchSizeLRScaling(16, batch_size=8), accumulate_grad_batches=3) == 1.5
        batches = [list(range(k, k + 8)) for k in range(0, 48, 8)]
        with pytest.raises(RefusedError, match=r"does not tell: it has no batch size. Pass batch_size=\."):
            factor(BatchSizeLRScaling(4), data=torch.utils.data.DataLoader(data(), batch_sampler=batches))

    def test_several_loaders_are_refused(self) -> None:
        class Two(Small):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step(batch[0], batch_idx)

        with pytest.raises(RefusedError, match="it is one of 2"):
            factor(BatchSizeLRScaling(4), Two(), CombinedLoader([loader(), loader()]))

    def test_unknown_optimizer(self) -> None:
        class Odd(torch.optim.Optimizer):
            def __init__(self, parameters: Any) -> None:
                super().__init__(parameters, {"lr": 1e-3})

            def step(self, closure: Any = None) -> Any:
                return closure()

        with pytest.raises(
            RefusedError, match="the rate of Odd goes with the batch size or with its square root is not"
        ):
            factor(BatchSizeLRScaling(4), Small(Odd))
        assert factor(BatchSizeLRScaling(4, optimizer_kind="adam"), Small(Odd)) == 2.0

    def test_one_of_several_optimizers(self) -> None:
        class Two(helpers.Manual):
            def configure_optimizers(self) -> Any:
                return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

            def training_step(self, batch: Any, batch_idx: int) -> None:
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                for optimizer in self.optimizers():
                    optimizer.step()

        trainer = fit(Two(), [BatchSizeLRScaling(4, optimizer=1)])
        assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [0.1, 0.4]
        trainer = fit(Two(), [BatchSizeLRScaling(4)])
        assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [0.4, 0.4]
        with pytest.raises(RefusedError, match="`optimizer` to be the index of one of the 2 optimizers"):
            fit(Two(), [BatchSizeLRScaling(4, optimizer=2)])

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_schedules_keep_their_form(self, name: str) -> None:
        alone, scaled = Watch(False), Watch(False)
        fit(scheduled(SCHEDULERS[name]), [alone], loader(), epochs=4)
        fit(scheduled(SCHEDULERS[name]), [BatchSizeLRScaling(4), scaled], loader(), epochs=4)
        assert [group["lr"] for group in scaled.seen] == pytest.approx([4 * group["lr"] for group in alone.seen])

    def test_advice_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            factor(BatchSizeLRScaling(4))
        assert "batches of 16 instead of 4: learning rate 0.001 -> 0.004 (x 4, mode 'linear')" in caplog.text

    def test_resumed_run_is_not_scaled_again(self, tmp_path: Any) -> None:
        path = tmp_path / "last.ckpt"
        trainer = fit(Small(), [BatchSizeLRScaling(4)], loader(), epochs=1)
        trainer.save_checkpoint(path)
        resumed = BatchSizeLRScaling(4)
        trainer = fit(Small(), [resumed], loader(), ckpt=path, epochs=2)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(4e-3)
        assert resumed.factor == 4.0
        # Another training with the same object begins anew.
        fit(Small(), [resumed], loader(batch_size=8), epochs=1)
        assert resumed.factor == 2.0


class Start(pl.Callback):
    """Keeps the weights with which training begins."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.weights = weights(module).clone()


class TestMeasured:
    N = 48

    def extremes(self, at: torch.Tensor, indices: Any) -> tuple[float, float]:
        x, y = data(self.N).tensors
        values = torch.linalg.eigvalsh(dense(Small(), at, (x[indices], y[indices]))[1])
        return float(values[0]), float(values[-1])

    def run(self, scaling: BatchSizeLRScaling) -> tuple[float, torch.Tensor, Any]:
        from fulgurite_plugins.curvature.batch_hessian_lr import noise

        start, module, made = Start(), Small(), []
        original = noise.BatchHessians.__init__

        def remember(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.steps = 60  # all eigenvalues
            made.append(self._order)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(noise.BatchHessians, "__init__", remember)
            fit(module, [start, scaling], loader(self.N, 8), epochs=1, accumulate_grad_batches=2)
        assert scaling.factor is not None
        return scaling.factor, start.weights, made[0]

    def test_predicted_by_the_additive_model(self) -> None:
        found, at, order = self.run(BatchSizeLRScaling(4, "rmt"))
        low, high = self.extremes(at, range(self.N))
        # Half a thousand probes of 6 batches of 8, where the callback takes 8 probes.
        x, y = data(self.N).tensors
        batches = [order[k : k + 8] for k in range(0, self.N, 8)]
        hessians = torch.stack([dense(Small(), at, (x[b], y[b]))[1] for b in batches])
        variance = 8 * float(hessians.var(dim=0).sum()) / hessians.shape[1]

        def ratio(v: float) -> float:
            before, after = (
                predict_batch_extremes(low, high, v, effective_batch_size(size, self.N)).largest for size in (4, 16)
            )
            return before / after

        assert ratio(0.5 * variance) < found < ratio(2 * variance)
        assert found > 1.02

    def test_measured_at_both_sizes(self) -> None:
        found, at, order = self.run(BatchSizeLRScaling(4, "rmt", spectrum="measured"))
        means = {}
        for size, count in ((4, 4), (16, 3)):
            ends = [self.extremes(at, order[k * size : (k + 1) * size])[1] for k in range(count)]
            means[size] = sum(ends) / count
        assert found == pytest.approx(means[4] / means[16], rel=1e-4)
        assert found > 1

    def test_calibrated_by_two_small_sizes(self) -> None:
        found, at, order = self.run(BatchSizeLRScaling(4, "rmt", spectrum="calibrated"))
        means = {}
        for size, count in ((2, 8), (8, 6)):
            ends = [self.extremes(at, order[k * size : (k + 1) * size])[1] for k in range(count)]
            means[size] = sum(ends) / count
        effective = {size: effective_batch_size(size, self.N) for size in (2, 4, 8, 16)}
        law = fit_excess([effective[2], effective[8]], [means[2], means[8]], self.extremes(at, range(self.N))[1])
        assert found == pytest.approx(law.largest(effective[4]) / law.largest(effective[16]), rel=1e-4)

    def test_cap_at_saturation(self) -> None:
        found, at, order = self.run(BatchSizeLRScaling(1, cap=True))
        x, y = data(self.N).tensors
        hessians = torch.stack(
            [dense(Small(), at, (x[order[k : k + 8]], y[order[k : k + 8]]))[1] for k in range(0, self.N, 8)]
        )
        variance = 8 * float(hessians.var(dim=0).sum()) / hessians.shape[1]
        high = self.extremes(at, range(self.N))[1]
        low, top = (saturation_batch_size(high, f * variance, self.N) for f in (0.5, 2.0))
        assert low <= found <= top
        assert found < 16

    def test_refusals(self) -> None:
        with pytest.raises(RefusedError, match="a batch of 64 is larger than the 48 examples of the training set"):
            fit(Small(), [BatchSizeLRScaling(64, "rmt")], loader())
        with pytest.raises(RefusedError, match="measures with batches of 40, but has 32 examples"):
            fit(Small(), [BatchSizeLRScaling(40, "rmt", spectrum="measured", examples=32)], loader())
        with pytest.raises(RefusedError, match="too few for two of them"):
            fit(Small(), [BatchSizeLRScaling(4, "rmt")], loader(batch_size=32))

        class Concave(Small):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return -F.mse_loss(nn.functional.linear(batch[0], self.net[0].weight), torch.zeros(len(batch[0]), 5))

        with pytest.raises(RefusedError, match="the largest eigenvalue of the Hessian is .*, not positive"):
            fit(Concave(), [BatchSizeLRScaling(4, "rmt")], loader())

    def test_bad_arguments(self) -> None:
        for bad, message in (
            (
                {"reference_batch_size": 0},
                "`reference_batch_size` of BatchSizeLRScaling .* positive integer, but got 0",
            ),
            ({"mode": "cube"}, "`mode` .* one of 'auto', 'linear', 'sqrt', 'rmt'"),
            ({"spectrum": "guessed"}, "`spectrum`"),
            ({"optimizer_kind": "lion"}, "`optimizer_kind`"),
            ({"mode": "rmt", "cap": True}, "`cap` .* saturates itself"),
            ({"batch_size": 0}, "`batch_size`"),
        ):
            with pytest.raises(ValueError, match=message):
                BatchSizeLRScaling(**{"reference_batch_size": 8, **bad})
        assert math.isinf(effective_batch_size(48, 48))
