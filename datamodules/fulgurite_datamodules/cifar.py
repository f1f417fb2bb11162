# SPDX-License-Identifier: Apache-2.0
"""Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images: CIFAR-10 and CIFAR-100 from local files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.errors import FulguriteError
from fulgurite_datamodules.base import ClassificationDataModule, Source
from fulgurite_datamodules.dataset import ArrayDataset, standardize
from fulgurite_datamodules.noise import NoiseKind

PIXELS = 3 * 32 * 32


class _CIFAR(ClassificationDataModule):
    input_shape = (3, 32, 32)

    archive: ClassVar[str]
    folder: ClassVar[str]
    train_files: ClassVar[tuple[str, ...]]
    test_file: ClassVar[str]
    label_bytes: ClassVar[int]

    def __init__(
        self,
        root: str | os.PathLike[str],
        augment: bool = True,
        train_size: int | None = None,
        val_size: int = 5000,
        split_seed: int = 0,
        label_noise: float = 0.0,
        noise_kind: NoiseKind = "symmetric",
        noise_seed: int = 0,
        batch_size: int = 128,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            train_size=train_size,
            val_size=val_size,
            test_size=None,
            split_seed=split_seed,
            label_noise=label_noise,
            noise_kind=noise_kind,
            noise_seed=noise_seed,
            batch_size=batch_size,
            num_workers=num_workers,
            drop_last=drop_last,
        )
        self.root = root
        self.augment = augment

    def read(self) -> Source:
        """Return training and test images as bytes `[N, 3, 32, 32]`, with their classes.

        Raises:
            FulguriteError: If files are missing or not of the published format.
        """
        folder = find_folder(self.root, self.folder, (*self.train_files, self.test_file), self.archive)
        parts = [
            read_records(folder / name, self.label_bytes, self.num_classes)
            for name in (*self.train_files, self.test_file)
        ]
        inputs = torch.from_numpy(np.concatenate([images for images, _ in parts]))
        targets = torch.from_numpy(np.concatenate([labels for _, labels in parts]))
        return Source(inputs, targets, test=torch.arange(len(targets) - len(parts[-1][1]), len(targets)))

    def make_dataset(self, inputs: Tensor, targets: Tensor, train: bool) -> ArrayDataset:
        """Return a dataset that keeps bytes in memory and makes its batches of them."""
        return ArrayDataset(inputs, targets, ImageTransform(self.mean, self.std, self.augment and train))


class CIFAR10(_CIFAR):
    """60000 colour images in 10 classes, inputs `[3, 32, 32]`; by default 45000 train, 5000 validate, 10000 test.

    Reads the published *binary version*, unpacked from `cifar-10-binary.tar.gz`; the test set is the published one. Inputs
    are standardised per channel with mean and standard deviation of the training examples. Attributes after `setup` are
    those of `ClassificationDataModule`.

    Args:
        root: The folder `cifar-10-batches-bin`, or the one that holds it.
        augment: Whether training images are cropped at random from themselves with a black border of 4 pixels, and
            flipped left to right with probability 1/2.
        train_size: Number of training examples, a stratified part of those that validation leaves; None for all.
        val_size: Number of training images kept for validation, stratified; 0 for no validation.
        split_seed: Seed of the split; independent of the seed of training.
        label_noise: Fraction of the training labels that get noise, in [0, 1]; exactly the rounded number is selected. The
            clean labels stay in `train_clean_targets`, the mask of the selected ones in `train_noisy`.
        noise_kind: `"symmetric"`: a class drawn from the others. `"pair"`: the next class. `"uniform"`: a class drawn from
            all, so that some labels stay right. `"permute"`: the selected labels change places, so that some stay right.
        noise_seed: Seed of the noise.
        batch_size: Examples per batch.
        num_workers: Processes that load data; 0 for none.
        drop_last: Whether training leaves out a last batch that is not full.

    Raises:
        ValueError: If an argument is outside its range.
    """

    num_classes = 10
    archive = "cifar-10-binary.tar.gz"
    folder = "cifar-10-batches-bin"
    train_files = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    test_file = "test_batch.bin"
    label_bytes = 1


class CIFAR100(_CIFAR):
    """60000 colour images in 100 classes, inputs `[3, 32, 32]`; by default 45000 train, 5000 validate, 10000 test.

    Reads the published *binary version*, unpacked from `cifar-100-binary.tar.gz`; the test set is the published one, labels
    are the fine ones. Inputs are standardised per channel with mean and standard deviation of the training examples.
    Attributes after `setup` are those of `ClassificationDataModule`.

    Args:
        root: The folder `cifar-100-binary`, or the one that holds it.
        augment: Whether training images are cropped at random from themselves with a black border of 4 pixels, and
            flipped left to right with probability 1/2.
        train_size: Number of training examples, a stratified part of those that validation leaves; None for all.
        val_size: Number of training images kept for validation, stratified; 0 for no validation.
        split_seed: Seed of the split; independent of the seed of training.
        label_noise: Fraction of the training labels that get noise, in [0, 1]; exactly the rounded number is selected. The
            clean labels stay in `train_clean_targets`, the mask of the selected ones in `train_noisy`.
        noise_kind: `"symmetric"`: a class drawn from the others. `"pair"`: the next class. `"uniform"`: a class drawn from
            all, so that some labels stay right. `"permute"`: the selected labels change places, so that some stay right.
        noise_seed: Seed of the noise.
        batch_size: Examples per batch.
        num_workers: Processes that load data; 0 for none.
        drop_last: Whether training leaves out a last batch that is not full.

    Raises:
        ValueError: If an argument is outside its range.
    """

    num_classes = 100
    archive = "cifar-100-binary.tar.gz"
    folder = "cifar-100-binary"
    train_files = ("train.bin",)
    test_file = "test.bin"
    label_bytes = 2


@dataclass(frozen=True)
class ImageTransform:
    """Makes standardised float images of bytes, cropped and flipped at random if `augment`.

    Args:
        mean: Mean per channel `[C]`, of values 0 to 255.
        std: Standard deviation per channel `[C]`.
        augment: Whether to crop and flip, with random numbers of the global generator, which Lightning seeds per worker.
    """

    mean: Tensor
    std: Tensor
    augment: bool

    def __call__(self, images: Tensor) -> Tensor:
        """Map bytes `[B, C, H, W]` to float32 `[B, C, H, W]`."""
        return standardize(random_crop_flip(images) if self.augment else images, self.mean, self.std)


def random_crop_flip(images: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Crop each image at random from itself with a border of zeros, and flip half of them left to right.

    Args:
        images: `[B, C, H, W]`.
        padding: Width of the border, in pixels.
        generator: The source of randomness; None for the global generator.

    Returns:
        Images of the same shape and type.
    """
    batch, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator)
    flipped = torch.rand(batch, generator=generator) < 0.5
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2 padding + 1, 2 padding + 1, H, W], a view
    cropped = windows[torch.arange(batch), :, top, left]
    return torch.where(flipped[:, None, None, None], cropped.flip(3), cropped)


def find_folder(root: str | os.PathLike[str], name: str, files: Sequence[str], archive: str) -> Path:
    """Return `root`, or the folder `name` in it, whichever holds all `files`.

    Raises:
        FulguriteError: If neither does; the message says what was found, and which archive to unpack.
    """
    outer = Path(root).expanduser()
    folders = (outer, outer / name)
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            return folder
    nearest = max(folders, key=lambda folder: sum((folder / file).is_file() for file in files))
    missing = [file for file in files if not (nearest / file).is_file()]
    raise FulguriteError(
        f"Expected `root` to be the folder {name}, or the one that holds it, with the files {', '.join(files)}, but "
        f"{nearest} lacks {', '.join(missing)}. {_content(outer)} Download {archive}, the binary version, and unpack it "
        f"there."
    )


def read_records(path: Path, label_bytes: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of records: label bytes, of which the last is the class, then red, green and blue planes.

    Returns:
        Images as bytes `[n, 3, 32, 32]`, and classes `[n]`, int64.

    Raises:
        FulguriteError: If the size of the file or a label is wrong.
    """
    record = label_bytes + PIXELS
    size = path.stat().st_size
    if size == 0 or size % record:
        raise FulguriteError(
            f"Expected the size of {path} to be a multiple of {record} bytes, the length of a record, but got {size}. The "
            f"file is incomplete or of another data set; unpack the archive again."
        )
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= num_classes:
        where = int(labels.argmax())
        raise FulguriteError(
            f"Expected labels of {path} to be in 0 ... {num_classes - 1}, but got {labels[where]} in record {where}. The "
            f"file is damaged or of another data set; unpack the archive again."
        )
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def _content(folder: Path, most: int = 12) -> str:
    if not folder.is_dir():
        return f"{folder} is {'not a folder' if folder.exists() else 'not there'}."
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most]) or 'nothing'}{more}."
