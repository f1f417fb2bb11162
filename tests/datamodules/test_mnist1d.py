# SPDX-License-Identifier: Apache-2.0
"""MNIST1D is generated: with the authors' arguments, without a network, without a trace in the global generators."""

from __future__ import annotations

import pickle
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fulgurite.errors import FulguriteError
from fulgurite_datamodules import MNIST1D
from fulgurite_datamodules.mnist1d import _generated

pytest.importorskip("mnist1d")


def global_states() -> tuple[Any, ...]:
    """The states of the global generators, in a form that compares."""
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


@pytest.fixture(scope="module")
def data() -> Iterator[MNIST1D]:
    """The data, made while no socket can be opened and from a global state that must not matter."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        np.random.seed(123)  # noqa: NPY002
        module = MNIST1D(label_noise=0.2, noise_kind="pair")
        module.setup()
        yield module


def test_sizes_shapes_and_classes(data: MNIST1D) -> None:
    assert (data.num_classes, data.input_shape) == (10, (1, 40))
    for dataset, n in ((data.train_dataset, 3500), (data.val_dataset, 500), (data.test_dataset, 1000)):
        assert dataset.inputs.shape == (n, 1, 40)
        assert dataset.inputs.dtype == torch.float32
        assert dataset.targets.dtype == torch.int64
    for part, n in ((data.train_clean_targets, 350), (data.val_dataset.targets, 50), (data.test_dataset.targets, 100)):
        assert torch.equal(part.bincount(), torch.full((10,), n))  # classes are equal, so stratification is exact


def test_training_inputs_are_standardised(data: MNIST1D) -> None:
    x = data.train_dataset.inputs.double()
    assert abs(x.mean()) < 1e-6
    assert abs(x.std(correction=0) - 1) < 1e-6


def test_signals_and_labels_are_those_of_the_authors_generator(data: MNIST1D) -> None:
    """Catches signals that lost their labels, and another seed or argument than the authors'."""
    from mnist1d.data import get_dataset_args, make_dataset

    theirs = make_dataset(get_dataset_args())
    signals = torch.tensor(np.concatenate([theirs["x"], theirs["x_test"]])).float()
    targets = torch.tensor(np.concatenate([theirs["y"], theirs["y_test"]]))
    raw = data.test_dataset.inputs * data.std + data.mean
    torch.testing.assert_close(raw[:, 0], signals[data.test_indices], atol=1e-5, rtol=0)
    assert torch.equal(data.test_dataset.targets, targets[data.test_indices])


def test_noise_has_its_count_and_kind(data: MNIST1D) -> None:
    assert int(data.train_noisy.sum()) == 700
    selected = data.train_noisy
    assert torch.equal(data.train_targets[selected], (data.train_clean_targets[selected] + 1) % 10)


def test_again_is_the_same_and_leaves_the_global_generators_alone(data: MNIST1D) -> None:
    """mnist1d seeds numpy and random; a user's own stream must go on as if it had not."""
    random.random()  # away from the state that another generation may have left
    np.random.rand()  # noqa: NPY002
    before = global_states()
    again = MNIST1D(label_noise=0.2, noise_kind="pair")
    again.setup()
    assert global_states() == before
    assert torch.equal(again.train_dataset.inputs, data.train_dataset.inputs)
    assert torch.equal(again.train_targets, data.train_targets)


def test_it_pickles_and_loads(data: MNIST1D) -> None:
    x, y = next(iter(pickle.loads(pickle.dumps(data)).train_dataloader()))
    assert x.shape == (64, 1, 40)
    assert y.shape == (64,)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    _generated.cache_clear()
    with pytest.raises(FulguriteError, match=r"pip install 'fulgurite\[mnist1d\]'"):
        MNIST1D().setup()
