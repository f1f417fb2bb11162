# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the components."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.testing import Case
from fulgurite.testing.lab import Plain, small_data
from fulgurite_plugins.grokking.corrupted_grokking.corruption import LabelCorruption
from fulgurite_plugins.grokking.corrupted_grokking.curves import PruningCurves
from fulgurite_plugins.grokking.corrupted_grokking.ipr import NeuronIPR
from fulgurite_plugins.grokking.corrupted_grokking.networks import OneHotMSE, QuadraticMLP, TokenTransformer
from fulgurite_plugins.grokking.corrupted_grokking.pruning import IPRPruning
from fulgurite_plugins.grokking.corrupted_grokking.splits import InversionDetector, SplitAccuracies


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _classes(n: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def _labels() -> tuple[Tensor, ...]:
    """Labels, true labels and the mask of those that differ, of 17 examples."""
    labels, truth = _classes(17, 4, 1), _classes(17, 4, 2)
    return labels, truth, labels != truth


def _tokens() -> tuple[Tensor]:
    return (torch.stack([_classes(6, 5, 1), _classes(6, 5, 2)], dim=1),)


_DATA = functools.partial(LabelCorruption(0.5, num_classes=4).wrap, small_data())


class _Validated(Plain):
    """Has validation data of its own."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(small_data(20, seed=1), batch_size=8)


_NO_NEURONS = {
    "batch_norm": "the kit's network with batch norm has a single linear layer, and so no neurons between two; the plugin's "
    "own tests have one"
}
_SMALLER = {
    **_NO_NEURONS,
    "bf16": "weights of smaller layers cannot be compared with those of a training without it",
    "fp16_loss_scale": "weights of smaller layers cannot be compared with those of a training without it",
    "nothing_left_after_fit": "smaller layers are what it is for",
    "weight_averaging": "it refuses to be with WeightAveraging, whose copy would keep its size",
}

CASES = {
    "LabelCorruption": Case(
        make=lambda: LabelCorruption(0.5, num_classes=4),
        off=lambda: LabelCorruption(0.0, num_classes=4),
        inapplicable={
            "limited_batches": "wrong labels are drawn for the whole training set, so that exactly the fraction is wrong; "
            "a loader of fewer examples has others"
        },
    ),
    "SplitAccuracies": Case(make=lambda: SplitAccuracies(every_n_epochs=1), data=_DATA, observes=True),
    "InversionDetector": Case(
        make=lambda: InversionDetector(every_n_epochs=1), module=_Validated, data=_DATA, observes=True
    ),
    "PruningCurves": Case(make=PruningCurves, data=_DATA, observes=True),
    "NeuronIPR": Case(make=lambda: NeuronIPR(log_every_n_epochs=1), observes=True),
    "IPRPruning": (
        Case(
            make=lambda: IPRPruning(0.5, at_epoch=1),
            off=lambda: IPRPruning(0.0, at_epoch=1),
            inapplicable=_NO_NEURONS,
        ),
        Case(
            label="masks",
            make=lambda: IPRPruning(0.5, mode="mask", at_epoch=1),
            off=lambda: IPRPruning(0.0, mode="mask"),
            inapplicable=_NO_NEURONS,
        ),
        Case(
            label="removes",
            make=lambda: IPRPruning(0.5, mode="remove"),
            off=lambda: IPRPruning(0.0, mode="remove"),
            inapplicable=_SMALLER,
        ),
    ),
    "CorruptionAccuracy": Case(arguments=lambda: (_random(17, 4), *_labels())),
    "QuadraticMLP": (
        Case(make=lambda: QuadraticMLP(5, width=6), arguments=lambda: (_random(7, 10),)),
        Case(label="batch norm", make=lambda: QuadraticMLP(5, width=6, norm="batch"), arguments=_tokens),
        Case(
            label="layer norm",
            make=lambda: QuadraticMLP(5, width=6, norm="layer", activation="relu"),
            arguments=lambda: (_random(7, 10),),
        ),
    ),
    "TokenTransformer": Case(make=lambda: TokenTransformer(5, d=8, heads=2, layer_norm=True), arguments=_tokens),
    "OneHotMSE": Case(make=OneHotMSE, arguments=lambda: (_random(9, 4), _classes(9, 4, 1))),
    "train_grid": Case(arguments=lambda: (5, (0.6,), (0.2,), 1.0, 0.1, 8, 3)),
    "inverse_participation_ratio": Case(arguments=lambda: (_random(5, 7),)),
    "gini": Case(arguments=lambda: (_random(5, 7).abs(),)),
    "neuron_scores": Case(arguments=lambda: ([_random(5, 7)], [_random(7, 5, seed=1)])),
    "prune_curve": Case(arguments=lambda: (_random(9, 5), _random(4, 5, seed=1), torch.tensor([3, 0, 4, 1, 2]))),
    "split_accuracies": Case(arguments=lambda: (_classes(17, 4, 3), *_labels())),
    "classify_phase": Case(arguments=lambda: (0.8, 1.0, 0.2, 0.25)),
    "inversion_times": Case(arguments=lambda: ([1, 2, 3], [1.0, 1.0, 0.8], [0.1, 1.0, 1.0], 0.2)),
    "modular_addition_solution": Case(arguments=lambda: (5, 8)),
    "modular_multiplication_solution": Case(arguments=lambda: (5, 8)),
}
