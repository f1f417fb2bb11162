# SPDX-License-Identifier: Apache-2.0
"""What scoring costs beside a plain forward pass, and what counting and pruning cost in a training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from fulgurite.bench import (
    Bench,
    Block,
    Callbacks,
    Case,
    Classifier,
    Target,
    Training,
    batches,
    calls,
    convolutional,
    device,
    perceptron,
    trainers,
)
from fulgurite_plugins.data_selection.data_diet.bench_gradients import GRADIENT_CASES
from fulgurite_plugins.data_selection.data_diet.forgetting import ForgettingEvents
from fulgurite_plugins.data_selection.data_diet.intervention import PruneTrainingSet
from fulgurite_plugins.data_selection.data_diet.scoring import Scoring, score_examples

_BATCH, _CLASSES = 128, 10
_ALONE, _FORWARD = "trainer alone", "forward pass"
_VARIANTS: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "trainer alone, once more": lambda: (),  # tells how far two equal trainings are apart
    "ForgettingEvents()": lambda: (ForgettingEvents(),),
    "PruneTrainingSet(strategy='random')": lambda: (PruneTrainingSet(strategy="random"),),
}


def _perceptron() -> Classifier:
    return perceptron(_CLASSES)


def _conv_net() -> Classifier:
    """A convolutional network of 400 000 parameters."""
    return convolutional(_CLASSES, channels=(64, 128, 256))


def _steps() -> Mapping[str, Block]:
    return trainers(Training(_perceptron, batches(20_000, 784, _CLASSES, _BATCH)), _VARIANTS)


def _scoring(make: Callable[[], Classifier], features: int, examples: int) -> Mapping[str, Block]:
    """Return a pass over the data by hand, and by `score_examples` in a trainer that has begun to fit."""
    loader = batches(examples, features, _CLASSES, _BATCH)()
    module = make()
    trainer = pl.Trainer(
        max_steps=1,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    module.to(device())  # where Lightning had it during the fit

    def forward() -> None:
        module.eval()
        with torch.no_grad():
            for inputs, _ in _in_order(loader):
                module.network(inputs.to(device()))
        module.train()

    def el2n() -> None:
        score_examples(trainer, module, loader, Scoring("bench", ("el2n",)))

    return calls({_FORWARD: forward, "EL2N of ScoreExamples": el2n})


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    return DataLoader(loader.dataset, _BATCH, collate_fn=loader.collate_fn)


_NO_DEARER = (Target("EL2N of ScoreExamples", "ratio", at_most=1.25),)

BENCH = Bench(
    cases=(
        Case(
            name="EL2N of 10,000 examples beside a forward pass over them (perceptron of a million parameters)",
            blocks=functools.partial(_scoring, _perceptron, 784, 10_000),
            reference=_FORWARD,
            targets=_NO_DEARER,
            rounds=30,
        ),
        Case(
            name="EL2N of 640 examples beside a forward pass over them (convolutional network of 400 000 parameters)",
            blocks=functools.partial(_scoring, _conv_net, 768, 640),
            reference=_FORWARD,
            targets=_NO_DEARER,
            rounds=20,
        ),
        Case(
            name=f"One training step of a perceptron of a million parameters (batch {_BATCH}, {_CLASSES} classes)",
            blocks=_steps,
            reference=_ALONE,
            targets=(
                Target("ForgettingEvents()", "ratio", at_most=1.05),
                Target("PruneTrainingSet(strategy='random')", "ratio", at_most=1.05),
            ),
        ),
        *GRADIENT_CASES,
    )
)
