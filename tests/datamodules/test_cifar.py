# SPDX-License-Identifier: Apache-2.0
"""CIFAR from small files in the published binary format, written here byte by byte."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fulgurite.errors import FulguriteError
from fulgurite_datamodules import CIFAR10, CIFAR100
from fulgurite_datamodules.cifar import random_crop_flip

PER_FILE = 20


def write(path: Path, labels: list[tuple[int, ...]], images: np.ndarray) -> None:
    """Write records: label bytes, 1024 red, 1024 green, 1024 blue, row by row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for label, image in zip(labels, images, strict=True):
            file.write(bytes(label))
            for plane in image:
                for row in plane:
                    file.write(bytes(row.tolist()))


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder with six files of 20 images, two of each class; and all images and labels, in the order of the files."""
    root = tmp_path_factory.mktemp("cifar10")
    images = pixels(6 * PER_FILE)
    labels = np.tile(np.arange(10), 12)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(i * PER_FILE, (i + 1) * PER_FILE)
        write(root / "cifar-10-batches-bin" / f"{name}.bin", [(int(c),) for c in labels[part]], images[part])
    return root, images, labels


def cifar100(root: Path, fine: list[int]) -> np.ndarray:
    """Write a CIFAR-100 folder whose training file has these fine labels; the coarse ones are fine // 5."""
    images = pixels(len(fine) + 4, seed=1)
    write(root / "cifar-100-binary" / "train.bin", [(f // 5, f) for f in fine], images[:-4])
    write(root / "cifar-100-binary" / "test.bin", [(19, 99), (0, 1), (2, 10), (1, 5)], images[-4:])
    return images


def global_states() -> tuple[Any, ...]:
    """The states of the global generators, in a form that compares."""
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


def ready(root: Any, **kwargs: Any) -> CIFAR10:
    data = CIFAR10(root, **{"val_size": 20, "batch_size": 16, **kwargs})
    data.setup()
    return data


def test_every_pixel_and_label_comes_back(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """Catches planes, rows and columns in another order, files in another order, and labels shifted by a record."""
    root, images, labels = cifar10
    data = ready(root)
    for dataset, part in (
        (data.train_dataset, data.train_indices),
        (data.val_dataset, data.val_indices),
        (data.test_dataset, data.test_indices),
    ):
        assert np.array_equal(dataset.inputs.numpy(), images[part])
        assert np.array_equal(dataset.targets.numpy(), labels[part])
    assert data.test_indices.tolist() == list(range(100, 120))
    assert data.train_dataset.targets.dtype == torch.int64


def test_validation_is_a_stratified_part_of_training(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    data = ready(cifar10[0])
    assert sorted([*data.train_indices.tolist(), *data.val_indices.tolist()]) == list(range(100))
    assert torch.equal(data.val_dataset.targets.bincount(), torch.full((10,), 2))
    assert torch.equal(data.train_targets.bincount(), torch.full((10,), 8))
    small = ready(cifar10[0], train_size=30)
    assert torch.equal(small.train_targets.bincount(), torch.full((10,), 3))


def test_the_folder_itself_or_its_parent(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root = cifar10[0]
    inner = ready(str(root / "cifar-10-batches-bin"))
    assert torch.equal(inner.train_dataset.inputs, ready(root).train_dataset.inputs)


def test_items_are_standardised_per_channel_by_the_training_images(
    cifar10: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    root, images, _ = cifar10
    data = ready(root, augment=False)
    train = torch.tensor(images[data.train_indices]).double()
    mean, std = train.mean((0, 2, 3)), train.std((0, 2, 3), correction=0)
    test = torch.tensor(images[data.test_indices]).double()
    expected = ((test - mean[:, None, None]) / std[:, None, None]).float()
    torch.testing.assert_close(torch.cat([x for x, _ in data.test_dataloader()]), expected, atol=1e-5, rtol=0)
    x, _ = data.train_dataset[3]
    assert x.shape == data.input_shape
    assert x.dtype == torch.float32


def slow_crop_flip(images: Tensor, top: Tensor, left: Tensor, flipped: Tensor) -> Tensor:
    """Pixel by pixel."""
    result = torch.zeros_like(images)
    for b in range(len(images)):
        for y in range(images.shape[2]):
            for x in range(images.shape[3]):
                column = images.shape[3] - 1 - x if flipped[b] else x
                row_in, column_in = y + int(top[b]) - 2, column + int(left[b]) - 2
                if 0 <= row_in < images.shape[2] and 0 <= column_in < images.shape[3]:
                    result[b, :, y, x] = images[b, :, row_in, column_in]
    return result


def test_crop_and_flip_equal_a_loop_over_pixels() -> None:
    images = torch.randint(1, 256, (12, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    top, left = torch.randint(0, 5, (2, 12), generator=draws)
    flipped = torch.rand(12, generator=draws) < 0.5
    assert 0 < int(flipped.sum()) < 12
    fast = random_crop_flip(images, padding=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fast, slow_crop_flip(images, top, left, flipped))


def test_crops_reach_every_offset_and_half_are_flipped() -> None:
    """Catches a border that is never, or always, in the picture; examples of a batch that share one crop."""
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(6000, 1, 5, 5)
    seen = random_crop_flip(image, padding=1, generator=torch.Generator().manual_seed(0)).flatten(1)
    kinds, counts = seen.unique(dim=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    assert (counts.double() / 6000 - 1 / 18).abs().max() < 5 * (1 / 18 / 6000) ** 0.5


def test_only_training_is_augmented_anew_each_epoch_and_from_the_global_seed(
    cifar10: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    data = ready(cifar10[0])
    test = [torch.cat([x for x, _ in data.test_dataloader()]) for _ in range(2)]
    assert torch.equal(*test)
    torch.manual_seed(0)
    first = data.train_dataset.__getitems__(range(8)).inputs
    second = data.train_dataset.__getitems__(range(8)).inputs
    torch.manual_seed(0)
    assert torch.equal(first, data.train_dataset.__getitems__(range(8)).inputs)
    assert not torch.equal(first, second)
    plain = ready(cifar10[0], augment=False).train_dataset
    assert torch.equal(plain.__getitems__(range(8)).inputs, plain.__getitems__(range(8)).inputs)


def test_workers_augment_differently_and_repeatably(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """Workers that share a random state would give their batches the same crops."""
    data = ready(cifar10[0], num_workers=2, val_size=0)
    data.train_dataset.inputs[:] = data.train_dataset.inputs[:1].clone()  # equal images: only the crops differ

    def epoch(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [x for x, _ in data.train_dataloader()]

    batches = epoch(0)
    assert not torch.equal(batches[0], batches[1])
    assert all(torch.equal(a, b) for a, b in zip(batches, epoch(0), strict=True))
    assert not torch.equal(batches[0], epoch(1)[0])


def test_label_noise_and_global_generators(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, _, labels = cifar10
    before = global_states()
    data = ready(root, label_noise=0.25)
    assert global_states() == before
    assert int(data.train_noisy.sum()) == 20
    assert torch.equal(data.train_targets != data.train_clean_targets, data.train_noisy)
    assert np.array_equal(data.train_clean_targets.numpy(), labels[data.train_indices])


def test_it_pickles_and_its_loader_runs(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    data = pickle.loads(pickle.dumps(ready(cifar10[0])))
    assert [x.shape for x, _ in data.train_dataloader()] == [(16, 3, 32, 32)] * 5
    assert all(bool(x.isfinite().all()) for x, _ in data.train_dataloader())


def test_cifar100_has_the_fine_labels(tmp_path: Path) -> None:
    """The coarse label comes first in a record; reading it instead, or shifting pixels by a byte, must show."""
    fine = [0, 7, 33, 99, 7, 50]
    images = cifar100(tmp_path, fine)
    data = CIFAR100(tmp_path, val_size=2)
    data.setup()
    order = torch.cat([data.train_indices, data.val_indices])
    assert torch.equal(torch.cat([data.train_targets, data.val_dataset.targets]), torch.tensor(fine)[order])
    assert np.array_equal(data.train_dataset.inputs.numpy(), images[data.train_indices])
    assert data.test_dataset.targets.tolist() == [99, 1, 10, 5]
    assert np.array_equal(data.test_dataset.inputs.numpy(), images[-4:])
    assert (data.num_classes, data.input_shape) == (100, (3, 32, 32))


@pytest.mark.parametrize(
    ("make", "archive", "file"),
    [(CIFAR10, "cifar-10-binary.tar.gz", "data_batch_1.bin"), (CIFAR100, "cifar-100-binary.tar.gz", "train.bin")],
)
def test_missing_files_say_what_to_download_and_what_was_found(
    make: Any, archive: str, file: str, tmp_path: Path
) -> None:
    with pytest.raises(FulguriteError) as nothing:
        make(tmp_path / "nowhere").setup()
    assert "nowhere is not there" in str(nothing.value)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / archive).touch()
    with pytest.raises(FulguriteError) as other:
        make(tmp_path).setup()
    message = str(other.value)
    assert f"holds cifar-10-batches-py/, {archive}." in message
    assert f"Download {archive}, the binary version, and unpack it" in message
    assert f"lacks {file}" in message


def test_one_missing_file_is_named_alone(tmp_path: Path) -> None:
    for i in (1, 2, 4, 5):
        write(tmp_path / "cifar-10-batches-bin" / f"data_batch_{i}.bin", [(0,)], pixels(1))
    write(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", [(0,)], pixels(1))
    with pytest.raises(FulguriteError, match=r"cifar-10-batches-bin lacks data_batch_3\.bin\. "):
        CIFAR10(tmp_path).setup()


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b""])
def test_a_file_of_the_wrong_size_is_refused(change: Any, tmp_path: Path) -> None:
    """An interrupted download; an empty file."""
    cifar100(tmp_path, [1, 2, 3])
    path = tmp_path / "cifar-100-binary" / "train.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FulguriteError, match=r"train\.bin to be a multiple of 3074 bytes, .* but got \d+\. "):
        CIFAR100(tmp_path).setup()


def test_a_label_outside_the_classes_is_refused_with_its_record(tmp_path: Path) -> None:
    cifar100(tmp_path, [1, 2, 100, 3])
    with pytest.raises(FulguriteError, match=r"train\.bin to be in 0 \.\.\. 99, but got 100 in record 2\. "):
        CIFAR100(tmp_path).setup()


def test_sizes_that_the_files_cannot_give_are_refused(cifar10: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(
        ValueError, match="`train_size` of CIFAR10 to be at most 80, which is what 20 validation and 20"
    ):
        ready(cifar10[0], train_size=81)
    with pytest.raises(ValueError, match="of its 120, but got val_size=5000 and 20 for the test"):
        CIFAR10(cifar10[0]).setup()
