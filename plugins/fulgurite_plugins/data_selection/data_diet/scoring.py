# SPDX-License-Identifier: Apache-2.0
"""One pass over the training set: the scores of all examples, from the user's own training step, unnoticed by training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from fulgurite import distributed, lightning_adapter
from fulgurite.errors import RefusedError, nearest
from fulgurite.losses import FUNCTIONAL_LOSSES, LossCall
from fulgurite_plugins.data_selection.data_diet import functional
from fulgurite_plugins.data_selection.data_diet.reader import Reader

OF_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "el2n": functional.el2n,
    "l1": functional.l1_error,
    "max_margin": functional.max_margin,
    "sum_margin": functional.sum_margin,
    "error": functional.output_error,
}
"""Scores that follow from outputs and targets alone."""

SCORES = (*OF_OUTPUTS, "grand")
"""All scores that a pass over the training set gives."""

SHARDED = dict.fromkeys(
    ("fsdp", "model_parallel", "deepspeed"),
    "scores come from a copy of the model, and its parameters are sharded there. Score on one device or under DDP; a file "
    "of scores can be pruned by anywhere.",
)


@dataclass(frozen=True)
class Scoring:
    """What is scored, and how.

    Args:
        user: Who scores, for messages.
        names: Names of scores, of `SCORES`.
        dataset: The examples in the order of the training set, without random transforms: a dataset, a DataLoader, or the
            name of an attribute of the datamodule or module that is one; None takes the training set as it is.
        parameters: Of GraNd: `"all"`, `"last_layer"` or patterns of names.
        chunk: Examples per pass of GraNd.
        augmentations: Passes over the data whose mean is taken, for data with random transforms.
        criterion: The name of the criterion, if the training step calls several.
    """

    user: str
    names: tuple[str, ...]
    dataset: Any = None
    parameters: str | Sequence[str] = "all"
    chunk: int | Literal["auto"] = "auto"
    augmentations: int = 1
    criterion: str | None = None


def check_names(user: str, names: Sequence[str], known: Sequence[str] = SCORES) -> None:
    """Raise ValueError unless there are names, all of them known."""
    if not names:
        raise ValueError(f"Expected {user} to be given at least one score of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise ValueError(
                f"Expected the scores of {user} to be among {', '.join(known)}, but got {name!r}.{nearest(str(name), known)}"
            )


@dataclass(frozen=True)
class Measured:
    """The scores `[N]` by name, and the classes `[N]`; None if the targets are no classes."""

    values: Mapping[str, Tensor]
    targets: Tensor | None


def score_examples(
    trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader[Any], scoring: Scoring
) -> Measured:
    """Score every example of the training set with the model as it is now; all ranks get all scores.

    In evaluation mode, outside autocast, on a copy of the module: parameters, gradients, buffers, modes, metrics and all
    random streams stay what they were. Each rank takes its share of the examples; one exchange brings them together.

    Args:
        trainer: The trainer, in its training loop.
        module: Its module.
        loader: The training loader: its dataset, batch size, workers and collate function are used.
        scoring: What is scored.

    Raises:
        RefusedError: If the data have no indices, or the training step does not show outputs and targets.
    """
    source = _source(trainer, module, loader, scoring)
    rank, world = trainer.global_rank, trainer.world_size
    own = torch.arange(rank, size_of(source), world)
    with isolate_rng():
        reader = Reader(trainer, module, scoring.user, scoring.criterion)
        if scoring.dataset is None and scoring.augmentations == 1:
            _warn_if_random(source.dataset, scoring.user)
        passes = [_one_pass(trainer, reader, source, own, scoring) for _ in range(scoring.augmentations)]
    columns = [own.double().unsqueeze(1), torch.stack([p[0] for p in passes]).mean(dim=0), passes[0][1].unsqueeze(1)]
    rows = torch.cat(columns, dim=1)
    n = size_of(source)
    gathered = torch.cat(distributed.gather_rows(rows, capacity=-(-n // world))) if world > 1 else rows
    whole = torch.empty_like(gathered)
    whole[gathered[:, 0].long()] = gathered
    targets = None if bool(whole[:, -1].isnan().any()) else whole[:, -1].long()
    return Measured({name: whole[:, 1 + i].float() for i, name in enumerate(scoring.names)}, targets)


def training_loader(trainer: pl.Trainer, user: str) -> DataLoader[Any]:
    """Return the training loader.

    Raises:
        RefusedError: If there are several, or it has no dataset with a length.
    """
    loaders = lightning_adapter.train_loaders(trainer)
    if len(loaders) != 1:
        raise RefusedError(
            f"{user} scores the examples of one training DataLoader, but the trainer has {len(loaders)}."
        )
    check_loader(loaders[0], user)
    return loaders[0]


def check_loader(loader: Any, user: str) -> None:
    """Refuse a loader whose examples have no index.

    Raises:
        RefusedError: If it is no DataLoader, or its dataset has no length.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        what = f"{type(loader).__name__}{f' over {type(dataset).__name__}' if dataset is not None else ''}"
        raise RefusedError(
            f"{user} gives every training example a score, which needs one DataLoader over a dataset with indices and a "
            f"length, but the training data are a {what}. Use a map-style dataset."
        )


def size_of(loader: DataLoader[Any]) -> int:
    """Return how many examples the dataset of a loader has."""
    return len(loader.dataset)  # type: ignore[arg-type]


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Return the batch size of a loader, also of one with a batch sampler of its own."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 64


def _source(
    trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader[Any], scoring: Scoring
) -> DataLoader[Any]:
    """Return a loader whose dataset is to be scored; of the training loader if no other is given."""
    check_loader(loader, scoring.user)
    given = scoring.dataset
    if isinstance(given, str):
        owners = [owner for owner in (getattr(trainer, "datamodule", None), module) if hasattr(owner, given)]
        if not owners:
            raise RefusedError(
                f"{scoring.user}: expected `dataset` to name an attribute of the datamodule or of the module, but neither "
                f"has {given!r}."
            )
        given = getattr(owners[0], given)
        given = given() if callable(given) and not hasattr(given, "__getitem__") else given
    if given is None:
        return loader
    if not isinstance(given, DataLoader):
        given = DataLoader(given, batch_size_of(loader), collate_fn=loader.collate_fn, num_workers=loader.num_workers)
    check_loader(given, scoring.user)
    sizes = size_of(given), size_of(loader)
    if sizes[0] != sizes[1]:
        raise RefusedError(
            f"{scoring.user}: expected `dataset` to hold the {sizes[1]} training examples, in their order, but it has "
            f"{sizes[0]}."
        )
    return given


def _one_pass(
    trainer: pl.Trainer, reader: Reader, source: DataLoader[Any], own: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Return scores `[n, number of names]` and classes `[n]` (NaN where there are none) of some examples."""
    size = batch_size_of(source)
    full = own[torch.arange(-(-len(own) // size) * size) % max(1, len(own))]  # a collate function may want full batches
    batches: DataLoader[Any] = DataLoader(
        source.dataset,
        size,
        sampler=full.tolist(),
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        worker_init_fn=source.worker_init_fn,
        generator=torch.Generator(),
    )
    scores = [torch.empty(0, len(scoring.names), dtype=torch.float64)]
    targets = [torch.empty(0, dtype=torch.float64)]
    for number, batch in enumerate(batches):
        if batch is None:
            raise RefusedError(
                f"{scoring.user} gives every training example a score, but the collate function made no batch of the "
                f"examples from {int(full[number * size])} on. Leave them out of the dataset."
            )
        call = reader(lightning_adapter.to_device(trainer, batch), number, size, find_network="grand" in scoring.names)
        columns = [_score(name, reader, call, scoring) for name in scoring.names]
        scores.append(torch.stack([column.double() for column in columns], dim=1))
        targets.append(_target_classes(call))
    device = scores[-1].device
    return tuple(torch.cat([p.to(device) for p in parts])[: len(own)].cpu() for parts in (scores, targets))  # type: ignore[return-value]


def _score(name: str, reader: Reader, call: LossCall, scoring: Scoring) -> Tensor:
    if name == "grand":
        return functional.grand(
            reader.network,
            reader.inputs,
            call.targets,
            _own_loss(call, scoring.user),
            scoring.parameters,
            scoring.chunk,
        )
    if name != "error" and call.fn in FUNCTIONAL_LOSSES and call.fn not in (F.cross_entropy, F.nll_loss):
        raise RefusedError(
            f"{scoring.user}: {name!r} is a score of classifiers, but the training step calls {call.name}. Score with "
            f"'error', the length of f - y, or with 'grand'."
        )
    return OF_OUTPUTS[name](call.outputs.detach(), call.targets)


def _own_loss(call: LossCall, user: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the module's own loss, per example."""
    if call.fn not in FUNCTIONAL_LOSSES:
        raise RefusedError(
            f"{user}: 'grand' needs the loss of each example, but the criterion {call.name!r} is no loss of "
            f"torch.nn.functional, which could be asked for it with reduction='none'. Use 'el2n'."
        )
    arguments = {k: v for k, v in call.arguments.items() if k not in ("reduction", "reduce", "size_average")}
    return partial(_per_example, call.fn, arguments)


def _per_example(fn: Callable[..., Tensor], arguments: Mapping[str, Any], outputs: Tensor, targets: Tensor) -> Tensor:
    losses = fn(outputs, targets, **arguments, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)


def _target_classes(call: LossCall) -> Tensor:
    """Return the classes `[B]` as float64; NaN if the targets are values."""
    targets, rows = call.targets, len(call.outputs)
    if not targets.is_floating_point() and targets.ndim == 1:
        return targets.double()
    if targets.is_floating_point() and targets.ndim == 2 and call.fn in (F.cross_entropy, F.nll_loss):
        return targets.argmax(dim=1).double()
    return torch.full((rows,), torch.nan, dtype=torch.float64, device=call.outputs.device)


def _warn_if_random(dataset: Any, user: str) -> None:
    """Warn, once, if an example is another one when it is read again."""
    from fulgurite_plugins.data_selection.data_diet.files import _hash

    probes = range(0, len(dataset), max(1, len(dataset) // 8))
    if any(_hash(dataset[i]) != _hash(dataset[i]) for i in probes):
        warnings.warn(
            f"{user}: the training set gives another input each time that an example is read, so that scores are those of "
            f"augmented inputs. Pass `dataset`, the same examples without random transforms, or average over several "
            f"augmentations with `augmentations`.",
            stacklevel=3,
        )
