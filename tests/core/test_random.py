# SPDX-License-Identifier: Apache-2.0
"""Random numbers that nobody else notices, and seeds made from counters."""

from __future__ import annotations

import itertools

import pytest
import torch

from fulgurite.random import derived_seed, seeded

CPU = torch.device("cpu")


def test_seeded_block_draws_what_the_seed_says_and_leaves_the_stream_alone():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    with seeded(5, CPU):
        first = torch.rand(3)
    with pytest.raises(ZeroDivisionError), seeded(5, CPU):
        torch.rand(3) / (1 // 0)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(5)), first)


def test_seeds_of_different_counters_differ_and_fit_a_generator():
    numbers = list(itertools.product(range(3), range(3), range(20)))
    seeds = [derived_seed(*each) for each in numbers]
    assert len(set(seeds)) == len(numbers)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = torch.stack([torch.rand(50, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    assert abs(float(torch.corrcoef(draws)[~torch.eye(len(draws), dtype=torch.bool)].mean())) < 0.01


def test_seeds_are_the_same_in_every_process():
    # int(np.random.SeedSequence((0, 1, 2)).generate_state(1, np.uint64)[0]) // 2, of numpy 2.4
    assert derived_seed(0, 1, 2) == 1535930435702422785
