# SPDX-License-Identifier: Apache-2.0
"""What the callback computes, against finite differences, a plain training loop and closed forms."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.bench import batches
from fulgurite.phase import training_loss, unnoticed
from fulgurite.random import derived_seed
from fulgurite_plugins.bilevel.self_tuning_networks.context import _mixed
from fulgurite_plugins.bilevel.self_tuning_networks.functional import RangeMap, perturb
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.intervention import SelfTuning
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import gated_layers, hyper_parameters
from fulgurite_plugins.bilevel.self_tuning_networks.targets import InputFunction
from tests import helpers
from tests.plugins.bilevel import stn


def steps(x: Tensor, value: Tensor) -> Tensor:
    return x * value.view(-1, 1)


@pytest.mark.parametrize("embed", ["unconstrained", "constrained"])
def test_gradient_of_the_validation_objective_is_that_of_finite_differences(embed):
    """In the hyperparameters and the scales, with common random numbers; the floor of a discrete one is no hindrance."""
    discrete = Hyper("steps", InputFunction(steps), init=2, range=(0, 8), discrete=True)
    tuner = stn.tuner(stn.rate(), stn.noise(), discrete, stn.decay(), embed=embed, entropy_weight=0.1)
    module, checked = stn.Slow(), []

    class Check(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            batch = tuple(t[:16].double() if t.is_floating_point() else t[:16] for t in helpers.data(seed=3).tensors)
            application, validation = tuner._application, tuner._validation

            def objective(theta: Tensor) -> Tensor:
                with unnoticed(pl_module, 0):
                    validation.show(theta, batch, application, seed=5)
                    loss = validation.objective(training_loss(trainer, pl_module, batch, 0), theta)
                    application.conditioning.clear()
                return loss

            theta = tuner.tuner.theta.double().requires_grad_()
            (exact,) = torch.autograd.grad(objective(theta), theta)
            step = 1e-5
            for index in range(theta.numel()):
                change = torch.zeros(theta.numel(), dtype=torch.float64)
                change[index] = step
                change = change.view_as(theta)
                difference = (objective(theta + change) - objective(theta - change)) / (2 * step)
                torch.testing.assert_close(exact.flatten()[index], difference, rtol=1e-4, atol=1e-9)
            checked.append(exact)

    loader = helpers.loader(
        torch.utils.data.TensorDataset(*(t.double() if t.is_floating_point() else t for t in helpers.data(160).tensors))
    )
    stn.fit([tuner, Check()], module, epochs=1, precision="64-true", loader=loader)
    assert checked[0].abs().min() > 1e-6


class Frozen(SelfTuning):
    """The method with gates that are zero and stay so."""

    def operate(self, module: Any) -> None:
        super().operate(module)
        for layer in gated_layers(module).values():
            layer.gate.weight.requires_grad_(False).zero_()


def test_without_gates_training_is_ordinary_training_with_dropout_rates_for_each_example():
    """Against a plain loop that draws the same rates and the same masks: parameters agree to 1e-6."""
    tuner = Frozen([stn.rate(init=0.4)], lr=0.0, scale_lr=0.0, warmup_epochs=0.5, schedule_file=None, seed=3)
    module = stn.Slow()
    stn.fit([tuner], module, epochs=2, shuffle=False)
    order = tuner._validation.state_dict()["split"]["trained_on"]
    plain = stn.Slow()
    pl.seed_everything(1, verbose=False)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer: Any = plain.configure_optimizers()
    map_ = RangeMap(0.0, 0.9)
    inputs, targets = helpers.data(160).tensors
    draws = 0
    for _ in range(2):
        for part in order.split(16):
            generator = torch.Generator().manual_seed(derived_seed(3, 0, draws, 0))
            lam0 = map_.unconstrain(torch.tensor([0.4], dtype=torch.float64)).float()
            rates = map_.constrain(perturb(lam0, torch.tensor([0.5]), len(part), None, generator))
            hidden = plain.net[1](plain.net[0](inputs[part]))
            masks = torch.Generator().manual_seed(_mixed(derived_seed(3, 0, draws, 1), 0))
            keep = 1.0 - rates
            mask = (torch.rand(hidden.shape, generator=masks) < keep) / keep
            optimizer.zero_grad()
            F.cross_entropy(plain.net[3](hidden * mask), targets[part]).backward()
            optimizer.step()
            draws += 1
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter, rtol=0, atol=1e-6)
    assert tuner._validation.steps > 0


class WithBatchNorm(stn.Slow):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(16))


def test_validation_steps_touch_neither_gradients_nor_buffers():
    tuner, seen = stn.tuner(), []

    class Watch(pl.Callback):
        """Before and after the callback's own hook, which takes the validation steps."""

        def __init__(self, first: bool) -> None:
            self.first = first

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any, **__: Any) -> None:
            tensors = [p.grad for p in module.parameters()] + list(module.buffers()) + list(module.parameters())
            copies = [None if t is None else t.clone() for t in tensors]
            if self.first:
                self.copies = copies
                seen.append((copies, tuner._validation.steps))
                return
            before, steps_ = seen[-1]
            for a, b in zip(before, copies, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
            seen[-1] = tuner._validation.steps - steps_

    module = WithBatchNorm()
    stn.fit([Watch(True), tuner, Watch(False)], module)
    assert sum(seen) == 6
    assert int(module.net[1].num_batches_tracked) == 16


class Quadratic(pl.LightningModule):
    """A frozen network whose output is its hyperparameters, and the convex loss y H y / 2."""

    def __init__(self, hessian: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.register_buffer("hessian", hessian)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.layer(torch.ones_like(batch[0][:, :1]))
        return 0.5 * ((y @ self.hessian) * y).sum(dim=1).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Identity(SelfTuning):
    """Gates with which the output of the layer is the hyperparameters."""

    def operate(self, module: Any) -> None:
        super().operate(module)
        module.layer.hyper_weight.data.fill_(1.0)
        module.layer.gate.weight.data.copy_(torch.eye(2))


HESSIAN = torch.tensor([[2.0, 0.3], [0.3, 0.5]])


def quadratic(entropy_weight: float, steps_: int, **kwargs: Any) -> Identity:
    hypers = [Hyper(n, InputFunction(steps), 0.0, (-float("inf"), float("inf")), scale=0.5) for n in ("a", "b")]
    loader = batches(40960, 1, 2, 2048)()
    tuner = Identity(
        hypers,
        holdout=0.5,
        warmup_epochs=0.0,
        train_steps=1,
        entropy_weight=entropy_weight,
        schedule_file=None,
        **kwargs,
    )
    helpers.trainer([tuner], epochs=-1, max_steps=steps_).fit(Quadratic(HESSIAN), loader)
    return tuner


def test_scales_go_to_the_root_of_entropy_weight_over_curvature():
    tuner = quadratic(0.05, 300, lr=0.03, scale_lr=0.03)
    last = torch.tensor(tuner.course.scales[-150:]).mean(dim=0)
    torch.testing.assert_close(last, (0.05 / HESSIAN.diagonal()).sqrt(), rtol=0.0, atol=1e-2)
    assert tuner.tuner.lam.abs().max() < 0.05


def test_without_entropy_scales_of_a_convex_loss_shrink_monotonically():
    scales = torch.tensor(quadratic(0.0, 40, lr=0.02, scale_lr=0.02).course.scales)
    assert (scales.diff(dim=0) < 0).all()


def test_draws_of_a_step_are_shared_or_not_and_have_the_right_moments():
    shown: list[Tensor] = []

    class Notes(stn.Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            shown.append(next(iter(gated_layers(self).values())).conditioning.h.detach().clone())
            return super().training_step(batch, batch_idx)

    tuner = stn.tuner(stn.decay(scale=0.7), stn.noise(scale=0.3), lr=0.0, scale_lr=0.0, warmup_epochs=0.0)
    stn.fit([tuner], Notes(), epochs=4, loader=helpers.loader(helpers.data(1000), 80))
    training = [h for h in shown if len(h) == 80]
    assert all((h[:, 0] == h[0, 0]).all() for h in training)
    assert all(len(h[:, 1].unique()) == 80 for h in training)
    lam = tuner.tuner.lam
    n = len(training)
    shared, own = torch.stack([h[0, 0] for h in training]), torch.cat([h[:, 1] for h in training])
    for draws, mean, std, count in ((shared, lam[0], 0.7, n), (own, lam[1], 0.3, n * 80)):
        assert abs(float(draws.mean() - mean)) < 5 * std / count**0.5
        assert abs(float(draws.std()) - std) < 5 * std / (2 * count) ** 0.5


def test_extra_weights_and_tuned_ones_are_not_decayed_by_the_users_optimizer():
    class Decayed(stn.Slow):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.1)

    for hypers, decayed in (([stn.rate()], {"net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"}),
                            ([stn.decay()], {"net.0.bias", "net.3.bias"})):  # fmt: skip
        module = Decayed()
        trainer = stn.fit([stn.tuner(*hypers)], module, epochs=1)
        names = {id(p): name for name, p in module.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        assert {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]} == decayed
        assert len(names) == sum(len(group["params"]) for group in groups)
        assert len(hyper_parameters(module)) == 6
