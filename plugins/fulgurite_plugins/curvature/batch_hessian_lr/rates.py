# SPDX-License-Identifier: Apache-2.0
"""Learning rates and momenta as optimizers and schedulers keep them, and the metric in which an optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fulgurite.errors import RefusedError

Kind = Literal["sgd", "adam"]

_SGD = {"SGD"}
_ADAM = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta"}
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Keys of a parameter group that are learning rates: the present one, and those that schedulers keep there."""


def optimizer_kind(optimizer: Optimizer) -> Kind | None:
    """Return whether an optimizer divides by a running size of the gradient, as Adam does; None if not known."""
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    return "sgd" if names & _SGD else "adam" if names & _ADAM else None


def multiply_rates(trainer: pl.Trainer, optimizer: Optimizer, factor: float) -> None:
    """Multiply all learning rates of an optimizer, and the base from which its schedulers compute theirs.

    Schedules keep their form: those that compute the rate from a base find it changed, and those that multiply the
    present rate go on from it.
    """
    for group in optimizer.param_groups:
        for key in _RATES:
            if isinstance(group.get(key), Tensor):
                group[key].mul_(factor)
            elif group.get(key) is not None:
                group[key] *= factor
    for config in trainer.lr_scheduler_configs:
        for scheduler in _nested(config.scheduler):
            if scheduler.optimizer is optimizer:
                for name in ("base_lrs", "max_lrs", "min_lrs", "_last_lr"):
                    if hasattr(scheduler, name):
                        setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
                if hasattr(scheduler, "eta_min"):
                    scheduler.eta_min *= factor


def _nested(scheduler: Any) -> list[Any]:
    return [scheduler, *(inner for outer in getattr(scheduler, "_schedulers", ()) for inner in _nested(outer))]


def base_rate(optimizer: Optimizer) -> float:
    """Return the learning rate that schedules of the first group start from, or rise to (`OneCycleLR`)."""
    group = optimizer.param_groups[0]
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def set_momentum(optimizer: Optimizer, momentum: float) -> None:
    """Set the momentum of all groups."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum


def momentum_of(optimizer: Optimizer) -> float:
    """Return the momentum of the first group."""
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def dampening(optimizer: Optimizer) -> float:
    r"""Return $\tau$ of the first group: a gradient enters the momentum at $1 - \tau$; $\beta_1$ for Adam."""
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group.get("dampening", 0.0))


def optimised(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer trains, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


class Metric:
    r"""The metric of an optimizer's step, $w \leftarrow w - \eta\, M g$ with a positive diagonal matrix $M$.

    Its stability depends on the eigenvalues of $M^{1/2} H M^{1/2}$ instead of those of $H$. $M$ has the learning rate
    of each parameter group over that of the first, and for Adam and AdamW the inverse of $\sqrt{\hat v} + \epsilon$.
    Weight decay in the loss adds its coefficient to the diagonal of $H$.

    Args:
        optimizer: The optimizer: SGD, Adam or AdamW.
        weight_decay: Whether weight decay counts.

    Attributes:
        known: Whether $M$ is: not before Adam's first step.
    """

    def __init__(self, optimizer: Optimizer, weight_decay: bool) -> None:
        groups = [(g, [p for p in g["params"] if p.requires_grad]) for g in optimizer.param_groups]
        adam = optimizer_kind(optimizer) == "adam"
        self.known = not adam or any("exp_avg_sq" in optimizer.state[p] for _, members in groups for p in members)
        first = base_rate(optimizer)
        roots, decays = [], []
        for group, members in groups:
            ratio = float(group.get("initial_lr", group["lr"])) / first if first else 1.0
            decay = 0.0 if group.get("decoupled_weight_decay") or not weight_decay else group.get("weight_decay", 0.0)
            for parameter in members:
                scale = _inverse_size(optimizer.state[parameter], group) if adam else parameter.new_ones(())
                roots.append((ratio * scale).sqrt().expand_as(parameter).reshape(-1))
                decays.append(parameter.new_full((), decay).expand_as(parameter).reshape(-1))
        self.root = torch.cat(roots).detach()
        self.decay = torch.cat(decays) if weight_decay else None

    def product(self, matrix: Any) -> Callable[[Tensor], Tensor]:
        r"""Return the multiplication by $M^{1/2} (H + W) M^{1/2}$, with $W$ the weight decay."""

        def multiply(vector: Tensor) -> Tensor:
            inner = self.root * vector
            image = matrix @ inner
            return self.root * (image if self.decay is None else image + self.decay * inner)

        return multiply


def _inverse_size(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return what Adam multiplies the momentum of a parameter by; zero if it has never had a gradient."""
    if "exp_avg_sq" not in state:
        return torch.zeros(())
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    correction = 1.0 - group["betas"][1] ** float(state["step"])
    return 1.0 / ((second / correction).sqrt() + group["eps"])


def chosen_optimizers(trainer: pl.Trainer, index: int | None, user: str) -> Sequence[Optimizer]:
    """Return the optimizer that an index names, or all for None.

    Raises:
        RefusedError: If there is none of that index.
    """
    found: Iterable[Optimizer] = trainer.optimizers
    optimizers = list(found)
    if index is None:
        return optimizers
    if not 0 <= index < len(optimizers):
        raise RefusedError(
            f"{user}: expected `optimizer` to be the index of one of the {len(optimizers)} optimizers of this training, "
            f"but got {index}."
        )
    return [optimizers[index]]
