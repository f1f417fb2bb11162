# SPDX-License-Identifier: Apache-2.0
"""Digits, and with it what all datamodules have in common."""

from __future__ import annotations

import pickle
import random
import socket
import subprocess
import sys
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn

import fulgurite_datamodules
from fulgurite_datamodules import Digits
from tests.helpers import Plain, trainer


def ready(**kwargs: Any) -> Digits:
    data = Digits(**kwargs)
    data.setup()
    return data


def global_states() -> tuple[Any, ...]:
    """The states of the global generators, in a form that compares."""
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


class Classifier(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({}, (1200, 200, 397)),
        ({"val_size": 0, "test_size": 997}, (800, 0, 997)),
        ({"val_size": 0, "test_size": 997, "train_size": 300}, (300, 0, 997)),
        ({"val_size": 997, "test_size": 0}, (800, 997, 0)),
        ({"val_size": 0, "test_size": 0}, (1797, 0, 0)),
        ({"train_size": 1200}, (1200, 200, 397)),
        ({"train_size": 100}, (100, 200, 397)),
    ],
)
def test_sizes_are_exact_and_parts_are_disjoint_and_stratified(
    arguments: dict[str, int], sizes: tuple[int, int, int]
) -> None:
    data = ready(**arguments)
    parts = (data.train_indices, data.val_indices, data.test_indices)
    assert tuple(map(len, parts)) == sizes
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    targets = torch.tensor(load_digits().target)
    share = targets.bincount().double() / 1797
    for part in parts:
        assert (targets[part].bincount(minlength=10) - share * len(part)).abs().max() <= 2


def test_inputs_are_the_images_of_sklearn_standardised_by_the_training_examples() -> None:
    """Catches statistics of the wrong part, and images that do not belong to their labels."""
    data, digits = ready(train_size=300), load_digits()
    images = torch.tensor(digits.images).float()
    train = images[data.train_indices]
    mean, std = train.mean(), train.std(correction=0)
    torch.testing.assert_close(data.mean, mean[None])
    torch.testing.assert_close(data.std, std[None])
    for dataset, part in ((data.train_dataset, data.train_indices), (data.test_dataset, data.test_indices)):
        torch.testing.assert_close(dataset.inputs, ((images[part] - mean) / std)[:, None])
        assert torch.equal(dataset.targets, torch.tensor(digits.target)[part])
        assert dataset.inputs.dtype == torch.float32
        assert dataset.targets.dtype == torch.int64


def test_the_split_depends_on_split_seed_alone() -> None:
    """Two ranks, or two training seeds, must not get different splits: test examples would leak into training."""
    pl.seed_everything(1, verbose=False)
    first = ready(noise_seed=5, label_noise=0.3)
    pl.seed_everything(2, verbose=False)
    second = ready(noise_seed=6, batch_size=7)
    assert torch.equal(first.train_indices, second.train_indices)
    assert torch.equal(first.test_indices, second.test_indices)
    assert not torch.equal(first.test_indices, ready(split_seed=1).test_indices)


def test_a_smaller_training_set_is_part_of_a_larger_one_and_leaves_the_test_set_alone() -> None:
    small, large = ready(train_size=100), ready()
    assert torch.equal(small.train_indices, large.train_indices[:100])
    assert torch.equal(small.test_indices, large.test_indices)
    assert torch.equal(small.val_indices, large.val_indices)


def test_only_training_labels_get_noise_and_the_clean_ones_are_kept() -> None:
    data = ready(val_size=0, test_size=997, label_noise=0.4, noise_kind="symmetric")
    targets = torch.tensor(load_digits().target)
    assert int(data.train_noisy.sum()) == 320
    assert torch.equal(data.train_targets != data.train_clean_targets, data.train_noisy)
    assert torch.equal(data.train_clean_targets, targets[data.train_indices])
    assert torch.equal(data.train_dataset.targets, data.train_targets)
    assert torch.equal(data.test_dataset.targets, targets[data.test_indices])


def test_noise_depends_on_noise_seed_alone() -> None:
    first = ready(label_noise=0.4)
    torch.manual_seed(99)
    assert torch.equal(first.train_targets, ready(label_noise=0.4).train_targets)
    assert not torch.equal(first.train_noisy, ready(label_noise=0.4, noise_seed=1).train_noisy)


def test_without_noise_labels_are_clean() -> None:
    data = ready()
    assert torch.equal(data.train_targets, data.train_clean_targets)
    assert not bool(data.train_noisy.any())


def test_setup_draws_nothing_from_the_global_generators() -> None:
    """A run must not change because its data were made in the same process."""
    before = global_states()
    ready(label_noise=0.3, train_size=500)
    assert global_states() == before


def test_setup_is_done_once() -> None:
    """Lightning calls it for each stage; whoever holds the dataset must keep the one that is trained on."""
    data = Digits()
    data.setup("fit")
    dataset = data.train_dataset
    data.setup("test")
    assert data.train_dataset is dataset


def test_classes_and_shape_are_known_before_setup() -> None:
    assert (Digits().num_classes, Digits().input_shape) == (10, (1, 8, 8))


def test_it_pickles_before_and_after_setup() -> None:
    assert pickle.loads(pickle.dumps(Digits(train_size=50))).train_size == 50
    data = ready(label_noise=0.1)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.train_targets, data.train_targets)
    assert len(again.train_dataloader()) == 19


def test_loaders_give_every_example_once_and_training_is_shuffled() -> None:
    data = ready()
    torch.manual_seed(0)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (64, 1, 8, 8)
    assert y.shape == (64,)
    epochs = [torch.cat([x for x, _ in data.train_dataloader()]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(*(epoch.flatten(1).sum(1).sort().values for epoch in epochs))
    assert torch.equal(torch.cat([y for _, y in data.test_dataloader()]), data.test_dataset.targets)
    assert torch.equal(torch.cat([y for _, y in data.val_dataloader()]), data.val_dataset.targets)
    assert torch.equal(torch.cat([y for _, y in data.predict_dataloader()]), data.test_dataset.targets)


def test_drop_last_and_batch_size_act_on_training_alone() -> None:
    data = ready(batch_size=100, train_size=250, drop_last=True)
    assert [len(y) for _, y in data.train_dataloader()] == [100, 100]
    assert [len(y) for _, y in data.test_dataloader()] == [100, 100, 100, 97]


def test_a_part_without_examples_has_no_loader() -> None:
    data = Digits(val_size=0, test_size=0)
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []


def test_it_trains_without_network_and_without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of the loop: fit with no validation set, then test; and the labels belong to the images."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    data, run = Digits(val_size=0, test_size=597), trainer(epochs=5)
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    run.fit(module, data)
    assert run.global_step == 5 * 19
    assert run.test(module, data, verbose=False)[0]["test_acc"] > 0.85


def test_validation_runs_when_there_is_a_validation_set() -> None:
    run = trainer(epochs=1)
    run.fit(Classifier(), Digits())
    assert "val_loss" in run.callback_metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_noise": 1.5}, r"`label_noise` of Digits to be a fraction in \[0, 1\], but got 1.5"),
        ({"label_noise": -0.1}, "but got -0.1"),
        ({"noise_kind": "asymmetric"}, "`noise_kind` of Digits to be one of .*, but got 'asymmetric'"),
        ({"train_size": 0}, "`train_size` of Digits to be a whole number of at least 1 or None, but got 0"),
        ({"val_size": 0.2}, "`val_size` of Digits to be a whole number of at least 0, but got 0.2"),
        ({"test_size": -1}, "`test_size` of Digits .* but got -1"),
        ({"batch_size": 0}, "`batch_size` of Digits to be a whole number of at least 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` of Digits"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_sizes_that_the_data_cannot_give_are_refused_with_the_number_that_there_is() -> None:
    with pytest.raises(ValueError, match=r"`train_size` of Digits to be at most 1200, .* leave of 1797, but got 1201"):
        ready(train_size=1201)
    with pytest.raises(ValueError, match="leave training examples of its 1797, but got val_size=900 and 897"):
        ready(val_size=900, test_size=897)
    with pytest.raises(ValueError, match=r"`batch_size` of Digits to be at most 50, .* but got 64"):
        ready(train_size=50, drop_last=True)


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.input_shape", "model.input_shape", apply_on="instantiate")


class Sized(Plain):
    def __init__(self, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__(classes=num_classes)
        self.sizes = (num_classes, tuple(input_shape))


def test_a_command_line_knows_the_arguments_and_links_classes_and_shape() -> None:
    cli = LinkedCLI(
        Sized,
        pl.LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=False,
        run=False,
        args=["--data=Digits", "--data.train_size=300", "--data.noise_kind=pair", "--data.label_noise=0.2"],
    )
    assert isinstance(cli.datamodule, Digits)
    assert (cli.datamodule.train_size, cli.datamodule.noise_kind) == (300, "pair")
    assert cli.model.sizes == (10, (1, 8, 8))


def test_the_manifest_names_what_there_is_and_imports_no_torch() -> None:
    for component in fulgurite_datamodules.plugin.components:
        assert getattr(fulgurite_datamodules, component.name) is component.load()
    code = "import sys, fulgurite_datamodules; assert not {'torch', 'sklearn', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
