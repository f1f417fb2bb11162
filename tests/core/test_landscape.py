# SPDX-License-Identifier: Apache-2.0
"""Barriers in closed form; the tangent kernel against the dense Jacobian in float64; the velocity against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._python_dispatch import TorchDispatchMode

from fulgurite import landscape
from fulgurite.errors import RefusedError
from fulgurite.landscape import Barrier, error_barrier, kernel_velocity, ntk_gram


def scalar(value: float) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def bump(model: nn.Module) -> float:
    """2 - (w - 1)^2 + w: a parabola with its top between the models, on a slope."""
    w = model.weight.item()
    return 3.0 - (w - 1.0) ** 2 + w


def test_barrier_in_closed_form():
    """From w = 0 to w = 2 the parabola rises by 1 above the chord, whatever the slope."""
    barrier = error_barrier(scalar(0.0), scalar(2.0), bump, points=5)
    assert barrier.positions == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert barrier.values == pytest.approx([2.0, 3.25, 4.0, 4.25, 4.0])
    assert barrier.height == pytest.approx(1.0)


def test_a_convex_function_has_no_barrier_and_nan_is_not_hidden():
    assert error_barrier(scalar(0.0), scalar(2.0), lambda m: m.weight.item() ** 2).height == 0.0
    assert math.isnan(Barrier((0.0, 0.5, 1.0), (1.0, math.nan, 1.0)).height)


def test_both_ends_are_exact_and_the_models_are_left_alone():
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()) for _ in range(2))
    second[1].running_mean.fill_(4.0)
    second[1].num_batches_tracked.fill_(7)
    x = torch.randn(5, 3)
    expected = [copy_in_eval(model)(x).sum().item() for model in (first, second)]
    states = [{name: value.clone() for name, value in m.state_dict().items()} for m in (first, second)]
    seen = []

    def evaluate(model: nn.Module) -> float:
        assert not any(module.training for module in model.modules())
        seen.append((model[1].running_mean.clone(), int(model[1].num_batches_tracked), torch.rand(())))
        return model(x).sum().item()

    values = error_barrier(first, second, evaluate, points=3).values
    assert [values[0], values[2]] == expected
    assert torch.equal(seen[1][0], torch.full((4,), 2.0))
    assert [count for _, count, _ in seen] == [0, 0, 0]
    assert len({float(draw) for _, _, draw in seen}) == 1
    for model, state in zip((first, second), states, strict=True):
        assert model.training
        assert all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def copy_in_eval(model: nn.Module) -> nn.Module:
    copied = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def test_evaluate_may_recompute_the_statistics_of_batch_norm():
    """The way that the documentation shows: afterwards a layer's outputs have mean 0 and variance 1 on the data."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    x = torch.randn(64, 3)
    variances = []

    def evaluate(model: nn.Module) -> float:
        torch.optim.swa_utils.update_bn([x], model)
        outputs = model.eval()(x)
        variances.append(outputs.var(dim=0))
        return outputs.mean().item()

    error_barrier(first, second, evaluate, points=3)
    for variance in variances:
        torch.testing.assert_close(variance, torch.ones(4), rtol=1e-3, atol=0)


def test_models_that_cannot_be_interpolated_are_refused():
    with pytest.raises(ValueError, match="`points` to be at least 3"):
        error_barrier(scalar(0.0), scalar(1.0), bump, points=2)
    with pytest.raises(ValueError, match=r"'weight' has shape \[1, 1\] in `model_a` and \[2, 1\] in `model_b`"):
        error_barrier(scalar(0.0), nn.Linear(1, 2, bias=False), bump)
    with pytest.raises(ValueError, match=r"'bias' has shape none in `model_a` and \[1\] in `model_b`"):
        error_barrier(scalar(0.0), nn.Linear(1, 1), bump)


# The tangent kernel


class Text(nn.Module):
    """An embedding that is the output layer too, a layer over positions, a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.untied = nn.Embedding(100, 5, padding_idx=3)
        self.layer = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh())
        self.scale = nn.Parameter(torch.randn(5))
        self.output = nn.Linear(5, 7)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output((self.layer(self.embedding(x) + self.untied(x)) * self.scale).sum(dim=1))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 2, bias=False),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).eval()


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), lambda: torch.randn(5, 6).double()),
    "convnet": (convnet, lambda: torch.randn(5, 4, 6, 6).double()),
    "text": (Text, lambda: torch.randint(0, 7, (4, 6))),
}


def dense_gram(model: nn.Module, x: Tensor) -> Tensor:
    """The oracle: the whole Jacobian."""
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))({n: p.detach() for n, p in model.named_parameters()})
    rows = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2)
    return torch.einsum("ncp,mep->ncme", rows, rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block", [1, 1 << 26])
def test_tangent_kernel_equals_that_of_the_dense_jacobian(name, block, monkeypatch):
    monkeypatch.setattr(landscape, "_BLOCK_NUMBERS", block)
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().double(), inputs()
    gram = ntk_gram(model, x)
    torch.testing.assert_close(gram, dense_gram(model, x), rtol=1e-10, atol=1e-12)
    matrix = gram.flatten(2).flatten(0, 1)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.diagonal().max()


@pytest.mark.parametrize("name", MODELS)
def test_trace_of_the_tangent_kernel_equals_that_of_the_dense_jacobian(name):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().double(), inputs()
    expected = torch.einsum("ncmc->nm", dense_gram(model, x))
    torch.testing.assert_close(ntk_gram(model, x, trace=True), expected, rtol=1e-10, atol=1e-12)


def test_trace_of_the_tangent_kernel_never_holds_a_matrix_over_all_outputs():
    class Largest(TorchDispatchMode):
        """Notes the largest tensor that any operation makes."""

        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, (tuple, list)) else [result]
            self.numbers = max([self.numbers, *(t.numel() for t in tensors if isinstance(t, Tensor))])
            return result

    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 16)), torch.randn(20, 4)
    largest = {}
    for trace in (True, False):
        with Largest() as mode:
            ntk_gram(model, x, trace=trace)
        largest[trace] = mode.numbers
    assert largest == {True: 20 * 20, False: (20 * 16) ** 2}


def test_tangent_kernels_of_disjoint_groups_add_up():
    model, x = MODELS["mlp"][0]().double(), MODELS["mlp"][1]()
    parts = ntk_gram(model, x, parameters="0.*") + ntk_gram(model, x, parameters="last_layer")
    torch.testing.assert_close(parts, ntk_gram(model, x), rtol=1e-12, atol=0)


def test_tangent_kernel_of_a_linear_model_is_that_of_its_inputs():
    x = torch.randn(4, 3).double()
    expected = torch.einsum("nm,ce->ncme", x @ x.T + 1, torch.eye(2).double())
    torch.testing.assert_close(ntk_gram(nn.Linear(3, 2).double(), x), expected, rtol=1e-12, atol=1e-15)


def test_tangent_kernel_refuses_what_it_cannot_measure():
    with pytest.raises(RefusedError, match="BatchNorm2d '1' is in training mode"):
        ntk_gram(convnet().train().double(), MODELS["convnet"][1]())
    with pytest.raises(ValueError, match=r"Expected outputs of shape \[1, C\], but Linear gives \[1, 6, 2\]"):
        ntk_gram(nn.Linear(3, 2), torch.randn(4, 6, 3))


# Its velocity


def test_velocity_equals_its_definition():
    torch.manual_seed(0)
    kernel, later = torch.randn(2, 6, 6, dtype=torch.float64)
    cosine = (kernel * later).sum() / (kernel.norm() * later.norm())
    torch.testing.assert_close(kernel_velocity(kernel, later, 5), (1 - cosine) / 5, rtol=1e-12, atol=0)
    torch.testing.assert_close(kernel_velocity(kernel, -3 * kernel, 2), torch.tensor(1.0).double(), rtol=1e-12, atol=0)


def test_velocity_resolves_small_changes_in_float32():
    """1 - cos of an angle of 1e-4 is 5e-9, which float32 cannot tell from zero."""
    kernel, later = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(1e-4), math.sin(1e-4)])
    torch.testing.assert_close(kernel_velocity(kernel, later), torch.tensor(5e-9), rtol=1e-3, atol=0)


def test_velocity_refuses_nonsense():
    with pytest.raises(ValueError, match=r"two kernels of one shape, but got \[2\] and \[3\]"):
        kernel_velocity(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="`steps` to be positive, but got 0"):
        kernel_velocity(torch.ones(2), torch.ones(2), 0)
