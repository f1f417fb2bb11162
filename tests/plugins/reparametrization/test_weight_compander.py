# SPDX-License-Identifier: Apache-2.0
"""Weight Compander in models: surgery and its undoing, state dicts, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fulgurite.errors import RefusedError
from fulgurite_plugins.reparametrization.weight_compander import (
    Compander,
    Companding,
    WeightCompander,
    WeightShape,
    compand,
    expand,
    fold,
    fold_state_dict,
    weight_shape,
)
from fulgurite_plugins.reparametrization.weight_compander.selection import companded, select


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 5)
    ).eval()


def inputs() -> Tensor:
    return torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def operated(module: nn.Module, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WeightCompander(**arguments).operate(module)
    return module


def names(module: nn.Module) -> list[str]:
    return [place.name for place in companded(module)]


# Surgery


def test_preserve_leaves_the_outputs_and_direct_changes_them_by_the_slope():
    plain, preserved = (
        network(),
        operated(network()),
    )  # uniform weights end at 1.73 standard deviations, the bound is at 1.87
    torch.testing.assert_close(preserved(inputs()), plain(inputs()), rtol=0, atol=1e-6)
    direct = operated(network(), a=0.2, b=0.1, init="direct")
    for before, after in zip(plain, direct, strict=True):
        if isinstance(before, nn.Linear | nn.Conv2d):
            assert torch.equal(after.parametrizations.weight.original, before.weight)
            assert torch.equal(after.weight, compand(before.weight, 0.2, 0.1))


def test_scales_are_relative_to_each_tensor_unless_given_or_shared():
    plain, module = network(), operated(network(), relative=(1.5, 0.75))
    for before, after in zip(plain, module, strict=True):
        if isinstance(before, nn.Linear | nn.Conv2d):
            scales = torch.cat(after.parametrizations.weight[0].scales())
            torch.testing.assert_close(scales, before.weight.detach().std() * torch.tensor([1.5, 0.75]))
    layers = [layer for layer in operated(network(), a=0.3, b=0.2) if parametrize.is_parametrized(layer)]
    assert [float(layer.parametrizations.weight[0].a) for layer in layers] == pytest.approx([0.3] * 3)
    shared = operated(network(), shared=True, learn=True)
    companders = {place.compander for place in companded(shared)}
    assert len(companders) == 1
    std = torch.cat([p.detach().flatten() for p in (plain[0].weight, plain[4].weight, plain[5].weight)]).std()
    torch.testing.assert_close(companders.pop().scales()[0].detach(), (1.2 * std).view(1))


def test_parameters_stay_the_same_objects_and_keep_their_type():
    module = network()
    before = {id(p) for p in module.parameters()}
    operated(module)
    assert {id(p) for p in module.parameters()} == before
    assert isinstance(module[0], nn.Conv2d)
    half = operated(network().bfloat16())
    assert half[4].weight.dtype is torch.bfloat16
    assert half[4].parametrizations.weight[0].a.dtype is torch.float32
    assert operated(network().double())[4].parametrizations.weight[0].a.dtype is torch.float64


def test_operating_twice_is_operating_once():
    module = operated(network())
    state = copy.deepcopy(module.state_dict())
    operated(module, relative=(3.0, 3.0))
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_limit_of_a_wide_function_is_plain_training():
    def train(module: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            x, y = torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x.double()), y).backward()
            optimizer.step()
        return module

    plain = train(network().double())
    wide = fold(train(operated(network().double(), relative=(1e6, 1e6))))
    for (name, one), (_, other) in zip(plain.named_parameters(), wide.named_parameters(), strict=True):
        assert float((one - other).detach().norm() / one.detach().norm()) < 1e-5, name


# Undoing it


def test_folded_model_computes_the_same_and_is_as_if_never_changed():
    plain, module = network(), operated(network(), include_bias=True, learn=True)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    expected = module(inputs())
    assert fold(module) is module
    assert torch.equal(module(inputs()), expected)
    assert [*module.state_dict()] == [*plain.state_dict()]  # in the same order, as optimizers number them
    assert [type(layer) for layer in module] == [type(layer) for layer in plain]
    assert not any(hasattr(layer, "parametrizations") for layer in module)
    assert module.load_state_dict(plain.state_dict()).missing_keys == []


def test_folding_a_copy_leaves_the_original_and_the_other_way_round():
    module = operated(network())
    expected = module(inputs())
    copied = fold(copy.deepcopy(module))
    assert torch.equal(module(inputs()), expected)
    assert torch.equal(copied(inputs()), expected)
    second = copy.deepcopy(module)
    fold(module)
    assert len(companded(second)) == 3
    assert torch.equal(second(inputs()), expected)
    second.load_state_dict(module.state_dict())  # the hook came along


def test_folded_state_dict_equals_that_of_the_folded_model():
    for arguments in ({}, {"learn": True}, {"fn": "softsign", "shared": True}):
        module = operated(
            nn.Sequential(network(), parametrizations.weight_norm(nn.Linear(5, 5))), exclude="1", **arguments
        )
        plain = fold_state_dict(module.state_dict(), arguments.get("fn", "arctan"))
        folded = fold(module).state_dict()
        assert plain.keys() == folded.keys()
        assert all(torch.equal(plain[name], folded[name]) for name in plain)


def test_what_is_parametrised_on_top_is_not_folded():
    module = operated(network())
    parametrize.register_parametrization(module[4], "weight", nn.Identity())
    with pytest.raises(RefusedError, match="`4.weight` has further parametrisations on top"):
        fold(module)
    assert len(companded(module)) == 3


# Tied weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_tied_tensor_is_companded_once_for_all_its_holders():
    plain, module = Tied(), operated(Tied(), relative=(3.0, 3.0))
    assert names(module) == ["embedding.weight", "head.weight"]
    tokens = torch.arange(7)
    torch.testing.assert_close(module(tokens), plain(tokens))
    assert torch.equal(module.embedding.weight, module.head.weight)
    assert len([*module.parameters()]) == 1
    module(tokens).square().sum().backward()
    plain(tokens).square().sum().backward()
    a, b = module.head.parametrizations.weight[0].scales()
    (v,) = module.parameters()
    torch.testing.assert_close(v.grad, plain.head.weight.grad * a * b / (b**2 + v.detach() ** 2), rtol=1e-4, atol=1e-4)
    weight = module.head.weight.detach()
    fold(module)
    assert module.head.weight is module.embedding.weight
    assert torch.equal(module.head.weight, weight)


# State dicts


def test_plain_state_dict_is_taken_as_if_it_had_been_there_before():
    other = network()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0).add_(0.01)
    module, expected = operated(network()), operated(copy.deepcopy(other))
    state = other.state_dict()
    module.load_state_dict(state)
    assert state.keys() == other.state_dict().keys()  # the caller's dictionary is left alone
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(module(inputs()), other(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [{"a": 0.4, "b": 0.3}, {"shared": True, "relative": (3.0, 3.0)}])
def test_plain_weights_leave_given_and_shared_scales_as_they_are(arguments):
    module = operated(network(), **arguments)
    scales = [float(place.compander.a) for place in companded(module)]
    weight = 0.05 * torch.randn(16, 144, generator=torch.Generator().manual_seed(4))
    module[4].load_state_dict({"weight": weight, "bias": torch.zeros(16)})
    assert [float(place.compander.a) for place in companded(module)] == scales
    torch.testing.assert_close(module[4].weight, weight, rtol=1e-5, atol=1e-6)


def test_plain_weights_begin_learned_scales_anew():
    module = operated(network(), learn=True)
    weight = torch.randn(16, 144, generator=torch.Generator().manual_seed(4)).clamp(-1.5, 1.5)
    module[4].load_state_dict({"weight": weight, "bias": torch.zeros(16)})
    torch.testing.assert_close(module[4].parametrizations.weight[0].scales()[0].detach(), (1.2 * weight.std()).view(1))


def test_own_state_dict_brings_back_free_tensors_and_scales_bit_for_bit():
    module = operated(network(), relative=(1.5, 0.75))
    other = operated(network())
    other.load_state_dict(module.state_dict())
    for (name, one), (_, two) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_assigning_a_weight_sets_the_free_tensor():
    module = operated(network(), a=1.0, b=1.0)
    module[4].weight = torch.full((16, 144), 0.3)
    torch.testing.assert_close(module[4].parametrizations.weight.original, expand(torch.full((16, 144), 0.3), 1.0, 1.0))


# Which layers


def test_which_layers_are_meant():
    def selected(modules: Any, exclude: Any = "", **arguments: Any) -> list[str]:
        found = select(model, modules, exclude, **arguments)
        assert all(place.parameter.requires_grad for place in found)
        return [place.name for place in found]

    model = nn.ModuleDict(
        {
            "stem": nn.ConvTranspose1d(2, 3, 3),
            "body": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)),
            "cell": nn.GRUCell(3, 3),
            "tokens": nn.Embedding(5, 3),
            "head": nn.Linear(3, 2),
        }
    )
    linear = ["body.0.weight", "body.2.weight", "head.weight"]
    assert selected("Linear,Conv") == ["stem.weight", *linear]
    assert selected(["Linear"]) == linear
    assert selected("Linear,Conv", "first, last") == linear[:2]
    assert selected("Linear", "body") == ["head.weight"]
    assert selected("body, stem") == ["stem.weight", *linear[:2]]
    assert selected("b*.2") == ["body.2.weight"]
    assert selected("Embedding, cell") == ["cell.weight_ih", "cell.weight_hh", "tokens.weight"]
    assert selected("head", include_bias=True) == ["head.weight", "head.bias"]
    model["body"].requires_grad_(False)
    assert selected("Linear") == ["head.weight"]
    with pytest.raises(RefusedError, match=r"no trainable weight is left by modules='body', exclude='' \(2 frozen\)"):
        select(model, "body")
    with pytest.raises(RefusedError, match=r"'haed' is neither the class nor the name .* Did you mean 'head'"):
        select(model, "Linear,haed")
    with pytest.raises(RefusedError, match=r"'boddy' is neither"):
        select(model, "Linear", "boddy")
    with pytest.raises(RefusedError, match=r"Layers with weights: .*stem \(ConvTranspose1d\)"):
        select(model, "Conv2d")


def test_recurrent_cells_and_attention_are_companded():
    torch.manual_seed(0)
    cell, x = nn.GRUCell(3, 3), torch.randn(2, 3)
    before = cell(x)
    torch.testing.assert_close(operated(cell, modules="GRUCell", relative=(3.0, 3.0))(x), before, rtol=0, atol=1e-6)
    attention, x = nn.MultiheadAttention(4, 2).eval(), torch.randn(5, 1, 4)
    before = attention(x, x, x)[0]
    operated(attention, modules="MultiheadAttention,Linear", relative=(3.0, 3.0))
    assert names(attention) == ["in_proj_weight", "out_proj.weight"]
    torch.testing.assert_close(attention(x, x, x)[0], before, rtol=0, atol=1e-6)


# What is refused


def meta_linear() -> nn.Module:
    return nn.Linear(3, 2, device="meta")


def zero_linear() -> nn.Module:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    return layer


def complex_linear() -> nn.Module:
    return nn.Linear(3, 2, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), "`weight`: it is parametrised already, by _WeightNorm"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), "parametrised already, by _SpectralNorm"),
        (lambda: prune.random_unstructured(nn.Linear(3, 2), "weight", 0.5), "what a hook makes `weight` from"),
        (lambda: nn.LazyLinear(2), "belongs to a lazy layer"),
        (meta_linear, "lies on the meta device"),
        (zero_linear, "the standard deviation of `weight` is 0"),
        (lambda: nn.Linear(1, 1), "the standard deviation of `weight` is nan"),
        (complex_linear, "has the type torch.complex64"),
        (nn.ReLU, "no trainable weight is left .* Layers with weights: none"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom.*")
def test_models_that_cannot_be_companded(make, message):
    model = nn.Sequential(nn.Linear(3, 3), make()) if isinstance(make(), nn.Linear) else make()
    before = [type(layer) for layer in model.modules()]
    with pytest.raises(RefusedError, match=message.replace("`weight`", r"`(1\.)?weight(_orig)?`")):
        WeightCompander().operate(model)
    assert [type(layer) for layer in model.modules()] == before  # the layers before it are as they were


def test_recurrent_layers_that_keep_lists_of_their_weights_are_refused():
    with pytest.raises(RefusedError, match="belongs to a LSTM, which keeps a list .* Use LSTMCell"):
        WeightCompander(modules="LSTM").operate(nn.LSTM(3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": 1.0}, "`a` and `b` of WeightCompander to be given together or not at all, but got a=1.0, b=None"),
        ({"a": 0.0, "b": 1.0}, "`a` of WeightCompander to be a positive, finite number, but got 0.0"),
        ({"a": 1.0, "b": float("inf")}, "`b` of WeightCompander"),
        ({"relative": (1.2, -1.0)}, r"`relative\[1\]` of WeightCompander"),
        ({"relative": (1.2,)}, "`relative` of WeightCompander to be two numbers"),
        ({"lr_scale": 0.0}, "`lr_scale` of WeightCompander"),
        ({"init": "zero"}, "`init` of WeightCompander to be 'preserve' or 'direct', but got 'zero'"),
        ({"fn": "sigmoid"}, "`fn` to be one of 'arctan', 'tanh', 'softsign'"),
        ({"fn": Companding(torch.atan, 1.6)}, "`fn` of WeightCompander to have an inverse when init is 'preserve'"),
        ({"modules": ""}, "`modules` of WeightCompander to name some layers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightCompander(**arguments)


def test_a_function_without_inverse_works_with_direct():
    module = operated(network(), fn=Companding(torch.atan, 1.6), init="direct", a=0.2, b=0.1)
    torch.testing.assert_close(module[4].weight, compand(network()[4].weight, 0.2, 0.1))


def test_clipped_entries_are_reported_with_advice_when_they_are_many():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WeightCompander().operate(network())
    module = network()
    nn.init.normal_(module[4].weight)
    with pytest.warns(UserWarning, match=r"1 of 1 tensors .* \d+\.\d% of `4.weight`, the most.$"):
        WeightCompander(modules="4").operate(module)
    with pytest.warns(UserWarning, match="Choose a larger amplitude: the first number of `relative`"):
        WeightCompander(relative=(0.5, 0.5)).operate(network())


# Diagnostics


def test_weight_shape_of_known_distributions():
    layer = nn.Linear(300, 300)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    normal = weight_shape(layer)["weight"]
    assert float(normal["kurtosis"]) == pytest.approx(3.0, abs=0.1)
    assert float(normal["near_zero"]) == pytest.approx(0.0797, abs=0.005)
    assert normal.keys() == {"kurtosis", "near_zero", "peak"}
    layer.weight.data = layer.weight.data.sign() * 0.2
    two_points = weight_shape(layer)["weight"]
    assert [round(float(value), 3) for value in two_points.values()] == [1.0, 0.0, 1.0]
    shape = weight_shape(operated(network()))["4.weight"]
    assert shape.keys() == {"kurtosis", "near_zero", "peak", "a", "b"}
    torch.testing.assert_close(shape["peak"], weight_shape(network())["4.weight"]["peak"])
    with pytest.raises(ValueError, match="`modules` of WeightShape"):
        WeightShape(modules=" , ")


def test_compander_by_itself():
    layer = parametrize.register_parametrization(nn.Linear(4, 3), "weight", Compander(0.8, 0.5, "tanh"))
    assert "bound=0.8, slope=1.6" in repr(layer)
    assert float(layer.weight.detach().abs().max()) < 0.8
