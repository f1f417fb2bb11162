# SPDX-License-Identifier: Apache-2.0
"""Modular arithmetic: the table of every operation, the split, corrupted labels, encodings and full batches."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from fulgurite_datamodules import ModularArithmetic
from tests.helpers import Plain, trainer


def ready(**kwargs: Any) -> ModularArithmetic:
    data = ModularArithmetic(**kwargs)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        ("add", lambda m, n: m + n),
        ("subtract", lambda m, n: m - n),
        ("multiply", lambda m, n: m * n),
        ("linear", lambda m, n: 3 * m - 2 * n),
        ("squares", lambda m, n: m**2 + n**2),
    ],
)
def test_labels_are_the_operation_on_every_pair(operation: Any, result: Any) -> None:
    """Catches labels that do not belong to their pairs, and a remainder of the wrong sign."""
    data = ready(modulus=11, operation=operation, coefficients=(3, -2), encoding="tokens", train_fraction=0.4)
    seen = set()
    for dataset in (data.train_dataset, data.val_dataset):
        for (m, n), target in dataset:
            assert int(target) == result(int(m), int(n)) % 11
            seen.add((int(m), int(n)))
    assert len(seen) == 121


def test_sizes_are_floors_and_the_parts_are_disjoint() -> None:
    data = ready(modulus=10, train_fraction=0.29, corrupted_fraction=0.35)  # 0.29 * 100 is 28.999999999999996 in floats
    assert len(data.train_indices) == 29
    assert int(data.train_noisy.sum()) == 10  # floor(10.15)
    together = torch.cat([data.train_indices, data.held_out_indices])
    assert torch.equal(together.sort().values, torch.arange(100))
    assert data.test_dataset is data.val_dataset
    assert torch.equal(data.pairs[data.train_indices], data.train_dataset.inputs)
    assert torch.equal(data.pairs[:, 0] * 10 + data.pairs[:, 1], torch.arange(100))


def test_one_hot_inputs_are_the_tokens() -> None:
    data, tokens = ready(modulus=7), ready(modulus=7, encoding="tokens")
    inputs, targets = next(iter(data.train_dataloader()))
    pairs, same = next(iter(tokens.train_dataloader()))
    expected = torch.cat([nn.functional.one_hot(pairs[:, 0], 7), nn.functional.one_hot(pairs[:, 1], 7)], dim=1).float()
    assert torch.equal(inputs, expected)
    assert torch.equal(targets, same)
    assert (data.input_shape, tokens.input_shape, data.num_classes) == ((14,), (2,), 7)


@pytest.mark.parametrize("modulus", [2, 5, 8, 9, 113])
def test_binary_inputs_are_the_digits_of_both_numbers(modulus: int) -> None:
    """Powers of two and their neighbours: 8 needs three digits, for 0 to 7, and 9 four."""
    data = ready(modulus=modulus, encoding="binary", train_fraction=1.0)
    digits = math.ceil(math.log2(modulus))
    assert (data.bits, data.input_shape) == (digits, (2 * digits,))
    (batch,) = data.train_dataloader()
    assert batch[0].dtype == torch.float32
    written = ["".join(str(int(bit)) for bit in row) for row in batch[0]]
    assert written == [f"{m:0{digits}b}{n:0{digits}b}" for m, n in data.pairs[data.train_indices].tolist()]
    assert len(set(written)) == modulus**2
    assert torch.equal(data.train_dataset[0][0], batch[0][0])


@pytest.mark.parametrize(("operation", "zeros"), [("add", 6), ("subtract", 6), ("multiply", 0)])
def test_pairs_with_a_zero_can_be_left_out(operation: Any, zeros: int) -> None:
    """Of the 36 others modulo 7, m + n and m - n are 0 for one n each, and m n never is."""
    data = ready(modulus=7, operation=operation, exclude_zero=True, train_fraction=0.4, encoding="tokens")
    assert data.pairs.tolist() == [[m, n] for m in range(1, 7) for n in range(1, 7)]
    assert (len(data.train_dataset), len(data.val_dataset)) == (14, 22)
    found = torch.cat([data.train_dataset.targets, data.val_dataset.targets])
    assert int((found == 0).sum()) == zeros
    for dataset in (data.train_dataset, data.val_dataset):
        for (m, n), target in dataset:
            expected = {"add": m + n, "subtract": m - n, "multiply": m * n}[operation]
            assert int(target) == int(expected) % 7
    assert data.num_classes == 7


def test_zeros_are_left_out_whatever_the_encoding() -> None:
    shapes = {}
    for encoding in ("onehot", "binary", "tokens"):
        data = ready(modulus=7, exclude_zero=True, train_fraction=1.0, encoding=encoding, corrupted_fraction=0.5)
        (batch,) = data.train_dataloader()
        assert len(batch[0]) == 36
        assert int(data.train_noisy.sum()) == 18
        shapes[encoding] = batch[0].shape[1:]
        assert shapes[encoding] == data.input_shape
    assert shapes == {"onehot": (14,), "binary": (6,), "tokens": (2,)}


@pytest.mark.parametrize("exclude", [True, False])
def test_only_training_labels_are_corrupted_and_the_true_ones_are_kept(exclude: bool) -> None:
    data = ready(modulus=13, train_fraction=0.9, corrupted_fraction=1.0, exclude_true_label=exclude)
    wrong = data.train_targets != data.true_labels
    assert bool(data.is_corrupted.all())
    assert torch.equal(data.train_dataset.targets, data.train_targets)
    pairs = data.pairs[data.held_out_indices]
    assert torch.equal(data.val_dataset.targets, pairs.sum(1) % 13)
    if exclude:
        assert bool(wrong.all())
    else:  # one in 13 of 152 stays right: 11.7, with a deviation of 3.3
        assert 1 <= int((~wrong).sum()) <= 22


def test_split_and_noise_depend_on_their_own_seeds_alone() -> None:
    arguments: dict[str, Any] = {"modulus": 13, "corrupted_fraction": 0.5}
    seed_everything(1, verbose=False)
    first = ready(**arguments)
    seed_everything(2, verbose=False)
    before = torch.get_rng_state()
    second = ready(**arguments, batch_size=4, encoding="tokens")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train_indices, second.train_indices)
    assert torch.equal(first.train_targets, second.train_targets)
    assert not torch.equal(first.train_indices, ready(**arguments, pair_seed=1).train_indices)
    assert not torch.equal(first.train_noisy, ready(**arguments, noise_seed=1).train_noisy)


def test_a_smaller_training_set_is_part_of_a_larger_one() -> None:
    small, large = ready(modulus=13, train_fraction=0.2), ready(modulus=13, train_fraction=0.7)
    assert torch.equal(small.train_indices, large.train_indices[: len(small.train_indices)])


def test_a_full_batch_is_the_whole_set_in_its_order_and_draws_no_order() -> None:
    data = ready(modulus=13)
    (batch,) = data.train_dataloader()
    assert torch.equal(batch[1], data.train_targets)
    assert len(list(data.val_dataloader())) == 1


def test_minibatches_are_drawn_anew_and_may_leave_out_the_last() -> None:
    data = ready(modulus=13, batch_size=16, drop_last=True, encoding="tokens")
    torch.manual_seed(0)
    first, second = (torch.cat([pairs for pairs, _ in data.train_dataloader()]) for _ in range(2))
    assert len(first) == 80  # of 84
    assert not torch.equal(first, second)
    assert len(list(data.test_dataloader())) == 1  # evaluation takes all at once, whatever the training does


def test_writing_into_a_batch_leaves_the_data_alone() -> None:
    """A plugin that changes a batch in place would otherwise change every later epoch."""
    for encoding in ("onehot", "binary", "tokens"):
        data = ready(modulus=5, encoding=encoding)
        kept = [part.clone() for part in next(iter(data.train_dataloader()))]
        for part in next(iter(data.train_dataloader())):
            part.zero_()
        for part, before in zip(next(iter(data.train_dataloader())), kept, strict=True):
            assert torch.equal(part, before)


def test_it_pickles_before_and_after_setup() -> None:
    assert pickle.loads(pickle.dumps(ModularArithmetic(modulus=5))).modulus == 5
    data = ready(modulus=5, corrupted_fraction=0.5)
    assert torch.equal(pickle.loads(pickle.dumps(data)).train_targets, data.train_targets)


def test_it_trains_and_validates() -> None:
    class Net(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(10, 5)

    run = trainer(epochs=3)
    run.fit(Net(), ModularArithmetic(modulus=5))
    assert run.global_step == 3
    assert "val_loss" in run.callback_metrics


def test_without_held_out_pairs_there_is_nothing_to_validate() -> None:
    data = ready(modulus=5, train_fraction=1.0)
    assert data.val_dataloader() == data.test_dataloader() == data.predict_dataloader() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modulus": 1}, "`modulus` of ModularArithmetic to be a whole number of at least 2, but got 1"),
        ({"operation": "divide"}, "`operation` of ModularArithmetic to be one of 'add', .*, but got 'divide'"),
        (
            {"encoding": "unary"},
            "`encoding` of ModularArithmetic to be one of 'onehot', 'binary', 'tokens', but got 'unary'",
        ),
        ({"exclude_zero": 1}, "`exclude_zero` of ModularArithmetic to be True or False, but got 1"),
        ({"modulus": 5, "train_fraction": 0.05, "exclude_zero": True}, "at least 1 / 16, one pair, but got 0.05"),
        ({"train_fraction": 0.0}, r"`train_fraction` of ModularArithmetic to be in \(0, 1\], but got 0.0"),
        ({"train_fraction": 1.01}, "but got 1.01"),
        ({"modulus": 5, "train_fraction": 0.03}, "at least 1 / 25, one pair, but got 0.03"),
        ({"corrupted_fraction": -0.1}, r"`corrupted_fraction` of ModularArithmetic to be in \[0, 1\], but got -0.1"),
        ({"batch_size": 0}, "`batch_size` of ModularArithmetic to be a positive whole number or None, but got 0"),
        ({"modulus": 5, "batch_size": 13, "drop_last": True}, "at most 12, the number of training pairs"),
        ({"coefficients": (1, 0.5)}, "`coefficients` of ModularArithmetic to be two whole numbers"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModularArithmetic(**arguments)
