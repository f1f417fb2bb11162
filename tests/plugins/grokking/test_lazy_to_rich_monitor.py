# SPDX-License-Identifier: Apache-2.0
"""What the monitor logs, against oracles of its own; that nothing notices it; resume; and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.errors import RefusedError
from fulgurite.tasks import Regression
from fulgurite_datamodules.polynomial_regression import PolynomialRegression
from fulgurite_plugins.grokking.lazy_to_rich_grokking import (
    LazyRichMonitor,
    OutputScaling,
    QuadraticPerceptron,
    kernel_alignment,
    kernel_regression,
)
from tests import helpers
from tests.helpers import Plain, fit, weights


def regression(outputs: int = 2, lr: float = 0.05) -> Regression:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, outputs))
    return Regression(network, optimizer=lambda p: torch.optim.SGD(p, lr=lr))


def examples(n: int, outputs: int = 2, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randn(n, outputs, generator=generator))


def run(monitor: LazyRichMonitor, module: Any = None, others: Any = (), epochs: int = 4, **trainer: Any) -> Any:
    """Train on 24 examples in batches of 12, two steps per epoch, with 10 for validation."""
    module = regression() if module is None else module
    trained = helpers.trainer([*others, monitor], epochs, **trainer)
    trained.fit(module, DataLoader(examples(24), 12), DataLoader(examples(10, seed=1), 4))
    return trained


def jacobian(network: nn.Module, x: Tensor) -> Tensor:
    found = jacrev(lambda p: functional_call(network, p, (x,)))({n: p.detach() for n, p in network.named_parameters()})
    return torch.cat([part.flatten(2) for part in found.values()], dim=2)


@pytest.mark.parametrize("kernel", ["trace", "full"])
def test_measures_are_their_definitions(kernel):
    """Everything from the dense Jacobians of the networks before and after."""
    module = regression()
    start = copy.deepcopy(module.network)
    monitor = LazyRichMonitor(every_n_steps=8, kernel=kernel)
    trainer = run(monitor, module)
    (x, y), (x_val, y_val) = examples(24).tensors, examples(10, seed=1).tensors
    before, after = jacobian(start, torch.cat([x, x_val])), jacobian(module.network, x)
    form = "ncp,mcp->nm" if kernel == "trace" else "ncp,mep->ncme"
    both, now = torch.einsum(form, before, before), torch.einsum(form, after, after)
    then = both[:24].narrow(both.ndim // 2, 0, 24)
    found = {key.removeprefix("lazyrichmonitor/"): float(v) for key, v in trainer.callback_metrics.items()}
    close = {"rel": 1e-3, "abs": 1e-6}
    assert found["kernel_alignment"] == pytest.approx(float(kernel_alignment(now, y)), **close)
    drift = 1 - float((now * then).sum() / (now.norm() * then.norm()))
    assert found["kernel_drift"] == pytest.approx(drift, **close)
    old, new = weights(start), weights(module.network)
    assert found["displacement"] == pytest.approx(float((new - old).norm() / old.norm()), **close)
    with torch.no_grad():
        grams = [h @ h.mT for h in (h - h.mean(0) for h in (net[:2](x) for net in (start, module.network)))]
        feature_drift = 1 - float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))
        assert found["feature_drift"] == pytest.approx(feature_drift, **close)
        assert found["train_loss"] == pytest.approx(float(F.mse_loss(module.network(x), y)), **close)
        assert found["val_loss"] == pytest.approx(float(F.mse_loss(module.network(x_val), y_val)), **close)
        cross = both[24:].narrow(both.ndim // 2, 0, 24)
        outputs = {"initial": start(x), "cross_initial": start(x_val)}
        predicted = kernel_regression(then, y, cross, **outputs)
    assert found["kernel_regression_val_loss"] == pytest.approx(float(F.mse_loss(predicted, y_val)), rel=0.02)
    assert found["kernel_regression_train_loss"] < 1e-4
    assert [entry["step"] for entry in monitor.history] == [0, 8]
    old, new = start[0].weight.detach(), module.network[0].weight.detach()
    assert monitor.displacements["network.0.weight"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)


@pytest.mark.parametrize("center", ["copy", "antisymmetric"])
def test_linearised_losses_are_those_of_a_lazy_training(center):
    """At alpha 1000 training is the lazy trajectory, with momentum too; the kernel has not moved."""

    def train(alpha: float, momentum: float = 0.0) -> dict[str, float]:
        module = regression(outputs=1)
        module.make_optimizer = lambda p: torch.optim.SGD(p, lr=0.01, momentum=momentum)
        monitor = LazyRichMonitor(every_n_steps=60, log_linearized=True)
        steps = DataLoader(examples(24, 1), 24, sampler=60 * [*range(24)])
        helpers.trainer([OutputScaling(alpha, center), monitor], 1).fit(
            module, steps, DataLoader(examples(10, 1, seed=1), 10)
        )
        return monitor.history[-1]

    lazy, rich, faster = train(1000.0), train(0.1), train(1000.0, momentum=0.5)
    for part in ("train", "val"):
        assert lazy[f"{part}_loss"] == pytest.approx(lazy[f"linearized_{part}_loss"], rel=0.02)
        assert faster[f"{part}_loss"] == pytest.approx(faster[f"linearized_{part}_loss"], rel=0.05)
    assert faster["train_loss"] < lazy["train_loss"] - 0.03
    assert lazy["kernel_drift"] < 1e-5
    assert rich["kernel_drift"] > 1e-3


def test_crossings_and_delay_are_logged():
    data = PolynomialRegression(dim=8, train_size=32, test_size=200, repeats=500)
    torch.manual_seed(0)
    module = Regression(QuadraticPerceptron(8, 64, epsilon=0.5), optimizer=lambda p: torch.optim.SGD(p, lr=32.0))
    monitor = LazyRichMonitor(every_n_steps=20, thresholds=0.2)
    helpers.trainer([OutputScaling(0.5), monitor], 1).fit(module, data)
    history, start = monitor.history, monitor.history[0]
    first = {
        part: next(h["step"] for h in history if h[f"{part}_loss"] <= 0.2 * start[f"{part}_loss"])
        for part in ("train", "val")
    }
    assert history[-1]["train_step"] == first["train"]
    assert history[-1]["val_step"] == first["val"] > first["train"]
    assert history[-1]["delay"] == pytest.approx(math.log10(first["val"] / first["train"]))
    between = next(h for h in history if h["step"] == first["val"] - 20)
    assert between["delay"] == pytest.approx(math.log10(between["step"] / first["train"]))


def test_nothing_notices_it():
    plain, watched = regression(), regression()
    helpers.trainer((), 4).fit(plain, DataLoader(examples(24), 12, shuffle=False))
    run(LazyRichMonitor(every_n_steps=1), watched)
    assert torch.equal(weights(plain), weights(watched))


def test_validating_more_often_changes_nothing_that_it_measures():
    once, twice = LazyRichMonitor(every_n_steps=2), LazyRichMonitor(every_n_steps=2)
    run(once)
    run(twice, val_check_interval=0.5)
    assert once.history == twice.history
    assert len(once.history) == 5


def test_accumulation_counts_optimizer_steps():
    monitor = LazyRichMonitor(every_n_steps=2)
    run(monitor, accumulate_grad_batches=2)
    assert [entry["step"] for entry in monitor.history] == [0, 2, 4]


def test_resume_goes_on_with_the_same_measures(tmp_path):
    def both() -> list[Any]:
        return [OutputScaling(4.0), LazyRichMonitor(every_n_steps=1, log_linearized=True)]

    whole, first, second = both(), both(), both()
    run(whole[1], others=whole[:1])
    run(first[1], others=first[:1], epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    trainer = helpers.trainer(second, 4)
    loaders = DataLoader(examples(24), 12), DataLoader(examples(10, seed=1), 4)
    trainer.fit(regression(), *loaders, ckpt_path=tmp_path / "a.ckpt")
    assert second[1].history == whole[1].history
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_only_named_parameters_count():
    monitor = LazyRichMonitor(every_n_steps=8, parameters=["*.2.*"])
    run(monitor)
    assert set(monitor.displacements) == {"network.2.weight", "network.2.bias"}
    frozen = regression()
    frozen.network[0].requires_grad_(False)
    every = LazyRichMonitor(every_n_steps=8)
    run(every, frozen)
    assert set(every.displacements) == {"network.2.weight", "network.2.bias"}


@pytest.mark.parametrize("kind", [Plain, helpers.DictReturned, helpers.OneArgument])
def test_classifiers_are_compared_with_one_hot_labels(kind):
    monitor = LazyRichMonitor(every_n_steps=4)
    module = kind()
    fit(module, [monitor], helpers.loader(shuffle=False), helpers.loader(helpers.data(20, seed=1)))
    x, y = helpers.data().tensors
    after = jacobian(module.net, x)
    expected = kernel_alignment(torch.einsum("ncp,mcp->nm", after, after), F.one_hot(y, 5))
    assert monitor.history[-1]["kernel_alignment"] == pytest.approx(float(expected), rel=1e-3)
    assert "delay" not in monitor.history[0]
    assert monitor.history[-1]["step"] == 8


def test_other_data_can_be_given_and_there_need_be_no_validation():
    monitor = LazyRichMonitor(DataLoader(examples(7, seed=5), 3), every_n_steps=8)
    run(monitor)
    assert "val_loss" not in monitor.history[-1]
    of_val = LazyRichMonitor("val", every_n_steps=8)
    run(of_val)
    alone = LazyRichMonitor(every_n_steps=4)
    fit(Plain(), [alone])
    assert "val_loss" not in alone.history[-1]
    assert of_val.history[0]["train_loss"] != monitor.history[0]["train_loss"]


def test_a_loss_that_is_not_finite_is_no_crossing():
    class Explodes(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (math.nan if self.global_step > 3 else 1.0)

    torch.manual_seed(0)
    module = Explodes(nn.Linear(4, 2), optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    monitor = LazyRichMonitor(every_n_steps=2, thresholds=1e-9)
    run(monitor, module)
    assert math.isnan(monitor.history[-1]["train_loss"])
    assert "train_step" not in monitor.history[-1]


def test_an_error_of_the_training_step_leaves_the_module_as_one_in_training_does():
    class Fails(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("on purpose")

    module = Fails()
    with pytest.raises(KeyError, match="on purpose"):
        fit(module, [LazyRichMonitor()])
    assert module._current_fx_name is None


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_samples": 0}, "`max_samples` of LazyRichMonitor to be a positive integer, but got 0"),
        ({"max_samples": 6000}, "at most 5000, but got 6000: a kernel of that many examples takes 0.1 GiB"),
        ({"every_n_steps": 1.5}, "`every_n_steps` of LazyRichMonitor"),
        ({"kernel": "dense"}, "`kernel` of LazyRichMonitor to be one of 'trace', 'full', but got 'dense'"),
        ({"thresholds": 0.0}, "`thresholds` of LazyRichMonitor to be a positive number"),
        ({"smoothing": 1.0}, r"`smoothing` of LazyRichMonitor to be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LazyRichMonitor(**arguments)


def test_batch_normalisation_is_refused_unless_allowed():
    def module() -> Regression:
        network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        return Regression(network, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))

    with pytest.raises(RefusedError, match="BatchNorm1d '1'.*allow_batchnorm_eval=True"):
        run(LazyRichMonitor(), module())
    allowed = LazyRichMonitor(every_n_steps=8, allow_batchnorm_eval=True)
    run(allowed, module())
    assert math.isfinite(allowed.history[-1]["kernel_drift"])


def test_what_it_cannot_measure_is_refused():
    with pytest.raises(RefusedError, match="`parameters` of LazyRichMonitor.*'nothing'.*network.0.weight"):
        run(LazyRichMonitor(parameters=["nothing"]))
    with pytest.raises(RefusedError, match="`module` of LazyRichMonitor to name a part"):
        run(LazyRichMonitor(module="net.work"))
    with pytest.raises(RefusedError, match="log_linearized=True.*cross_entropy under SGD"):
        fit(Plain(), [LazyRichMonitor(log_linearized=True)])

    class Twice(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]) + self(-batch[0]), batch[1])

    with pytest.raises(RefusedError, match="Sequential was called 2 times.*`module=`"):
        fit(Twice(), [LazyRichMonitor()])
