# SPDX-License-Identifier: Apache-2.0
"""Learning rates at which runs with different output scales begin at the same speed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from fulgurite.errors import RefusedError

Correction = Literal["auto", "sgd", "adaptive", "none"]

POWERS = {"sgd": 2, "adaptive": 1, "none": 0}
r"""The power of $1 / \alpha$: steps of plain gradients change outputs by $\alpha^2$, steps of unit size by $\alpha$."""

_PLAIN = {"SGD", "ASGD"}
_ADAPTIVE = {
    *("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "Adafactor", "RMSprop", "Rprop"),
    *("SparseAdam", "Lion", "Muon", "LAMB", "Lamb", "Sophia", "Prodigy"),
}

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "default_min_lr", "eta_min", "_last_lr")


def kind_of(optimizer: torch.optim.Optimizer, owner: str) -> Correction:
    """Return which correction an optimizer takes.

    Raises:
        RefusedError: If it is not known.
    """
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if names & _ADAPTIVE:
        return "adaptive"
    if names & _PLAIN:
        return "sgd"
    raise RefusedError(
        f"{owner} does not know whether steps of {type(optimizer).__name__} grow with the gradient. Say so by "
        f"`lr_correction`: 'sgd' if they do (lr / alpha**2), 'adaptive' if their size does not depend on it (lr / alpha), "
        f"'none' to leave the learning rate alone."
    )


def scale_rates(
    optimizer: torch.optim.Optimizer, schedulers: Iterable[Any], factor: float, preserve_weight_decay: bool
) -> None:
    """Multiply every learning rate of an optimizer and its schedulers, also those that schedulers keep for later.

    Args:
        optimizer: The optimizer, freshly made.
        schedulers: Schedulers; those of other optimizers are left alone.
        factor: The factor.
        preserve_weight_decay: Whether to divide weight decay by it, so that their product stays as it was.
    """
    for group in optimizer.param_groups:
        for name in _GROUP_RATES:
            if group.get(name) is not None:
                group[name] = _scaled(group[name], factor)
        if preserve_weight_decay and group.get("weight_decay"):
            group["weight_decay"] = group["weight_decay"] / factor
    for scheduler in _nested(schedulers):
        if getattr(scheduler, "optimizer", None) is optimizer:
            for name in _SCHEDULER_RATES:
                if getattr(scheduler, name, None) is not None:
                    setattr(scheduler, name, _scaled(getattr(scheduler, name), factor))


def _scaled(rate: Any, factor: float) -> Any:
    if isinstance(rate, torch.Tensor):
        return rate.mul_(factor)  # capturable optimizers keep the tensor
    return type(rate)(_scaled(r, factor) for r in rate) if isinstance(rate, list | tuple) else rate * factor


def _nested(schedulers: Iterable[Any]) -> Iterable[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _nested(getattr(scheduler, "_schedulers", ()))
