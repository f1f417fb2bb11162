# SPDX-License-Identifier: Apache-2.0
"""The pure functions: stratified orders, label noise, channel statistics, the dataset that takes out whole batches."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate

from fulgurite_datamodules.dataset import ArrayDataset, channel_statistics, collate, standardize
from fulgurite_datamodules.noise import flip_labels
from fulgurite_datamodules.splits import stratified_order


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def deviations(targets: Tensor, order: Tensor) -> Tensor:
    """Examples of each class in each prefix, less the exact share: [N + 1, C]."""
    hits = F.one_hot(targets).double()
    counts = torch.cat([torch.zeros(1, hits.shape[1]), hits[order].cumsum(0)])
    return counts - torch.arange(len(targets) + 1)[:, None] * hits.mean(0)


def test_stratified_order_is_a_permutation_whose_every_slice_has_the_class_proportions() -> None:
    """A plain permutation strays by tens of examples; a sorted one by hundreds."""
    targets = torch.randint(0, 7, (1000,), generator=generator(5))
    for seed in range(5):
        order = stratified_order(targets, generator(seed))
        assert sorted(order.tolist()) == list(range(1000))
        off = deviations(targets, order)
        assert off.abs().max() <= 1
        assert (off.max(0).values - off.min(0).values).max() <= 2  # the worst slice


def test_stratified_order_is_exact_when_the_classes_are_equal() -> None:
    targets = torch.arange(50) % 5
    assert torch.equal(targets[stratified_order(targets, generator())][:20].bincount(), torch.full((5,), 4))


def test_stratified_order_is_random_within_classes_and_between_them() -> None:
    """Catches a split that always takes the first examples of each class, or classes in a fixed order."""
    targets = torch.arange(4) % 2
    seen = {tuple(stratified_order(targets, generator(seed)).tolist()) for seed in range(200)}
    assert len(seen) == 16  # 2! per class, times 2 orders of the classes in each of 2 levels


def test_a_rare_class_stands_in_the_middle_not_always_in_the_first_slice() -> None:
    """With ranks j / n, every class would put an example into the test set before any gets a second one."""
    targets = torch.tensor([0] * 9 + [1])
    places = {int((stratified_order(targets, generator(seed)) == 9).nonzero()) for seed in range(20)}
    assert places == {4, 5}


def test_stratified_order_depends_on_its_seed_only() -> None:
    targets = torch.arange(300) % 10
    torch.manual_seed(1)
    first = stratified_order(targets, generator(3))
    torch.manual_seed(2)
    assert torch.equal(first, stratified_order(targets, generator(3)))
    assert not torch.equal(first, stratified_order(targets, generator(4)))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.333, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "symmetric", "pair", "permute"])
def test_exactly_the_rounded_fraction_is_selected_and_nothing_else_changes(fraction: float, kind: str) -> None:
    """A coin per example would select a random number of them."""
    clean = torch.randint(0, 10, (797,), generator=generator(1))
    before = clean.clone()
    noisy, mask = flip_labels(clean, 10, fraction, kind, generator())
    assert int(mask.sum()) == round(fraction * 797)
    assert torch.equal(noisy[~mask], clean[~mask])
    assert torch.equal(clean, before)
    assert noisy.dtype == clean.dtype
    assert noisy.min() >= 0
    assert noisy.max() < 10
    if kind == "symmetric":
        assert bool((noisy[mask] != clean[mask]).all())
    if kind == "pair":
        assert torch.equal(noisy[mask], (clean[mask] + 1) % 10)


@pytest.mark.parametrize(("kind", "expected"), [("symmetric", [0, 1 / 3, 1 / 3, 1 / 3]), ("uniform", [0.25] * 4)])
def test_noisy_labels_are_drawn_uniformly_from_the_other_classes_or_from_all(kind: str, expected: list[float]) -> None:
    """For every true class: a draw that favours a class, or never gives one, falls out of five standard errors."""
    n = 20_000
    clean = torch.arange(4).repeat_interleave(n)
    noisy, _ = flip_labels(clean, 4, 1.0, kind, generator())
    for c in range(4):
        frequencies = noisy[clean == c].bincount(minlength=4).double() / n
        assert torch.allclose(frequencies.roll(-c), torch.tensor(expected).double(), atol=5 * 0.5 / n**0.5)


def test_noise_is_nested_more_of_it_keeps_what_less_of_it_changed() -> None:
    clean = torch.randint(0, 10, (500,), generator=generator(1))
    few, few_mask = flip_labels(clean, 10, 0.2, "symmetric", generator())
    many, many_mask = flip_labels(clean, 10, 0.4, "symmetric", generator())
    assert bool(many_mask[few_mask].all())
    assert torch.equal(many[few_mask], few[few_mask])


def test_permuted_labels_are_those_of_the_selected_examples_in_another_order() -> None:
    """Fails if classes gain or lose labels, if other examples take part, or if the order is not random."""
    clean = (torch.arange(4000) % 5 == 0).long()
    noisy, mask = flip_labels(clean, 2, 0.3, "permute", generator())
    assert torch.equal(noisy[mask].sort().values, clean[mask].sort().values)
    share = float(clean[mask].double().mean())
    right = float((noisy[mask] == clean[mask]).double().mean())
    assert abs(right - share**2 - (1 - share) ** 2) < 5 * 0.5 / 1200**0.5
    _, fewer = flip_labels(clean, 2, 0.1, "permute", generator())
    assert bool(mask[fewer].all())


def test_two_classes_symmetric_noise_is_the_other_class() -> None:
    noisy, _ = flip_labels(torch.tensor([0, 1, 1]), 2, 1.0, "symmetric", generator())
    assert noisy.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], 3, 1.5, "pair"), r"`fraction` of flip_labels to be a fraction in \[0, 1\], but got 1.5"),
        (([0], 3, float("nan"), "pair"), "but got nan"),
        (
            ([0], 3, 0.5, "pairs"),
            "`kind` of flip_labels to be one of 'uniform', 'symmetric', 'pair', 'permute', but got 'pairs'",
        ),
        (([0], 1, 0.5, "pair"), "`num_classes` of flip_labels to be at least 2, but got 1"),
        (([0, 3], 3, 0.5, "pair"), r"in 0 ... 2, but got values from 0 to 3"),
    ],
)
def test_wrong_arguments_of_flip_labels_are_refused(arguments: tuple, message: str) -> None:
    targets, *rest = arguments
    with pytest.raises(ValueError, match=message):
        flip_labels(torch.tensor(targets), *rest, generator())


@pytest.mark.parametrize("shape", [(2345, 3, 4, 4), (1500, 1, 40)])
def test_channel_statistics_equal_those_of_the_whole_in_float64(shape: tuple[int, ...]) -> None:
    """2345 is no multiple of the part length: a mean of part means would be wrong."""
    inputs = torch.randint(0, 256, shape, generator=generator(), dtype=torch.uint8)
    inputs[:1000] //= 4
    mean, std = channel_statistics(inputs)
    dims = [d for d in range(len(shape)) if d != 1]
    torch.testing.assert_close(mean, inputs.double().mean(dims).float())
    torch.testing.assert_close(std, inputs.double().std(dims, correction=0).float())


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    inputs = torch.full((5, 1, 2, 2), 7, dtype=torch.uint8)
    assert torch.equal(standardize(inputs, *channel_statistics(inputs)), torch.zeros(5, 1, 2, 2))


def numbered(n: int = 10) -> ArrayDataset:
    return ArrayDataset(torch.arange(n).float().view(n, 1, 1) * 10, torch.arange(n))


@pytest.mark.parametrize(("collate_fn", "workers"), [(collate, 0), (default_collate, 0), (collate, 1)])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(10)), lambda d: ConcatDataset([d])])
def test_batches_are_the_same_with_any_collate_function_and_wrapper(collate_fn: Any, workers: int, wrap: Any) -> None:
    """People put our datasets into loaders, subsets and concatenations of their own."""
    loader = DataLoader(wrap(numbered()), batch_size=4, collate_fn=collate_fn, num_workers=workers)
    batches = list(loader)
    assert [type(batch) for batch in batches] == [list] * 3
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(torch.equal(x, y.float().view(-1, 1, 1) * 10) for x, y in batches)


def test_an_item_is_a_pair_and_iteration_over_the_dataset_ends() -> None:
    items = list(numbered(3))
    assert len(items) == 3
    assert items[2][0].shape == (1, 1)
    assert items[2][1].item() == 2
    assert numbered(3)[-1][1].item() == 2
    with pytest.raises(IndexError, match="Index 3 is outside a dataset of 3"):
        numbered(3)[3]


def test_a_dataset_pickles() -> None:
    again = pickle.loads(pickle.dumps(numbered()))
    assert torch.equal(again.inputs, numbered().inputs)
