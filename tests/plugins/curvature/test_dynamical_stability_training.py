# SPDX-License-Identifier: Apache-2.0
"""The monitor, the controller and the penalty in trainings: what they measure, and what they refuse."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fulgurite.errors import RefusedError
from fulgurite_plugins.curvature.dynamical_stability import (
    DiagonalLinearNetwork,
    StabilityMonitor,
    StableLearningRate,
    TracePenalty,
    TwoLayerReLU,
    max_stable_lr,
    stability_radius,
)
from fulgurite_plugins.curvature.dynamical_stability.features import OutputCurvature
from fulgurite_plugins.curvature.dynamical_stability.intervention import trace_estimate
from fulgurite_plugins.curvature.dynamical_stability.rates import Rates, read_rates, read_sampling
from tests.helpers import Plain, data, fit, loader, trainer, weights


def regression_data(n: int = 12, d: int = 4) -> TensorDataset:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :1].relu())


class Regressor(pl.LightningModule):
    """Somebody's module with a squared loss."""

    def __init__(
        self,
        network: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.05),
    ) -> None:
        super().__init__()
        self.net = TwoLayerReLU(4, 6) if network is None else network
        self.loss = loss
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def batches(n: int = 12, batch_size: int = 3, **kwargs: Any) -> DataLoader:
    return loader(regression_data(n), batch_size=batch_size, **kwargs)


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """`[N, C, P]` by plain autograd."""
    rows = [
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, list(net.parameters()), retain_graph=True)])
            for o in out
        ]
        for out in net(x)
    ]
    return torch.stack([torch.stack(row) for row in rows]).detach().double()


@pytest.mark.parametrize("quantities", [("exact",), ("trace", "frobenius", "lambda_max", "refined")])
def test_what_is_logged_is_what_a_dense_computation_gives(quantities: Any) -> None:
    """mse_loss of one output has the curvature 2 g g^T; batches are drawn without replacement."""
    module = Regressor()
    monitor = StabilityMonitor(quantities=quantities, probes=600)
    run = fit(module, [monitor], batches(), epochs=2)
    x, y = regression_data().tensors
    j = math.sqrt(2) * jacobian(module.net, x)[:, 0]
    h = j.T @ j / 12
    found = {key.removeprefix("stability/"): float(value) for key, value in run.callback_metrics.items()}
    trace, largest = float(h.trace()), float(torch.linalg.eigvalsh(h)[-1])
    assert found["loss"] == pytest.approx(float(F.mse_loss(module.net(x), y)), rel=1e-5)
    assert found["trace"] == pytest.approx(trace, rel=1e-5)
    assert found["trace_error"] == 0.0  # all examples were measured
    assert found["frobenius"] == pytest.approx(float(h.norm()), rel=1e-5 if "exact" in quantities else 0.15)
    assert found["lambda_max"] == pytest.approx(largest, rel=1e-5)
    assert found["lr_trace"] == pytest.approx(0.05 * trace / 6, rel=1e-5)
    assert found["lr_lambda"] == pytest.approx(0.05 * largest / 2, rel=1e-5)
    assert found["max_lr_gd"] == pytest.approx(2 / largest, rel=1e-5)
    w_d, w_r = 9 / (3 * 11), 12 * 2 / (3 * 11)
    refined = 2 * trace / (w_d * float(j.norm(dim=1).pow(4).mean()) + w_r * float(h.square().sum()))
    assert found["max_lr_refined"] == pytest.approx(refined, rel=1e-5 if "exact" in quantities else 0.15)
    if "exact" in quantities:
        exact = float(max_stable_lr(j @ j.T, 3))
        assert found["max_lr_exact"] == pytest.approx(exact, rel=1e-5)
        assert found["max_lr_sgd"] == pytest.approx(exact, rel=1e-5)
        assert found["radius"] == pytest.approx(float(stability_radius(j @ j.T, 0.05, 3)), rel=1e-6)
    assert monitor.history[-1]["epoch"] == 2


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        (F.mse_loss, 1.0),
        (lambda o, t: 0.5 * (o - t).square().sum(dim=1).mean(), 1.0),
        (lambda o, t: F.mse_loss(o, t, reduction="none").sum(dim=1).mean(), 2.0),
    ],
)
def test_the_convention_of_the_loss_is_found_out(loss: Any, scale: float) -> None:
    """Two outputs: mse_loss has 2 / C = 1, half the sum of squares 1, the sum of squares 2."""

    class Task(Regressor):
        fulgurite_criterion = "loss"

    net = nn.Linear(4, 2)
    module = Task(net, loss)
    monitor = StabilityMonitor(quantities=("trace",))
    fit(module, [monitor], loader(TensorDataset(torch.randn(12, 4), torch.randn(12, 2)), batch_size=3), epochs=1)
    x = next(iter(DataLoader(module.trainer.train_dataloader.dataset, 12)))[0]
    assert monitor.history[-1]["trace"] == pytest.approx(scale * float(jacobian(net, x).square().sum()) / 12, rel=1e-5)


def test_cross_entropy_is_a_diagnostic_with_error_bars() -> None:
    """Half of the examples: the truth on all lies within a few standard errors."""
    module = Plain()
    monitor = StabilityMonitor(max_samples=30, quantities=("trace", "refined", "lambda_max"), output_probes=8)
    fit(module, [monitor], epochs=2)
    whole = StabilityMonitor(quantities=("trace",))
    fit(Plain(), [whole], epochs=2)
    last, truth = monitor.history[-1], whole.history[-1]
    assert 0 < last["trace_error"] < 0.5 * last["trace"]
    assert abs(last["trace"] - truth["trace"]) < 4 * last["trace_error"]
    assert truth["max_lr_trace"] == pytest.approx(2 * 16 * 4 / truth["trace"])  # rank C - 1


def test_training_goes_on_as_without_it() -> None:
    plain, watched = Plain(dropout=0.3), Plain(dropout=0.3)
    fit(plain)
    fit(watched, [StabilityMonitor(max_samples=20)])
    assert torch.equal(weights(plain), weights(watched))


def test_the_whole_hessian_and_the_residual() -> None:
    module = Regressor(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)))
    monitor = StabilityMonitor(quantities=("trace", "lambda_max", "frobenius"), curvature="hessian", probes=300)
    fit(module, [monitor], batches(), epochs=1)
    x, y = regression_data().tensors
    names, values = zip(*module.net.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        parameters = {n: part.view_as(v) for n, part, v in zip(names, parts, values, strict=True)}
        return F.mse_loss(torch.func.functional_call(module.net, parameters, (x,)), y)

    h = torch.func.hessian(loss)(torch.cat([v.detach().flatten() for v in values]))
    gauss_newton = 2 * float(jacobian(module.net, x).square().sum()) / 12
    last = monitor.history[-1]
    assert abs(last["trace"] - float(h.trace())) < 4 * last["trace_error"]
    assert last["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-4)
    assert last["residual_trace"] == pytest.approx(last["trace"] - gauss_newton, rel=1e-4, abs=1e-4)


def two_groups(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": module.net.hidden.parameters(), "lr": 0.02}, {"params": module.net.output.parameters(), "lr": 0.08}]  # type: ignore[union-attr, operator]
    )


@pytest.mark.parametrize("quantities", [("exact",), ("trace", "lambda_max")])
def test_groups_with_other_rates_weigh_the_features(quantities: Any) -> None:
    class Grouped(Regressor):
        def configure_optimizers(self) -> Any:
            return two_groups(self)

    module = Grouped()
    monitor = StabilityMonitor(quantities=quantities)
    with pytest.warns(UserWarning, match="parameter groups have different learning rates"):
        fit(module, [monitor], batches(), epochs=1)
    x, _ = regression_data().tensors
    j = math.sqrt(2) * jacobian(module.net, x)[:, 0]
    j[:, :24] *= math.sqrt(0.02 / 0.08)
    last = monitor.history[-1]
    assert last["lr"] == pytest.approx(0.08)
    assert last["trace"] == pytest.approx(float(j.square().sum()) / 12, rel=1e-5)
    assert last["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(j @ j.T)[-1]) / 12, rel=1e-5)


def test_frozen_parameters_do_not_count() -> None:
    module = Regressor()
    module.net.output.weight.requires_grad_(False)
    monitor = StabilityMonitor(quantities=("trace",))
    fit(module, [monitor], batches(), epochs=1)
    j = jacobian(Regressor(module.net.requires_grad_(True)).net, regression_data().tensors[0])[:, 0, :24]  # type: ignore[arg-type]
    assert monitor.history[-1]["trace"] == pytest.approx(2 * float(j.square().sum()) / 12, rel=1e-5)


def gd_is_stable(lr: float, sharpness: float, momentum: float, nesterov: bool) -> bool:
    x = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum, nesterov=nesterov)
    for _ in range(3000):
        x.grad = sharpness * x.detach()
        optimizer.step()
    return bool(x.abs() < 1)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.5, True), (0.9, True)])
def test_the_limit_of_gradient_descent_is_exact_with_momentum(momentum: float, nesterov: bool) -> None:
    limit = Rates(0.1, {}, momentum, nesterov).gd_limit / 3.0
    assert gd_is_stable(0.98 * limit, 3.0, momentum, nesterov)
    assert not gd_is_stable(1.02 * limit, 3.0, momentum, nesterov)


def test_momentum_is_told_once_and_reported_both_ways() -> None:
    module = Regressor(optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5))
    monitor = StabilityMonitor(quantities=("trace",))
    with pytest.warns(UserWarning, match="rule of thumb") as caught:
        fit(module, [monitor], batches(), epochs=3)
    assert sum("rule of thumb" in str(w.message) for w in caught) == 1
    last = monitor.history[-1]
    assert last["lr_trace_momentum"] == pytest.approx(2 * last["lr_trace"])


def test_adam_is_not_covered_and_crossings_are_told() -> None:
    module = Regressor(optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    with pytest.warns(UserWarning, match="Adam, which the theory does not cover"):
        fit(module, [StabilityMonitor(quantities=("trace",))], batches(), epochs=1)
    monitor = StabilityMonitor(quantities=("trace",), lr=100.0)
    with pytest.warns(
        UserWarning, match=r"after epoch 0 the learning rate 100 is .* times the trace's limit"
    ) as caught:
        fit(Regressor(), [monitor], batches(), epochs=2)
    assert sum("times the trace's limit" in str(w.message) for w in caught) == 1  # crossed once, told once


def test_the_batch_is_that_of_an_update() -> None:
    monitor = StabilityMonitor(quantities=("trace",))
    fit(Regressor(), [monitor], batches(), epochs=1, accumulate_grad_batches=2)
    last = monitor.history[-1]
    assert last["max_lr_trace"] == pytest.approx(2 * 6 / last["trace"], rel=1e-5)
    given = StabilityMonitor(quantities=("trace",), batch_size=4)
    fit(Regressor(), [given], batches(), epochs=1)
    assert given.history[-1]["max_lr_trace"] == pytest.approx(8 / given.history[-1]["trace"], rel=1e-5)


def test_replacement_is_read_from_the_sampler() -> None:
    data = regression_data()
    drawn = DataLoader(data, 3, sampler=RandomSampler(data, replacement=True))
    monitor = StabilityMonitor(quantities=("exact",))
    module = Regressor()
    run = fit(module, [monitor], drawn, epochs=1)
    assert read_sampling(run, "test").replacement
    j = math.sqrt(2) * jacobian(module.net, data.tensors[0])[:, 0]
    expected = float(max_stable_lr(j @ j.T, 3, replacement=True))
    assert monitor.history[-1]["max_lr_exact"] == pytest.approx(expected, rel=1e-5)


def test_weight_decay_can_be_included() -> None:
    module = Regressor(optimizer=lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.5))
    monitor = StabilityMonitor(quantities=("exact",), include_weight_decay=True)
    fit(module, [monitor], batches(), epochs=1)
    j = math.sqrt(2) * jacobian(module.net, regression_data().tensors[0])[:, 0]
    last = monitor.history[-1]
    assert last["max_lr_gd"] == pytest.approx(2 / (last["lambda_max"] + 0.5), rel=1e-5)
    assert last["max_lr_exact"] == pytest.approx(float(max_stable_lr(j @ j.T, 3, weight_decay=0.5)), rel=1e-5)


def test_a_network_without_closed_forms_is_measured_too() -> None:
    module = Regressor(DiagonalLinearNetwork(4, init_scale=0.5))
    monitor = StabilityMonitor(quantities=("exact",))
    fit(module, [monitor], batches(), epochs=1)
    j = jacobian(module.net, regression_data().tensors[0])
    assert monitor.history[-1]["trace"] == pytest.approx(2 * float(j.square().sum()) / 12, rel=1e-5)


def test_history_is_kept_in_checkpoints_and_measured_every_n_epochs(tmp_path: Path) -> None:
    whole = StabilityMonitor(quantities=("trace",), every_n_epochs=2)
    first = fit(Regressor(), [whole], batches(), epochs=2)
    assert [row["epoch"] for row in whole.history] == [0, 2]
    first.save_checkpoint(tmp_path / "x.ckpt")
    resumed = StabilityMonitor(quantities=("trace",), every_n_epochs=2)
    fit(Regressor(), [resumed], batches(), epochs=4, ckpt=tmp_path / "x.ckpt")
    assert [row["epoch"] for row in resumed.history] == [0, 2, 4]
    assert resumed.history[:2] == whole.history


def test_the_picture_is_drawn_at_the_end(tmp_path: Path) -> None:
    monitor = StabilityMonitor(quantities=("exact",), picture="course.png")
    fit(Regressor(), [monitor], batches(), epochs=2, default_root_dir=tmp_path)
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_far_from_zero_is_told() -> None:
    with pytest.warns(UserWarning, match=r"the loss at the last measurement is .* diagnostics only"):
        fit(Regressor(), [StabilityMonitor(quantities=("trace",))], batches(), epochs=1)


class Sum(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1], reduction="sum")


class Absolute(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.l1_loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("module", "monitor", "message"),
    [
        (Sum, {}, "needs a loss that is a mean over examples, but mse_loss is called with reduction='sum'"),
        (Absolute, {}, "calls l1_loss on outputs of shape .* second derivative is neither"),
        (Regressor, {"batch_size": 13}, "`batch_size` to be at most the 12 training examples, but got 13"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(module: Any, monitor: Any, message: str) -> None:
    made = module()
    with pytest.raises(RefusedError, match=message):
        fit(made, [StabilityMonitor(**monitor)], batches(), epochs=1)
    assert made.trainer.global_step == 0


def test_exact_on_too_many_outputs_is_refused_with_its_memory() -> None:
    with pytest.raises(RefusedError, match=r"at most 1024 outputs .* got 300 examples of 5 outputs: about .* GiB"):
        fit(Plain(), [StabilityMonitor(quantities=("exact",))], loader(data(300)), epochs=1)


def test_weight_decay_of_differing_groups_is_refused() -> None:
    rates = Rates(0.1, {"a": 1.0, "b": 0.5}, weight_decays=(0.0, 0.1))
    with pytest.raises(RefusedError, match="needs one weight decay and one learning rate"):
        rates.weight_decay("StabilityMonitor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantities": ()}, "`quantities` of StabilityMonitor"),
        ({"quantities": ("sharpness",)}, "`quantities` of StabilityMonitor"),
        ({"quantities": ("refined",), "curvature": "hessian"}, "without 'refined' and 'exact'"),
        ({"curvature": "fisher"}, "`curvature` of StabilityMonitor"),
        ({"lr": 0.0}, "`lr` of StabilityMonitor to be positive or None, but got 0.0"),
        ({"max_samples": 0}, "`max_samples` of StabilityMonitor"),
        ({"every_n_epochs": 0}, "`every_n_epochs` of StabilityMonitor"),
        ({"probes": 0}, "`probes` of StabilityMonitor"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityMonitor(**arguments)


def test_the_controller_sets_a_part_of_the_limit() -> None:
    controller, monitor = StableLearningRate(target=0.5, limit="exact"), StabilityMonitor(quantities=("exact",))
    module = Regressor()
    run = fit(module, [controller, monitor], batches(), epochs=2)
    last = monitor.history[-1]  # measured after the rate had been set
    assert last["lr"] == pytest.approx(0.5 * last["max_lr_exact"], rel=1e-5)
    assert float(run.callback_metrics["stablelearningrate/lr"]) == pytest.approx(last["lr"])
    assert monitor.history[0]["lr"] == pytest.approx(0.05)


def test_the_controller_is_off_during_warm_up_and_keeps_ratios() -> None:
    class Grouped(Regressor):
        def configure_optimizers(self) -> Any:
            return two_groups(self)

    off = fit(Grouped(), [StableLearningRate(warmup_epochs=9)], batches(), epochs=2)
    assert [g["lr"] for g in off.optimizers[0].param_groups] == [0.02, 0.08]
    on = fit(Grouped(), [StableLearningRate(warmup_epochs=0)], batches(), epochs=2)
    low, high = (g["lr"] for g in on.optimizers[0].param_groups)
    assert high != 0.08
    assert low / high == pytest.approx(0.25)


def test_the_controller_refuses_schedulers_and_other_optimizers() -> None:
    class Scheduled(Regressor):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(RefusedError, match="has a learning-rate scheduler"):
        fit(Scheduled(), [StableLearningRate()], batches(), epochs=1)
    with pytest.raises(RefusedError, match="knows the stability of SGD, but the optimizer is Adam"):
        fit(Regressor(optimizer=torch.optim.Adam), [StableLearningRate()], batches(), epochs=1)
    with pytest.raises(ValueError, match=r"`target` of StableLearningRate to be in \(0, 1\], but got 1.5"):
        StableLearningRate(target=1.5)


def test_the_penalty_is_the_trace_on_average_over_signs() -> None:
    """Over all signs of four outputs the estimate is exact, and its gradient is that of the trace."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    parameters = list(net.parameters())
    for curvature in (OutputCurvature("squared", 1.5), OutputCurvature("cross_entropy")):
        estimates = []
        for signs in itertools.product((-1.0, 1.0), repeat=4):
            with pytest.MonkeyPatch.context() as patch:
                fixed = (torch.tensor(signs) + 1) / 2
                patch.setattr(torch, "randint", lambda *a, fixed=fixed, **k: fixed.view(2, 2))
                estimates.append(trace_estimate(net(x), parameters, curvature, 1, torch.Generator()))
        found = torch.stack(estimates).mean()

        def exact(curvature: OutputCurvature = curvature) -> Tensor:
            outputs = net(x)
            roots = curvature.roots(outputs)
            total = outputs.new_zeros(())
            for i, k in itertools.product(range(2), range(2)):
                g = torch.autograd.grad(outputs[i], parameters, roots[i, :, k], create_graph=True)
                total = total + sum(part.square().sum() for part in g) / 2
            return total

        torch.testing.assert_close(found, exact())
        for ours, theirs in zip(
            torch.autograd.grad(found, parameters, materialize_grads=True),
            torch.autograd.grad(exact(), parameters, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_the_penalty_has_a_gradient_where_probabilities_vanish() -> None:
    """The root of a probability that is 0 in floating point has no finite derivative."""
    outputs = torch.tensor([[0.0, -300.0, 1.0]], requires_grad=True)
    curvature, generator = OutputCurvature("cross_entropy"), torch.Generator()
    scaled = nn.Parameter(torch.ones(3))
    estimate = trace_estimate(outputs * scaled, [scaled], curvature, 1, generator)
    assert torch.autograd.grad(estimate, scaled)[0].isfinite().all()


def test_the_penalty_flattens_and_weight_zero_changes_nothing() -> None:
    traces = {}
    for weight in (0.0, 0.05):
        monitor = StabilityMonitor(quantities=("trace",))
        module = Regressor()
        fit(module, [TracePenalty(weight), monitor], batches(), epochs=20)
        traces[weight] = monitor.history[-1]["trace"]
        if not weight:
            plain = Regressor()
            fit(plain, (), batches(), epochs=20)
            assert torch.equal(weights(plain), weights(module))
    assert traces[0.05] < 0.8 * traces[0.0]
    with pytest.raises(ValueError, match="`weight` of TracePenalty to be a number that is not negative, but got -1"):
        TracePenalty(-1)


def test_rates_of_parameters_without_optimizer_are_zero() -> None:
    module = Regressor(optimizer=lambda p: torch.optim.SGD([next(iter(p))], lr=0.1))
    run = trainer(epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, batches())
    rates = read_rates(run, module)
    assert rates.ratios == {"net.hidden.weight": 1.0, "net.output.weight": 0.0}


@pytest.mark.parametrize("inside", [False, True])
def test_the_penalty_refuses_a_compiled_model(inside):
    """The compiler's graphs cannot be differentiated twice: torch would stop in the middle of the first backward pass."""
    module = Regressor()
    if inside:
        module.net.compile(backend="eager")
    compiled = module if inside else torch.compile(module, backend="eager")
    with pytest.raises(RefusedError, match="TracePenalty differentiates the model twice, which torch.compile does not"):
        fit(compiled, [TracePenalty(0.1)], DataLoader(regression_data(), 4), epochs=1)
    fit(module if inside else Regressor(), [TracePenalty(0.0)], DataLoader(regression_data(), 4), epochs=1)
