# SPDX-License-Identifier: Apache-2.0
"""The output scale: zero at the start, its lazy limit, its speed, its learning rates, its state; and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.optim import lr_scheduler

from fulgurite import FulguriteError
from fulgurite.errors import RefusedError
from fulgurite.landscape import ntk_gram
from fulgurite_plugins.grokking.lazy_to_rich_grokking import OutputScaling, lazy_trajectory, merge
from fulgurite_plugins.grokking.lazy_to_rich_grokking.learning_rate import kind_of, scale_rates
from fulgurite_plugins.grokking.lazy_to_rich_grokking.scaling import scale_weights
from tests import helpers
from tests.helpers import Plain, fit, weights

CENTERS = ["none", "copy", "antisymmetric"]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def inputs(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scaled(alpha: float, center: Any = "copy") -> nn.Module:
    model = network()
    OutputScaling(alpha, center).operate(model)
    return model


def descend(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
    """Train on half the squared error, summed over outputs, averaged over examples; return all outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    outputs = []
    for _ in range(steps):
        outputs.append(model(x))
        optimizer.zero_grad()
        (0.5 * (outputs[-1] - y).square().sum(1).mean()).backward()
        optimizer.step()
    return torch.stack([*outputs, model(x)]).detach()


# The function


@pytest.mark.parametrize("center", CENTERS)
def test_scaled_function_is_the_formula(center):
    model, x = scaled(4.0, center), inputs()
    start = network()
    with torch.no_grad():
        for parameter in list(model.parameters())[:4]:
            parameter += 0.1
        plain = copy.deepcopy(start)
        for parameter in plain.parameters():
            parameter += 0.1
    g, g0 = plain(x), start(x)
    expected = {"none": 4 * g, "copy": 4 * (g - g0), "antisymmetric": 4 * (g - g0) / math.sqrt(2)}[center]
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=0)  # alpha / sqrt(2) is a float32 number


@pytest.mark.parametrize("center", ["copy", "antisymmetric"])
@pytest.mark.parametrize("mode", [True, False])
def test_output_is_zero_at_the_start(center, mode):
    """Also with batch normalisation, whose copy follows the mode."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).train(mode)
    OutputScaling(100.0, center).operate(model)
    x = inputs().float()
    for _ in range(2):
        assert (model(x) == 0).all()


def test_a_frozen_copy_has_no_dropout_and_no_gradients():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    OutputScaling(2.0).operate(model)
    model.train()
    other = model.output_scaling.other
    x = inputs().float()
    assert torch.equal(other(x), other(x))
    assert model[1].training
    model(x).sum().backward()
    assert all(p.grad is None for p in other.parameters())
    assert not any(p.requires_grad for p in other.parameters())


def test_tangent_kernel_of_both_centrings_is_alpha_squared_times_that_of_the_network():
    x = inputs()
    expected = 9 * ntk_gram(network(), x)
    for center in CENTERS:
        torch.testing.assert_close(ntk_gram(scaled(3.0, center), x), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("center", ["copy", "antisymmetric"])
def test_large_alpha_is_kernel_gradient_descent(center):
    """The largest deviation over 100 steps falls as 1 / alpha; of a twin as 1 / alpha^2, as its first order cancels."""
    x, y = inputs(), torch.randn(6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lr, steps, alphas = 0.1, 100, (10.0, 30.0, 100.0)
    lazy = lazy_trajectory(ntk_gram(network(), x), y, torch.zeros_like(y), torch.arange(steps + 1), lr=lr)
    deviations = []
    for alpha in alphas:
        trained = descend(scaled(alpha, center), x, y, lr / alpha**2, steps)
        deviations.append(float((trained - lazy).abs().max()))
    logs = [torch.tensor(values, dtype=torch.float64).log() for values in (alphas, deviations)]
    logs = [values - values.mean() for values in logs]
    slope = float((logs[0] * logs[1]).sum() / logs[0].square().sum())
    assert slope == pytest.approx({"copy": -1, "antisymmetric": -2}[center], abs=0.15)
    assert float((lazy[-1] - y).abs().max()) < float(y.abs().max())


def test_first_step_moves_outputs_equally_whatever_alpha_is():
    x, y = inputs(), torch.ones(6, 2).double()
    moves = []
    for alpha in (0.5, 2.0, 8.0):
        outputs = descend(scaled(alpha), x, y, 1e-7 / alpha**2, 1)
        moves.append(outputs[1] - outputs[0])
    for move in moves[1:]:
        torch.testing.assert_close(move, moves[0], rtol=1e-5, atol=0)


def test_alpha_one_without_centring_changes_nothing():
    plain, with_it = Plain(), Plain()
    fit(plain)
    fit(with_it, [OutputScaling(1.0, "none")])
    assert torch.equal(weights(plain), weights(with_it))
    assert plain.state_dict().keys() == with_it.state_dict().keys()


def test_float16_outputs_are_multiplied_in_float32():
    model = nn.Linear(2, 2, bias=False).half()
    nn.init.constant_(model.weight, 100.0)
    OutputScaling(1e5, "none").operate(model)
    model.half()  # must not overflow alpha
    assert model(torch.ones(1, 2).half()).tolist() == [[2e7, 2e7]]


@pytest.mark.parametrize("center", CENTERS)
def test_copies_and_pickles_are_whole_and_independent(center):
    model, x = scaled(2.0, center), inputs()
    with torch.no_grad():
        model[0].weight += 0.1
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        copied = duplicate(model)
        assert torch.equal(copied(x), model(x))
        before = copied(x)
        with torch.no_grad():
            model[0].weight += 0.1
        assert torch.equal(copied(x), before)
        assert not torch.equal(model(x), before)


def test_a_compiled_network_is_not_compiled_anew_when_alpha_changes():
    model = network().float()
    OutputScaling(2.0).operate(model)
    with torch.no_grad():
        model[0].weight += 0.1
    counter = CompileCounter()
    compiled, x = torch.compile(model, backend=counter), inputs().float()
    torch.testing.assert_close(compiled(x), model(x))
    seen = counter.frame_count
    model.output_scaling.alpha.fill_(5.0)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x)
    assert counter.frame_count == seen


# The weights at the start


def homogeneous(seed: int = 0, layers: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [4, *[16] * (layers - 1), 2]
    parts = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*parts[:-1]).double()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_outputs_of_a_homogeneous_network_scale_with_the_power_of_its_layers(layers, factor):
    """Powers of two are exact."""
    model, x = homogeneous(layers=layers), inputs()
    expected = factor**layers * model(x)
    OutputScaling(1.0, "none", init_scale=factor).operate(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_larger_weights_are_an_output_scale_in_a_homogeneous_network(factor):
    """Weights c w with learning rate lr train as w does with lr / c^2 under the output scale c^L, to the last bit."""
    x, y = inputs(), torch.randn(6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    models = homogeneous(), homogeneous()
    OutputScaling(1.0, "none", init_scale=factor).operate(models[0])
    OutputScaling(factor**3, "none").operate(models[1])
    outputs = [descend(m, x, y, lr, 20) for m, lr in zip(models, (2**-10, 2**-10 / factor**2), strict=True)]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0][0], outputs[0][-1])


def test_biases_normalisations_and_frozen_parameters_stay():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm([2, 4, 4]), nn.GroupNorm(1, 2), nn.RMSNorm([4, 4])
    )
    model.add_module("frozen", nn.Linear(3, 3).requires_grad_(False))
    model.add_module("shared", nn.Linear(3, 3))
    model.add_module("tied", nn.Linear(3, 3))
    model.add_module("embedding", nn.Embedding(4, 3))
    model.tied.weight = model.shared.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale_weights(model, 3.0)
    for name, value in model.state_dict().items():
        changed = name in ("0.weight", "shared.weight", "tied.weight", "embedding.weight")
        assert torch.equal(value, 3 * before[name] if changed else before[name]), name
    assert model.get_parameter("2.weight").ndim == 3


@pytest.mark.parametrize("center", ["copy", "antisymmetric"])
def test_what_is_subtracted_has_the_multiplied_weights(center):
    model, x = network(), inputs()
    model[0].weight.requires_grad_(False)
    expected = copy.deepcopy(model)
    OutputScaling(3.0, center, init_scale=2.0).operate(model)
    assert (model(x) == 0).all()
    for own in (model, model.output_scaling.other):
        assert torch.equal(own[0].weight, expected[0].weight)
        assert torch.equal(own[2].weight, 2 * expected[2].weight)
        assert torch.equal(own[2].bias, expected[2].bias)


@pytest.mark.parametrize("center", CENTERS)
def test_weights_are_multiplied_once_however_often_the_module_is_used(center):
    class Still(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Still()
    before = copy.deepcopy(module)
    for use in ("validate", "fit", "fit"):
        trainer = helpers.trainer([OutputScaling(1.0, center, init_scale=2.0)])
        getattr(trainer, use)(module, helpers.loader())
    for index in (0, 2):
        assert torch.equal(module.net[index].weight, 2 * before.net[index].weight)
        assert torch.equal(module.net[index].bias, before.net[index].bias)


@pytest.mark.parametrize("center", CENTERS)
def test_a_resume_does_not_multiply_weights_again(center, tmp_path):
    whole, first, second = Plain(), Plain(), Plain()

    def train(module: Plain, epochs: int, ckpt: Any = None) -> pl.Trainer:
        plugin = OutputScaling(1.0, center, init_scale=2.0)
        return fit(module, [plugin], helpers.loader(shuffle=False), epochs=epochs, ckpt=ckpt)

    train(first, 1).save_checkpoint(tmp_path / "a.ckpt")
    train(second, 3, tmp_path / "a.ckpt")
    train(whole, 3)
    assert torch.equal(weights(whole), weights(second))


def test_checkpoints_of_other_initial_weights_are_refused(tmp_path):
    fit(Plain(), [OutputScaling(init_scale=2.0)], epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RefusedError, match="init_scale=3.*the checkpoint.*alpha=1, center='copy', init_scale=2"):
        fit(Plain(), [OutputScaling(init_scale=3.0)], ckpt=tmp_path / "a.ckpt", epochs=2)
    module = Plain()
    fit(module, [OutputScaling(init_scale=2.0)], epochs=1)
    with pytest.raises(RefusedError, match="init_scale=1.*Sequential is scaled with.*init_scale=2"):
        helpers.trainer([OutputScaling()]).fit(module, helpers.loader())


def test_networks_without_weights_to_multiply_are_refused():
    with pytest.raises(RefusedError, match="init_scale=2.*Linear has none.*`module=`"):
        OutputScaling(init_scale=2.0).operate(nn.Linear(2, 2).requires_grad_(False))
    with torch.device("meta"):
        later = nn.Linear(2, 2)
    with pytest.raises(RefusedError, match="Linear has no values for them yet"):
        OutputScaling(center="none", init_scale=2.0).operate(later)


# Which network


class Several(Plain):
    """Layers on the LightningModule itself."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def test_forward_of_a_module_with_several_parts_is_scaled():
    module, x = Several(), torch.randn(3, 12)
    fit(module, [OutputScaling(2.0, module=None)], epochs=1)
    other = module.output_scaling.other
    torch.testing.assert_close(module(x), 2 * (Several.forward(module, x) - other(x)))
    assert isinstance(other, Several)


def test_only_part_with_parameters_is_scaled_and_named_ones():
    sole, named = Plain(), Several()
    fit(sole, [OutputScaling(2.0)], epochs=1)
    assert sole.net._forward_hooks
    assert not sole._forward_hooks
    fit(named, [OutputScaling(2.0, "none", module="second")], epochs=1)
    h = torch.randn(3, 8)
    torch.testing.assert_close(named.second(h), 2 * F.linear(h, named.second.weight, named.second.bias))


def test_a_network_that_the_step_does_not_call_is_named():
    class Other(Several):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.second(self.first(batch[0])), batch[1])

    with pytest.raises(FulguriteError, match="did not call the network.*`module=`"):
        fit(Other(), [OutputScaling(2.0)])


# Learning rates


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.01),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.4, 12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5, 0.02)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=0.02),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_learning_rate_of_a_schedule_is_multiplied(name):
    rates: list[list[float]] = [[], []]
    for factor, seen in zip((1.0, 0.25), rates, strict=True):
        parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}]
        optimizer = torch.optim.SGD(groups, 0.2, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        scale_rates(optimizer, [scheduler], factor, preserve_weight_decay=True)
        for _ in range(10):
            seen += [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
    assert rates[1] == pytest.approx([0.25 * rate for rate in rates[0]], rel=1e-9)
    assert len(set(rates[0])) > 2


@pytest.mark.parametrize(
    ("optimizer", "power"),
    [
        (torch.optim.SGD, 2),
        (torch.optim.Adam, 1),
        (torch.optim.AdamW, 1),
        (torch.optim.RMSprop, 1),
        (type("Lion", (torch.optim.SGD,), {}), 1),
        (type("MySGD", (torch.optim.SGD,), {}), 2),
    ],
)
def test_correction_goes_by_the_optimizer_and_keeps_the_product_with_weight_decay(optimizer, power):
    class Module(Plain):
        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters(), lr=0.1, weight_decay=0.01)

    for preserve in (True, False):
        plugin = OutputScaling(4.0, preserve_weight_decay=preserve)
        (group,) = fit(Module(), [plugin], epochs=1).optimizers[0].param_groups
        assert group["lr"] == pytest.approx(0.1 / 4**power)
        assert group["weight_decay"] == pytest.approx(0.01 * 4**power if preserve else 0.01)


@pytest.mark.parametrize(("correction", "power"), [("none", 0), ("sgd", 2), ("adaptive", 1)])
def test_correction_can_be_said(correction, power):
    (group,) = fit(Plain(), [OutputScaling(4.0, lr_correction=correction)]).optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0.5 / 4**power)


def test_unknown_optimizers_are_named():
    class Unheard(torch.optim.Optimizer):
        pass

    with pytest.raises(RefusedError, match="steps of Unheard grow.*'sgd'.*'adaptive'.*'none'"):
        kind_of(Unheard([nn.Parameter(torch.ones(1))], {"lr": 1.0}), "OutputScaling")
    with pytest.raises(RefusedError, match="LBFGS"):
        kind_of(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]), "OutputScaling")


class Scheduled(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, weight_decay=1e-3)
        return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=0.1)]


@pytest.mark.parametrize("center", CENTERS)
def test_resume_corrects_once_and_equals_an_uninterrupted_run(center, tmp_path):
    whole, first, second = Scheduled(), Scheduled(), Scheduled()
    trainer = fit(first, [OutputScaling(4.0, center)], helpers.loader(shuffle=False), epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = fit(
        second, [OutputScaling(4.0, center)], helpers.loader(shuffle=False), ckpt=tmp_path / "a.ckpt", epochs=4
    )
    reference = fit(whole, [OutputScaling(4.0, center)], helpers.loader(shuffle=False), epochs=4)
    assert torch.equal(weights(whole), weights(second))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert reference.optimizers[0].param_groups[0]["lr"] == resumed.optimizers[0].param_groups[0]["lr"]
    assert resumed.lr_scheduler_configs[0].scheduler.base_lrs == [0.5 / 16]


def test_checkpoints_of_another_scale_are_refused(tmp_path):
    fit(Plain(), [OutputScaling(4.0)], epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RefusedError, match="alpha=2, center='copy'.*the checkpoint.*alpha=4"):
        fit(Plain(), [OutputScaling(2.0)], ckpt=tmp_path / "a.ckpt", epochs=2)


def test_a_second_fit_goes_on_with_the_same_function():
    module = Plain()
    fit(module, [OutputScaling(4.0)], epochs=1)
    start = weights(module.output_scaling.other)
    trainer = helpers.trainer([OutputScaling(4.0)])
    trainer.fit(module, helpers.loader())
    assert torch.equal(weights(module.output_scaling.other), start)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 / 16)
    assert len(module.net._forward_hooks) == 1
    with pytest.raises(RefusedError, match="alpha=3.*Sequential is scaled with alpha=4"):
        helpers.trainer([OutputScaling(3.0)]).fit(module, helpers.loader())


# Merging


def test_merge_folds_alpha_into_the_last_layer():
    for make in (lambda: Plain(), lambda: Several()):
        module, x = make(), torch.randn(3, 12)
        fit(module, [OutputScaling(3.0, "none")], epochs=1)
        expected = module(x)
        merge(module, head="second" if isinstance(module, Several) else None)
        torch.testing.assert_close(module(x), expected)
        assert module.state_dict().keys() == make().state_dict().keys()
        assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in module.modules())


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(RefusedError, match="centred \\('copy'\\)"):
        merge(scaled(2.0))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(RefusedError, match="nothing in Sequential is scaled"):
        merge(model)
    OutputScaling(2.0, "none").operate(model)
    with pytest.raises(RefusedError, match="ends with a ReLU.*`head=`"):
        merge(model)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "`alpha` of OutputScaling to be a positive number, but got 0.0"),
        ({"alpha": math.inf}, "`alpha` of OutputScaling.*inf"),
        ({"alpha": math.nan}, "`alpha` of OutputScaling.*nan"),
        ({"init_scale": 0.0}, "`init_scale` of OutputScaling to be a positive number, but got 0.0"),
        ({"init_scale": -1.0}, "`init_scale` of OutputScaling.*-1.0"),
        ({"init_scale": math.inf}, "`init_scale` of OutputScaling.*inf"),
        ({"init_scale": math.nan}, "`init_scale` of OutputScaling.*nan"),
        ({"center": "zero"}, "`center` of OutputScaling to be one of 'none', 'copy', 'antisymmetric', but got 'zero'"),
        ({"lr_correction": "adam"}, "`lr_correction` of OutputScaling"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        OutputScaling(**arguments)


def test_unknown_parts_get_near_names():
    with pytest.raises(RefusedError, match="`module` of OutputScaling.*'nett'.* Did you mean 'net'"):
        fit(Plain(), [OutputScaling(2.0, module="nett")])


def test_outputs_that_are_no_tensor_are_refused():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x), x

    model = Pair()
    OutputScaling(2.0).operate(model)
    with pytest.raises(RefusedError, match="must be a tensor, but got a tuple.*`module=`"):
        model(torch.ones(1, 2))


def test_a_twin_that_is_not_optimised_is_refused():
    class Own(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    with pytest.raises(RefusedError, match="moves '0.weight', but not that of the twin.*center='copy'"):
        fit(Own(), [OutputScaling(2.0, "antisymmetric")])


def test_command_line_round_trip():
    cli = LightningCLI(
        Plain,
        run=False,
        args=[
            "--trainer.logger=false",
            "--trainer.callbacks+=OutputScaling",
            "--trainer.callbacks.alpha=0.5",
            "--trainer.callbacks.center=antisymmetric",
        ],
        save_config_callback=None,
    )
    (plugin,) = [c for c in cli.trainer.callbacks if isinstance(c, OutputScaling)]
    assert (plugin.alpha, plugin.center, plugin.lr_correction) == (0.5, "antisymmetric", "auto")
