# SPDX-License-Identifier: Apache-2.0
"""Large windows: the factor that slides from gradient to gradient, against one that is made anew."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from fulgurite_plugins.curvature.m_fac import preconditioner
from fulgurite_plugins.curvature.m_fac.columns import Columns
from fulgurite_plugins.curvature.m_fac.functional import damped, window_coefficients
from fulgurite_plugins.curvature.m_fac.preconditioner import Preconditioner
from fulgurite_plugins.curvature.m_fac.sliding import factorize, newest_column, slide_
from tests.plugins.curvature.test_m_fac import drawn, relative
from tests.plugins.curvature.test_m_fac_optimizer import D, M, direction, optimizer, parameter, steps, window_of

ROWS, SIZE, DAMPING = 70, 45, 1e-5  # more gradients than columns: all but 45 eigenvalues of S are m times the damping


@pytest.fixture(autouse=True)
def _every_window_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioner, "_SLIDING", 1)


def made(rows: int = ROWS, size: int = SIZE, dtype: torch.dtype = torch.float64) -> Preconditioner:
    columns = Columns(shard=False, sparse=False)
    columns.append([torch.zeros(size, dtype=torch.float64)])
    return Preconditioner(columns, rows, dtype, None, summed=False)


def in_order(matrix: Tensor, pushed: int) -> Tensor:
    """Rows and columns by age, the oldest first."""
    order = (pushed + torch.arange(len(matrix))) % len(matrix)
    return matrix[order][:, order]


def backward_error(factor: Tensor, system: Tensor) -> float:
    """The largest difference of R^T R and S, in the scale of each element."""
    upper, roots = factor.triu(), system.diagonal().sqrt()
    return float(((upper.T @ upper - system) / torch.outer(roots, roots)).abs().max())


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 66, 150])
def test_a_slide_is_the_factor_of_the_next_window(rows):
    gradients = drawn(3 * rows + 1, 2 * rows)
    systems = gradients @ gradients.T + rows * torch.eye(len(gradients), dtype=torch.float64)
    factor = factorize(systems[:rows, :rows])
    for first in range(1, 2 * rows + 1):
        now = slice(first, first + rows)
        slide_(factor, systems[now, first + rows - 1].clone(), least=1e-3)
        system = systems[now, now]
        assert backward_error(factor, system) < 1e-13
        assert torch.allclose(newest_column(factor), torch.linalg.inv(system)[-1], rtol=1e-11, atol=1e-14)


def test_steps_are_those_of_the_dense_inverse():
    gradients = drawn(3 * M, D)
    for i, move in enumerate(steps(optimizer([parameter()]), gradients)):
        assert torch.allclose(move, direction(window_of(gradients, i), gradients[i]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("noise", 1e-9),
        ("drift", 1e-9),
        ("alike", 1e-9),
        ("outliers", 1e-9),
        ("large", None),  # S has a condition of 1e12: no method leaves a digit of the direction to compare
    ],
)
def test_thousands_of_slides_are_as_good_as_a_factorisation(kind, bound):
    sliding, common = made(), drawn(SIZE, seed=9)
    for number, noise in enumerate(drawn(2000, SIZE)):
        gradient = {
            "noise": noise,
            "drift": (common + noise) * 0.999**number,
            "alike": common + 1e-3 * noise,
            "outliers": common + noise * (100.0 if number % 37 == 0 else 0.1),
            "large": 1e3 * noise,
        }[kind] / SIZE**0.5
        found, finite = sliding.step(gradient, DAMPING)
        assert finite
        if number % 100 == 99:
            rounding = torch.finfo(torch.float64).eps * ROWS**0.5
            assert sliding.factor is not None
            system = in_order(damped(sliding.gram, DAMPING, rounding), number + 1)
            assert backward_error(sliding.factor[1], system) < 1e-12
            assert sliding.window is not None
            slot = torch.tensor([number % ROWS])
            expected = sliding.window.combination(window_coefficients(sliding.gram, slot, DAMPING, rounding))
            assert bound is None or relative(found, expected) < bound


def test_a_window_in_float32():
    """Its coefficients, in float64; what they make of rows in float32 has a rounding of its own."""
    sliding = made(dtype=torch.float32)
    rounding = torch.finfo(torch.float32).eps * ROWS**0.5
    for number, gradient in enumerate(drawn(300, SIZE)):
        sliding.step(gradient, DAMPING)
        assert sliding.factor is not None
        expected = window_coefficients(in_order(sliding.gram, number + 1), torch.tensor([ROWS - 1]), DAMPING, rounding)
        assert relative(ROWS * newest_column(sliding.factor[1]), expected) < 1e-7


def test_gradients_that_are_not_finite_leave_the_factor_as_it_was():
    gradients, plain, spoilt = drawn(2 * ROWS, SIZE), made(), made()
    _, finite = spoilt.step(torch.full((SIZE,), torch.nan), DAMPING)
    assert not finite
    assert spoilt.factor is None
    for number, gradient in enumerate(gradients):
        if number % 7 == 3:
            _, finite = spoilt.step(gradient * torch.inf, DAMPING)
            assert not finite
        assert torch.equal(plain.step(gradient, DAMPING)[0], spoilt.step(gradient, DAMPING)[0])
    assert plain.factor is not None
    assert spoilt.factor is not None
    assert torch.equal(plain.factor[1], spoilt.factor[1])
    assert spoilt.skipped.item() == 1 + 20


@pytest.mark.parametrize("before", [5, ROWS + 7])
def test_a_resumed_window_goes_on_bit_for_bit(before):
    gradients, whole, file = drawn(before + 2 * ROWS, SIZE), made(), io.BytesIO()
    for gradient in gradients[:before]:
        whole.step(gradient, DAMPING)
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = made()
    resumed.load_state_dict(torch.load(file, weights_only=True), torch.device("cpu"))
    for gradient in gradients[before:]:
        assert torch.equal(whole.step(gradient, DAMPING)[0], resumed.step(gradient, DAMPING)[0])


def test_a_checkpoint_of_a_window_that_did_not_slide(monkeypatch):
    gradients, plain = drawn(2 * ROWS, SIZE), made()
    monkeypatch.setattr(preconditioner, "_SLIDING", ROWS + 1)
    for gradient in gradients[: ROWS + 3]:
        plain.step(gradient, DAMPING)
    assert plain.factor is None
    monkeypatch.setattr(preconditioner, "_SLIDING", ROWS)
    sliding = made()
    sliding.load_state_dict(plain.state_dict(), torch.device("cpu"))
    for gradient in gradients[ROWS + 3 :]:
        found, _ = sliding.step(gradient, DAMPING)
        assert sliding.factor is not None
        monkeypatch.setattr(preconditioner, "_SLIDING", ROWS + 1)
        assert relative(found, plain.step(gradient, DAMPING)[0]) < 1e-9
        monkeypatch.setattr(preconditioner, "_SLIDING", ROWS)


def test_another_damping_makes_the_factor_anew():
    gradients, sliding = drawn(ROWS + 20, SIZE), made()
    for number, gradient in enumerate(gradients):
        damping = 1e-3 if number < ROWS else 1e-2
        found, _ = sliding.step(gradient, damping)
        assert relative(found, direction(window_of(gradients, number, ROWS), gradient, damping)) < 1e-9


def test_what_is_not_positive_definite_is_kept_so_by_the_least_element():
    factor = factorize(torch.eye(2, dtype=torch.float64))
    slide_(factor, torch.tensor([3.0, 1.0], dtype=torch.float64), least=0.25)  # [[1, 3], [3, 1]] is indefinite
    assert torch.allclose(factor.triu(), torch.tensor([[1.0, 3.0], [0.0, 0.5]], dtype=torch.float64).copysign(factor))
    spoilt = torch.tensor([[1.0, 3.0], [3.0, 4.0]], dtype=torch.float64)
    assert torch.equal(factorize(spoilt), torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
