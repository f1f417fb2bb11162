# SPDX-License-Identifier: Apache-2.0
"""Sparse parity: labels against a loop, words that are distinct, and bad arguments."""

from __future__ import annotations

import pytest
import torch

from fulgurite_datamodules.sparse_parity import SparseParity


@pytest.mark.parametrize("shuffle_places", [False, True])
def test_labels_are_the_parity_of_the_relevant_bits_and_of_no_others(shuffle_places):
    data = SparseParity(relevant=3, noise=9, size=300, shuffle_places=shuffle_places)
    data.setup()
    targets = torch.cat([data.train_dataset.targets, data.val_dataset.targets])
    for word, target in zip(data.words.tolist(), targets.tolist(), strict=True):
        assert target == sum(word[place] for place in data.places.tolist()) % 2
    assert (data.places.tolist() == [0, 1, 2]) is not shuffle_places
    for place in range(12):
        flipped = data.words.clone()
        flipped[:, place] = 1 - flipped[:, place]
        changed = flipped[:, data.places].sum(1) % 2 != targets
        assert bool(changed.all()) == (place in data.places.tolist())
        assert bool(changed.any()) == (place in data.places.tolist())


def test_the_default_is_that_of_the_study_and_words_are_distinct():
    data = SparseParity()
    data.setup()
    assert data.words.shape == (2000, 43)
    assert len(data.words.unique(dim=0)) == 2000
    assert (len(data.train_dataset), len(data.val_dataset)) == (1000, 1000)
    assert abs(float(data.words.float().mean()) - 0.5) < 0.01
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == (1000, 43)
    assert set(inputs.unique().tolist()) == {0.0, 1.0}
    assert targets.dtype is torch.int64


def test_all_words_of_few_bits():
    data = SparseParity(relevant=2, noise=3, size=32, train_fraction=1.0)
    data.setup()
    numbers = (data.words * 2 ** torch.arange(5)).sum(1)
    assert sorted(numbers.tolist()) == list(range(32))
    assert data.val_dataloader() == []


def test_signs_batches_and_seeds():
    bits, signs, other = SparseParity(), SparseParity(encoding="signs", batch_size=30), SparseParity(seed=1)
    for data in (bits, signs, other):
        data.setup()
    torch.testing.assert_close(signs.train_dataset.inputs, 2 * bits.train_dataset.inputs - 1)
    assert len(signs.train_dataloader()) == 34
    assert not torch.equal(bits.words, other.words)
    order = [next(iter(signs.train_dataloader()))[0] for _ in range(2)]
    assert not torch.equal(*order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relevant": 0}, "`relevant` of SparseParity"),
        ({"noise": 60}, "`noise` of SparseParity to be at most 59"),
        ({"relevant": 2, "noise": 2, "size": 17}, "at most 16, the number of words of 4 bits"),
        ({"train_fraction": 0.0}, r"`train_fraction` of SparseParity to be in \(0, 1\]"),
        ({"encoding": "onehot"}, "'bits', 'signs'"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"size": 2.5}, "`size`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseParity(**arguments)
