# SPDX-License-Identifier: Apache-2.0
"""Orthogonal convolutions: the regularizer, the theorems and the bounds, against the dense operator and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import RefusedError
from fulgurite_plugins.reparametrization import (
    conv_operator_matrix,
    conv_singular_values,
    isometry_bounds,
    lipschitz_certificate,
    lorth,
    orthogonal_conv_exists,
    orthogonal_conv_init_,
)
from fulgurite_plugins.reparametrization.orthogonal_convolutions.correlation import AtFrequencies, AtLags
from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import (
    correlated_rows,
    kernel_rows,
    polyphase_rows,
    residual,
    wang_norm,
)
from fulgurite_plugins.reparametrization.orthogonal_convolutions.landscape import SHAPES, descend
from fulgurite_plugins.reparametrization.orthogonal_convolutions.theory import certified_norm, isometry_constant

METHODS = ("auto", "lags", "fft", "conv")

CASES = [
    (4, 6, 3, 1),
    (6, 4, 3, 1),
    (4, 4, 3, 1),
    (5, 2, 3, 2),
    (10, 2, 3, 2),
    (8, 2, 3, 2),
    (3, 4, 2, 1),
    (7, 2, 5, 3),
    (2, 3, 3, 4),
]
"""Filters, channels, taps, stride: rows, columns and squares, with and without a stride, and S > k."""


def kernel(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(kernel(n, n, seed=seed)).Q


def semi_orthogonal(rows: int, columns: int, seed: int = 0) -> Tensor:
    tall = orthogonal(max(rows, columns), seed)[:, : min(rows, columns)]
    return tall if rows >= columns else tall.mT


def squared_residual(operator: Tensor) -> Tensor:
    """The smaller Gram matrix of an operator minus the identity, squared and summed."""
    gram = operator @ operator.mT if operator.shape[0] <= operator.shape[1] else operator.mT @ operator
    return (gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum()


# Theorem A, and the operator itself


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("shape", CASES)
def test_theorem_a_against_the_dense_operator(shape, axes):
    filters, channels, k, s = shape
    weight = kernel(filters, channels, *[k] * axes)
    n = math.ceil((2 * k - 1) / s)
    expected = squared_residual(conv_operator_matrix(weight, s, s * n))
    for method in METHODS:
        torch.testing.assert_close(n**axes * lorth(weight, s, method=method), expected, rtol=1e-12, atol=0)


def test_theorem_a_fails_on_smaller_inputs():
    weight = kernel(3, 4, 5)
    ratios = {
        n: float(squared_residual(conv_operator_matrix(weight, 1, n)) / n / lorth(weight)) for n in (5, 7, 8, 9, 11)
    }
    assert all(abs(ratios[n] - 1) > 1e-3 for n in (5, 7, 8))
    assert all(abs(ratios[n] - 1) < 1e-12 for n in (9, 11))


@pytest.mark.parametrize(("stride", "groups", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_the_dense_operator_is_what_torch_computes(stride, groups, dilation):
    layer = nn.Conv2d(
        4, 6, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False, padding_mode="circular"
    ).double()
    x = kernel(2, 4, 6, 6)
    matrix = conv_operator_matrix(layer.weight, stride, 6, dilation, groups)
    torch.testing.assert_close(x.flatten(1) @ matrix.mT, layer(x).flatten(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("n", [2, 5])
def test_singular_values_are_those_of_the_dense_operator(shape, n):
    filters, channels, k, s = shape
    weight = kernel(filters, channels, k, k)
    dense = torch.linalg.svdvals(conv_operator_matrix(weight, s, s * n))
    torch.testing.assert_close(conv_singular_values(weight, s, s * n), dense, rtol=0, atol=1e-10)


def test_singular_values_with_groups_dilation_unequal_strides_and_of_a_matrix():
    weight = kernel(4, 3, 2, 3)
    dense = torch.linalg.svdvals(conv_operator_matrix(weight, (2, 1), (6, 5), dilation=(1, 2), groups=2))
    torch.testing.assert_close(
        conv_singular_values(weight, (2, 1), (6, 5), dilation=(1, 2), groups=2), dense, rtol=0, atol=1e-10
    )
    matrix = kernel(3, 5)
    torch.testing.assert_close(conv_singular_values(matrix, input_size=1), torch.linalg.svdvals(matrix))
    with pytest.raises(ValueError, match=r"`input_size` to be a multiple of the stride \(2, 2\)"):
        conv_singular_values(kernel(4, 3, 3, 3), 2, 7)


# Theorems B and C


def test_theorem_b_is_never_violated():
    worst = {True: 0.0, False: 0.0}
    for seed in range(200):
        filters, channels, k, s = CASES[seed % len(CASES)]
        weight = (0.05 + seed / 200) * kernel(filters, channels, *[k] * (1 + seed % 2), seed=seed)
        values = conv_singular_values(weight, s, 3 * s)
        error = (values.square() - 1).abs().amax()
        for sharp in (True, False):
            constant = isometry_constant(filters, channels, weight.shape[2:], s, sharp=sharp)
            worst[sharp] = max(worst[sharp], float(error.square() / (constant * lorth(weight, s))))
    assert worst[False] <= worst[True] <= 1


def test_the_paper_s_constants():
    assert isometry_constant(4, 6, (3, 3), sharp=False) == 4 * 5**2
    assert isometry_constant(10, 2, (3, 3), 2, sharp=False) == 2 * 5**2
    assert isometry_constant(8, 2, (3, 3), 2, sharp=False) == min(8 * 3**2, 2 * 5**2)
    assert isometry_constant(3, 4, (5,), 3, sharp=False) == 3 * 3
    assert isometry_constant(10, 2, (3, 3), 2) == 3**2


@pytest.mark.parametrize(("shape", "stride"), [((3, 6, 3, 3), 1), ((24, 4, 3, 3), 2), ((8, 2, 3, 3), 2)])
def test_theorem_c_on_random_vectors(shape, stride):
    """A kernel that is orthogonal by few of its taps, and a little noise on all of them."""
    exact = semi_orthogonal(shape[0], shape[1] * stride**2).reshape(*shape[:2], stride, stride)
    nearly = F.pad(exact, (1, 2 - stride, 1, 2 - stride)) + 1e-3 * kernel(*shape)
    matrix = conv_operator_matrix(nearly, stride, 6)
    eps, upper = isometry_bounds(nearly, stride)
    assert 0 < eps < 0.5
    x = kernel(50, matrix.shape[1])
    assert ((x @ matrix.mT).norm(dim=1) <= upper * x.norm(dim=1)).all()
    preserved = matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix
    y = kernel(50, preserved.shape[1])
    ratio = (y @ preserved.mT).square().sum(1) / y.square().sum(1)
    assert ((ratio >= 1 - eps) & (ratio <= 1 + eps)).all()


def test_the_lipschitz_bound_is_not_capped_far_from_an_isometry():
    """With eps = min(1, ...), as a bound is sometimes quoted, ten times the identity would have a constant of sqrt(2)."""
    _, upper = isometry_bounds(10 * torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1))
    assert upper >= 10


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", CASES)
def test_certified_norm_bounds_every_size_closely(shape):
    filters, channels, k, s = shape
    weight = kernel(filters, channels, k, k)
    bound = certified_norm(weight, s)
    largest = max(float(conv_singular_values(weight, s, s * n)[0]) for n in (1, 3, 4, 7, 16, 37))
    assert largest <= bound * (1 + 1e-12)
    assert bound <= 1.05 * largest


# What is orthogonal


@pytest.mark.parametrize("k", [1, 3, 5])
def test_identity_kernel(k):
    weight = torch.zeros(4, 4, k, k, dtype=torch.float64)
    nn.init.dirac_(weight)
    assert lorth(weight) < 1e-30
    assert lorth(weight, method="lags") == 0
    assert lorth(weight, method="conv") == 0


@pytest.mark.parametrize(("filters", "channels"), [(4, 6), (6, 4)])
def test_pointwise_kernel_from_qr(filters, channels):
    weight = orthogonal(6)[:filters, :channels].reshape(filters, channels, 1, 1)
    assert lorth(weight) < 1e-12
    torch.testing.assert_close(conv_singular_values(weight, 1, 3), torch.ones(36, dtype=torch.float64))
    assert lorth(weight.flatten(1)) < 1e-12


def test_pixel_unshuffle_kernel():
    weight = F.pixel_unshuffle(torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2), 2)
    weight = torch.eye(12, dtype=torch.float64).view(12, 3, 2, 2)
    x = kernel(1, 3, 4, 4)
    assert F.conv2d(x, weight, stride=2).equal(F.pixel_unshuffle(x, 2))
    assert lorth(weight, 2) == 0


def test_exact_near_zero_in_the_column_case_in_float32():
    """The paper's form subtracts M - C S^2 there, which leaves noise of 1e-5 that may be negative."""
    weight = 1e-5 * kernel(256, 2, 3, 3)
    weight[:, :, 1, 1] += semi_orthogonal(256, 2)
    exact, single = lorth(weight), weight.float()
    assert 1e-9 < exact < 1e-6
    assert abs(lorth(single) - exact) < 0.05 * exact
    naive = F.conv2d(single, single, padding=2)
    naive[:, :, 2, 2] -= torch.eye(256)
    assert abs(naive.square().sum() - 254 - exact) > 0.5 * exact


# Forms and invariances


GEOMETRIES = [
    (1, 1, 2, (4, 3, 3, 3)),
    ((2, 3), 1, 1, (5, 2, 3, 5)),
    ((1, 2), 1, 3, (6, 1, 2, 3)),
    (2, 1, 1, (3, 2, 3, 3, 3)),
    (2, (2, 1), 2, (4, 3, 2, 3)),
    (3, 1, 1, (2, 5, 2, 7)),
    (1, 1, 1, (5, 4)),
]
"""Stride, dilation, groups, kernel; with two axes and more the slow oracle is the convolution of the kernel with itself."""


@pytest.mark.parametrize(("stride", "dilation", "groups", "shape"), GEOMETRIES)
@pytest.mark.parametrize("method", ["auto", "lags", "fft"])
def test_value_and_gradient_of_every_form_for_all_geometries(stride, dilation, groups, shape, method):
    """The values against the dense operator, the closed gradients against autograd through the convolution."""
    weight = kernel(*shape).requires_grad_()
    found = lorth(weight, stride, dilation, groups, method=method)
    axes = len(shape) - 2
    strides, spread = (x if isinstance(x, tuple) else (x,) * axes for x in (stride, dilation))
    n = [math.ceil((2 * d * (k - 1) + 1) / s) for k, s, d in zip(shape[2:], strides, spread, strict=True)]
    size = [x * s for x, s in zip(n, strides, strict=True)] or 1
    parts = weight.chunk(groups)
    dense = [squared_residual(conv_operator_matrix(part, stride, size, dilation)) for part in parts]
    torch.testing.assert_close(math.prod(n) * found, sum(dense), rtol=1e-10, atol=0)
    expected = lorth(weight, stride, dilation, groups, method="conv")
    torch.testing.assert_close(
        *(torch.autograd.grad(value, weight)[0] for value in (found, expected)), rtol=1e-10, atol=1e-12
    )


def test_a_direct_sum_over_lags_is_the_oracle_of_the_form_at_lags():
    """Without any matrix product: every pair of filters, every lag that is a multiple of the stride, every tap."""
    weight, stride = kernel(3, 2, 4), 2
    total = 0.0
    for m, n, d in itertools.product(range(3), range(3), (-2, 0, 2)):
        taps = [t for t in range(4) if 0 <= t + d < 4]
        product = sum(float(weight[m, c, t] * weight[n, c, t + d]) for c in range(2) for t in taps)
        total += (product - (d == 0 and m == n)) ** 2
    assert float(lorth(weight, stride, method="lags")) == pytest.approx(total, rel=1e-12)


def test_auto_takes_the_lags_where_a_stride_leaves_few_of_them():
    """128 x 64 x 3 x 3 with stride 2: 42 multiplications per entry of M M C for value and gradient, against 140."""
    strided = correlated_rows(torch.zeros(128, 64, 3, 3), 2)
    assert strided.step == (2, 2)
    assert strided.rows.shape == (1, 128, 64, 3, 3)
    unit = 128**2 * 64
    assert AtLags((3, 3), (2, 2)).cost(128, 64) == 42 * unit + AtLags((1,), (1,)).cost(0, 0) * 5
    assert AtFrequencies((2, 2)).cost(128, 256) == 140 * unit
    assert correlated_rows(torch.zeros(128, 64, 3, 3), 2, method="fft").step == (1, 1)
    assert correlated_rows(torch.zeros(64, 64, 9, 9), 2).step == (1, 1)


@pytest.mark.parametrize("method", ["lags", "fft"])
def test_accuracy_in_float32_and_double_backward_and_transforms(method):
    weight = 0.1 * kernel(24, 8, 3, 3)
    for stride in (1, 2):

        def value(w: Tensor, stride: int = stride) -> Tensor:
            return lorth(w, stride, method=method)

        exact = torch.func.grad(lambda w, s=stride: lorth(w, s, method="conv"))(weight)
        torch.testing.assert_close(torch.func.grad(value)(weight.float()).double(), exact, rtol=1e-4, atol=1e-5)
        assert abs(value(weight.float()) - value(weight)) < 1e-6 * value(weight)
        both = torch.func.vmap(torch.func.grad(value))(torch.stack([weight, 2 * weight]))
        torch.testing.assert_close(both[0], exact, rtol=1e-10, atol=1e-12)
        small = kernel(3, 2, 3, 2).requires_grad_()
        assert torch.autograd.gradgradcheck(value, small)
        assert torch.autograd.gradcheck(value, small, check_forward_ad=True, check_batched_grad=True)


def test_groups_are_added():
    weight = kernel(6, 2, 3, 3)
    parts = sum(lorth(part, 2) for part in weight.chunk(3))
    torch.testing.assert_close(lorth(weight, 2, groups=3), parts, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 2), (2, 3), (2, 2), ((1, 2), (2, 3))])
def test_dilation_equals_the_stuffed_kernel(stride, dilation):
    weight = kernel(4, 3, 3, 3)
    d = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    whole = torch.zeros(4, 3, 2 * d[0] + 1, 2 * d[1] + 1, dtype=torch.float64)
    whole[:, :, :: d[0], :: d[1]] = weight
    torch.testing.assert_close(lorth(weight, stride, dilation), lorth(whole, stride), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "stride"), [((4, 6, 3, 3), 1), ((6, 4, 3, 3), 1), ((10, 2, 3, 3), 2), ((3, 4, 3, 3), 2)]
)
def test_a_transposed_convolution_is_the_adjoint(shape, stride):
    weight = kernel(*shape)
    n = 6 // stride
    x = torch.eye(shape[0] * n**2, dtype=torch.float64).view(-1, shape[0], n, n)
    full = F.conv_transpose2d(x, weight, stride=stride)
    folded = torch.zeros(len(x), shape[1], 6, 6, dtype=torch.float64)
    for i in range(full.shape[2]):
        for j in range(full.shape[3]):
            folded[:, :, i % 6, j % 6] += full[:, :, i, j]
    value = lorth(weight, stride, transposed=True)
    torch.testing.assert_close(n**2 * value, squared_residual(folded.flatten(1).mT), rtol=1e-10, atol=0)
    if stride == 1:
        torch.testing.assert_close(value, lorth(weight.transpose(0, 1)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("shape", "stride"), [((3, 2, 3, 3), 1), ((2, 3, 3), 1), ((5, 1, 3, 2), 2), ((3, 2), 1)])
@pytest.mark.parametrize("method", METHODS)
def test_gradient(shape, stride, method):
    assert torch.autograd.gradcheck(lambda w: lorth(w, stride, method=method), kernel(*shape).requires_grad_())


def test_invariance_under_mixing_of_channels_and_sign():
    weight, left, right = kernel(4, 6, 3, 3), orthogonal(4), orthogonal(6, seed=1)
    mixed = torch.einsum("mn,ncij,cd->mdij", left, weight, right)
    torch.testing.assert_close(lorth(mixed), lorth(weight), rtol=1e-12, atol=0)
    torch.testing.assert_close(lorth(-weight), lorth(weight), rtol=1e-12, atol=0)


def test_precision_and_wrong_arguments():
    assert lorth(torch.randn(3, 2, 3, 3).bfloat16()).dtype is torch.float32
    assert lorth(kernel(3, 2, 3, 3)).dtype is torch.float64
    with torch.inference_mode():
        lorth(kernel(7, 5, 4, 4))
    lorth(kernel(7, 5, 4, 4).requires_grad_()).backward()
    with pytest.raises(ValueError, match="`method` to be one of 'auto', 'lags', 'fft', 'conv', but got 'dense'"):
        lorth(kernel(3, 2, 3, 3), method="dense")
    with pytest.raises(ValueError, match="`stride` to be a positive integer, or 2 of them"):
        lorth(kernel(3, 2, 3, 3), stride=(1, 1, 1))
    with pytest.raises(ValueError, match="`groups` to divide the 3 filters"):
        lorth(kernel(3, 2, 3, 3), groups=2)
    with pytest.raises(ValueError, match=r"kernel \[M, C, \*k\] with at most 3 axes, but got \[3\]"):
        lorth(kernel(3))


# Baselines


def test_kernel_penalty_is_the_gram_of_the_flattened_kernel():
    weight = kernel(4, 2, 3, 3)
    flat = weight.flatten(1)
    expected = (flat @ flat.mT - torch.eye(4, dtype=torch.float64)).square().sum()
    torch.testing.assert_close(residual(kernel_rows(weight)).sum(), expected, rtol=1e-12, atol=0)
    tall = kernel(30, 2, 3, 3)
    assert residual(kernel_rows(torch.linalg.qr(tall.flatten(1)).Q.view_as(tall))).sum() < 1e-20


def test_the_code_of_wang_et_al_misses_lags():
    """Its formula written out; and a kernel that it calls orthogonal, for the products that are not are those it skips."""
    weight = kernel(4, 2, 3, 3)
    lags = F.conv2d(weight, weight, stride=2, padding=1)
    target = torch.zeros_like(lags)
    target[:, :, 1, 1] = torch.eye(4)
    torch.testing.assert_close(wang_norm(weight, 2), (lags - target).norm(), rtol=1e-12, atol=0)
    corner = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    corner[0, 0, 0, 0] = corner[0, 0, 2, 2] = 0.5**0.5
    assert wang_norm(corner) < 1e-12
    assert lorth(corner) > 0.4
    assert lorth(torch.eye(8, dtype=torch.float64).view(8, 2, 2, 2), 2) == 0
    stuffed = F.pad(torch.eye(8, dtype=torch.float64).view(8, 2, 2, 2), (0, 1, 0, 1))
    assert lorth(stuffed, 2) == 0
    assert wang_norm(stuffed, 2) > 1


# Existence


def test_existence_agrees_with_the_reference_s_own_cases():
    rows = orthogonal_conv_exists(289, 32, 3, 4)
    assert (rows.exists, "M > 288" in rows.reason, "at most 288 filters" in rows.reason) == (False, True, True)
    assert orthogonal_conv_exists(288, 32, 3, 4).exists
    columns = orthogonal_conv_exists(129, 8, 3, 4)
    assert (columns.exists, "S > k" in columns.reason) == (False, True)
    assert not orthogonal_conv_exists(8, 2, 1, 2).exists
    assert orthogonal_conv_exists(2, 2, 1, 2).exists
    assert orthogonal_conv_exists(10, 2, 3, 2).exists


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (4, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(1, 3), (3, 3), (2, 1)])
def test_existence_is_full_rank_of_a_generic_kernel(stride, dilation, size):
    """An orthogonal kernel exists if and only if a generic one has full rank: the taps that are needed are there."""
    for filters in (1, 2, 3, 4, 5, 6, 8, 9, 12, 17):
        weight = kernel(filters, 2, *size)
        rank = torch.linalg.matrix_rank(conv_operator_matrix(weight, stride, (2 * stride[0], 2 * stride[1]), dilation))
        full = min(filters, 2 * math.prod(stride)) * 4
        found = orthogonal_conv_exists(filters, 2, size, stride, dilation=dilation)
        assert found.exists == (int(rank) == full), (filters, found.reason)


def with_zeros(weight: Tensor, stride: int, size: int, padding: int) -> Tensor:
    inputs = torch.eye(weight.shape[1] * size, dtype=weight.dtype).view(-1, weight.shape[1], size)
    return F.conv1d(inputs, weight, stride=stride, padding=padding).flatten(1).mT


@pytest.mark.parametrize(("k", "stride", "channels"), [(3, 1, 2), (3, 2, 1), (5, 2, 1), (5, 3, 1), (3, 3, 1)])
def test_existence_with_zeros_around_the_image(k, stride, channels):
    """Where existence is claimed, one is made of the taps that never meet the zeros; else minimisation stops far above 0."""
    padding, size = (k - 1) // 2, 3 * stride
    for filters in range(1, channels * stride + 2):
        exists = orthogonal_conv_exists(filters, channels, (k,), stride, "zeros").exists
        if exists:
            taps = min(stride, k - padding)
            weight = torch.zeros(filters, channels, k, dtype=torch.float64)
            block = semi_orthogonal(filters, channels * taps).reshape(filters, channels, taps)
            weight[:, :, padding : padding + taps] = block
            assert squared_residual(with_zeros(weight, stride, size, padding)) < 1e-20
        else:
            weight = kernel(filters, channels, k).requires_grad_()
            optimizer = torch.optim.Adam([weight], lr=0.03)
            for _ in range(150):
                optimizer.zero_grad()
                value = squared_residual(with_zeros(weight, stride, size, padding))
                value.backward()
                optimizer.step()
            assert value > 0.1


def test_existence_without_padding():
    assert not orthogonal_conv_exists(8, 2, 3, 1, "valid").exists
    assert not orthogonal_conv_exists(10, 2, 3, 2, "valid").exists
    assert orthogonal_conv_exists(10, 2, 2, 2, "valid").exists
    assert orthogonal_conv_exists(2, 3, 3, 1, "valid").exists
    nearly = orthogonal_conv_init_(torch.empty(2, 3, 3, dtype=torch.float64), generator=generator())
    assert squared_residual(with_zeros(nearly, 1, 8, 0)) < 1e-6
    with pytest.raises(ValueError, match="`padding_mode` to be one of"):
        orthogonal_conv_exists(8, 2, 3, 1, "reflect")
    with pytest.raises(ValueError, match="`out_channels` to be a positive integer"):
        orthogonal_conv_exists(0, 2, 3)


# Initialisation and landscape


@pytest.mark.parametrize(
    ("shape", "options"),
    [((9, 1, 3, 3), {}), ((2, 6, 3), {}), ((8, 2, 3, 3), {"stride": 2}), ((18, 1, 3, 3), {"groups": 2}), ((5, 3), {})],
)
def test_init_reaches_an_orthogonal_convolution(shape, options):
    weight = torch.empty(shape)
    same = torch.empty(shape)
    assert orthogonal_conv_init_(weight, **options, generator=generator(3)) is weight
    assert lorth(weight, **options) < 1.1e-8
    assert orthogonal_conv_init_(same, **options, generator=generator(3)).equal(weight)


def test_init_refuses_what_does_not_exist_and_says_when_it_falls_short():
    with pytest.raises(ValueError, match="at most 8 filters"):
        orthogonal_conv_init_(torch.empty(9, 8, 1, 1), stride=2)
    with pytest.warns(UserWarning, match="reached L_orth = .*, not 1e-300"):
        orthogonal_conv_init_(torch.empty(2, 2, 3, 3), tolerance=1e-300, generator=generator())


def test_descent_reaches_zero_but_in_the_square_case_without_stride():
    for shape in ((9, 1, 3, 1), (8, 2, 3, 2)):
        found = descend(*shape, seeds=2, steps=200)
        assert (found.end < 1e-3 * found.start).all(), shape
    stuck = descend(2, 2, 3, 1, seeds=4, steps=200)
    assert (stuck.end > 1e-2 * stuck.start).any()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_descent_of_the_claim(shape):
    filters, channels, _, stride = shape
    found = descend(*shape)
    square = filters == channels * stride**2
    assert bool((found.end < 1e-3 * found.start).all()) != square


# Certificate


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.GELU(), nn.MaxPool2d(3, 2, padding=1)),
        nn.ConvTranspose2d(6, 3, 2, stride=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def test_certificate_bounds_the_jacobian():
    network = chain().double()
    network(kernel(64, 1, 8, 8))
    network.eval()
    certificate = lipschitz_certificate(network)
    assert certificate.bound == pytest.approx(math.prod(certificate.factors.values()))
    assert list(certificate.factors)[3:6] == ["3.0", "3.1", "3.2"]
    slopes = [
        torch.linalg.matrix_norm(torch.autograd.functional.jacobian(network, x[None]).view(5, 64), ord=2)
        for x in kernel(20, 1, 8, 8, seed=1)
    ]
    assert 0.01 * certificate.bound < max(slopes) <= certificate.bound


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 7, 7)),
        (nn.Conv2d(2, 3, 4, stride=3, bias=False), (2, 10, 10)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, bias=False), (2, 5, 5)),
        (nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False), (4, 9)),
        (nn.AvgPool2d(3, 2, padding=1), (2, 7, 7)),
        (nn.AvgPool1d(2), (2, 8)),
    ],
)
def test_each_linear_factor_bounds_the_norm_with_zeros_around(layer, shape):
    layer = layer.double()
    size = math.prod(shape)
    matrix = layer(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1)
    norm = float(torch.linalg.matrix_norm(matrix, ord=2))
    assert norm <= lipschitz_certificate(layer).bound * (1 + 1e-9) <= 2.0 * norm


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.relu()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Branch(), "knows no bound for 1, a Branch"),
        (nn.LayerNorm(3), "knows no bound for 1, a LayerNorm"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "repeats values of the image"),
        (nn.Conv2d(1, 1, 3, padding=2, padding_mode="circular"), "repeats values of the image"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "knows no bound for 1, a AvgPool2d"),
        (nn.BatchNorm1d(2, track_running_stats=False), "knows no bound for 1, a BatchNorm1d"),
    ],
)
def test_certificate_refuses_what_it_cannot_bound(layer, message):
    with pytest.raises(RefusedError, match=message):
        lipschitz_certificate(nn.Sequential(nn.ReLU(), layer))


def test_polyphase_rows_keep_the_roles_on_request():
    weight = kernel(10, 2, 3, 3)
    assert polyphase_rows(weight, 2).shape == (1, 8, 10, 2, 2)
    assert polyphase_rows(weight, 2, smaller_side=False).shape == (1, 10, 8, 2, 2)


def test_kernels_of_orthogonium_are_orthogonal():
    """An independent construction of orthogonal convolutions (orthogonium, MIT) where it is installed."""
    layers = pytest.importorskip("orthogonium.layers.conv.AOC")
    for inputs, outputs, k, stride in [(8, 16, 3, 1), (16, 8, 3, 1), (8, 8, 3, 1), (8, 16, 4, 2)]:
        torch.manual_seed(0)
        padding = (k - 1) // 2
        layer = layers.AdaptiveOrthoConv2d(inputs, outputs, k, stride, padding, padding_mode="circular")
        assert lorth(layer.weight, stride) < 1e-10
        sigma = conv_singular_values(layer.weight.detach(), stride, 8 * stride)
        torch.testing.assert_close(sigma, torch.ones_like(sigma), rtol=0, atol=1e-5)
