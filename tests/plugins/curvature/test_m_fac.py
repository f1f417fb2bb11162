# SPDX-License-Identifier: Apache-2.0
"""The mathematics of M-FAC in float64: against dense inverses, the paper's recursion, and rank-one updates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.curvature import EmpiricalFisher, model_loss
from fulgurite_plugins.curvature.m_fac import fisher
from fulgurite_plugins.curvature.m_fac.fisher import FisherInverse
from fulgurite_plugins.curvature.m_fac.functional import (
    densities,
    full_precision,
    obs_saliency,
    static_recursion,
    window_coefficients,
    woodbury_ihvp,
)

D, M, DAMPING = 50, 16, 1e-2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(gradients: Tensor, damping: float, block_size: int | None = None) -> Tensor:
    """The matrix F itself, with zeros outside the blocks."""
    matrix = damping * torch.eye(gradients.shape[1], dtype=torch.float64) + gradients.T @ gradients / len(gradients)
    block = torch.arange(gradients.shape[1]) // (block_size or gradients.shape[1])
    return matrix * (block.unsqueeze(0) == block.unsqueeze(1))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rank_one_updates(gradients: Tensor, damping: float) -> Tensor:
    """The dense inverse by Sherman and Morrison, one gradient after the other."""
    inverse = torch.eye(gradients.shape[1], dtype=torch.float64) / damping
    for g in gradients:
        column = inverse @ g
        inverse = inverse - torch.outer(column, column) / (len(gradients) + g @ column)
    return inverse


SHAPES = [
    (M, D, None),
    (60, D, None),
    (M, D, 7),
    (M, D, 20),
    (M, D, D),
    (M, D, 1000),
    (M, D, 1),
    (1, D, 10),
    (1, 1, None),
]


@pytest.mark.parametrize("page", [2**24, 40])
@pytest.mark.parametrize(("m", "d", "block_size"), SHAPES)
def test_products_and_entries_are_those_of_the_dense_inverse(monkeypatch, page, m, d, block_size):
    monkeypatch.setattr(fisher, "_PAGE", page)
    gradients, x = drawn(m, d), drawn(d, 3, seed=1)
    inverse, expected = (
        FisherInverse(gradients, DAMPING, block_size),
        torch.linalg.inv(dense(gradients, DAMPING, block_size)),
    )
    scale = float(expected.abs().max())
    assert relative(inverse.mul(x), expected @ x) < 1e-12
    assert relative(inverse.mul(x[:, 0]), expected @ x[:, 0]) < 1e-12
    assert float((inverse.diag() - expected.diag()).abs().max()) < 1e-10 * scale
    assert float((inverse.submatrix(torch.arange(d)) - expected).abs().max()) < 1e-10 * scale
    assert float((inverse.entry(d - 1, 0) - expected[d - 1, 0]).abs()) < 1e-10 * scale
    picked = torch.tensor([d - 1, 0, d // 2])
    assert torch.allclose(inverse.submatrix(picked), expected[picked][:, picked], rtol=1e-9, atol=1e-10 * scale)


def test_all_forms_agree():
    gradients, x = drawn(M, D), drawn(D, seed=1)
    h, divisors = static_recursion(gradients, DAMPING)
    recursion = x / DAMPING - h.T @ ((h @ x) / divisors)
    closed = woodbury_ihvp(gradients, x, DAMPING)
    assert relative(closed, recursion) < 1e-10
    assert relative(closed, rank_one_updates(gradients, DAMPING) @ x) < 1e-10
    assert relative(FisherInverse(gradients, DAMPING).mul(x), recursion) < 1e-10
    diagonal = 1 / DAMPING - (h.square() / divisors.unsqueeze(1)).sum(0)
    assert relative(FisherInverse(gradients, DAMPING).diag(), diagonal) < 1e-10


def test_it_inverts_f_symmetrically_and_positively():
    gradients, x, y = drawn(M, D), drawn(D, seed=1), drawn(D, seed=2)
    inverse, matrix = FisherInverse(gradients, DAMPING), dense(gradients, DAMPING)
    assert float((matrix @ inverse.mul(x) - x).abs().max()) < 1e-8
    assert torch.isclose(y @ inverse.mul(x), x @ inverse.mul(y), rtol=1e-10)
    assert float(x @ inverse.mul(x)) > 0
    for g in gradients:  # where F^-1 is smallest
        assert float(g @ inverse.mul(g)) > 0


@pytest.mark.parametrize("damping", [1e4, 1e8])
def test_with_large_damping_it_is_the_identity(damping):
    gradients, g = drawn(M, D), drawn(D, seed=1)
    bound = float(torch.linalg.matrix_norm(gradients, 2) ** 2 / (M * damping))
    assert relative(damping * FisherInverse(gradients, damping).mul(g), g) <= bound
    assert relative(damping * woodbury_ihvp(gradients, g, damping), g) <= bound


def test_blocks_of_one_column_are_the_diagonal_formula():
    gradients, x = drawn(M, D), drawn(D, seed=1)
    expected = x / (DAMPING + gradients.square().mean(0))
    assert torch.allclose(FisherInverse(gradients, DAMPING, 1).mul(x), expected, rtol=1e-13)


def test_the_blocks_themselves():
    gradients = drawn(M, D)
    for block_size in (7, 20):
        blocks = torch.cat(list(FisherInverse(gradients, DAMPING, block_size).blocks()))
        whole = torch.block_diag(*blocks)[:D, :D]
        assert torch.allclose(whole, torch.linalg.inv(dense(gradients, DAMPING, block_size)), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`block_size` of FisherInverse.blocks to be given"):
        next(FisherInverse(gradients, DAMPING).blocks())


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_number_of_blocks_at_a_time_does_not_matter(chunk):
    gradients, x = drawn(M, D), drawn(D, seed=1)
    expected = FisherInverse(gradients, DAMPING, 6).mul(x)
    assert torch.allclose(FisherInverse(gradients, DAMPING, 6, chunk_blocks=chunk).mul(x), expected, rtol=1e-13)


@pytest.mark.parametrize("block_size", [None, 64, 300])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_lower_precision_keeps_its_digits(dtype, bound, block_size):
    """Of the gradients as they are stored; the bound is the one that float32 products leave with this damping."""
    gradients, x = drawn(128, 2000).to(dtype), drawn(2000, seed=1)
    found = FisherInverse(gradients, 1e-5, block_size).mul(x.float())
    exact = FisherInverse(gradients.double(), 1e-5, block_size).mul(x.float().double())
    assert found.dtype == torch.float32
    assert relative(found.double(), exact) < bound


def test_the_window_form_does_not_cancel():
    """The direction of a gradient in the window, with a damping at which Woodbury's difference has no digit left."""
    gradients = drawn(M, D)
    gram = gradients @ gradients.T
    for slot in (0, 5, M - 1):
        coefficients = window_coefficients(gram, torch.tensor([slot]), DAMPING)
        assert relative(gradients.T @ coefficients, woodbury_ihvp(gradients, gradients[slot], DAMPING)) < 1e-12
    rows = gradients.float()
    damping = 1e-8
    exact = rows.double().T @ window_coefficients(rows.double() @ rows.double().T, torch.tensor([3]), damping)
    coefficients = window_coefficients((rows @ rows.T).double(), torch.tensor([3]), damping, rounding=1.2e-7)
    found = rows.T @ coefficients.float()
    system = damping * M * torch.eye(M) + rows @ rows.T
    difference = (rows[3] - rows.T @ torch.linalg.solve(system, rows @ rows[3])) / damping
    assert relative(found.double(), exact) < 1e-5
    assert relative(difference.double(), exact) > 1e-2


def test_a_gram_matrix_that_is_spoilt_gives_the_scaled_gradient():
    gram = torch.tensor([[1.0, 3.0], [3.0, 4.0]], dtype=torch.float64)  # no Gram matrix: indefinite
    found = window_coefficients(gram, torch.tensor([1]), 0.1)
    assert torch.allclose(found, torch.tensor([0.0, 2 / (2 * 0.1 + 4.0)], dtype=torch.float64))


def test_saliency_is_the_least_rise_of_the_quadratic():
    matrix, w = dense(drawn(M, D), DAMPING), drawn(D, seed=3)
    inverse = torch.linalg.inv(matrix)
    found = obs_saliency(w, inverse.diag())
    for i in (0, 17, D - 1):
        others = [j for j in range(D) if j != i]
        delta = torch.zeros(D, dtype=torch.float64)
        delta[i] = -w[i]
        delta[others] = torch.linalg.solve(matrix[others][:, others], matrix[others, i] * w[i])
        assert torch.isclose(found[i], 0.5 * delta @ matrix @ delta, rtol=1e-9)


def test_densities_fall_geometrically():
    found = densities(0.5, 0.1, 4)
    ratios = [b / a for a, b in zip([0.5, *found], found, strict=False)]
    assert found[-1] == 0.1
    assert ratios == pytest.approx([0.2**0.25] * 4)
    assert densities(0.3, 0.3, 1) == [0.3]
    for arguments in ((0.0, 0.1, 2), (0.5, 0.6, 2), (0.5, 0.1, 0)):
        with pytest.raises(ValueError, match="of densities to be"):
            densities(*arguments)


def test_tf32_is_off_inside_and_what_it_was_afterwards():
    settings = torch.backends.cuda.matmul
    found = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        with full_precision():
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "`damping` of FisherInverse to be a positive number, but got 0.0"),
        ({"damping": float("inf")}, "`damping` of FisherInverse"),
        ({"block_size": 0}, "`block_size` of FisherInverse to be a positive integer or None, but got 0"),
        ({"chunk_blocks": -1}, "`chunk_blocks` of FisherInverse"),
        ({"gradients": torch.zeros(3)}, r"`gradients` of FisherInverse to be a matrix \[m, d\]"),
        ({"gradients": torch.zeros(0, 3)}, r"`gradients` of FisherInverse to be a matrix \[m, d\]"),
        ({"gradients": torch.full((2, 2), torch.nan)}, "to be finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FisherInverse(**{"gradients": drawn(2, 3), "damping": 1.0, **arguments})
    with pytest.raises(ValueError, match="`damping` of woodbury_ihvp"):
        woodbury_ihvp(drawn(2, 3), drawn(3), -1.0)


def test_an_index_out_of_range_is_an_error():
    inverse = FisherInverse(drawn(2, 3), 1.0)
    for i, j in ((0, 3), (-1, 0)):
        with pytest.raises(IndexError, match=r"\[0, 3\)"):
            inverse.entry(i, j)


def small_problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, drawn(12, 6, seed=7), torch.arange(12) % 3


def example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for number in range(len(x)):
        loss = F.cross_entropy(model(x[number : number + 1]), y[number : number + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_it_inverts_the_empirical_fisher_of_a_network():
    """Against products with the Fisher that core computes from the model, without any gradient kept."""
    model, x, y = small_problem()
    rows = example_gradients(model, x, y)
    vector = drawn(rows.shape[1], seed=8)
    inverse = FisherInverse(rows, DAMPING).mul(vector)
    source = model_loss(model, nn.CrossEntropyLoss(reduction="none"), [(x, y)])
    with EmpiricalFisher(source, list(model.parameters())) as operator:
        assert relative(operator @ inverse + DAMPING * inverse, vector) < 1e-10


def test_it_inverts_the_fisher_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = small_problem()
    rows = example_gradients(model, x, y)
    vector = drawn(rows.shape[1], seed=8)
    theirs = curvlinops.EFLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    inverse = FisherInverse(rows, DAMPING).mul(vector)
    assert relative(theirs @ inverse + DAMPING * inverse, vector) < 1e-10
