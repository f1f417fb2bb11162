# SPDX-License-Identifier: Apache-2.0
"""Synthetic regression: the targets are what they are said to be, whatever the global seed, and passes are permutations."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from fulgurite_datamodules.synthetic_regression import SingleNeuron, SparseRegression


def made(kind: Any, **arguments: Any) -> Any:
    data = kind(**arguments)
    data.setup()
    return data


def test_sparse_targets_are_the_sum_of_the_first_inputs() -> None:
    data = made(SparseRegression, dim=7, train_size=5, test_size=4, sparsity=2)
    assert data.coefficients.tolist() == [1, 1, 0, 0, 0, 0, 0]
    for part in (data.train_dataset, data.test_dataset):
        torch.testing.assert_close(part.targets, part.inputs[:, :2].sum(dim=1, keepdim=True))


def test_the_neuron_is_a_rectified_first_input() -> None:
    data = made(SingleNeuron, dim=3, train_size=50)
    assert torch.equal(data.train_dataset.targets, data.train_dataset.inputs[:, :1].clamp_min(0))
    assert data.test_dataset.targets.shape == (1000, 1)


def test_noise_is_in_the_training_targets_alone() -> None:
    clean = made(SingleNeuron, train_size=2000)
    noisy = made(SingleNeuron, train_size=2000, noise=0.3)
    assert torch.equal(clean.train_dataset.inputs, noisy.train_dataset.inputs)
    assert torch.equal(clean.test_dataset.targets, noisy.test_dataset.targets)
    difference = noisy.train_dataset.targets - clean.train_dataset.targets
    assert abs(float(difference.std()) - 0.3) < 0.02


def test_data_depend_on_their_own_seed_alone() -> None:
    torch.manual_seed(1)
    first = made(SparseRegression)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = made(SparseRegression)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train_dataset.inputs, second.train_dataset.inputs)
    assert not torch.equal(first.train_dataset.inputs, made(SparseRegression, data_seed=1).train_dataset.inputs)


def test_an_epoch_is_as_many_permutations_as_asked_for() -> None:
    loader = made(SparseRegression, train_size=6, batch_size=4, passes_per_epoch=3).train_dataloader()
    assert len(loader) == 5
    torch.manual_seed(0)
    order = torch.tensor(list(loader.sampler)).view(3, 6)
    assert torch.equal(order.sort(dim=1).values, torch.arange(6).expand(3, 6))
    assert not torch.equal(order[0], order[1])


def test_the_whole_set_is_one_batch_by_default_and_a_batch_is_never_larger() -> None:
    assert len(made(SingleNeuron, train_size=9, passes_per_epoch=4).train_dataloader()) == 4
    inputs, targets = next(iter(made(SingleNeuron, train_size=9, batch_size=100).train_dataloader()))
    assert inputs.shape == (9, 10)
    assert targets.shape == (9, 1)


def test_no_test_examples_make_no_loader_and_it_pickles() -> None:
    assert made(SingleNeuron, test_size=0).test_dataloader() == []
    copied = pickle.loads(pickle.dumps(made(SparseRegression)))
    assert torch.equal(copied.train_dataset.inputs, made(SparseRegression).train_dataset.inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "`dim` of SparseRegression to be a positive integer, but got 0"),
        ({"sparsity": 61}, r"`sparsity` of SparseRegression to be an integer in \[0, 60\], but got 61"),
        ({"noise": -1.0}, "`noise` of SparseRegression to be a number that is not negative"),
        ({"batch_size": 0}, "`batch_size` of SparseRegression to be a positive integer"),
        ({"test_size": -1}, "`test_size` of SparseRegression"),
        ({"passes_per_epoch": 0}, "`passes_per_epoch` of SparseRegression"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseRegression(**arguments)
