# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the datamodules; of CIFAR, from small files of the published format."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fulgurite.testing import Case
from fulgurite_datamodules.cifar import CIFAR10, CIFAR100, PIXELS
from fulgurite_datamodules.mnist1d import MNIST1D
from fulgurite_datamodules.modular_arithmetic import ModularArithmetic
from fulgurite_datamodules.polynomial_regression import PolynomialRegression, TeacherStudent
from fulgurite_datamodules.sparse_parity import SparseParity
from fulgurite_datamodules.synthetic_regression import SingleNeuron, SparseRegression

_RECORDS = 60
"""Images in each file."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with both data sets, of random images, that lasts as long as the process."""
    folder = tempfile.TemporaryDirectory()
    generator = np.random.default_rng(0)
    for kind in (CIFAR10, CIFAR100):
        place = Path(folder.name) / kind.folder
        place.mkdir()
        for name in (*kind.train_files, kind.test_file):
            classes = np.arange(_RECORDS, dtype=np.uint8)[:, None] % kind.num_classes
            coarse = classes[:, : kind.label_bytes - 1] // 5  # CIFAR-100 has a byte for it before the class
            images = generator.integers(0, 256, (_RECORDS, PIXELS), dtype=np.uint8)
            np.concatenate([coarse, classes, images], axis=1).tofile(place / name)
    return folder


def _cifar10(**arguments: Any) -> CIFAR10:
    return CIFAR10(_folder().name, val_size=20, batch_size=16, **arguments)


def _cifar100() -> CIFAR100:
    return CIFAR100(_folder().name, val_size=9, batch_size=16)


def _classes() -> torch.Tensor:
    return torch.randint(0, 5, (23,), generator=torch.Generator().manual_seed(1))


def _flip_labels() -> tuple[Any, ...]:
    return _classes(), 5, 0.4, "symmetric", torch.Generator().manual_seed(2)


def _stratified_order() -> tuple[Any, ...]:
    return _classes(), torch.Generator().manual_seed(2)


CASES = {
    "MNIST1D": Case(make=lambda: MNIST1D(train_size=90, val_size=31, test_size=40)),
    "CIFAR10": (
        Case(make=_cifar10),
        Case(label="noise", make=lambda: _cifar10(label_noise=0.3, augment=False, drop_last=True)),
    ),
    "CIFAR100": Case(make=_cifar100),
    "ModularArithmetic": (
        Case(make=lambda: ModularArithmetic(modulus=7)),
        Case(label="tokens", make=lambda: ModularArithmetic(modulus=7, encoding="tokens", batch_size=4)),
        Case(
            label="noise",
            make=lambda: ModularArithmetic(
                modulus=7, corrupted_fraction=0.3, encoding="binary", batch_size=4, drop_last=True, exclude_zero=True
            ),
        ),
    ),
    "SparseRegression": (
        Case(make=lambda: SparseRegression(dim=5, train_size=8, test_size=6)),
        Case(label="batches", make=lambda: SparseRegression(dim=5, train_size=9, test_size=6, batch_size=2)),
    ),
    "SingleNeuron": Case(make=lambda: SingleNeuron(dim=5, train_size=9, test_size=6, batch_size=2)),
    "PolynomialRegression": (
        Case(make=lambda: PolynomialRegression(dim=5, train_size=8, test_size=6)),
        Case(
            label="noise",
            make=lambda: PolynomialRegression(dim=5, train_size=9, test_size=6, noise_std=0.3, batch_size=2),
        ),
    ),
    "TeacherStudent": Case(make=lambda: TeacherStudent(dim=5, train_size=9, test_size=6, batch_size=2)),
    "SparseParity": (
        Case(make=lambda: SparseParity(relevant=2, noise=6, size=40)),
        Case(label="batches", make=lambda: SparseParity(noise=6, size=41, encoding="signs", batch_size=4)),
    ),
    "flip_labels": Case(arguments=_flip_labels),
    "stratified_order": Case(arguments=_stratified_order),
}
