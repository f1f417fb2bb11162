# SPDX-License-Identifier: Apache-2.0
"""Targets against their formulas, moments of the inputs, loaders, seeds."""

from __future__ import annotations

import math

import pytest
import torch

from fulgurite_datamodules.polynomial_regression import PolynomialRegression, TeacherStudent


def ready(kind=PolynomialRegression, **arguments):
    data = kind(**arguments)
    data.setup()
    return data


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("direction", ["axis", "random"])
def test_targets_are_the_polynomial(degree, direction):
    data = ready(dim=5, train_size=20, test_size=7, degree=degree, direction=direction)
    assert float(data.beta.square().sum()) == pytest.approx(5, rel=1e-6)
    assert (data.beta[1:] == 0).all() == (direction == "axis")
    for part, size in ((data.train_dataset, 20), (data.test_dataset, 7)):
        assert part.inputs.shape == (size, 5)
        expected = (part.inputs @ data.beta).unsqueeze(1) ** degree / math.factorial(degree)
        torch.testing.assert_close(part.targets, expected)


def test_inputs_have_covariance_one_over_the_dimension():
    """The mean of n squares of variance 2 / D^2 each has standard error sqrt(2 / n) / D; five of them."""
    n, dim = 40_000, 4
    inputs = ready(dim=dim, train_size=n, test_size=0).train_dataset.inputs
    apart = (inputs.mT @ inputs / n - torch.eye(dim) / dim).abs().max()
    assert apart < 5 * math.sqrt(2 / n) / dim
    assert inputs.mean(0).abs().max() < 5 / math.sqrt(n * dim)


def test_noise_is_otrain_sizeing_targets_only_and_leaves_inputs_alone():
    clean, noisy = (ready(dim=3, train_size=5000, test_size=50, noise_std=std) for std in (0.0, 0.5))
    assert torch.equal(clean.train_dataset.inputs, noisy.train_dataset.inputs)
    assert torch.equal(clean.train_dataset.targets, noisy.train_clean_targets)
    assert torch.equal(clean.test_dataset.targets, noisy.test_dataset.targets)
    noise = noisy.train_dataset.targets - noisy.train_clean_targets
    assert float(noise.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * 5000))


def test_a_full_batch_is_all_examples_in_their_order_as_often_as_asked():
    data = ready(dim=3, train_size=10, test_size=4, repeats=3)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 3
    for inputs, targets in batches:
        assert torch.equal(inputs, data.train_dataset.inputs)
        assert torch.equal(targets, data.train_dataset.targets)
    (held_out,) = data.val_dataloader()
    assert torch.equal(held_out[0], data.test_dataset.inputs)


def test_small_batches_are_drawn_anew_and_each_round_has_every_example_once():
    data = ready(dim=2, train_size=10, test_size=0, batch_size=5, repeats=2)
    torch.manual_seed(0)
    rows = torch.cat([inputs for inputs, _ in data.train_dataloader()])
    rounds = [{tuple(row) for row in part.tolist()} for part in rows.split(10)]
    assert len(rows) == 20
    assert rounds[0] == rounds[1] == {tuple(row) for row in data.train_dataset.inputs.tolist()}
    assert not torch.equal(rows[:10], rows[10:])
    assert data.val_dataloader() == []


def test_seed_is_all_that_it_depends_on():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = ready(dim=3), ready(dim=3), ready(dim=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train_dataset.inputs, same.train_dataset.inputs)
    assert not torch.equal(first.train_dataset.inputs, other.train_dataset.inputs)


def test_a_teacher_gives_its_targets():
    data = ready(TeacherStudent, dim=3, train_size=8, test_size=5, width=2)
    x = data.test_dataset.inputs
    expected = sum(data.readout[k] * torch.tanh(x @ data.hidden[k]) for k in range(2)) / math.sqrt(2)
    torch.testing.assert_close(data.test_dataset.targets[:, 0], expected)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            PolynomialRegression,
            {"dim": 0},
            "`dim` of PolynomialRegression to be a whole number of at least 1, but got 0",
        ),
        (PolynomialRegression, {"train_size": 2.5}, "`train_size` of PolynomialRegression"),
        (
            PolynomialRegression,
            {"test_size": -1},
            "`test_size` of PolynomialRegression to be a whole number of at least 0",
        ),
        (PolynomialRegression, {"degree": 0}, "`degree` of PolynomialRegression"),
        (
            PolynomialRegression,
            {"direction": "up"},
            "`direction` of PolynomialRegression to be one of 'axis', 'random'",
        ),
        (PolynomialRegression, {"noise_std": -1.0}, "`noise_std` of PolynomialRegression"),
        (PolynomialRegression, {"batch_size": 0}, "`batch_size` of PolynomialRegression"),
        (PolynomialRegression, {"repeats": 0}, "`repeats` of PolynomialRegression"),
        (TeacherStudent, {"width": 0}, "`width` of TeacherStudent"),
    ],
)
def test_wrong_arguments_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
