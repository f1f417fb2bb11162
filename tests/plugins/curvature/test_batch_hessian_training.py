# SPDX-License-Identifier: Apache-2.0
"""SLQLearningRate and HessianSpectrum in trainings, against dense Hessians of the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_plugins.curvature import HessianSpectrum, SLQLearningRate, heavy_ball_parameters
from tests import helpers
from tests.helpers import Manual, Plain, fit, weights

FREE: dict[str, Any] = {"max_change": 1e9, "lr_bounds": (1e-9, 1e9), "warmup_epochs": 0}


class Small(Plain):
    """53 parameters, smooth; the optimizer is made by a function."""

    def __init__(self, make: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)) -> None:
        pl.LightningModule.__init__(self)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def data(n: int = 48) -> Any:
    return helpers.data(n, features=6, classes=3)


def loader(n: int = 48, batch_size: int = 16, **arguments: Any) -> Any:
    return helpers.loader(data(n), batch_size, shuffle=False, **arguments)


def dense(module: nn.Module, at: Tensor, batch: Any, loss: Any = F.cross_entropy) -> tuple[Tensor, Tensor]:
    """Return gradient and Hessian of the mean loss at flat parameters, in float64."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    x, y = batch

    def of(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return loss(functional_call(module, values, (x.double(),)), y)

    flat = at.double()
    return torch.autograd.functional.jacobian(of, flat), torch.autograd.functional.hessian(of, flat)


class Watch(pl.Callback):
    """Keeps the weights and batches that come before the learner sees them, and what the optimizer has afterwards."""

    def __init__(self, before: bool) -> None:
        self.before, self.seen = before, []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        group = {k: v for k, v in trainer.optimizers[0].param_groups[0].items() if k != "params"}
        self.seen.append((weights(module).clone(), batch) if self.before else group)


def watched(learner: SLQLearningRate, module: Any = None, data: Any = None, **arguments: Any) -> tuple[list, list, Any]:
    before, after = Watch(True), Watch(False)
    module = Small() if module is None else module
    trainer = fit(module, [before, learner, after], loader() if data is None else data, **{"epochs": 1, **arguments})
    return before.seen, after.seen, trainer


class TestRules:
    @pytest.mark.parametrize("rule", ["inverse", "polyak", "two_over_sum"])
    def test_extremes_are_those_of_the_batch(self, rule: str) -> None:
        learner = SLQLearningRate(rule, steps=60, **FREE)
        before, after, _ = watched(learner)
        at, batch = before[0]
        _, hessian = dense(Small(), at, batch)
        values = torch.linalg.eigvalsh(hessian)
        largest = float(values[-1])
        smallest = float(values[values > 1e-3 * largest][0])
        assert learner.extremes is not None
        assert learner.extremes.largest == pytest.approx(largest, rel=1e-4)
        assert learner.extremes.smallest == pytest.approx(smallest, rel=2e-2)
        lr, momentum = heavy_ball_parameters(*learner.extremes)
        if rule == "inverse":
            lr = 1 / learner.extremes.largest
        elif rule == "two_over_sum":
            lr, momentum = 2 / sum(learner.extremes), 0.0
        assert after[0]["lr"] == pytest.approx(lr)
        assert after[0]["momentum"] == pytest.approx(momentum)
        assert [group["lr"] for group in after[1:]] == [after[0]["lr"]] * 2

    def test_rayleigh_quotient_of_the_gradient(self) -> None:
        before, after, _ = watched(SLQLearningRate("rayleigh", **FREE))
        gradient, hessian = dense(Small(), *before[0])
        assert after[0]["lr"] == pytest.approx(float(gradient @ gradient / (gradient @ hessian @ gradient)), rel=1e-4)
        assert after[0]["momentum"] == 0.9

    def test_dataset(self) -> None:
        learner = SLQLearningRate(steps=60, on="dataset", **FREE)
        before, _, _ = watched(learner)
        _, hessian = dense(Small(), before[0][0], data().tensors)
        assert learner.extremes is not None
        assert learner.extremes.largest == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4)

    def test_gauss_newton_is_what_is_asked_for(self) -> None:
        learner = SLQLearningRate(steps=60, operator="ggn", **FREE)
        before, _, _ = watched(learner)
        at, (x, _) = before[0]
        module = Small().double()
        torch.nn.utils.vector_to_parameters(at.double(), module.parameters())
        z = module(x.double())
        rows = [torch.autograd.grad(out, list(module.parameters()), retain_graph=True) for out in z.reshape(-1)]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).view(16, 3, -1)
        p = z.softmax(dim=1)
        of_outputs = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        ggn = torch.einsum("ncp,nce,neq->pq", jacobian, of_outputs.detach(), jacobian) / 16
        assert learner.extremes is not None
        assert learner.extremes.largest == pytest.approx(float(torch.linalg.eigvalsh(ggn)[-1]), rel=1e-4)

    def test_accumulated_batches_are_one(self) -> None:
        whole, parts = SLQLearningRate(**FREE), SLQLearningRate(**FREE)
        watched(whole)
        _, after, _ = watched(parts, data=loader(batch_size=4), accumulate_grad_batches=4)
        assert parts.extremes == pytest.approx(whole.extremes, rel=1e-4)
        assert [group["lr"] for group in after[:3]] == [1e-3] * 3
        assert after[3]["lr"] == pytest.approx(1 / whole.extremes.largest, rel=1e-4)

    def test_when_it_measures(self) -> None:
        learner = SLQLearningRate(every_n_epochs=2, warmup_epochs=1, steps=3)
        _, after, _ = watched(learner, epochs=5)
        rates = [group["lr"] for group in after[::3]]
        assert rates[0] == 1e-3
        assert rates[1] == pytest.approx(3e-3)
        assert rates[2] == rates[1]
        assert rates[3] == pytest.approx(9e-3)
        assert rates[4] == rates[3]


class TestLimits:
    def test_change_bounds_and_safety(self) -> None:
        for arguments, expected in (
            ({"max_change": 2.0}, 2e-3),
            ({"max_change": 1e9, "lr_bounds": (1e-6, 0.05)}, 0.05),
        ):
            _, after, _ = watched(SLQLearningRate(warmup_epochs=0, **arguments))
            assert after[0]["lr"] == pytest.approx(expected)
        full, half = SLQLearningRate(**FREE), SLQLearningRate(safety=0.5, **FREE)
        watched(full)
        watched(half)
        assert half.lr == pytest.approx(0.5 * full.lr)

    def test_momentum_has_a_bound_and_can_be_left(self) -> None:
        _, after, _ = watched(SLQLearningRate(floor=1e-9, steps=53, **FREE))
        assert 0.9 < after[0]["momentum"] <= 0.99
        _, after, _ = watched(SLQLearningRate(set_momentum=False, **FREE))
        assert after[0]["momentum"] == 0.9

    @pytest.mark.parametrize("kind", ["negative", "zero", "nan"])
    def test_unusable_curvature_keeps_the_rate(self, kind: str) -> None:
        class Odd(Small):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = {
                    "negative": lambda z: -F.mse_loss(z, torch.zeros_like(z)),
                    "zero": lambda z: F.l1_loss(z, torch.full_like(z, 1e3)),
                    "nan": lambda z: F.mse_loss(z * math.nan, torch.zeros_like(z)),
                }[kind]
                return loss(nn.functional.linear(batch[0], self.net[0].weight)) + 0 * weights(self).sum()

        for rule in ("inverse", "rayleigh"):
            learner = SLQLearningRate(rule, **FREE)
            with pytest.warns(UserWarning, match="no usable curvature was found before epoch 0 .* stays at 0.001"):
                _, after, _ = watched(learner, Odd())
            assert (after[0]["lr"], after[0]["momentum"]) == (1e-3, 0.9)
            assert learner.extremes is None

    def test_batches_that_the_loader_skips_are_not_measured(self) -> None:
        def skipping(examples: list[Any]) -> Any:
            return torch.utils.data.default_collate(examples) if len(examples) == 16 else None

        exact, learner = SLQLearningRate(on="dataset", **FREE), SLQLearningRate(on="dataset", **FREE)
        whole = torch.utils.data.Subset(data(53), range(48))
        watched(exact, data=helpers.loader(whole, 16, shuffle=False))
        watched(learner, data=loader(53, collate_fn=skipping))
        assert learner.extremes == exact.extremes

    def test_bad_arguments(self) -> None:
        for bad, message in (
            ({"rule": "newton"}, "`rule` of SLQLearningRate .* one of 'inverse'"),
            ({"on": "epoch"}, "`on` .* one of 'batch', 'dataset'"),
            ({"steps": 0}, "`steps` .* an integer of at least 1, but got 0"),
            ({"warmup_epochs": -1}, "`warmup_epochs` .* at least 0"),
            ({"safety": 0.0}, "`safety` .* positive"),
            ({"max_change": 1.0}, "`max_change`"),
            ({"floor": 1.0}, r"`floor` .* in \(0, 1\)"),
            ({"lr_bounds": (1.0, 0.1)}, "`lr_bounds` .* the smaller first"),
        ):
            with pytest.raises(ValueError, match=message):
                SLQLearningRate(**bad)


class TestOptimizers:
    def test_adam_steps_in_its_own_metric(self) -> None:
        learner = SLQLearningRate(steps=60, **{**FREE, "warmup_epochs": 1})
        watched(learner, Small(lambda p: torch.optim.Adam(p, lr=1e-2)), epochs=1)
        assert learner.extremes is None
        learner = SLQLearningRate(steps=60, **{**FREE, "warmup_epochs": 0})
        state: list[Any] = []

        class Copy(pl.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                if trainer.current_epoch == 1 and batch_idx == 0:
                    found = trainer.optimizers[0].state
                    state.extend((found[p]["exp_avg_sq"].clone(), float(found[p]["step"])) for p in module.parameters())

        module = Small(lambda p: torch.optim.Adam(p, lr=1e-2))
        before, after = Watch(True), Watch(False)
        with pytest.warns(UserWarning, match="no step of Adam yet"):
            fit(module, [Copy(), before, learner, after], loader(), epochs=2)
        assert after.seen[0]["lr"] == 1e-2  # no step yet: no metric
        at, batch = before.seen[3]
        _, hessian = dense(Small(), at, batch)
        root = torch.cat([((v / (1 - 0.999**t)).sqrt() + 1e-8).rsqrt().reshape(-1) for v, t in state]).double()
        largest = float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])
        assert learner.extremes is not None
        assert learner.extremes.largest == pytest.approx(largest, rel=1e-3)
        momentum = after.seen[3]["betas"][0]
        assert momentum == pytest.approx(min(0.99, heavy_ball_parameters(*learner.extremes)[1]))
        # Adam's momentum is an average: a gradient enters it at (1 - beta).
        assert after.seen[3]["lr"] == pytest.approx(1 / largest / (1 - momentum), rel=1e-3)
        assert after.seen[3]["betas"][1] == 0.999

    def test_groups_keep_their_ratio_and_shape_the_metric(self) -> None:
        def make(parameters: Any) -> Any:
            first, *others = parameters
            return torch.optim.SGD([{"params": others}, {"params": [first], "lr": 4e-3}], lr=1e-3, momentum=0.9)

        learner = SLQLearningRate(steps=60, **FREE)
        before, _, trainer = watched(learner, Small(make))
        _, hessian = dense(Small(), *before[0])
        root = torch.ones(len(hessian), dtype=torch.float64)
        root[:30] = 2.0
        largest = float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])
        assert learner.extremes is not None
        assert learner.extremes.largest == pytest.approx(largest, rel=1e-4)
        one, two = (group["lr"] for group in trainer.optimizers[0].param_groups)
        assert (one, two) == (pytest.approx(1 / largest, rel=1e-4), pytest.approx(4 / largest, rel=1e-4))

    @pytest.mark.parametrize("adds", [False, True])
    def test_weight_decay_can_count(self, adds: bool) -> None:
        learner = SLQLearningRate(steps=60, add_weight_decay=adds, **FREE)
        before, _, _ = watched(learner, Small(lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.25)))
        largest = float(torch.linalg.eigvalsh(dense(Small(), *before[0])[1])[-1])
        assert learner.extremes is not None
        assert learner.extremes.largest == pytest.approx(largest + 0.25 * adds, rel=1e-4)

    def test_frozen_parameters_are_left_out(self) -> None:
        module = Small(lambda p: torch.optim.SGD((q for q in p if q.requires_grad), lr=1e-3))
        module.net[0].requires_grad_(False)
        learner = SLQLearningRate(steps=60, **FREE)
        before, _, _ = watched(learner, module)
        _, hessian = dense(Small(), *before[0])
        assert learner.extremes is not None
        assert learner.extremes.largest == pytest.approx(float(torch.linalg.eigvalsh(hessian[35:, 35:])[-1]), rel=1e-4)

    def test_dampening_counts(self) -> None:
        plain, damped = SLQLearningRate(set_momentum=False, **FREE), SLQLearningRate(set_momentum=False, **FREE)
        watched(plain)
        watched(damped, Small(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.5)))
        assert damped.lr == pytest.approx(2 * plain.lr)

    def test_refusals(self) -> None:
        with pytest.raises(RefusedError, match="that of RMSprop is not known"):
            fit(Small(torch.optim.RMSprop), [SLQLearningRate()], loader())
        with pytest.raises(RefusedError, match="slq .*manual optimization"):
            fit(Manual(), [SLQLearningRate()])
        with pytest.warns(UserWarning, match="gradients are clipped"):
            fit(Small(), [SLQLearningRate(steps=2)], loader(), gradient_clip_val=1.0)


def scheduled(make: Callable[[Any], Any], interval: str = "step") -> Small:
    def both(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": interval}}

    return Small(both)


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-4),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, 20, cycle_momentum=False),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


class TestSchedulers:
    def test_refused_unless_composed(self) -> None:
        with pytest.raises(RefusedError, match="StepLR would overwrite. .* schedulers='compose'"):
            fit(scheduled(SCHEDULERS["step"]), [SLQLearningRate()], loader())
        cycling = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, 20)  # noqa: E731
        with pytest.raises(RefusedError, match="sets the momentum, .* cycle_momentum=False"):
            fit(scheduled(cycling), [SLQLearningRate(schedulers="compose")], loader())

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_composed_rates_are_products(self, name: str) -> None:
        learner = SLQLearningRate(steps=3, schedulers="compose")
        bases: list[float] = []

        class Base(pl.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                bases.append(learner.lr)  # type: ignore[arg-type]

        alone, composed = Watch(False), Watch(False)
        fit(scheduled(SCHEDULERS[name]), [alone], loader(), epochs=4)
        fit(scheduled(SCHEDULERS[name]), [learner, Base(), composed], loader(), epochs=4)
        assert bases[0] == pytest.approx(1e-3)
        assert bases[-1] == pytest.approx(27e-3)
        factors = [group["lr"] / 1e-3 for group in alone.seen]
        assert len({round(factor, 6) for factor in factors}) > 3
        assert [group["lr"] for group in composed.seen] == pytest.approx(
            [f * b for f, b in zip(factors, bases, strict=True)]
        )


class Dropped(Plain):
    """With everything that a measurement could disturb."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        )


class TestUndisturbed:
    @pytest.mark.parametrize("operator", ["hessian", "ggn", "fisher", "finite_differences"])
    def test_spectrum_changes_nothing(self, operator: Any) -> None:
        runs = []
        for callbacks in ([], [HessianSpectrum(steps=4, every_n_epochs=1, operator=operator)]):
            module = Dropped()
            fit(module, callbacks, helpers.loader(data(), 16))
            runs.append((module.state_dict(), torch.get_rng_state(), [p.grad for p in module.parameters()]))
        (one, rng, gradients), (other, rng_other, gradients_other) = runs
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(rng, rng_other)
        assert [g is None for g in gradients] == [g is None for g in gradients_other]

    def test_autocast_is_off(self) -> None:
        exact, mixed = SLQLearningRate(**FREE), SLQLearningRate(**FREE)
        watched(exact)
        watched(mixed, precision="bf16-mixed")
        assert mixed.extremes == exact.extremes


class TestSpectrum:
    def test_whole_data(self) -> None:
        module, spectrum = Small(), HessianSpectrum(num_batches="all", steps=53, every_n_epochs=2)
        trainer = fit(module, [spectrum], loader(), epochs=4)
        assert [epoch for epoch, _ in spectrum.densities] == [2, 4]
        values = torch.linalg.eigvalsh(dense(Small(), weights(module), data().tensors)[1])
        density = spectrum.densities[-1][1]
        assert density.largest == pytest.approx(float(values[-1]), rel=1e-4)
        assert density.smallest == pytest.approx(float(values[0]), rel=1e-4)
        assert float(trainer.callback_metrics["spectrum/largest"]) == pytest.approx(density.largest)
        assert float(trainer.callback_metrics["spectrum/smallest"]) == pytest.approx(density.smallest)

    def test_one_batch_is_chosen_once(self) -> None:
        module, spectrum = Small(), HessianSpectrum(steps=8, every_n_epochs=1)
        trainer = fit(module, [spectrum], helpers.loader(data(), 16), epochs=1)
        again = spectrum.measure(trainer, module)
        assert torch.equal(again.values, spectrum.densities[0][1].values)
        other = HessianSpectrum(steps=8, seed=1).measure(trainer, module)
        assert not torch.equal(again.values, other.values)

    def test_validation_data(self) -> None:
        module, spectrum = Small(), HessianSpectrum("val", "all", steps=53, every_n_epochs=1)
        held = helpers.data(20, features=6, classes=3, seed=5)
        fit(module, [spectrum], loader(), helpers.loader(held, 8, shuffle=False), epochs=1)
        values = torch.linalg.eigvalsh(dense(Small(), weights(module), held.tensors)[1])
        assert spectrum.densities[0][1].largest == pytest.approx(float(values[-1]), rel=1e-4)

    def test_picture_and_state(self, tmp_path: Path) -> None:
        spectrum = HessianSpectrum(steps=5, probes=2, every_n_epochs=1, pictures="spectra")
        fit(Small(), [spectrum], loader(), default_root_dir=tmp_path)
        assert sorted(p.name for p in (tmp_path / "spectra").iterdir()) == ["hessian_0001.png", "hessian_0002.png"]
        restored = HessianSpectrum()
        restored.load_state_dict(spectrum.state_dict())
        assert [e for e, _ in restored.densities] == [1, 2]
        assert torch.equal(restored.densities[1][1].weights, spectrum.densities[1][1].weights)

    def test_operations_that_cannot_be_differentiated_twice(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x.tanh()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)

        class Layer(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Once.apply(x)

        module = Small()
        module.net[1] = Layer()
        with pytest.raises(FulguriteError, match="cannot be differentiated twice"):
            fit(module, [HessianSpectrum(every_n_epochs=1, steps=3)], loader())
        spectrum = HessianSpectrum(num_batches="all", operator="finite_differences", every_n_epochs=1, steps=20)
        fit(module, [spectrum], loader(), epochs=1)
        values = torch.linalg.eigvalsh(dense(Small(), weights(module), data().tensors)[1])
        assert spectrum.densities[0][1].largest == pytest.approx(float(values[-1]), rel=1e-2)

    def test_loss_that_cannot_be_measured(self) -> None:
        class Detached(Small):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return (self(batch[0]) ** 2).mean()

        with pytest.raises(RefusedError, match=r"HessianSpectrum \(spectrum\) .* no loss of torch.nn.functional"):
            fit(Detached(), [HessianSpectrum(every_n_epochs=1)], loader())

    def test_bad_arguments(self) -> None:
        for bad, message in (
            ({"dataloader": "test"}, "`dataloader`"),
            ({"num_batches": 0}, "`num_batches` .* a positive integer or 'all', but got 0"),
            ({"steps": 0}, "`steps`"),
            ({"operator": "kfac"}, "`operator` .* one of 'hessian', 'ggn'"),
        ):
            with pytest.raises(ValueError, match=message):
                HessianSpectrum(**bad)
