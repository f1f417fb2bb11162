# SPDX-License-Identifier: Apache-2.0
"""The ring buffer of gradients: which rows it holds, and what it computes with them."""

from __future__ import annotations

import io

import pytest
import torch

from fulgurite.curvature import window as window_module
from fulgurite.curvature.window import GradientWindow


def gradients() -> torch.Tensor:
    return torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def filled(n: int, rows: int = 5, dtype: torch.dtype = torch.float64) -> GradientWindow:
    window = GradientWindow(rows, 7, dtype)
    for gradient in gradients()[:n]:
        window.push(gradient)
    return window


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 9, 10, 12])
def test_it_holds_the_last_gradients_and_zeros(n):
    window = filled(n)
    assert len(window) == min(n, 5)
    assert torch.equal(window.in_order(), gradients()[max(0, n - 5) : n])
    assert window.gradients.abs().sum(dim=1).count_nonzero() == min(n, 5)
    assert int(window.slot) == n % 5


def test_products_are_those_of_the_matrix():
    window = filled(8)
    vector, coefficients = gradients()[0], torch.arange(5.0, dtype=torch.float64)
    assert torch.allclose(window.products(vector), (window.gradients * vector).sum(1), rtol=1e-14)
    expected = sum(c * row for c, row in zip(coefficients, window.gradients, strict=True))
    assert torch.allclose(window.combination(coefficients), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("piece", [1, 12, 10**9])
def test_products_of_stored_bfloat16_are_accumulated_in_float32(monkeypatch, piece):
    monkeypatch.setattr(window_module, "_PIECE", piece)
    window = filled(8, dtype=torch.bfloat16)
    rows, vector = window.gradients.double(), gradients()[0]
    found = window.products(vector)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), rows @ vector, rtol=1e-6, atol=1e-6)
    coefficients = torch.linspace(-1, 1, 5)
    assert torch.allclose(window.combination(coefficients).double(), coefficients.double() @ rows, rtol=1e-6, atol=1e-6)


def test_a_gradient_that_is_not_accepted_changes_nothing():
    window = filled(7)
    before, slot = window.gradients.clone(), window.slot
    returned = window.push(torch.full((7,), torch.nan), accept=torch.tensor(False))
    assert torch.equal(window.gradients, before)
    assert torch.equal(window.slot, slot)
    assert torch.equal(returned, slot)
    window.push(gradients()[7], accept=torch.tensor(True))
    assert torch.equal(window.in_order(), gradients()[3:8])


def test_it_grows_by_columns_of_zeros():
    window = filled(6)
    window.grow(9)
    assert torch.equal(window.in_order(), torch.cat([gradients()[1:6], torch.zeros(5, 2, dtype=torch.float64)], dim=1))
    with pytest.raises(ValueError, match="at least 9"):
        window.grow(8)


def test_its_state_is_restored_and_loads_safely():
    window, file = filled(8), io.BytesIO()
    torch.save(window.state_dict(), file)
    file.seek(0)
    other = GradientWindow(5, 7, torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (window, other):
        each.push(gradients()[8])
    assert torch.equal(window.gradients, other.gradients)
    assert torch.equal(other.in_order(), gradients()[4:9])


def test_the_state_of_another_window_is_refused():
    with pytest.raises(
        ValueError, match="GradientWindow of 4 gradients of 7 numbers, but got one of 5"
    ):  # both are named
        GradientWindow(4, 7).load_state_dict(filled(3).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "`rows` of GradientWindow to be a positive integer, but got 0"),
        ((1.5, 3), "`rows` of GradientWindow"),
        ((2, -1), "`size` of GradientWindow to be 0 or more"),
        ((2, 3, torch.int64), "`dtype` of GradientWindow to be a floating-point type"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientWindow(*arguments)


def test_a_window_without_columns():
    window = GradientWindow(3, 0)
    window.push(torch.zeros(0))
    assert torch.equal(window.products(torch.zeros(0)), torch.zeros(3))
    assert window.combination(torch.ones(3)).shape == (0,)
