# SPDX-License-Identifier: Apache-2.0
"""Norms of gradients per example against a loop over the examples, and closed forms; which parameters are meant."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.per_example import cross_entropy, per_example_norms, per_example_squares
from fulgurite.per_example.gradients import Outer, Rows
from fulgurite.per_example.layers import has_rule, patches
from tests.core.per_example_cases import CASES, CLASSES, N, call, cast, convnet, made, mlp, one


def loop(model: nn.Module, x: Any, y: Tensor, loss: Any = cross_entropy) -> dict[str, Tensor]:
    """The slow oracle: autograd, one example after the other."""
    named = dict(model.named_parameters())
    rows = []
    for i in range(N):
        value = loss(call(model, one(x, i)), y[i : i + 1]).squeeze()
        gradients = torch.autograd.grad(value, list(named.values()), materialize_grads=True)
        rows.append(torch.stack([gradient.square().sum() for gradient in gradients]))
    return dict(zip(named, torch.stack(rows).T, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_squares_equal_a_loop_over_examples_in_float64(name):
    model, x, y = made(name)
    found, expected = per_example_squares(model, x, y), loop(model, x, y)
    assert list(found) == list(expected)
    for parameter, squares in expected.items():
        torch.testing.assert_close(
            found[parameter], squares, rtol=1e-10, atol=1e-18, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    unused = {parameter for parameter, squares in expected.items() if squares.max() == 0}
    assert unused == ({"unused.weight", "unused.bias"} if name == "raw parameters" else set())


@pytest.mark.parametrize("name", CASES)
def test_norms_equal_a_loop_over_examples_in_float32(name):
    model, x, y = made(name, torch.float32)
    norms = per_example_norms(model, x, y)
    assert norms.dtype == torch.float32
    expected = torch.stack(list(loop(model.double(), cast(x, torch.float64), y).values())).sum(dim=0).sqrt()
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)


def test_parameters_of_one_layer_that_shares_its_type_with_others_go_their_own_way():
    """Only what has no closed form costs a second pass: the parameters of a subclass, not those of its neighbours."""
    model, _, _ = made("parametrized")
    assert [has_rule(layer) for layer in (model[0], model[2], model[3])] == [False, False, True]
    model[3].forward = model[3].forward
    assert not has_rule(model[3])


@pytest.mark.parametrize("name", ["mlp", "convnet", "tied", "raw parameters"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_change_nothing(name, chunk):
    model, x, y = made(name)
    torch.testing.assert_close(
        per_example_norms(model, x, y, chunk=chunk), per_example_norms(model, x, y), rtol=1e-12, atol=0
    )


def test_chunks_of_one_carry_a_model_that_sorts_its_batch():
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            order = x[:, 0].argsort()
            return self.layer(x[order])[order.argsort()]

    x, y = torch.randn(N, 6), torch.arange(N) % CLASSES
    model = Sorts()
    expected = per_example_norms(model.layer, x, y)
    torch.testing.assert_close(per_example_norms(model, x, y, chunk=1), expected, rtol=1e-6, atol=0)


def test_no_examples_have_no_norms():
    model, x, y = made("mlp")
    assert per_example_norms(model, x[:0], y[:0]).shape == (0,)


@pytest.mark.parametrize("layer", [mlp, convnet])
def test_last_layer_norm_is_the_error_norm_times_the_features(layer):
    """The gradient with respect to [W, b] is (p - y) [h, 1]^T."""
    model = layer().double()
    x, y = torch.randn(N, *((6,) if layer is mlp else (4, 7, 8)), dtype=torch.float64), torch.arange(N) % CLASSES
    logits, features = model(x), model[:-1](x)
    el2n = (logits.softmax(dim=1) - F.one_hot(y, CLASSES)).norm(dim=1)
    expected = el2n * (features.square().sum(dim=1) + 1).sqrt()
    torch.testing.assert_close(per_example_norms(model, x, y, parameters="last_layer"), expected, rtol=1e-10, atol=0)


def test_squares_of_disjoint_groups_add_up():
    model, x, y = made("sequences")
    groups = ("embedding.*", ["norms.*.weight"], ["norms.*.bias", "head.*"])
    parts = [per_example_norms(model, x, y, parameters=group).square() for group in groups]
    torch.testing.assert_close(sum(parts), per_example_norms(model, x, y).square(), rtol=1e-12, atol=0)


def test_logistic_regression_in_closed_form():
    model = nn.Linear(4, 1).double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.3], dtype=torch.float64)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets, reduction="none")

    with_one = torch.cat([x, torch.ones(N, 1)], dim=1)
    expected = (model(x).squeeze(1).sigmoid() - y).abs() * with_one.norm(dim=1)
    torch.testing.assert_close(per_example_norms(model, x, y, loss), expected, rtol=1e-12, atol=0)


def test_soft_targets_and_targets_in_a_dictionary():
    model, x, y = made("mlp")
    soft = F.one_hot(y, CLASSES).double()
    hard = per_example_norms(model, x, y)
    torch.testing.assert_close(per_example_norms(model, x, soft), hard, rtol=1e-12, atol=0)
    weighted = per_example_norms(
        model, x, {"y": y, "weight": torch.arange(N)}, lambda o, t: t["weight"] * cross_entropy(o, t["y"])
    )
    torch.testing.assert_close(weighted, hard * torch.arange(N), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("outputs", "inputs", "positions"), [(3, 4, 1), (3, 4, 9), (30, 40, 9)])
def test_all_forms_of_the_norm_agree(outputs, inputs, positions):
    left, right = torch.randn(N, 2, outputs, positions).double(), torch.randn(N, 2, inputs, positions).double()
    expected = torch.einsum("bgot,bgit->bgoi", left, right).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(Outer(left, right).squared_norm(), expected, rtol=1e-12, atol=0)


def test_rows_that_were_looked_up_twice_add_up():
    index = torch.tensor([[2, 0, 2], [1, 1, 1], [0, 1, 2]])
    gradient = torch.randn(3, 3, 4, dtype=torch.float64)
    table = torch.zeros(3, 5, 4, dtype=torch.float64)
    for example, position in itertools.product(range(3), range(3)):
        table[example, index[example, position]] += gradient[example, position]
    rows = Rows(index, gradient)
    torch.testing.assert_close(rows.squared_norm(), table.square().sum(dim=(1, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(rows.dense(torch.Size((5, 4))), table, rtol=1e-12, atol=0)


def test_patches_are_those_of_torch():
    layer = nn.Conv2d(4, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2)
    x = torch.randn(N, 4, 7, 8)
    expected = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    assert torch.equal(patches(layer, x).flatten(1, 2), expected)


# Which parameters


def test_frozen_parameters_do_not_count():
    model, x, y = made("mlp")
    model[0].requires_grad_(False)
    assert list(per_example_squares(model, x, y)) == ["2.weight", "4.weight", "4.bias"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raw parameters", ["head.weight", "head.bias"]),
        ("tied", ["embedding.weight", "output.bias"]),
        ("attention", ["head.weight", "head.bias"]),
    ],
)
def test_the_last_layer_is_the_one_that_is_called_last(name, expected):
    model, x, y = made(name)
    found = list(per_example_squares(model, x, y, parameters="last_layer"))
    assert found == (expected if name != "tied" else ["output.bias"])


def test_the_last_layer_may_be_parametrized_and_defined_first():
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, CLASSES))
            self.body = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    found = per_example_squares(HeadFirst(), torch.randn(N, 4), torch.arange(N) % CLASSES, parameters="last_layer")
    assert all(name.startswith("head.") for name in found)
    assert len(found) == 3


def test_tied_weights_are_found_by_each_of_their_names():
    model, x, y = made("tied")
    assert list(per_example_squares(model, x, y, parameters="output.weight")) == ["embedding.weight"]


def test_unknown_and_frozen_choices_are_refused():
    model, x, y = made("mlp")
    with pytest.raises(ValueError, match=r"no parameter of Sequential matches '4.wieght'. Did you mean '4.weight'"):
        per_example_norms(model, x, y, parameters="4.wieght")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="None of the parameters 'all' of Sequential requires gradients"):
        per_example_norms(model, x, y)


class Scaled(nn.Module):
    """A layer that multiplies by a parameter of a module that it may share with others; no closed form covers it."""

    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.weight[0]


def test_a_module_that_stands_in_several_places_is_put_back():
    """`torch.func.functional_call` would leave a tensor of its own in the place of the parameter."""
    shared = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(nn.Linear(3, 3), Scaled(shared), nn.Tanh(), Scaled(shared))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    squares = per_example_squares(model, x, y)
    assert isinstance(shared.weight, nn.Parameter)
    for row in range(4):
        model.zero_grad()
        F.cross_entropy(model(x[row : row + 1]), y[row : row + 1]).backward()
        torch.testing.assert_close(squares["1.scale.weight"][row], shared.weight.grad.square().sum())
