# SPDX-License-Identifier: Apache-2.0
"""The toy's closed forms against sampling, autograd, gradient descent and the tangent kernel of the network, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fulgurite.landscape import ntk_gram
from fulgurite_datamodules.polynomial_regression import PolynomialRegression
from fulgurite_plugins.grokking.lazy_to_rich_grokking import (
    QuadraticPerceptron,
    generalization_decomposition,
    population_flow,
    population_gradient,
    quadratic_ntk,
)
from fulgurite_plugins.grokking.lazy_to_rich_grokking.toy import statistics

ALPHA, EPSILON, DIM, WIDTH = 1.7, 0.4, 5, 8


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(centred=False):
    beta = drawn(DIM, seed=1)
    beta *= math.sqrt(DIM) / beta.norm()
    return drawn(WIDTH, DIM), ALPHA, EPSILON, beta, drawn(WIDTH, DIM, seed=2) if centred else None


def outputs(weights, x, alpha=ALPHA):
    h = x @ weights.mT
    return alpha * (h + EPSILON / 2 * h.square()).mean(dim=1)


@pytest.mark.parametrize("centred", [False, True])
def test_closed_form_equals_sampling(centred):
    weights, alpha, epsilon, beta, initial = case(centred)
    x = drawn(1_000_000, DIM, seed=3) / math.sqrt(DIM)
    errors = outputs(weights, x) - (x @ beta).square() / 2
    if initial is not None:
        errors -= outputs(initial, x)
    squares = errors.square()
    expected = generalization_decomposition(weights, alpha, epsilon, beta, initial).total
    assert abs(squares.mean() - expected) < 4 * squares.std() / math.sqrt(len(x))


def test_the_three_terms_are_those_that_have_names_and_sum_to_the_loss():
    weights, alpha, epsilon, beta, _ = case()
    mean, second = weights.mean(0), weights.mT @ weights / WIDTH
    parts = generalization_decomposition(weights, alpha, epsilon, beta)
    form = alpha * epsilon * second - torch.outer(beta, beta)
    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(parts.misalignment, form.square().sum() / (2 * DIM**2), **close)
    variance = (alpha * epsilon * second.trace() - beta.square().sum()) ** 2 / (4 * DIM**2)
    torch.testing.assert_close(parts.variance, variance, **close)
    torch.testing.assert_close(parts.linear_power, alpha**2 * mean.square().sum() / DIM, **close)
    moments = (2 * (form / 2 @ form / 2).trace() + (form / 2).trace() ** 2) / DIM**2 + parts.linear_power
    torch.testing.assert_close(parts.total, moments, **close)
    assert torch.equal(generalization_decomposition(statistics(weights), alpha, epsilon, beta).total, parts.total)


@pytest.mark.parametrize("centred", [False, True])
def test_population_gradient_equals_autograd(centred):
    weights, alpha, epsilon, beta, initial = case(centred)
    leaf = weights.clone().requires_grad_()
    (generalization_decomposition(leaf, alpha, epsilon, beta, initial).total / 2).backward()
    found = population_gradient(weights, alpha, epsilon, beta, initial)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("centred", [False, True])
def test_population_flow_equals_gradient_descent_with_small_steps(centred):
    weights, alpha, epsilon, beta, initial = case(centred)
    rate, steps = 5e-4, 2000
    found = population_flow(weights, alpha, epsilon, beta, rate * steps, 100, initial)
    for _ in range(steps):
        weights = weights - rate * WIDTH / alpha**2 * population_gradient(weights, alpha, epsilon, beta, initial)
    for mine, other in zip(found, statistics(weights), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    assert (found.mean - case()[0].mean(0)).norm() > 0.05


def test_population_flow_is_of_fourth_order():
    start = case()
    exact = population_flow(*start[:4], 4.0, 300)
    errors = [float((population_flow(*start[:4], 4.0, n).second - exact.second).norm()) for n in (8, 16)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.25)


def test_tangent_kernel_of_the_network_is_the_analytic_one():
    network = QuadraticPerceptron(DIM, WIDTH, EPSILON).double()
    x, others = drawn(6, DIM), drawn(4, DIM, seed=1)
    weights = network.hidden.weight.detach()
    measured = ntk_gram(network, torch.cat([x, others]), trace=True)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(WIDTH * measured[:6, :6], quadratic_ntk(weights, EPSILON, x), **close)
    torch.testing.assert_close(WIDTH * measured[:6, 6:], quadratic_ntk(weights, EPSILON, x, others), **close)


def test_network_is_the_formula_and_trains_its_first_layer_only():
    torch.manual_seed(0)
    network = QuadraticPerceptron(DIM, WIDTH, EPSILON, alpha=4.0).double()
    x = drawn(6, DIM)
    expected = outputs(network.hidden.weight.detach(), x, alpha=4.0).unsqueeze(1)
    torch.testing.assert_close(network(x).detach(), expected, rtol=1e-6, atol=0)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["hidden.weight"]
    assert QuadraticPerceptron(2, 3, train_readout=True).readout.weight.requires_grad


def test_test_loss_of_the_network_on_the_data_is_the_closed_form():
    """On 200 000 held-out examples of the datamodule, within 4 standard errors."""
    data = PolynomialRegression(dim=DIM, train_size=1, test_size=200_000, direction="random")
    data.setup()
    network = QuadraticPerceptron(DIM, WIDTH, EPSILON)
    with torch.no_grad():
        squares = (network(data.test_dataset.inputs) - data.test_dataset.targets).square()
    expected = generalization_decomposition(network.hidden.weight.detach(), 1.0, EPSILON, data.beta).total
    assert abs(squares.mean() - expected) < 4 * squares.std() / math.sqrt(200_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_dim": 0}, "`input_dim` of QuadraticPerceptron to be a positive integer, but got 0"),
        ({"width": 2.0}, "`width` of QuadraticPerceptron"),
        ({"epsilon": math.nan}, "`epsilon` of QuadraticPerceptron"),
        ({"alpha": 0.0}, "`alpha` of QuadraticPerceptron to be a positive number, but got 0.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuadraticPerceptron(**{"input_dim": 3, "width": 4, **arguments})
