# SPDX-License-Identifier: Apache-2.0
"""Self-Tuning Networks: the equations against closed forms, scikit-learn and torch's distributions."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite_plugins.bilevel.self_tuning_networks.functional import (
    RangeMap,
    gaussian_entropy,
    perturb,
    ridge_gate,
    ridge_gates,
    softplus_inverse,
)
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper, Knobs
from fulgurite_plugins.bilevel.self_tuning_networks.layers import HyperLinear, fuse
from fulgurite_plugins.bilevel.self_tuning_networks.targets import Cutout, GaussianNoise

INF = math.inf
RANGES = [(0.0, 0.9), (-2.0, 3.0), (0.0, INF), (1.5, INF), (-INF, 0.0), (-INF, 2.0), (-INF, INF)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Ranges


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_range_map_is_inverted_and_stays_strictly_inside(low: float, high: float):
    lam = torch.linspace(-8, 8, 321, dtype=torch.float64)
    ranges = RangeMap(low, high)
    torch.testing.assert_close(ranges.unconstrain(ranges.constrain(lam)), lam, rtol=0, atol=1e-6)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        extreme = ranges.constrain(torch.tensor([-1e4, -300.0, -40.0, 0.0, 40.0, 300.0, 1e4], dtype=dtype))
        assert extreme.dtype is dtype
        assert bool((extreme > low).all()), extreme
        assert bool((extreme < high).all()), extreme


def test_range_maps_are_the_formulas_of_the_four_kinds():
    lam = torch.tensor([-1.3, 0.0, 2.1], dtype=torch.float64)
    sigmoid, softplus = 1 / (1 + torch.exp(-lam)), torch.log1p(torch.exp(lam))
    torch.testing.assert_close(RangeMap(-2.0, 3.0).constrain(lam), -2 + 5 * sigmoid)
    torch.testing.assert_close(RangeMap(1.5, INF).constrain(lam), 1.5 + softplus)
    torch.testing.assert_close(RangeMap(-INF, 2.0).constrain(lam), 2 - softplus)
    assert torch.equal(RangeMap(-INF, INF).constrain(lam), lam)


def test_several_ranges_at_once_are_each_of_them_and_have_its_gradient():
    lam = torch.randn(5, len(RANGES), dtype=torch.float64, generator=seeded()).requires_grad_()
    together = RangeMap([low for low, _ in RANGES], [high for _, high in RANGES])
    apart = torch.stack([RangeMap(*ends).constrain(lam[:, k]) for k, ends in enumerate(RANGES)], 1)
    torch.testing.assert_close(together.constrain(lam), apart, rtol=0, atol=1e-15)
    torch.testing.assert_close(together.unconstrain(apart), lam, rtol=0, atol=1e-9)
    assert torch.autograd.gradcheck(together.constrain, lam)
    assert together.constrain(torch.full((len(RANGES),), 500.0, requires_grad=True)).isfinite().all()


def test_gradients_of_range_maps_are_finite_far_out():
    lam = torch.tensor([[-500.0] * len(RANGES), [500.0] * len(RANGES)], requires_grad=True)
    RangeMap([low for low, _ in RANGES], [high for _, high in RANGES]).constrain(lam).sum().backward()
    assert lam.grad is not None
    assert lam.grad.isfinite().all()


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), ([0.0, 2.0], [1.0, 1.0])])
def test_a_range_must_have_its_ends_in_order(low, high):
    with pytest.raises(ValueError, match="`low` of RangeMap to be below `high`"):
        RangeMap(low, high)


def test_softplus_is_inverted():
    value = torch.tensor([1e-6, 0.01, 1.0, 30.0, 800.0], dtype=torch.float64)
    torch.testing.assert_close(F.softplus(softplus_inverse(value)), value, rtol=1e-9, atol=0)


# Perturbation


def test_entropy_is_that_of_independent_gaussians():
    scale = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        gaussian_entropy(scale), torch.distributions.Normal(0.0, scale).entropy().sum(), rtol=0, atol=1e-12
    )
    (gradient,) = torch.autograd.grad(gaussian_entropy(scale), scale)
    torch.testing.assert_close(gradient, 1 / scale.detach())


def test_shared_hyperparameters_have_one_draw_and_the_others_one_for_each_example():
    lam, scale, n = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 2.0, 0.1]), 40_000
    shared = torch.tensor([False, True, False])
    drawn = perturb(lam, scale, n, shared, seeded())
    assert drawn.shape == (n, 3)
    assert torch.equal(drawn[:, 1], drawn[:1, 1].expand(n))
    for k in (0, 2):
        assert drawn[:, k].unique().numel() > 0.9 * n
        assert abs(drawn[:, k].mean() - lam[k]) < 5 * scale[k] / math.sqrt(n)
        assert abs(drawn[:, k].std() / scale[k] - 1) < 5 / math.sqrt(2 * n)
    correlation = torch.corrcoef(drawn[:, [0, 2]].T)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)
    plain = perturb(lam, scale, n, None, seeded())
    assert torch.equal(plain[:, 0], drawn[:, 0])  # sharing one leaves the draws of the others alone
    assert torch.equal(plain[0], drawn[0])  # the shared draw is that of the first example


def test_the_perturbation_is_reparametrised():
    lam = torch.randn(3, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    scale = torch.rand(3, dtype=torch.float64, generator=seeded(2)).requires_grad_()
    shared = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda a, b: perturb(a, b, 4, shared, seeded()), (lam, scale))


def test_the_stationary_scale_of_a_quadratic_is_the_closed_form():
    """F(lam) = lam^T A lam / 2: dE/ds_k = s_k A_kk, so that with entropy weight tau the scale rests at sqrt(tau / A_kk)."""
    A = torch.tensor([[3.0, 0.7], [0.7, 0.4]], dtype=torch.float64)
    tau, noise = 0.02, torch.randn(200_000, 2, dtype=torch.float64, generator=seeded())
    noise = (noise - noise.mean(0)) / noise.std(0, correction=0)  # exact first and second moments
    lam = torch.zeros(2, dtype=torch.float64)

    def objective(rho: Tensor, weight: float) -> Tensor:
        drawn = lam + F.softplus(rho) * noise
        return 0.5 * ((drawn @ A) * drawn).sum(1).mean() - weight * gaussian_entropy(F.softplus(rho))

    scale = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(0.5 * (((scale * noise) @ A) * (scale * noise)).sum(1).mean(), scale)
    off_diagonal = A[0, 1] * (noise[:, 0] * noise[:, 1]).mean() * scale.detach().flip(0)
    torch.testing.assert_close(slope, scale.detach() * A.diagonal() + off_diagonal, rtol=1e-9, atol=1e-12)

    rho = softplus_inverse(torch.full((2,), 0.5, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.LBFGS([rho], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(rho, tau)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(F.softplus(rho.detach()), (tau / A.diagonal()).sqrt(), rtol=1e-2, atol=0)


def test_without_entropy_the_scales_of_a_convex_objective_shrink_monotonically():
    A = torch.tensor([3.0, 0.4], dtype=torch.float64)
    rho, sizes = softplus_inverse(torch.full((2,), 1.0, dtype=torch.float64)).requires_grad_(), []
    for _ in range(60):
        scale = F.softplus(rho)
        sizes.append(scale.detach())
        noise = torch.randn(4096, 2, dtype=torch.float64, generator=seeded(len(sizes)))
        loss = 0.5 * (A * (scale * noise).square()).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, rho)
        rho = (rho - 0.2 * gradient).detach().requires_grad_()
    assert bool((torch.stack(sizes).diff(dim=0) < 0).all())
    assert bool((sizes[-1] < 0.5).any())


# Best responses


@pytest.mark.parametrize("lam", [-4.0, 0.0, 3.0])
@pytest.mark.parametrize("targets", [1, 3])
def test_the_ridge_gate_is_ridge_regression(lam: float, targets: int):
    X = torch.randn(30, 6, dtype=torch.float64, generator=seeded())
    y = torch.randn(30, targets, dtype=torch.float64, generator=seeded(1))
    y = y.squeeze(1) if targets == 1 else y
    peer = Ridge(alpha=math.exp(lam), fit_intercept=False, solver="cholesky").fit(X.numpy(), y.numpy())
    expected = torch.from_numpy(peer.coef_)
    torch.testing.assert_close(ridge_gate(X, y, lam), expected if targets == 1 else expected.T, rtol=0, atol=1e-8)


def test_the_derivative_of_the_ridge_gate_is_that_of_a_falling_sigmoid():
    d = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    lam = torch.tensor(0.7, dtype=torch.float64)
    gates = ridge_gates(d, lam)
    torch.testing.assert_close(gates, d**2 / (d**2 + lam.exp()))
    derivative = torch.func.jacrev(lambda value: ridge_gates(d, value))(lam)
    torch.testing.assert_close(derivative, -gates * (1 - gates), rtol=0, atol=1e-12)
    X, y = torch.randn(9, 3, dtype=torch.float64, generator=seeded()), torch.ones(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: ridge_gate(X, y, value), lam.clone().requires_grad_())


def test_ridge_of_a_rank_deficient_design_has_no_weight_where_there_is_no_data():
    X = torch.zeros(5, 3, dtype=torch.float64)
    X[:, 0] = torch.arange(5)
    w = ridge_gate(X, torch.ones(5, dtype=torch.float64), -2.0)
    assert w.isfinite().all()
    torch.testing.assert_close(w[1:], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_a_gated_layer_recovers_the_best_response_of_a_jointly_quadratic_objective(scale: float):
    r"""f(lam, w) = (w - w0 - J lam)^T A (w - w0 - J lam) / 2 + terms in lam: w*(lam) = w0 + J lam, whatever the scale.

    The layer has one input that is 1: its effective bias is b + (V_b h) * c, an affine response.
    """
    H, D, draws = 2, 3, 20_000
    generator = seeded()
    J = torch.randn(D, H, dtype=torch.float64, generator=generator)
    w0 = torch.randn(D, dtype=torch.float64, generator=generator)
    root = torch.randn(D, D, dtype=torch.float64, generator=generator)
    A = root @ root.T + torch.eye(D, dtype=torch.float64)
    lam0 = torch.tensor([0.4, -1.1], dtype=torch.float64)
    lam = perturb(lam0, torch.full((H,), scale, dtype=torch.float64), draws, None, generator)

    layer = HyperLinear(1, D, bias=False, num_hyper=H, generator=generator).double()
    with torch.no_grad():
        layer.hyper_weight.fill_(1.0)  # U and V enter as a product: one of them is enough
    h = lam - lam0
    layer.conditioning.set(h=h)
    fitted = [layer.weight, layer.gate.weight]
    optimizer = torch.optim.LBFGS(
        fitted, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    ones = torch.ones(draws, 1, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        rest = layer(ones) - w0 - lam @ J.T
        loss = 0.5 * ((rest @ A) * rest).sum(1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(fuse(layer, torch.zeros(H)).weight[:, 0], w0 + J @ lam0, rtol=0, atol=1e-4)
    jacobian = torch.func.jacrev(lambda value: layer.effective(value)[0][:, 0])(torch.zeros(H, dtype=torch.float64))
    torch.testing.assert_close(jacobian, J, rtol=0, atol=1e-4)


def test_the_validation_gradient_equals_finite_differences_with_common_random_numbers():
    """Through a gated network, in lam and rho; the discrete value is rounded, but the gates see the unrounded lam."""
    torch.manual_seed(0)
    network = nn.Sequential(HyperLinear(4, 5, num_hyper=2), nn.Tanh(), HyperLinear(5, 2, num_hyper=2)).double()
    hypers = [
        Hyper("length", Cutout("length"), 4, (0, 24), discrete=True),
        Hyper("noise", GaussianNoise(), 0.05, (0.0, math.inf), shared=True),
    ]
    knobs = Knobs(hypers, network)
    for layer in (network[0], network[2]):
        nn.init.normal_(layer.gate.weight)
    x = torch.randn(16, 4, dtype=torch.float64, generator=seeded(3))
    target = torch.randint(0, 2, (16,), generator=seeded(4))

    def objective(lam: Tensor, rho: Tensor) -> Tensor:
        drawn = perturb(lam, F.softplus(rho), 16, knobs.shared, seeded(5))
        assert not knobs.values(drawn).requires_grad
        for layer in (network[0], network[2]):
            layer.conditioning.set(h=drawn, values=knobs.values(drawn))
        return F.cross_entropy(network(x), target) - 1e-3 * gaussian_entropy(F.softplus(rho))

    lam = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    rho = torch.tensor([-0.2, 0.4], dtype=torch.float64, requires_grad=True)
    gradients = torch.cat(torch.autograd.grad(objective(lam, rho), (lam, rho)))
    assert bool((gradients.abs() > 1e-6).all())
    theta, step = torch.cat([lam, rho]).detach(), 1e-5
    for k in range(4):
        shift = step * F.one_hot(torch.tensor(k), 4).double()
        above, below = theta + shift, theta - shift
        slope = (objective(above[:2], above[2:]) - objective(below[:2], below[2:])) / (2 * step)
        torch.testing.assert_close(gradients[k], slope.detach(), rtol=1e-4, atol=1e-9)
