# SPDX-License-Identifier: Apache-2.0
"""What a training does in one update: its learning rates, its momentum, and how its batches are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError


@dataclass(frozen=True)
class Rates:
    r"""The learning rates of an optimizer, as of now.

    Groups with different rates $\eta_g$ are SGD at the largest rate $\eta$ on features that are scaled by
    $\sqrt{\eta_g / \eta}$: so all that is measured is weighted by `ratios`, and the trace is
    $\sum_g \eta_g \mathrm{Tr}_g / \eta$.

    Args:
        lr: The largest learning rate.
        ratios: The rate of each trainable parameter over the largest, by name; 0 for one that no optimizer has.
        momentum: The momentum of the group with the largest rate.
        nesterov: Whether it is Nesterov's.
        weight_decays: The weight decays of all groups.
        optimizers: Class names of the optimizers.
    """

    lr: float
    ratios: Mapping[str, float]
    momentum: float = 0.0
    nesterov: bool = False
    weight_decays: tuple[float, ...] = (0.0,)
    optimizers: tuple[str, ...] = ("SGD",)

    @property
    def covered(self) -> bool:
        """Whether the theory is about these optimizers."""
        return set(self.optimizers) == {"SGD"}

    @property
    def gd_limit(self) -> float:
        r"""The $c$ in gradient descent's limit $\eta \lambda_{\max} \le c$, exact with momentum $\beta$ too.

        It is 2 without, $2 (1 + \beta)$ with heavy-ball momentum and $2 (1 + \beta) / (1 + 2 \beta)$ with Nesterov's.
        """
        plain = 2 * (1 + self.momentum)
        return plain / (1 + 2 * self.momentum) if self.nesterov else plain

    def weight_decay(self, user: str) -> float:
        """Return the one weight decay.

        Raises:
            RefusedError: If groups differ, in their decay or in their rates.
        """
        if len(set(self.weight_decays)) > 1 or set(self.ratios.values()) - {1.0, 0.0}:
            raise RefusedError(
                f"{user}(include_weight_decay=True) needs one weight decay and one learning rate, but the optimizer's "
                f"groups have weight decays {sorted(set(self.weight_decays))}. Leave the option off."
            )
        return self.weight_decays[0]


def read_rates(trainer: pl.Trainer, module: pl.LightningModule, lr: float | None = None) -> Rates:
    """Return the learning rates of a trainer's optimizers as they are now.

    Args:
        trainer: The trainer, in training.
        module: Its module.
        lr: The rate to take for all parameters instead.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rate_of = {p: float(group["lr"] if lr is None else lr) for group in groups for p in group["params"]}
    largest = max(rate_of.values(), default=0.0)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    scale = largest or 1.0
    ratios = {name: (rate_of[p] / scale if largest else 1.0) if p in rate_of else 0.0 for name, p in trained.items()}
    leading: dict[str, Any] = max(groups, key=lambda group: float(group["lr"]), default={})
    return Rates(
        largest,
        ratios,
        float(leading.get("momentum", 0.0)),
        bool(leading.get("nesterov", False)),
        tuple(float(group.get("weight_decay", 0.0)) for group in groups) or (0.0,),
        tuple(type(getattr(optimizer, "optimizer", optimizer)).__name__ for optimizer in trainer.optimizers),
    )


@dataclass(frozen=True)
class Sampling:
    """How the examples of one update are drawn.

    Args:
        batch_size: The global effective batch size.
        examples: The number of training examples.
        replacement: Whether they are drawn with replacement.
    """

    batch_size: int
    examples: int
    replacement: bool


def read_sampling(trainer: pl.Trainer, user: str, batch_size: int | None = None) -> Sampling:
    """Return how a trainer draws the examples of one update, on all ranks and in all accumulated micro-batches.

    Args:
        trainer: The trainer, in training.
        user: Who asks, for messages.
        batch_size: The batch size of an update, if it is not to be found out.

    Raises:
        RefusedError: If the batch size, or the number of examples, cannot be found out.
    """
    loaders = lightning_adapter.present_train_loaders(trainer)
    dataset = getattr(loaders[0], "dataset", None) if len(loaders) == 1 else None
    if dataset is None or not hasattr(dataset, "__len__"):
        raise RefusedError(
            f"{user} needs the number of training examples, which one training DataLoader over a dataset with a length "
            f"tells; the trainer has {len(loaders)} loaders. Use a map-style dataset."
        )
    examples = len(dataset)
    sampler = loaders[0].sampler
    if batch_size is None:
        own = loaders[0].batch_size or getattr(loaders[0].batch_sampler, "batch_size", None)
        if own is None:
            raise RefusedError(
                f"{user} cannot find out the batch size: {type(loaders[0].batch_sampler).__name__} has no "
                f"`batch_size`. Give it to the plugin, over all devices and accumulated batches."
            )
        own = min(own, math.ceil(examples / trainer.world_size))
        batch_size = min(own * trainer.world_size * trainer.accumulate_grad_batches, examples)
    replacement = isinstance(sampler, torch.utils.data.RandomSampler) and sampler.replacement
    if batch_size > examples and not replacement:
        raise RefusedError(
            f"{user}: expected `batch_size` to be at most the {examples} training examples, but got {batch_size}."
        )
    return Sampling(batch_size, examples, replacement)
