# SPDX-License-Identifier: Apache-2.0
"""What PS-KD costs: time per training step, memory, and its memory update beside the slow natural way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fulgurite.bench import (
    Bench,
    Block,
    Callbacks,
    Case,
    Target,
    Training,
    batches,
    calls,
    convolutional,
    device,
    perceptron,
    trainers,
    training_memory,
)
from fulgurite.samples import SampleMemory
from fulgurite_plugins.distillation.ps_kd.functional import refine_targets
from fulgurite_plugins.distillation.ps_kd.intervention import PSKD

_N = 20_000
_BATCH = 128
_ALONE = "trainer alone"
_VARIANTS: dict[str, Callbacks] = {
    _ALONE: lambda: (),
    "trainer alone, once more": lambda: (),  # tells how far two equal trainings are apart
    "PSKD()": lambda: (PSKD(),),
    "PSKD(dtype='float16')": lambda: (PSKD(dtype="float16"),),
    "PSKD(teacher='snapshot')": lambda: (PSKD(teacher="snapshot"),),
}


def _training(classes: int) -> Training:
    """A perceptron of a million parameters; timing begins in the second epoch, from which on targets are refined."""
    return Training(functools.partial(perceptron, classes), batches(_N, 784, classes, _BATCH))


def _steps(classes: int) -> Mapping[str, Block]:
    return trainers(_training(classes), _VARIANTS)


def _convolutional_steps() -> Mapping[str, Block]:
    training = Training(functools.partial(convolutional, 100), batches(5 * _BATCH, 768, 100, _BATCH), steps=2)
    return trainers(training, _VARIANTS)


def _memory(classes: int) -> Mapping[str, Block]:
    return training_memory(_training(classes), _VARIANTS)


def _memory_update(classes: int) -> Mapping[str, Block]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(_N, generator=generator)[:_BATCH]
    targets = torch.randint(0, classes, (_BATCH,), generator=generator).to(device())
    predictions = torch.randn(_BATCH, classes, generator=generator).softmax(dim=1).to(device())
    return calls(
        {
            "SampleMemory": _vectorised(indices, targets, predictions),
            "eye[targets] and a loop over rows": _row_by_row(indices, targets, predictions),
        }
    )


def _vectorised(indices: Tensor, targets: Tensor, predictions: Tensor) -> Callable[[], Tensor]:
    memory = SampleMemory(_N, tuple(predictions.shape[1:]), device=predictions.device)
    memory.write(torch.arange(_N), predictions[torch.arange(_N) % _BATCH])  # as after the first epoch
    memory.exchange()
    on_device = indices.to(predictions.device)

    def update() -> Tensor:
        past, _ = memory.read(indices, on_device)
        refined = refine_targets(targets, past, 0.5)
        memory.write(indices, predictions, on_device)
        return refined

    return update


def _row_by_row(indices: Tensor, targets: Tensor, predictions: Tensor) -> Callable[[], Tensor]:
    memory = torch.zeros(_N, predictions.shape[1])

    def update() -> Tensor:
        one_hot = torch.eye(predictions.shape[1])[targets.cpu()]
        refined = (0.5 * one_hot + 0.5 * memory[indices]).to(predictions.device)
        rows = predictions.cpu()
        for row, index in enumerate(indices):
            memory[index] = rows[row]
        return refined

    return update


def _one_array(classes: int, dtype: torch.dtype) -> float:
    """Bytes of one [N, C] array, and as much again as a flag per example and some scalars may take."""
    return _N * classes * dtype.itemsize + 2 * _N


BENCH = Bench(
    cases=(
        *(
            Case(
                name=f"One training step of a perceptron of a million parameters (batch {_BATCH}, {classes} classes)",
                blocks=functools.partial(_steps, classes),
                reference=_ALONE,
                targets=(
                    Target("PSKD()", "ratio", at_most=1.05),
                    Target("PSKD(dtype='float16')", "ratio", at_most=1.05),
                ),
            )
            for classes in (10, 100)
        ),
        Case(
            name=f"One training step of a convolutional network of a million parameters (batch {_BATCH}, 100 classes)",
            blocks=_convolutional_steps,
            reference=_ALONE,
            targets=(
                Target("PSKD()", "ratio", at_most=1.05),
                Target("PSKD(dtype='float16')", "ratio", at_most=1.05),
            ),
            rounds=20,
        ),
        Case(
            name=f"Targets refined and memory updated (batch {_BATCH}, 100 classes)",
            blocks=functools.partial(_memory_update, 100),
            reference="SampleMemory",
            targets=(Target("eye[targets] and a loop over rows", "ratio", at_least=10.0),),
        ),
        Case(
            name=f"All tensors alive when training ends ({_N:,} examples, 100 classes)",
            blocks=functools.partial(_memory, 100),
            reference=_ALONE,
            targets=(
                Target("PSKD()", "difference", at_most=_one_array(100, torch.float32)),
                Target("PSKD(dtype='float16')", "difference", at_most=_one_array(100, torch.float16)),
            ),
            unit="bytes",
            rounds=1,
        ),
    )
)
