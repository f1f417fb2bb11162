# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the components."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.testing import Case
from fulgurite.testing.lab import BATCH, small_data
from fulgurite_plugins.bilevel.self_tuning_networks import layers
from fulgurite_plugins.bilevel.self_tuning_networks.course import Course
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.intervention import SelfTuning
from fulgurite_plugins.bilevel.self_tuning_networks.replay import JitterSchedule, ReplaySchedule, SinusoidSchedule
from fulgurite_plugins.bilevel.self_tuning_networks.targets import GaussianNoise, WeightDecay

_NOISE = "each rank and each micro-batch draws perturbations and noise of its own, by design"
_DRAWN_FOR_EACH = {
    "accumulation": _NOISE,
    "short_last_window": _NOISE,
    "two_ranks_equal_one": _NOISE,
}
_LISTS = {"dict_batches": "the held-out loader of the case gives lists, as no trainer would be given beside dicts"}


def held_out() -> DataLoader[Any]:
    """Return held-out batches like the kit's training batches."""
    return DataLoader(small_data(32, seed=3), BATCH)


def held_out_at_once() -> DataLoader[Any]:
    """Return all held-out examples in one batch, so that any number of ranks sees the same."""
    return DataLoader(small_data(32, seed=3), 32)


def _noise() -> list[Hyper]:
    return [Hyper("noise", GaussianNoise(), init=0.1, range=(0.0, 1.0))]


def _decay() -> list[Hyper]:
    return [Hyper("decay", WeightDecay("network.*"), init=0.01, range=(0.0, 0.1), scale=1e-6)]


def _tuner(hyperparameters: list[Hyper], **arguments: Any) -> SelfTuning:
    held = {"holdout": f"{__name__}:held_out", "warmup_epochs": 0.3, "lr": 0.02, "scale_lr": 0.02}
    return SelfTuning(hyperparameters, **{**held, **arguments})


@functools.cache
def _schedule() -> str:
    """Return the path of a schedule file, which lies in a folder of its own for as long as the process runs."""
    path = Path(_folder().name) / "schedule.json"
    course = Course(["noise"])
    for update, value in ((0, 0.1), (3, 0.3), (7, 0.2)):
        course.append(update, [value], [0.5])
    course.write(path, [hyper.as_dict() for hyper in _noise()])
    return str(path)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _inputs(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)),)


def _layer(make: Any, *shape: int) -> Case:
    return Case(make=make, arguments=functools.partial(_inputs, *shape))


def _indices() -> tuple[Tensor]:
    return (torch.arange(6).view(3, 2),)


def _perturbed() -> tuple[Any, ...]:
    return torch.tensor([0.1, -0.2]), torch.tensor([0.5, 0.3]), 4, None, torch.Generator().manual_seed(0)


def _regression() -> tuple[Any, ...]:
    (X,) = _inputs(12, 3)
    return X, X.sum(dim=1), 0.5


CASES = {
    "SelfTuning": (
        Case(label="noise", make=lambda: _tuner(_noise()), inapplicable={**_DRAWN_FOR_EACH, **_LISTS}),
        Case(
            label="weight decay",
            make=lambda: _tuner(_decay(), tune_scales=False, holdout=f"{__name__}:held_out_at_once"),
            inapplicable=_LISTS,
        ),
        Case(
            label="held out of the training set",
            make=lambda: _tuner(_noise(), holdout=0.4),
            inapplicable={
                **_DRAWN_FOR_EACH,
                "odd_batches": "batches of 43 are more than the examples that can be held out of 44",
                "limited_batches": "which examples are held out depends on how many the training set has",
            },
        ),
    ),
    "ReplaySchedule": Case(make=lambda: ReplaySchedule(_schedule()), inapplicable=_DRAWN_FOR_EACH),
    "JitterSchedule": Case(make=lambda: JitterSchedule(_noise()), inapplicable=_DRAWN_FOR_EACH),
    "SinusoidSchedule": Case(make=lambda: SinusoidSchedule(_decay(), amplitude=0.005, period=8)),
    "HyperLinear": _layer(lambda: layers.HyperLinear(4, 3, num_hyper=2), 5, 4),
    "HyperConv1d": _layer(lambda: layers.HyperConv1d(2, 3, 3, num_hyper=2), 3, 2, 6),
    "HyperConv2d": _layer(lambda: layers.HyperConv2d(2, 3, 3, num_hyper=2), 3, 2, 5, 5),
    "HyperConv3d": _layer(lambda: layers.HyperConv3d(1, 2, 2, num_hyper=2), 3, 1, 3, 3, 3),
    "HyperLSTMCell": _layer(lambda: layers.HyperLSTMCell(4, 3, num_hyper=2), 5, 4),
    "HyperGRUCell": _layer(lambda: layers.HyperGRUCell(4, 3, num_hyper=2), 5, 4),
    "HyperEmbedding": Case(make=lambda: layers.HyperEmbedding(8, 3, num_hyper=2), arguments=_indices),
    "perturb": Case(
        arguments=_perturbed,
        inapplicable={"gradient": "each call draws the next numbers of its generator"},
    ),
    "gaussian_entropy": Case(arguments=lambda: (torch.tensor([0.5, 2.0]),)),
    "ridge_gate": Case(
        arguments=_regression,
        inapplicable={"half_precision": "torch has no singular value decomposition in half precision"},
    ),
}
