# SPDX-License-Identifier: Apache-2.0
"""The mathematics of dynamical stability, against dense matrices, simulations and closed forms, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_plugins.curvature.dynamical_stability import (
    DiagonalLinearNetwork,
    TwoLayerReLU,
    alignment_factor,
    frobenius_norm,
    gauss_newton_trace,
    lambda_max,
    max_stable_lr,
    non_uniformity,
    path_norm,
    refined_trace_bound,
    stability_box,
    stability_radius,
    trace_bound,
)
from fulgurite_plugins.curvature.dynamical_stability.features import (
    OutputCurvature,
    evaluated,
    feature_kernel,
    signs,
    squared_products,
)
from fulgurite_plugins.curvature.dynamical_stability.functional import sampling_weights, trace


def jacobian(n: int, outputs: int, p: int, seed: int = 0) -> Tensor:
    return torch.randn(n, outputs, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel_of(j: Tensor) -> Tensor:
    kernel = torch.einsum("ncp,mdp->ncmd", j, j)
    return kernel[:, 0, :, 0] if j.shape[1] == 1 else kernel


def draws(n: int, batch: int, replacement: bool) -> list[tuple[float, Tensor]]:
    """All batches, as counts of examples `[n]`, with their probabilities."""
    pick = itertools.product if replacement else itertools.combinations
    chosen = [*(pick(range(n), repeat=batch) if replacement else pick(range(n), batch))]  # type: ignore[call-arg, arg-type]
    return [(1 / len(chosen), torch.tensor(c).bincount(minlength=n).double()) for c in chosen]


def explicit_map(j: Tensor, lr: float, batch: int, replacement: bool, decay: float = 0.0) -> Tensor:
    """The mean of `kron(A, A)` over all batches, `A` one step of SGD on the parameters: nothing is derived here."""
    n, _, p = j.shape
    eye = torch.eye(p, dtype=j.dtype)
    total = torch.zeros(p * p, p * p, dtype=j.dtype)
    for probability, counts in draws(n, batch, replacement):
        step = eye - lr * (torch.einsum("n,ncp,ncq->pq", counts, j, j) / batch + decay * eye)
        total += probability * torch.kron(step, step)
    return total


CASES = [(5, 1, 4, 2, False), (5, 1, 4, 2, True), (4, 2, 6, 1, False), (4, 1, 3, 4, False), (4, 3, 5, 3, True)]


@pytest.mark.parametrize(("n", "outputs", "p", "batch", "replacement"), CASES)
@pytest.mark.parametrize("factor", [0.3, 0.99, 1.3])
def test_the_radius_is_that_of_the_mean_over_all_batches(
    n: int, outputs: int, p: int, batch: int, replacement: bool, factor: float
) -> None:
    j = jacobian(n, outputs, p)
    lr = factor * float(max_stable_lr(kernel_of(j), batch, replacement))
    expected = torch.linalg.eigvals(explicit_map(j, lr, batch, replacement)).abs().max()
    found = stability_radius(kernel_of(j), lr, batch, replacement)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_directions_without_gradient_do_not_count() -> None:
    """More parameters than examples: the dense map has the eigenvalue 1 there, which would hide everything below it."""
    j = jacobian(3, 1, 5)
    lr = 0.5 * float(max_stable_lr(kernel_of(j), 2))
    assert torch.linalg.eigvals(explicit_map(j, lr, 2, False)).abs().max() > 1 - 1e-12
    span = torch.linalg.svd(j[:, 0], full_matrices=False).Vh
    inside = j @ span.mT
    expected = torch.linalg.eigvals(explicit_map(inside, lr, 2, False)).abs().max()
    torch.testing.assert_close(stability_radius(kernel_of(j), lr, 2), expected, atol=1e-9, rtol=0)
    assert expected < 1


@pytest.mark.parametrize("replacement", [False, True])
def test_weight_decay_adds_to_every_step(replacement: bool) -> None:
    j = jacobian(4, 1, 3)
    expected = torch.linalg.eigvals(explicit_map(j, 0.2, 2, replacement, decay=0.3)).abs().max()
    found = stability_radius(kernel_of(j), 0.2, 2, replacement, weight_decay=0.3)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    limit = float(max_stable_lr(kernel_of(j), 2, replacement, weight_decay=0.3))
    radius = stability_radius(kernel_of(j), limit, 2, replacement, weight_decay=0.3)
    assert abs(float(radius) - 1) < 1e-8


@pytest.mark.parametrize("seed", range(20))
def test_the_limits_are_in_their_order(seed: int) -> None:
    n, outputs, p, batch, replacement = CASES[seed % len(CASES)]
    j = jacobian(n + 4, outputs, p + seed, seed)
    kernel = kernel_of(j)
    exact = float(max_stable_lr(kernel, batch, replacement))
    refined = float(refined_trace_bound(kernel, batch, replacement))
    loose = float(trace_bound(trace(kernel), batch, outputs))
    slack = 1 + 1e-9
    assert exact <= refined * slack <= loose * slack**2
    assert exact <= 2 / float(lambda_max(kernel)) * slack
    assert abs(float(stability_radius(kernel, exact, batch, replacement)) - 1) < 1e-8
    assert float(stability_radius(kernel, 0.98 * exact, batch, replacement)) < 1
    assert float(stability_radius(kernel, 1.02 * exact, batch, replacement)) > 1


def test_unit_gradients_and_single_examples_make_the_trace_exact() -> None:
    j = jacobian(8, 1, 30)
    kernel = kernel_of(j / j.norm(dim=2, keepdim=True))
    expected = 2 / float(trace(kernel))
    assert expected == pytest.approx(2.0)
    assert float(max_stable_lr(kernel, 1)) == pytest.approx(expected, rel=1e-6)
    assert float(refined_trace_bound(kernel, 1)) == pytest.approx(expected, rel=1e-12)


def test_the_whole_set_is_gradient_descent() -> None:
    kernel = kernel_of(jacobian(6, 2, 7))
    assert float(max_stable_lr(kernel, 6)) == pytest.approx(2 / float(lambda_max(kernel)), rel=1e-9)


def test_several_outputs_need_their_number_in_the_bound_by_the_trace() -> None:
    """One example with two orthogonal gradients is gradient descent: stable up to 2, where `lr Tr(H) = 4 > 2 B`."""
    kernel = kernel_of(torch.eye(2, dtype=torch.float64).unsqueeze(0))
    assert float(max_stable_lr(kernel, 1)) == pytest.approx(2.0)
    assert float(trace_bound(trace(kernel), 1)) == pytest.approx(1.0)  # below what is stable: no bound
    assert float(trace_bound(trace(kernel), 1, outputs=2)) == pytest.approx(2.0)


def test_order_and_duplication_of_the_data_do_not_matter() -> None:
    j = jacobian(6, 2, 5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    expected = float(max_stable_lr(kernel_of(j), 2, replacement=True))
    assert float(max_stable_lr(kernel_of(j[order]), 2, replacement=True)) == pytest.approx(expected, rel=1e-9)
    twice = kernel_of(torch.cat([j, j]))
    assert float(max_stable_lr(twice, 2, replacement=True)) == pytest.approx(expected, rel=1e-9)
    lr = 0.9 * expected
    radius = float(stability_radius(kernel_of(j), lr, 2, replacement=True))
    assert radius < 1 - 1e-6
    assert float(stability_radius(twice, lr, 2, replacement=True)) == pytest.approx(radius, abs=1e-9)
    # Without replacement the number of examples matters, and can be given.
    given = float(max_stable_lr(twice, 2, examples=6))
    assert given == pytest.approx(float(max_stable_lr(kernel_of(j), 2)), rel=1e-9)


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_simulated_sgd_grows_as_the_radius_says(factor: float) -> None:
    """4,000 runs of linear SGD with one example per step, from the worst second moment."""
    j = jacobian(4, 1, 3)[:, 0]
    kernel = j @ j.T
    lr = factor * float(max_stable_lr(kernel, 1))
    expected = float(stability_radius(kernel, lr, 1))
    values, vectors = torch.linalg.eig(explicit_map(j.unsqueeze(1), lr, 1, False))
    moment = vectors[:, values.abs().argmax()].real.view(3, 3)
    moment = (moment + moment.T) * torch.sign(moment.trace())
    own, basis = torch.linalg.eigh(moment)
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * own.clamp_min(0).sqrt() @ basis.T
    before = theta.square().sum(dim=1)
    for _ in range(3):
        g = j[torch.randint(0, 4, (4000,), generator=generator)]
        theta = theta - lr * (theta * g).sum(dim=1, keepdim=True) * g
    change = theta.square().sum(dim=1) - expected**3 * before
    assert abs(float(change.mean())) < 3 * float(change.std()) / math.sqrt(4000)


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def inputs(n: int = 9) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense_gauss_newton(model: nn.Module, x: Tensor, loss: str) -> Tensor:
    """`mean_i J_i^T A_i J_i` with both factors by autograd."""
    parameters = dict(model.named_parameters())

    def outputs(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (one.unsqueeze(0),)).squeeze(0)

    losses: dict[str, Any] = {
        "half_squared": lambda z: 0.5 * z.square().sum(),
        "mse": lambda z: z.square().mean(),
        "cross_entropy": lambda z: F.cross_entropy(z, torch.tensor(0)),
    }
    found = []
    for one in x:
        rows = torch.func.jacrev(outputs)(parameters, one)
        j = torch.cat([r.flatten(1) for r in rows.values()], dim=1)
        a = torch.func.hessian(losses[loss])(model(one.unsqueeze(0)).squeeze(0).detach())
        found.append(j.T @ a @ j)
    return torch.stack(found).mean(dim=0).detach()


@pytest.mark.parametrize("loss", ["half_squared", "mse", "cross_entropy"])
def test_trace_norm_and_eigenvalue_are_those_of_the_dense_matrix(loss: Any) -> None:
    model, x = network(), inputs()
    dense = dense_gauss_newton(model, x, loss)
    torch.testing.assert_close(gauss_newton_trace(model, x, loss), dense.trace(), atol=1e-10, rtol=1e-10)
    outputs = evaluated(model, x)
    weights = {name: 1.0 for name, _ in model.named_parameters()}
    kernel = feature_kernel(model, x, outputs, OutputCurvature.of(loss, 3), weights)
    torch.testing.assert_close(trace(kernel), dense.trace(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(frobenius_norm(kernel), dense.norm(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(lambda_max(kernel), torch.linalg.eigvalsh(dense)[-1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("loss", ["half_squared", "cross_entropy"])
def test_probes_of_outputs_are_unbiased(loss: Any) -> None:
    model, x = network(), inputs(4)
    exact = float(gauss_newton_trace(model, x, loss))
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([gauss_newton_trace(model, x, loss, probes=1, generator=generator) for _ in range(100)])
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(len(found))


def test_products_of_features_are_unbiased_and_of_one_output_exact() -> None:
    x = inputs(4)
    for outputs, probes in ((1, 1), (3, 400)):
        model = network(outputs)
        weights = {name: 1.0 + number for number, (name, _) in enumerate(model.named_parameters())}
        curvature, values = OutputCurvature("squared", 2.0), evaluated(model, x)
        kernel = feature_kernel(model, x, values, curvature, weights).movedim(2, 1)
        expected = torch.stack([kernel[i, i] for i in range(4)]).square().sum(dim=(1, 2))
        drawn = signs(2 * probes, 4, outputs, torch.Generator().manual_seed(0)).double()
        found = squared_products(model, x, values, curvature, weights, drawn)
        torch.testing.assert_close(found, expected, rtol=1e-10 if outputs == 1 else 0.25, atol=0)


def test_trace_agrees_with_backpack() -> None:
    """A peer: the exact diagonal of the Gauss-Newton matrix."""
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import DiagGGNExact

    model, x = network().float(), inputs().float()
    extended = backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(DiagGGNExact()):
        loss(extended(x), torch.zeros(9, dtype=torch.long)).backward()
    expected = sum(p.diag_ggn_exact.sum() for p in model.parameters())
    torch.testing.assert_close(gauss_newton_trace(model, x, "cross_entropy"), expected, rtol=1e-5, atol=0)


def test_alignment_is_that_of_the_noise_covariance() -> None:
    j, r = jacobian(6, 2, 5), torch.randn(6, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    own = torch.einsum("ncp,nc->np", j, r)
    noise = own.T @ own / 6 - torch.outer(own.mean(dim=0), own.mean(dim=0))
    h = torch.einsum("ncp,ncq->pq", j, j) / 6
    loss = r.square().sum() / 12
    expected = (h @ noise).trace() / (2 * loss * h.square().sum())
    torch.testing.assert_close(alignment_factor(kernel_of(j), r), expected)


def test_non_uniformity_is_that_of_the_examples_matrices() -> None:
    j = jacobian(6, 2, 5)
    own = torch.einsum("ncp,ncq->npq", j, j)
    h = own.mean(dim=0)
    expected = torch.linalg.eigvalsh((own @ own).mean(dim=0) - h @ h)[-1].sqrt()
    torch.testing.assert_close(non_uniformity(kernel_of(j)), expected)
    a, s = stability_box(0.1, 2, 6)
    assert a == pytest.approx(20)
    assert s == pytest.approx(10 * math.sqrt(2 * 5 / 4))
    assert stability_box(0.1, 6, 6)[1] == math.inf


def gaussian(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_two_layer_closed_form_is_the_trace(bias: bool) -> None:
    torch.manual_seed(0)
    net = TwoLayerReLU(5, 7, bias=bias).double()
    if bias:
        nn.init.normal_(net.hidden.bias)
    x = gaussian(9, 5)
    torch.testing.assert_close(net.trace(x), gauss_newton_trace(net, x), atol=1e-10, rtol=0)


def test_two_layer_trace_over_gaussian_inputs_bounds_the_path_norm() -> None:
    torch.manual_seed(0)
    net = TwoLayerReLU(5, 7).double()
    traces = torch.stack([net.trace(x) for x in gaussian(20_000, 5).split(100)])
    assert abs(float((traces.mean() - net.expected_trace()).detach())) < 4 * float(traces.std()) / math.sqrt(
        len(traces)
    )
    assert net.expected_trace() > math.sqrt(5) * net.path_norm()
    with torch.no_grad():  # balance the units: |a_j| sqrt(d) = |w_j|
        lengths = net.hidden.weight.norm(dim=1)
        factor = (math.sqrt(5) * net.output.weight.abs().squeeze(0) / lengths).sqrt()
        before = net(gaussian(3, 5)), net.path_norm(), net.expected_trace()
        net.hidden.weight.mul_(factor.unsqueeze(1))
        net.output.weight.div_(factor)
    torch.testing.assert_close(net(gaussian(3, 5)), before[0])
    torch.testing.assert_close(net.path_norm(), before[1])
    assert net.expected_trace() < before[2]
    torch.testing.assert_close(net.expected_trace(), math.sqrt(5) * net.path_norm())


@pytest.mark.parametrize(("form", "depth"), [("ab", 2), ("ab", 3), ("uv", 2), ("uv", 3)])
def test_diagonal_network_formulas_hold_for_white_inputs(form: Any, depth: int) -> None:
    torch.manual_seed(0)
    net = DiagonalLinearNetwork(4, depth, form, init_scale=0.7).double()
    nn.init.normal_(net.factors)
    x = math.sqrt(12) * torch.linalg.qr(gaussian(12, 4)).Q
    weights = {"factors": 1.0}
    kernel = feature_kernel(net, x, evaluated(net, x), OutputCurvature("squared"), weights)
    torch.testing.assert_close(gauss_newton_trace(net, x), net.trace(), atol=1e-10, rtol=0)
    torch.testing.assert_close(frobenius_norm(kernel), net.frobenius_norm(), atol=1e-10, rtol=0)
    torch.testing.assert_close(lambda_max(kernel), net.lambda_max(), atol=1e-10, rtol=0)
    torch.testing.assert_close(net(x).squeeze(1), x @ net.coefficients)


def test_diagonal_network_curvature_bounds_norms_of_the_coefficients() -> None:
    torch.manual_seed(0)
    net = DiagonalLinearNetwork(6, init_scale=1.0)
    beta = net.coefficients
    assert net.trace() > 2 * beta.abs().sum()
    assert net.frobenius_norm() > 2 * beta.norm()
    assert net.lambda_max() > 2 * beta.abs().max()
    with torch.no_grad():
        net.factors.copy_(torch.stack([beta.abs().sqrt(), beta.sign() * beta.abs().sqrt()]))
    torch.testing.assert_close(net.trace(), 2 * beta.abs().sum())
    torch.testing.assert_close(net.frobenius_norm(), 2 * beta.norm())
    torch.testing.assert_close(net.lambda_max(), 2 * beta.abs().max())
    uv = DiagonalLinearNetwork(6, form="uv", init_scale=0.5)
    assert uv.coefficients.abs().max() == 0
    nn.init.normal_(uv.factors)
    assert uv.trace() >= 4 * uv.coefficients.abs().sum()


def test_a_large_kernel_has_its_radius_at_the_limit() -> None:
    """Convergence without luck: 96 examples with lengths over two orders of magnitude."""
    j = jacobian(96, 1, 200) * torch.logspace(-1, 1, 96, dtype=torch.float64).view(-1, 1, 1)
    kernel = kernel_of(j)
    limit = float(max_stable_lr(kernel, 4))
    assert abs(float(stability_radius(kernel, limit, 4)) - 1) < 1e-7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: stability_radius(k, 0.0, 1), "`lr` to be a positive number, but got 0.0"),
        (lambda k: stability_radius(k, -1.0, 1), "`lr` to be a positive number, but got -1.0"),
        (lambda k: max_stable_lr(k, 4), "`batch_size` to be at most the number of examples, 3"),
        (lambda k: max_stable_lr(k, 0), "`batch_size` to be positive, but got 0"),
        (lambda k: max_stable_lr(k[:0, :0], 1), r"at least one example, but got \[0, 0\]"),
        (lambda k: max_stable_lr(k[:, :2], 1), r"but got \[3, 2\]"),
        (lambda k: max_stable_lr(k * math.nan, 1), "`kernel` to be finite"),
        (lambda k: alignment_factor(k, torch.ones(2)), r"`residuals` of shape \[3, 1\]"),
        (lambda k: stability_box(0.0, 1, 3), "`lr` to be a positive number"),
        (lambda k: sampling_weights(1, 0), "`examples` to be positive"),
        (lambda k: path_norm(torch.ones(3, 2), torch.ones(2)), "each of the 3 units"),
        (lambda k: gauss_newton_trace(network(), inputs(0)), "at least one example, but got none"),
        (lambda k: gauss_newton_trace(network(), inputs(), probes=0), "`probes` of gauss_newton_trace"),
        (lambda k: gauss_newton_trace(network(), inputs(), "hinge"), "'half_squared', 'mse', 'cross_entropy'"),
        (lambda k: DiagonalLinearNetwork(0), "`dim` of DiagonalLinearNetwork"),
        (lambda k: DiagonalLinearNetwork(2, depth=1), "`depth` of DiagonalLinearNetwork"),
        (lambda k: DiagonalLinearNetwork(2, form="xy"), "`form` of DiagonalLinearNetwork"),
        (lambda k: TwoLayerReLU(2, 0), "`width` of TwoLayerReLU"),
    ],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.eye(3))


def test_no_curvature_has_no_limit() -> None:
    kernel = torch.zeros(3, 3)
    assert float(max_stable_lr(kernel, 1)) == math.inf
    assert float(stability_radius(kernel, 1.0, 1)) == 1.0
    assert float(non_uniformity(kernel)) == 0.0


def test_a_gradient_that_is_not_finite_names_the_parameter() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    with pytest.raises(FulguriteError, match=r"'0\.(weight|bias)' are not finite for example 0"):
        gauss_newton_trace(model, inputs())


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()
    with pytest.raises(RefusedError, match="depends on the whole batch"):
        gauss_newton_trace(model, inputs())
