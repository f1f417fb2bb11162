# SPDX-License-Identifier: Apache-2.0
"""Scores on disk: safetensors with their provenance, and what tells one training set from another."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from fulgurite.errors import FulguriteError, nearest
from fulgurite.files import write_whole
from fulgurite_plugins.data_selection.data_diet.functional import NeverLearned, average_scores, check_scores

_KEY = "fulgurite.scores"
_TARGETS = "targets"
_PROBES = 256
"""Examples whose labels tell a dataset."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all examples of a training set, and where they come from.

    Args:
        values: `[N]` by name; `"el2n@10"` is EL2N after 10 epochs.
        targets: The labels `[N]` that they were computed with; None if there are none.
        provenance: Plain data: `dataset` (type, size, fingerprint), `model`, `runs` (seed, epochs and steps of each), ...
    """

    values: Mapping[str, Tensor]
    targets: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Return whether names, numbers and provenance are equal."""
        if not isinstance(other, Scores) or self.values.keys() != other.values.keys():
            return False
        pairs = [(self.values[name], other.values[name]) for name in self.values]
        if self.targets is not None and other.targets is not None:
            pairs.append((self.targets, other.targets))
        same = all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)
        return same and (self.targets is None) == (other.targets is None) and self.provenance == other.provenance

    __hash__ = None  # type: ignore[assignment]

    def pick(self, name: str) -> tuple[str, Tensor]:
        """Return the score called `name`, or the only one of that name at any epoch, with its full name.

        Raises:
            FulguriteError: If there is none, or there are several.
        """
        if name in self.values:
            return name, self.values[name]
        found = [key for key in self.values if key.partition("@")[0] == name]
        if len(found) == 1:
            return found[0], self.values[found[0]]
        known = ", ".join(self.values)
        if found:
            raise FulguriteError(f"Expected the name of one score, but {name!r} is one of several: {', '.join(found)}.")
        raise FulguriteError(
            f"Expected the name of a score in the file, which has {known}, but got {name!r}.{nearest(name, self.values)}"
        )


def save_scores(path: Path, scores: Scores) -> None:
    """Write scores as a safetensors file, at once."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in scores.values.items()}
    if scores.targets is not None:
        tensors[_TARGETS] = scores.targets.cpu().contiguous()
    write_whole(path, save(tensors, {_KEY: json.dumps({"version": 1, **scores.provenance})}))


def load_scores(path: Path | str) -> Scores:
    """Read a file of scores.

    Raises:
        FulguriteError: If it is not there, or no file of scores.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FulguriteError(
            f"Expected a file of scores, as ScoreExamples and `fulgurite score` write it, but {path} is none."
        )
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise FulguriteError(
            f"Expected {path} to be a file of scores, as ScoreExamples and `fulgurite score` write it, but it cannot be "
            f"read as one: {type(error).__name__}: {error}."
        ) from error
    targets = tensors.pop(_TARGETS, None)
    return Scores(tensors, targets, provenance)


def average(parts: Sequence[Scores], never_learned: NeverLearned = "inf") -> Scores:
    """Return the mean over runs, of all scores that the parts have.

    Args:
        parts: Scores of single runs, or means of equally many.
        never_learned: See `average_scores`; the number of presentations is that of the file.

    Raises:
        FulguriteError: If they are of different training sets or hold different scores.
    """
    if not parts:
        raise FulguriteError("Expected scores of at least one run, but got none.")
    first = parts[0]
    for part in parts[1:]:
        check_same_data(part, first.provenance["dataset"])
        if set(part.values) != set(first.values):
            raise FulguriteError(
                f"Expected all files to hold the same scores, but one has {', '.join(sorted(first.values))} and another "
                f"{', '.join(sorted(part.values))}."
            )
    presentations = first.provenance.get("presentations", {})
    values = {
        name: average_scores([part.values[name] for part in parts], *_never(name, never_learned, presentations))
        for name in first.values
    }
    runs = [run for part in parts for run in part.provenance.get("runs", [])]
    return Scores(values, first.targets, {**first.provenance, "runs": runs, "never_learned": never_learned})


def _never(name: str, never_learned: NeverLearned, presentations: Mapping[str, int]) -> tuple[NeverLearned, int | None]:
    return (never_learned, presentations[name]) if name in presentations else ("inf", None)


def check_same_data(scores: Scores, dataset: Mapping[str, Any]) -> None:
    """Refuse scores of another training set.

    Raises:
        FulguriteError: With both sizes, or both fingerprints.
    """
    theirs = scores.provenance.get("dataset", {})
    for key in ("size", "fingerprint"):
        if theirs.get(key) != dataset[key]:
            raise FulguriteError(
                f"Expected scores of the training set, whose {key} is {dataset[key]}, but the scores were computed on one "
                f"whose {key} is {theirs.get(key)}: an index would mean another example. Score the data that are trained on."
            )


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """Return type, size and fingerprint of a dataset.

    The fingerprint is a hash of the labels of 256 examples, evenly spaced: what random augmentation does not change.
    Without labels that are single integers it is a hash of whole examples, if reading them twice gives the same.
    """
    n = len(dataset)
    probes = sorted({i * (n - 1) // max(1, min(_PROBES, n) - 1) for i in range(min(_PROBES, n))})
    with isolate_rng():
        contents: list[Any] = [_label(dataset[i]) for i in probes]
        if None in contents:
            first, second = ([_hash(dataset[i]) for i in probes] for _ in range(2))
            contents = first if first == second else []
    digest = hashlib.sha256(json.dumps([n, contents]).encode()).hexdigest()[:16]
    return {"type": type(dataset).__qualname__, "size": n, "fingerprint": digest}


def describe_model(module: nn.Module) -> dict[str, Any]:
    """Return type and number of parameters of a model."""
    return {"type": type(module).__qualname__, "parameters": sum(p.numel() for p in module.parameters())}


def describe_run(epoch: float, steps: int) -> dict[str, Any]:
    """Return what tells a run: the global seed, and when it was scored."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {"seed": None if seed is None else int(seed), "epoch": epoch, "steps": steps}


def versions() -> dict[str, str]:
    """Return the versions of what scores were computed with."""
    return {name: importlib.metadata.version(name) for name in ("fulgurite", "torch")}


def labels_of(dataset: Any, read: bool = False) -> Tensor | None:
    """Return the classes `[N]` of a dataset; None if it does not show them.

    Args:
        dataset: A dataset with attributes `targets` or `labels`, a `TensorDataset`, or a `Subset` of one.
        read: Whether to read all examples if there is no shorter way.
    """
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        found: Any = None if whole is None else whole[torch.as_tensor(dataset.indices)]
    elif isinstance(dataset, TensorDataset):
        found = dataset.tensors[-1]
    else:
        found = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
    if found is not None:
        tensor = torch.as_tensor(found)
        if tensor.ndim == 1 and not tensor.is_floating_point():
            return tensor.long()
    if not read:
        return None
    with isolate_rng():
        labels = [_label(dataset[i]) for i in range(len(dataset))]
    return None if None in labels else torch.tensor(labels)


def _label(item: Any) -> int | None:
    """Return the only single integer in an example; None if there is none, or several."""
    found = [int(leaf) for leaf in _leaves(item) if _is_integer(leaf)]
    return found[0] if len(found) == 1 else None


def _is_integer(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.numel() == 1 and not leaf.is_floating_point()
    return isinstance(leaf, int) or (
        hasattr(leaf, "dtype") and getattr(leaf, "ndim", 1) == 0 and leaf.dtype.kind in "iu"
    )


def _leaves(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return [leaf for value in item.values() for leaf in _leaves(value)]
    if isinstance(item, tuple | list):
        return [leaf for value in item for leaf in _leaves(value)]
    return [item]


def _hash(item: Any) -> str:
    parts = [
        leaf.cpu().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode() for leaf in _leaves(item)
    ]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def as_scores(source: str | Path | Tensor, name: str) -> tuple[str, Tensor, Scores | None]:
    """Return name and values of the scores that a user gave: a file, of which `name` says which, or a tensor `[N]`.

    Raises:
        FulguriteError: If the file has no such scores.
        ValueError: If a score is NaN.
    """
    if isinstance(source, Tensor):
        check_scores(source, "the scores that were given")
        return "scores", source, None
    scores = load_scores(source)
    key, values = scores.pick(name)
    check_scores(values, f"{key} of {source}")
    return key, values, scores
