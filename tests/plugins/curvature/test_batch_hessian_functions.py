# SPDX-License-Identifier: Apache-2.0
"""The random-matrix theory and the quadrature of batch_hessian_lr against closed forms, samples and dense matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.nn import functional as F

from fulgurite.curvature import Hessian, model_loss
from fulgurite_plugins.curvature import (
    effective_batch_size,
    fit_excess,
    heavy_ball_parameters,
    hessian_variance,
    predict_batch_extremes,
    predict_ggn_extremes,
    rule_parameters,
    saturation_batch_size,
    scale_learning_rate,
    slq_density,
)
from fulgurite_plugins.curvature.batch_hessian_lr.functional import unit_probes, usable_extremes

EXAMPLES = 24


def wigner(size: int, seed: int) -> torch.Tensor:
    """A symmetric matrix with independent entries of variance 1 (2 on the diagonal)."""
    draws = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return (draws + draws.mT) / math.sqrt(2)


class TestPredictedExtremes:
    P, B = 2000, 40.0
    SIGMA = 0.5  # so that the outlier leaves the bulk at sqrt(P / b) sigma = 3.54
    THRESHOLD = math.sqrt(P / B) * SIGMA

    @pytest.mark.parametrize("ratio", [0.5, 1.4, 3.0])
    def test_spiked_wigner_matrix(self, ratio: float) -> None:
        spike = ratio * self.THRESHOLD
        noise = wigner(self.P, 0) * self.SIGMA / math.sqrt(self.B)
        u = unit_probes(2, self.P, torch.Generator().manual_seed(1))
        v = u[1] - (u[1] @ u[0]) * u[0]
        v = v / v.norm()
        matrix = noise + spike * torch.outer(u[0], u[0]) - 0.8 * spike * torch.outer(v, v)
        smallest, largest = scipy.sparse.linalg.eigsh(
            matrix.numpy(), 2, which="BE", return_eigenvectors=False, tol=1e-3
        )
        found = predict_batch_extremes(-0.8 * spike, spike, self.P * self.SIGMA**2, self.B)
        assert found.largest == pytest.approx(largest, rel=0.02)
        assert found.smallest == pytest.approx(smallest, rel=0.02)
        assert (found.largest == 2 * self.THRESHOLD) == (ratio < 1)

    @pytest.mark.parametrize(("size", "rows"), [(600, 300), (300, 600)])
    @pytest.mark.parametrize("ratio", [0.5, 2.5])
    def test_spiked_covariance(self, size: int, rows: int, ratio: float) -> None:
        noise, draws = 0.7, 6
        spike = noise * (1 + ratio * math.sqrt(size / rows))
        x = torch.randn(draws, rows, size, generator=torch.Generator().manual_seed(0)) * math.sqrt(noise)
        x[..., 0] *= math.sqrt(spike / noise)
        gram = (x.mT @ x if size < rows else x @ x.mT) / rows
        ends = torch.linalg.eigvalsh(gram)[:, [0, -1]].mean(dim=0)
        found = predict_ggn_extremes(spike, noise, size, rows)
        # An outlier varies by about its size times sqrt(2 / rows).
        assert found.largest == pytest.approx(float(ends[1]), rel=3 * math.sqrt(2 / rows / draws))
        assert found.smallest == pytest.approx(float(ends[0]) if size < rows else 0.0, rel=0.05)

    def test_models_are_continuous_where_the_outlier_leaves_the_bulk(self) -> None:
        below, above = (predict_batch_extremes(0.0, 2.0 + d, 16.0, 4.0).largest for d in (-1e-9, 1e-9))
        assert below == pytest.approx(above, rel=1e-6)
        below, above = (predict_ggn_extremes(3.0 + d, 1.0, 400, 100).largest for d in (-1e-9, 1e-9))
        assert below == pytest.approx(above, rel=1e-6)

    def test_whole_data_set_has_its_own_extremes(self) -> None:
        whole = effective_batch_size(1000, 1000)
        assert whole == math.inf
        assert predict_batch_extremes(-0.3, 2.0, 5.0, whole) == (-0.3, 2.0)
        assert predict_ggn_extremes(2.0, 0.1, 500, whole).largest == 2.0

    def test_extremes_move_inwards_with_the_batch_size(self) -> None:
        effective = [effective_batch_size(size, 1000) for size in range(1, 1001)]
        assert all(a < b for a, b in itertools.pairwise(effective))
        for predict in (
            lambda b: predict_batch_extremes(-0.5, 1.0, 30.0, b),
            lambda b: predict_ggn_extremes(1.0, 0.01, 3000, b),
        ):
            largest = [predict(b).largest for b in effective]
            assert all(a > b for a, b in itertools.pairwise(largest))
        smallest = [predict_batch_extremes(-0.5, 1.0, 30.0, b).smallest for b in effective]
        assert all(a < b for a, b in itertools.pairwise(smallest))

    def test_batch_larger_than_the_data_set(self) -> None:
        with pytest.raises(ValueError, match="`batch_size` .* at most the 100 examples of the data set, but got 101"):
            effective_batch_size(101, 100)
        with pytest.raises(ValueError, match="at least 1"):
            effective_batch_size(0, 100)


class TestExcess:
    def test_two_sizes_are_met_exactly(self) -> None:
        law = fit_excess([4.0, 64.0], [5.4, 1.5], 0.97)
        assert law.largest(4.0) == pytest.approx(5.4)
        assert law.largest(64.0) == pytest.approx(1.5)
        assert law.largest(math.inf) == 0.97

    def test_power_law_is_found(self) -> None:
        sizes = [2.0, 8.0, 32.0, 128.0]
        law = fit_excess(sizes, [0.5 + 3.0 * b**-0.7 for b in sizes], 0.5)
        assert (law.scale, law.exponent) == (pytest.approx(3.0), pytest.approx(0.7))

    def test_exponents_of_the_additive_model(self) -> None:
        bulk = fit_excess([1.0, 2.0], [predict_batch_extremes(0, 1e-3, 9.0, b).largest for b in (1.0, 2.0)], 0.0)
        outlier = fit_excess([50.0, 90.0], [predict_batch_extremes(0, 2.0, 9.0, b).largest for b in (50.0, 90.0)], 2.0)
        assert bulk.exponent == pytest.approx(0.5)
        assert outlier.exponent == pytest.approx(1.0)

    def test_bad_measurements(self) -> None:
        with pytest.raises(ValueError, match="above the 2.0 of all examples"):
            fit_excess([4, 16], [3.0, 1.9], 2.0)
        with pytest.raises(ValueError, match="two different finite batch sizes"):
            fit_excess([4, math.inf], [3.0, 2.5], 2.0)


class TestScaling:
    def test_rules(self) -> None:
        assert scale_learning_rate(0.1, 64, 128, "linear") == pytest.approx(0.2)
        assert scale_learning_rate(0.1, 64, 128, "sqrt") == pytest.approx(0.1 * math.sqrt(2))
        assert scale_learning_rate(0.1, 128, 64, "linear") == pytest.approx(0.05)

    def test_saturation(self) -> None:
        at = saturation_batch_size(largest=2.0, variance=400.0, dataset_size=1000)
        assert 400.0 / effective_batch_size(at, 1000) == pytest.approx(2.0**2)
        assert scale_learning_rate(0.1, at / 2, 500, "linear", saturation=at) == pytest.approx(0.2)
        assert scale_learning_rate(0.1, 200, 500, "linear", saturation=at) == 0.1
        assert saturation_batch_size(2.0, 0.0) == 1.0

    @pytest.mark.parametrize(
        ("largest", "exponent"),
        [
            (lambda b: predict_batch_extremes(-1.0, 1.0, 100.0, b).largest, 0.5),
            (lambda b: predict_ggn_extremes(1.0, 1e-2, 10_000, b).largest, 1.0),
        ],
        ids=["additive: square root", "multiplicative: linear"],
    )
    def test_limits_of_the_random_matrix_rule(self, largest: Callable[[float], float], exponent: float) -> None:
        small = scale_learning_rate(1.0, 1e-6, 2e-6, "rmt", largest=largest)
        huge = scale_learning_rate(1.0, 1e8, 2e8, "rmt", largest=largest)
        assert small == pytest.approx(2**exponent, rel=1e-3)
        assert huge == pytest.approx(1.0, rel=1e-3)

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="`mode` .* one of 'linear', 'sqrt', 'rmt', but got 'cube'"):
            scale_learning_rate(0.1, 1, 2, "cube")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`largest` .* given for mode='rmt'"):
            scale_learning_rate(0.1, 1, 2, "rmt")
        with pytest.raises(ValueError, match="`new_batch_size` .* positive"):
            scale_learning_rate(0.1, 1, 0)


class TestRules:
    def test_heavy_ball_at_condition_one(self) -> None:
        assert heavy_ball_parameters(1.0, 1.0) == (1.0, 0.0)

    @pytest.mark.parametrize(("smallest", "largest"), [(0.01, 1.0), (0.5, 8.0)])
    def test_heavy_ball_converges_at_its_rate(self, smallest: float, largest: float) -> None:
        lr, momentum = heavy_ball_parameters(smallest, largest)
        eigenvalues = torch.linspace(smallest, largest, 30, dtype=torch.float64)
        w = nn.Parameter(torch.ones(30, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
        norms = []
        for _ in range(400):
            w.grad = eigenvalues * w.detach()
            optimizer.step()
            norms.append(float(w.detach().norm()))
        # Both ends are double roots: an error of t * rate^t, whose factor t is taken out.
        measured = (norms[-1] / 400 / (norms[199] / 200)) ** (1 / 200)
        root, small = math.sqrt(largest), math.sqrt(smallest)
        assert measured == pytest.approx((root - small) / (root + small), rel=0.02)

    def test_rules_are_stable_and_optimal_where_they_should_be(self) -> None:
        for rule in ("inverse", "polyak", "two_over_sum"):
            lr, momentum = rule_parameters(rule, 0.1, 4.0)
            assert lr * 4.0 < 2 * (1 + momentum)
        lr, momentum = rule_parameters("two_over_sum", 0.1, 4.0)
        assert momentum == 0.0
        assert abs(1 - lr * 0.1) == pytest.approx(abs(1 - lr * 4.0))  # both ends shrink alike
        assert rule_parameters("inverse", 0.1, 4.0) == (0.25, heavy_ball_parameters(0.1, 4.0)[1])

    def test_usable_extremes(self) -> None:
        assert usable_extremes([-5.0, 1e-4, 0.02, 3.0], floor=1e-3) == (0.02, 3.0)
        assert usable_extremes([-5.0, -1.0]) is None
        assert usable_extremes([0.0]) is None
        assert usable_extremes([-1.0, 1e-7]) is None  # rounding
        assert usable_extremes([]) is None
        assert usable_extremes([1.0, math.nan]) is None
        assert usable_extremes([1.0, math.inf]) is None

    def test_bad_ranges(self) -> None:
        with pytest.raises(ValueError, match="`smallest` .* positive"):
            heavy_ball_parameters(0.0, 1.0)
        with pytest.raises(ValueError, match="`largest` .* at least 2.0"):
            heavy_ball_parameters(2.0, 1.0)


@pytest.fixture(scope="module")
def hessians() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(EXAMPLES, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (EXAMPLES,), generator=generator)
    parameters = list(network.parameters())
    size = sum(p.numel() for p in parameters)
    assert size == 48
    dense = []
    for n in range(EXAMPLES):
        source = model_loss(
            network, lambda z, t: F.cross_entropy(z, t, reduction="none"), [(x[n : n + 1], y[n : n + 1])]
        )
        dense.append(Hessian(source, parameters) @ torch.eye(size, dtype=torch.float64))
    return torch.stack(dense)


class TestHessianVariance:
    """On a network of 50 parameters, against the dense Hessian of every example."""

    B = 4

    @pytest.mark.parametrize("disjoint", [True, False])
    def test_unbiased(self, hessians: torch.Tensor, disjoint: bool) -> None:
        deviations = hessians - hessians.mean(dim=0)
        # The variance with the divisor N - 1, which is the one that finite populations have.
        exact = deviations.square().sum() / hessians.shape[1] / (EXAMPLES - 1)
        generator = torch.Generator().manual_seed(1)
        estimates = []
        for _ in range(200):
            if disjoint:
                batches = torch.randperm(EXAMPLES, generator=generator).view(-1, self.B)
            else:
                batches = torch.stack([torch.randperm(EXAMPLES, generator=generator)[: self.B] for _ in range(6)])
            z = unit_probes(8, hessians.shape[1], generator, torch.float64)
            products = torch.einsum("kpq,rq->krp", hessians[batches].mean(dim=1), z)
            estimates.append(hessian_variance(products, self.B, math.inf if disjoint else EXAMPLES))
        values = torch.stack(estimates)
        error = float(values.std()) / math.sqrt(len(values))
        assert float(values.mean()) == pytest.approx(float(exact), abs=3 * error)
        assert error < 0.05 * float(exact)

    def test_generator_and_tensor_agree(self) -> None:
        products = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = products.var(dim=0).sum(dim=-1).mean() * 4
        torch.testing.assert_close(hessian_variance(iter(products), 4), expected)
        torch.testing.assert_close(hessian_variance(products[:, 0], 4), products[:, 0].var(dim=0).sum() * 4)

    def test_one_batch_has_no_variance(self) -> None:
        with pytest.raises(ValueError, match="those of at least 2 batches, but got 1"):
            hessian_variance(torch.ones(1, 3), 4)
        with pytest.raises(ValueError, match="below the data set's size"):
            hessian_variance(torch.ones(2, 3), 4, 4)


class TestDensity:
    def matrix(self, size: int = 40, seed: int = 0) -> torch.Tensor:
        draws = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return draws + draws.mT

    def test_all_steps_give_all_eigenvalues(self) -> None:
        matrix = self.matrix()
        values = slq_density(matrix, steps=40).values
        torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-9)

    def test_extremes_of_a_large_matrix(self) -> None:
        matrix = self.matrix(400)
        density = slq_density(matrix, steps=90)
        low, high = scipy.sparse.linalg.eigsh(matrix.numpy(), 2, which="BE", return_eigenvectors=False)
        assert (density.smallest, density.largest) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))

    def test_moments_are_those_of_the_start_vector(self) -> None:
        matrix, k = self.matrix() / 10, 5
        start = torch.randn(1, 40, generator=torch.Generator().manual_seed(9), dtype=torch.float64)[0]
        start = start / start.norm()
        density = slq_density(matrix, steps=k, seed=9)
        assert len(density.values) == k
        assert float(density.weights.sum()) == pytest.approx(1.0, abs=1e-12)
        power = start.clone()
        for m in range(2 * k + 1):
            exact = float(start @ power)
            if m < 2 * k:
                assert density.moment(m) == pytest.approx(exact, abs=1e-8)
            power = matrix @ power
        assert density.moment(2 * k) != pytest.approx(exact, abs=1e-8)  # the quadrature ends there

    def test_average_over_probes_estimates_the_density(self) -> None:
        matrix = self.matrix(60) / 10
        density = slq_density(matrix, steps=12, probes=200, seed=5)
        assert len(density.values) == 12 * 200
        assert float(density.weights.sum()) == pytest.approx(1.0)
        assert bool((density.values.diff() >= 0).all())
        eigenvalues = torch.linalg.eigvalsh(matrix)
        for m in (1, 2, 4):
            exact = float(eigenvalues.pow(m).mean())
            assert density.moment(m) == pytest.approx(exact, abs=0.05 * float(eigenvalues.abs().pow(m).mean()))

    def test_degenerate_spectrum_ends_early(self) -> None:
        density = slq_density(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)), steps=4)
        assert density.values.tolist() == pytest.approx([1.0, 5.0])
        assert slq_density(torch.zeros(3, 3), steps=3).values.tolist() == [0.0]

    def test_smoothed_density_integrates_to_one(self) -> None:
        density = slq_density(self.matrix() / 10, steps=20)
        points = torch.linspace(-6, 6, 4001, dtype=torch.float64)
        smooth = density.smoothed(points, 0.1)
        assert float(torch.trapezoid(smooth, points)) == pytest.approx(1.0, abs=1e-9)
        mean = float(torch.trapezoid(smooth * points, points))
        assert mean == pytest.approx(density.moment(1), abs=1e-9)
        with pytest.raises(ValueError, match="`width` .* positive"):
            density.smoothed(points, 0.0)

    def test_picture(self, tmp_path: Path) -> None:
        import matplotlib.image

        for name, matrix in (("spread", self.matrix()), ("zero", torch.zeros(3, 3))):
            slq_density(matrix, steps=20).draw(tmp_path / f"{name}.png", name)
            pixels = matplotlib.image.imread(tmp_path / f"{name}.png")
            assert np.ptp(pixels[..., :3]) > 0.5

    def test_bad_arguments(self) -> None:
        for bad in ({"steps": 0}, {"probes": 0}, {"steps": 2.5}):
            with pytest.raises(ValueError, match="a positive integer"):
                slq_density(self.matrix(), **bad)
