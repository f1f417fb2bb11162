# SPDX-License-Identifier: Apache-2.0
"""Alignment, kernel regression and lazy trajectories against definitions, scikit-learn and gradient descent; the delay."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from fulgurite_plugins.grokking.lazy_to_rich_grokking import (
    GeneralizationDelay,
    KernelAlignment,
    generalization_delay,
    kernel_alignment,
    kernel_regression,
    lazy_trajectory,
)

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernels(n=8, m=5, outputs=None):
    """Return a kernel of `n` examples, that of `m` others with them; with outputs, `[N, C, N, C]`."""
    shape = (n + m,) if outputs is None else (n + m, outputs)
    jacobian = drawn(*shape, 40)
    rows = jacobian.flatten(0, -2)
    whole = (rows @ rows.mT).reshape(*shape, *shape)
    return whole[:n].narrow(len(shape), 0, n), whole[n:].narrow(len(shape), 0, n)


# Alignment


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("outputs", [None, 1, 3])
def test_alignment_is_its_definition(outputs, centered):
    kernel, targets = kernels()[0], drawn(8, *([] if outputs is None else [outputs]), seed=1)
    mine = kernel_alignment(kernel, targets, centered)
    centre = torch.eye(8, dtype=torch.float64) - (1 / 8 if centered else 0)
    kernel, of_targets = (centre @ k @ centre for k in (kernel, targets.reshape(8, -1) @ targets.reshape(8, -1).mT))
    expected = (kernel * of_targets).sum() / (kernel.norm() * of_targets.norm())
    torch.testing.assert_close(mine, expected, **EXACT)
    assert 0 < mine < 1


def test_alignment_of_a_full_kernel_is_that_of_the_matrix():
    kernel, targets = kernels(outputs=3)[0], drawn(8, 3, seed=1)
    matrix = kernel.reshape(24, 24)
    torch.testing.assert_close(kernel_alignment(kernel, targets), kernel_alignment(matrix, targets.flatten()), **EXACT)


def test_centring_a_full_kernel_is_centring_the_features():
    """Of one output, it is the same as that of the kernel of that output."""
    kernel, targets = kernels()[0], drawn(8, 1, seed=1)
    full = kernel_alignment(kernel[:, None, :, None], targets, centered=True)
    torch.testing.assert_close(full, kernel_alignment(kernel, targets, centered=True), **EXACT)


def test_alignment_ignores_scale_and_rotation_and_is_one_for_the_targets_own_kernel():
    kernel, targets = kernels()[0], drawn(8, 3, seed=1)
    rotation = torch.linalg.qr(drawn(3, 3, seed=2)).Q
    expected = kernel_alignment(kernel, targets)
    torch.testing.assert_close(kernel_alignment(7.5 * kernel, targets), expected, **EXACT)
    torch.testing.assert_close(kernel_alignment(kernel, targets @ rotation), expected, **EXACT)
    torch.testing.assert_close(kernel_alignment(targets @ targets.mT, targets), torch.tensor(1.0).double(), **EXACT)


def test_alignment_metric_adds_blocks_of_any_cut_and_merges():
    kernel, targets = kernels()[0], drawn(8, 2, seed=1)
    first, second = KernelAlignment().set_dtype(torch.float64), KernelAlignment().set_dtype(torch.float64)
    first.update(kernel[:3, :5], targets[:3], targets[:5])
    first.update(kernel[:3, 5:], targets[:3], targets[5:])
    second.update(kernel[3:], targets[3:], targets)
    second.merge_state(first)
    torch.testing.assert_close(second.compute(), kernel_alignment(kernel, targets), **EXACT)
    with pytest.raises(ValueError, match=r"block of the kernel \[B, M\].*\[3, 8\], \[3, 2\] and \[3, 2\]"):
        first.update(kernel[:3], targets[:3])


# Kernel regression


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("ridge", [None, 0.3])
def test_regression_equals_that_of_scikit_learn(outputs, ridge):
    kernel, cross = kernels()
    targets = drawn(8, *([] if outputs is None else [outputs]), seed=1)
    alpha = 1e-6 * float(kernel.diagonal().mean()) if ridge is None else ridge
    oracle = KernelRidge(kernel="precomputed", alpha=alpha).fit(kernel.numpy(), targets.numpy())
    for block in (None, cross):
        expected = torch.from_numpy(oracle.predict((kernel if block is None else block).numpy()))
        found = kernel_regression(kernel, targets, block, ridge=ridge)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_regression_begins_from_the_networks_outputs_and_takes_full_kernels():
    (kernel, cross), targets = kernels(outputs=3), drawn(8, 3, seed=1)
    start, cross_start = drawn(8, 3, seed=2), drawn(5, 3, seed=3)
    found = kernel_regression(kernel, targets, cross, ridge=0.1, initial=start, cross_initial=cross_start)
    system = kernel.reshape(24, 24) + 0.1 * torch.eye(24, dtype=torch.float64)
    expected = cross.reshape(15, 24) @ torch.linalg.solve(system, (targets - start).flatten())
    torch.testing.assert_close(found, expected.reshape(5, 3) + cross_start, rtol=1e-10, atol=1e-10)


def test_regression_refuses_what_has_no_solution():
    ones = torch.ones(4, 4)
    with pytest.raises(ValueError, match="with ridge 0 is not positive definite"):
        kernel_regression(ones, torch.ones(4), ridge=0.0)
    with pytest.raises(ValueError, match="`ridge` to be at least 0, but got -1"):
        kernel_regression(ones, torch.ones(4), ridge=-1.0)
    with pytest.raises(ValueError, match=r"`cross` to be \[M, 4\], but got \[2, 3\]"):
        kernel_regression(ones, torch.ones(4), torch.ones(2, 3))
    with pytest.raises(ValueError, match="`cross_initial`.*with `initial`"):
        kernel_regression(ones, torch.ones(4), torch.ones(2, 4), initial=torch.zeros(4))
    with pytest.raises(ValueError, match=r"got \[4, 4\] and \[5\]"):
        kernel_regression(ones, torch.ones(5))


# The lazy trajectory


@pytest.mark.parametrize("outputs", [None, 2])
def test_trajectory_of_gradient_flow_is_the_matrix_exponential(outputs):
    (kernel, _), shape = kernels(outputs=outputs), (8,) if outputs is None else (8, outputs)
    targets, start = drawn(*shape, seed=1), drawn(*shape, seed=2)
    times = torch.tensor([0.0, 0.2, 3.0])
    found = lazy_trajectory(kernel, targets, start, times)
    matrix = kernel.reshape(targets.numel(), -1)
    for time, value in zip(times.tolist(), found, strict=True):
        decay = torch.linalg.matrix_exp(-matrix * time / 8)
        expected = targets + (decay @ (start - targets).flatten()).reshape(shape)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [40, 3])
def test_trajectory_of_gradient_descent_is_that_of_a_linear_model(rank):
    """The oracle trains a model that is linear in its weights; with rank 3 its kernel is singular."""
    features, others = drawn(8, rank), drawn(5, rank, seed=5)
    targets, start, cross_start = drawn(8, 2, seed=1), drawn(8, 2, seed=2), drawn(5, 2, seed=3)
    lr, weights = 0.05, torch.zeros(rank, 2, dtype=torch.float64)
    expected, elsewhere = [], []
    for _ in range(31):
        expected.append(start + features @ weights)
        elsewhere.append(cross_start + others @ weights)
        weights = weights - lr * features.mT @ (expected[-1] - targets) / 8
    times, kernel = torch.arange(31), features @ features.mT
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(lazy_trajectory(kernel, targets, start, times, lr=lr), torch.stack(expected), **close)
    found = lazy_trajectory(kernel, targets, start, times, lr=lr, cross=others @ features.mT, cross_initial=cross_start)
    torch.testing.assert_close(found, torch.stack(elsewhere), **close)


def test_trajectory_ends_at_kernel_regression():
    (kernel, cross), targets, start, other = kernels(), drawn(8, seed=1), drawn(8, seed=2), drawn(5, seed=3)
    arguments = {"cross": cross, "cross_initial": other}
    (found,) = lazy_trajectory(kernel, targets, start, torch.tensor([1e6]), **arguments)
    expected = kernel_regression(kernel, targets, ridge=0.0, initial=start, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# The delay


def test_delay_finds_the_first_crossings():
    train, test = torch.tensor([1.0, 0.05, 0.5, 0.01]), torch.tensor([1.0, 0.9, 0.2, 0.09])
    steps = torch.tensor([1, 10, 100, 1000])
    delay = generalization_delay(train, test, steps=steps)
    assert delay == (10, 1000)
    assert delay.decades == pytest.approx(2)
    assert generalization_delay(train, test, tau=0.05, trivial=4.4, steps=steps) == (10, 100)
    assert generalization_delay(train, test, tau=0.35, smoothing=0.5, steps=steps) == (1000, 1000)


def test_delay_of_curves_that_never_cross():
    never, at_once = torch.ones(3), torch.zeros(3)
    assert generalization_delay(at_once, never).decades == math.inf
    assert generalization_delay(never, at_once).decades == -math.inf
    assert math.isnan(generalization_delay(never, never).decades)
    assert generalization_delay(at_once, at_once, steps=torch.arange(3)).decades == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_crossing_and_ends_the_search(bad):
    train, test = torch.tensor([0.05, 0.05, 0.05]), torch.tensor([0.9, bad, 0.01])
    assert generalization_delay(train, test) == (1, math.inf)
    metric = GeneralizationDelay()
    metric.update(train, test, torch.tensor([1, 2, 3]))
    with pytest.warns(UserWarning, match="test loss was not finite"):
        assert metric.compute() == math.inf


@pytest.mark.parametrize("smoothing", [0.0, 0.6])
def test_metric_equals_the_function(smoothing):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.rand(2, 50, generator=generator) * torch.logspace(0, -2, 50)).unbind()
    arguments = {"tau": 0.05, "smoothing": smoothing}
    expected = generalization_delay(train, test / 2, **arguments)
    metric = GeneralizationDelay(trivial_test=2.0, **arguments)
    for step, (a, b) in enumerate(zip(train, test, strict=True), start=1):
        metric.update(a, b, step)
    assert metric.delay == expected
    assert float(metric.compute()) == pytest.approx(expected.decades)
    assert math.isfinite(expected.decades)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: generalization_delay(torch.ones(2), torch.ones(3)),
            r"two curves of one length, but got \[2\] and \[3\]",
        ),
        (lambda: generalization_delay(torch.ones(2), torch.ones(2), tau=0.0), "`tau` of generalization_delay"),
        (lambda: GeneralizationDelay(smoothing=1.0), r"`smoothing` of GeneralizationDelay to be in \[0, 1\)"),
        (lambda: GeneralizationDelay(trivial_test=0.0), "`trivial_test` of GeneralizationDelay to be positive"),
    ],
)
def test_wrong_arguments_of_the_delay_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_of_low_rank_in_float32_is_solved_where_it_is_more_than_rounding():
    """More examples than features: the rounding of float32 makes some eigenvalues negative, beyond the default ridge."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 20, generator=generator) + 5
    new = torch.randn(40, 20, generator=generator) + 5
    weights = torch.randn(20, 1, generator=generator)
    kernel, cross = features @ features.T, new @ features.T
    assert torch.linalg.eigvalsh(kernel.double())[0] < -1e-6 * kernel.diagonal().mean()  # else nothing is tested
    found = kernel_regression(kernel, features @ weights, cross)
    torch.testing.assert_close(found, new @ weights, rtol=1e-2, atol=1e-2)
