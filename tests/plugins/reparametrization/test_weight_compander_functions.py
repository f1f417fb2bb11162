# SPDX-License-Identifier: Apache-2.0
"""Weight Compander's equations: against closed forms, their inverses, and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.profiler import ProfilerActivity, profile

from fulgurite_plugins.reparametrization.weight_compander import (
    Compander,
    Companding,
    compand,
    compand_grad_scale,
    expand,
    parameter_groups,
)
from fulgurite_plugins.reparametrization.weight_compander.functional import FUNCTIONS

NAMES = list(FUNCTIONS)


def free(n: int = 40, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_arctangent_tanh_and_softsign_are_what_they_are_called():
    v = free()
    close = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(compand(v, 1.3, 0.7), 1.3 * torch.atan(v / 0.7), **close)
    torch.testing.assert_close(compand(v, 1.3, 0.7, "tanh"), 1.3 * torch.tanh(v / 0.7), **close)
    torch.testing.assert_close(compand(v, 1.3, 0.7, "softsign"), 1.3 * v / (v.abs() + 0.7), **close)
    torch.testing.assert_close(compand_grad_scale(v, 1.3, 0.7), 1.3 * 0.7 / (0.49 + v * v), **close)


@pytest.mark.parametrize("fn", NAMES)
def test_odd_increasing_and_within_the_bound(fn):
    v = torch.linspace(-30, 30, 601, dtype=torch.float64) * (0.5 if fn == "tanh" else 1.0)
    w = compand(v, 2.0, 1.5, fn)
    torch.testing.assert_close(w, -w.flip(0), rtol=0, atol=1e-14)
    assert bool((w.diff() > 0).all())
    bound = FUNCTIONS[fn].bound(2.0)
    assert bound == {"arctan": math.pi, "tanh": 2.0, "softsign": 2.0}[fn]
    assert bool((w.abs() < bound).all())
    for huge in (1e6, 1e30):  # in float32, rounding may reach the bound
        assert float(compand(torch.tensor([huge]), 2.0, 1.5, fn)) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_expand_inverts_compand(dtype, rtol):
    v = torch.linspace(-50, 50, 1001, dtype=dtype) * 0.3
    torch.testing.assert_close(
        expand(compand(v, 2.0, 0.3), 2.0, 0.3), v, rtol=rtol, atol=1e-6 if rtol > 1e-6 else 1e-12
    )
    for fn, reach in (("tanh", 2.6), ("softsign", 90.0)):
        v = torch.linspace(-reach, reach, 1001, dtype=dtype)
        torch.testing.assert_close(expand(compand(v, 2.0, 1.0, fn), 2.0, 1.0, fn), v, rtol=10 * rtol, atol=1e-6)


@pytest.mark.parametrize("fn", NAMES)
def test_weights_beyond_the_bound_are_clipped_to_99_per_cent_of_it(fn):
    w = torch.tensor([-9.0, 0.2, 9.0], dtype=torch.float64)
    edge = 0.99 * FUNCTIONS[fn].bound(1.0)
    again = compand(expand(w, 1.0, 1.0, fn), 1.0, 1.0, fn)
    torch.testing.assert_close(again, torch.tensor([-edge, 0.2, edge], dtype=torch.float64), rtol=1e-12, atol=0)


def test_gradients_equal_the_closed_forms():
    v, upstream = free().requires_grad_(), free(seed=1)
    a, b = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.3, 0.7))
    compand(v, a, b).backward(upstream)
    close = {"rtol": 1e-12, "atol": 1e-12}
    with torch.no_grad():
        torch.testing.assert_close(v.grad, upstream * a * b / (b**2 + v**2), **close)
        torch.testing.assert_close(a.grad, (upstream * torch.atan(v / b)).sum().view(1), **close)
        torch.testing.assert_close(b.grad, -(upstream * a * v / (b**2 + v**2)).sum().view(1), **close)


@pytest.mark.parametrize("fn", NAMES)
def test_derivatives_of_first_and_second_order_forward_mode_and_batched(fn):
    v = free(6).requires_grad_()
    a, b = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.3, 0.7))

    def function(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return compand(v, a, b, fn)

    assert torch.autograd.gradcheck(
        function, (v, a, b), atol=1e-7, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=True
    )
    assert torch.autograd.gradgradcheck(function, (v, a, b))
    (slope,) = torch.autograd.grad(compand(v, a, b, fn).sum(), v)
    torch.testing.assert_close(compand_grad_scale(v, a, b, fn), slope, rtol=1e-12, atol=1e-12)


def test_backward_keeps_the_free_tensor_alone():
    v = free().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compand(v, torch.tensor([1.3], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64))
    large = [tensor for tensor in kept if tensor.numel() > 1]
    assert [tensor.data_ptr() for tensor in large] == [v.data_ptr()]


def test_backward_keeps_the_weights_too_where_the_amplitude_is_learned():
    v, a = free().requires_grad_(), torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        w = compand(v, a, torch.tensor([0.7], dtype=torch.float64))
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 1}
    assert large == {v.data_ptr(), w.data_ptr()}


def allocated(function: Callable[[], object]) -> int:
    """Bytes that the operations of a call allocate, whether or not they are freed again."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    return sum(max(0, event.self_cpu_memory_usage) for event in found.events())


def test_one_new_tensor_forward_and_one_backward():
    v, upstream = torch.randn(100_000, requires_grad=True), torch.randn(100_000)
    before = v.detach().clone(), upstream.clone()
    a, b = torch.tensor([1.3]), torch.tensor([0.7])
    w = compand(v, a, b)
    size = v.numel() * v.element_size()
    assert size <= allocated(lambda: compand(v, a, b)) < 1.01 * size
    assert size <= allocated(lambda: torch.autograd.grad(w, v, upstream)) < 1.01 * size
    assert torch.equal(v, before[0])
    assert torch.equal(upstream, before[1])  # it may belong to somebody else


@pytest.mark.parametrize("fn", NAMES)
def test_every_argument_can_be_batched_alone(fn):
    """What is computed in place has to have room for the batch, whichever argument brings it."""
    v, others = free(5), (torch.tensor([1.3], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64))
    for place in range(3):
        arguments = [v, *others]
        arguments[place] = torch.stack([arguments[place], 2 * arguments[place]])
        places = tuple(0 if i == place else None for i in range(3))

        def slope(*x: Tensor) -> Tensor:
            return grad(lambda v: compand(v, *x[1:], fn).sum())(x[0])

        def value(*x: Tensor) -> Tensor:
            return compand(*x, fn)

        for function in (value, slope):
            one_by_one = [function(*(x[i] if j == place else x for j, x in enumerate(arguments))) for i in range(2)]
            torch.testing.assert_close(vmap(function, places)(*arguments), torch.stack(one_by_one))


def test_widths_whose_square_float32_does_not_hold_are_refused():
    for b in (1e-18, 1e18):
        v = torch.tensor([0.0, b], requires_grad=True)
        (slope,) = torch.autograd.grad(compand(v, b, b).sum(), v)
        torch.testing.assert_close(slope, torch.tensor([1.0, 0.5]))
    for b in (1e-19, 1e19):
        for call in (lambda b: compand(torch.ones(2), 1.0, b), lambda b: Compander(1.0, b)):
            with pytest.raises(ValueError, match=r"`b` of [Cc]ompand(er)? to be between 1e-18 and 1e18"):
                call(b)


def test_half_precision_is_computed_in_float32():
    v = torch.tensor([1e-3, 0.5, 3.0])
    tiny = torch.tensor([3e-8])  # not a number of float16: v / b would overflow
    for dtype in (torch.float16, torch.bfloat16):
        w = compand(v.to(dtype), torch.tensor([1.0]), tiny)
        assert w.dtype is dtype
        torch.testing.assert_close(w, compand(v, 1.0, 3e-8).to(dtype), rtol=1e-2, atol=0)
        assert expand(w, 1.0, 1.0).dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compand(v, 1.0, 0.5), torch.atan(v / 0.5))


def test_a_function_of_ones_own():
    c = math.sqrt(math.pi) / 2
    erf = Companding(lambda x: torch.erf(c * x), 1.0)
    v = free(8, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: compand(v, 1.3, 0.7, erf), v)
    exact = 1.3 / 0.7 * torch.exp(-((c * v.detach() / 0.7) ** 2))
    torch.testing.assert_close(compand_grad_scale(v.detach(), 1.3, 0.7, erf), exact)
    with pytest.raises(ValueError, match="`fn` of expand to have an inverse"):
        expand(v, 1.3, 0.7, erf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.exp, 1e9), "`function` of Companding to be odd"),
        ((lambda x: x.sum(), 9.0), "`function` of Companding to be finite and elementwise"),
        ((lambda x: x.clamp(-1, 1), 2.0), "strictly increasing"),
        ((lambda x: torch.tanh(2 * x), 1.1), "slope 1 at zero, but got 2"),
        ((torch.atan, 1.0), "`limit` of Companding to be finite and above"),
        ((torch.atan, math.inf), "`limit` of Companding"),
        ((torch.atan, 1.6, torch.atanh), "`inverse` of Companding"),
        ((torch.atan, 1.6, torch.tan, torch.cos), "`derivative` of Companding"),
    ],
)
def test_functions_that_do_not_compand_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Companding(*arguments)


def test_bad_arguments_of_the_functions():
    v = torch.zeros(3)
    for a, b in ((0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="`a` of compand to be a positive, finite number"):
            compand(v, a, b)
    with pytest.raises(ValueError, match="`b` of expand to be a positive, finite number, but got inf"):
        expand(v, 1.0, math.inf)
    with pytest.raises(ValueError, match="Did you mean 'arctan'"):
        compand(v, 1.0, 1.0, "arctann")
    with pytest.raises(ValueError, match="`b` of Compander to be a positive"):
        Compander(1.0, 0.0)


# The parametrisation


def test_learned_scales_have_the_gradient_of_their_logarithms():
    compander = Compander(1.3, 0.7, learn=True).double()
    a, b = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.3, 0.7))
    v, upstream = free(), free(seed=1)
    compander(v).backward(upstream)
    compand(v, a, b).backward(upstream)
    torch.testing.assert_close(compander.log_a.grad, a.grad * 1.3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compander.log_b.grad, b.grad * 0.7, rtol=1e-6, atol=1e-6)


def test_learned_scales_stay_positive_in_a_thousand_large_steps():
    torch.manual_seed(0)
    layer = nn.utils.parametrize.register_parametrization(nn.Linear(5, 3), "weight", Compander(learn=True))
    optimizer = torch.optim.SGD(parameter_groups(layer, lr=0.1, lr_scale=1.0), lr=0.1, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    x = 100 * torch.randn(16, 5)
    for _ in range(1000):
        optimizer.zero_grad()
        layer(x).square().mean().clamp(max=1e4).backward()
        optimizer.step()
    a, b = (value.detach() for value in layer.parametrizations.weight[0].scales())
    assert 0 < float(a) < math.inf
    assert 0 < float(b) < math.inf
    with torch.no_grad():
        layer.parametrizations.weight[0].log_b.fill_(-1e6)
    assert layer(x).isfinite().all()


def test_parameter_groups_scale_the_rate_of_learned_scales():
    layer = nn.utils.parametrize.register_parametrization(nn.Linear(5, 3), "weight", Compander(learn=True))
    weights, scales = parameter_groups(layer, lr=0.5, lr_scale=0.02)
    assert (weights["lr"], scales["lr"], scales["weight_decay"]) == (0.5, 0.01, 0.0)
    assert {id(p) for group in (weights, scales) for p in group["params"]} == {id(p) for p in layer.parameters()}
    assert len(parameter_groups(nn.Linear(2, 2), lr=0.5)) == 1


def test_per_example_gradients_through_torch_func():
    torch.manual_seed(0)
    layer = nn.utils.parametrize.register_parametrization(nn.Linear(4, 3), "weight", Compander(0.5, 0.4, learn=True))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(6, 4)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(6):
        layer.zero_grad()
        layer(x[i]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-4, atol=1e-5)


def test_one_step_by_hand_with_decay_on_the_free_tensor():
    layer = nn.Linear(1, 1, bias=False).double()
    layer.weight.data.fill_(0.3)
    a, b, rate, decay, x, y = 0.9, 0.6, 0.1, 0.05, 2.0, 1.5
    nn.utils.parametrize.register_parametrization(layer, "weight", Compander(a, b).double())
    with torch.no_grad():  # a and b were rounded to float32
        layer.parametrizations.weight[0].a.fill_(a)
        layer.parametrizations.weight[0].b.fill_(b)
        layer.weight = torch.full((1, 1), 0.3, dtype=torch.float64)
    v = b * math.tan(0.3 / a)
    assert float(layer.parametrizations.weight.original) == pytest.approx(v, abs=1e-14)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, weight_decay=decay)
    (layer(torch.full((1, 1), x, dtype=torch.float64)) - y).square().sum().backward()
    optimizer.step()
    w = a * math.atan(v / b)
    v -= rate * (2 * (w * x - y) * x * a * b / (b * b + v * v) + decay * v)
    assert float(layer.parametrizations.weight.original) == pytest.approx(v, abs=1e-12)
    assert float(layer.weight) == pytest.approx(a * math.atan(v / b), abs=1e-12)
