# SPDX-License-Identifier: Apache-2.0
"""M-FAC as an optimizer (Frantar, Kurtic, Alistarh, 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fulgurite.errors import FulguriteError, check_argument, check_choice, is_number
from fulgurite_plugins.curvature.m_fac.columns import Columns, local
from fulgurite_plugins.curvature.m_fac.functional import check_damping
from fulgurite_plugins.curvature.m_fac.preconditioner import Preconditioner


class MFAC(Optimizer):
    r"""SGD on gradients multiplied by the inverse of the damped empirical Fisher of the last `num_grads` of them.

    With $F = \lambda I + \frac{1}{m} \sum_j g_j g_j^T$ over a sliding window that the newest gradient $g$ is part of,
    a step is $u = F^{-1} g$, $v \leftarrow \beta v + (1 - \beta) u$, $\theta \leftarrow \theta - \eta v$. The window
    is zero at first, with the divisor $m$ fixed, so that the first step is $u = g / (\lambda + |g|^2 / m)$. It costs
    two passes over the window, and the factorisation of an `[m, m]` matrix; a large window's factor is updated instead.

    A gradient that is not finite is not taken in, and its step changes nothing. Parameters without a gradient stay as
    they are; they count as zeros in the window.

    Args:
        params: Parameters, or groups of them with `lr`, `momentum` and `weight_decay` of their own.
        lr: Learning rate $\eta$, 0 or more.
        momentum: $\beta$ in [0, 1), of the preconditioned direction; there is no bias correction.
        weight_decay: L2 penalty, 0 or more, added to the gradient before it enters the window.
        num_grads: Gradients in the window $m$. Each is a copy of all parameters.
        damping: $\lambda$, positive. The smaller `num_grads`, the larger it has to be.
        sparse: Whether to freeze the coordinates that are exactly zero when the optimizer is built, and leave them
            out of the window.
        storage_dtype: Precision of the stored gradients: `"float32"`, `"float64"`, or `"bfloat16"` for half the memory.
        storage_device: Where the window lies, and products with it are computed; None for the device of the parameters.
        shard: Whether each rank holds only its part of the columns (one `all_reduce` of $m + 1$ numbers and one
            `all_gather` of the direction per step). `"local"` says that the parameters of this process are already
            its own part of the model, as under FSDP; parameters that are DTensors are treated so by themselves.
        per_group: Whether each group has a window of its own; else all share one.
        checkpoint_window: Whether the window is saved; else a resumed training begins with an empty one.
        nonfinite: What to do with a gradient that is not finite: `"skip"` it, or `"raise"` an error that names the
            parameter, which makes every step wait for the device.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = MFAC([weight], lr=1.0, num_grads=1, damping=25.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.detach()  # less g / (damping + |g|^2)
        tensor([2.9400, 3.9200])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        num_grads: int = 512,
        damping: float = 1e-5,
        sparse: bool = False,
        storage_dtype: torch.dtype | str = "float32",
        storage_device: torch.device | str | None = None,
        shard: bool | Literal["local"] = False,
        per_group: bool = False,
        checkpoint_window: bool = True,
        nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        check_argument(isinstance(num_grads, int) and num_grads >= 1, "num_grads", "MFAC", "at least 1", num_grads)
        check_damping(damping, "MFAC")
        name = str(storage_dtype).removeprefix("torch.")
        check_choice(name, ("float32", "float64", "bfloat16"), "storage_dtype", "MFAC")
        check_choice(shard, (False, True, "local"), "shard", "MFAC")
        check_choice(nonfinite, ("skip", "raise"), "nonfinite", "MFAC")
        self.num_grads = num_grads
        self.damping = damping
        self.sparse = sparse
        self.storage_dtype = name
        self.storage_device = storage_device
        self.shard = shard
        self.per_group = per_group
        self.checkpoint_window = checkpoint_window
        self.nonfinite = nonfinite
        self.preconditioners: list[Preconditioner] = []
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @property
    def skipped(self) -> int:
        """Steps that were skipped because a gradient was not finite, in all windows together; waits for the device."""
        return sum(int(preconditioner.skipped) for preconditioner in self.preconditioners)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the shared window grows by columns of zeros.

        Args:
            param_group: The parameters under `params`, and options of their own.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, fits, expected in (
            ("lr", isinstance(group["lr"], Tensor) or (is_number(group["lr"]) and group["lr"] >= 0), "0 or more"),
            ("momentum", is_number(group["momentum"]) and 0 <= group["momentum"] < 1, "in [0, 1)"),
            ("weight_decay", is_number(group["weight_decay"]) and group["weight_decay"] >= 0, "0 or more"),
        ):
            check_argument(fits, name, "MFAC", expected, group[name])
        if self.per_group or not self.preconditioners:
            distributed = any(isinstance(parameter, DTensor) for parameter in group["params"])
            summed = self.shard is not False or distributed
            columns = Columns(self.shard is True and not distributed, self.sparse)
            device = None if self.storage_device is None else torch.device(self.storage_device)
            dtype = getattr(torch, self.storage_dtype)
            self.preconditioners.append(Preconditioner(columns, self.num_grads, dtype, device, summed))
        self.preconditioners[-1].columns.append(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step, and return the loss of the closure.

        Args:
            closure: Computes the loss and the gradients anew; None if they are there already.

        Raises:
            FulguriteError: If a gradient is not finite and `nonfinite="raise"`.
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.per_group:
            for preconditioner, group in zip(self.preconditioners, self.param_groups, strict=True):
                self._update(preconditioner, [group])
        else:
            self._update(self.preconditioners[0], self.param_groups)
        return loss

    def _update(self, preconditioner: Preconditioner, groups: list[dict[str, Any]]) -> None:
        gradients: list[Tensor | None] = []
        for group in groups:
            gradients += _decayed(group)
        if all(gradient is None for gradient in gradients):
            return
        if self.nonfinite == "raise":
            self._check_finite(groups)
        direction, finite = preconditioner.step(preconditioner.columns.gather(gradients), self.damping)
        directions = preconditioner.columns.scatter(torch.where(finite, direction, 0.0))
        for group in groups:
            own, directions = directions[: len(group["params"])], directions[len(group["params"]) :]
            moved = [(p, u) for p, u in zip(group["params"], own, strict=True) if p.grad is not None]
            if moved:
                parameters, updates = (list(each) for each in zip(*moved, strict=True))
                self._move(group, parameters, updates, finite)

    def _move(self, group: dict[str, Any], parameters: list[Tensor], updates: list[Tensor], finite: Tensor) -> None:
        """Average the directions over time, and step."""
        places = [local(parameter) for parameter in parameters]
        updates = [update.to(place.dtype) for update, place in zip(updates, places, strict=True)]
        accept = finite.squeeze(0).to(places[0].dtype)
        if group["momentum"]:
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            averages = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
            change = torch._foreach_sub(updates, averages)
            torch._foreach_mul_(change, accept * (1 - group["momentum"]))
            torch._foreach_add_(averages, change)
            updates = averages
        torch._foreach_sub_(places, torch._foreach_mul(updates, accept * group["lr"]))

    def _check_finite(self, groups: list[dict[str, Any]]) -> None:
        for number, group in enumerate(groups):
            names = group.get("param_names", [f"number {i} of group {number}" for i in range(len(group["params"]))])
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
                    raise FulguriteError(
                        f"MFAC: the gradient of parameter {name} (shape {list(parameter.shape)}) is not finite. Lower the "
                        f"learning rate or clip gradients; with nonfinite='skip' such steps are left out."
                    )

    def state_dict(self) -> dict[str, Any]:
        """Return the state; with `shard=True` all ranks call this, and each gets the whole window."""
        state = super().state_dict()
        state["windows"] = [p.state_dict() for p in self.preconditioners] if self.checkpoint_window else None
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state_dict: What `state_dict` returned; without windows they begin anew, with a warning.

        Raises:
            ValueError: If the window was saved with another `num_grads`, or for other parameters.
        """
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "windows"})
        windows = state_dict.get("windows")
        if windows is None:
            warnings.warn(
                "MFAC: the checkpoint has no window of gradients (checkpoint_window=False, or a sharded checkpoint, which "
                "keeps none): the training goes on with an empty one, and its first steps differ from an uninterrupted run.",
                stacklevel=2,
            )
            return
        if len(windows) != len(self.preconditioners):
            raise ValueError(
                f"Expected a checkpoint of MFAC with {len(self.preconditioners)} windows, but got one with {len(windows)}. "
                f"Build the optimizer with the `per_group` that it was saved with."
            )
        for preconditioner, state in zip(self.preconditioners, windows, strict=True):
            preconditioner.load_state_dict(state, local(preconditioner.columns.parameters[0]).device)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything for a copy: torch's own optimizers keep nothing beside their state and groups."""
        own = {key: value for key, value in self.__dict__.items() if not key.startswith("_")}
        return {**own, **super().__getstate__()}


def _decayed(group: dict[str, Any]) -> list[Tensor | None]:
    """Return the gradients of a group with weight decay added, each where its parameter has one."""
    found: list[Tensor | None] = [parameter.grad for parameter in group["params"]]
    if any(gradient is not None and gradient.is_sparse for gradient in found):
        raise RuntimeError("MFAC does not support sparse gradients. Use dense ones (nn.Embedding(sparse=False)).")
    present = [parameter for parameter in group["params"] if parameter.grad is not None]
    if group["weight_decay"] and present:
        gradients = [local(parameter.grad) for parameter in present]
        decayed = iter(torch._foreach_add(gradients, [local(p) for p in present], alpha=group["weight_decay"]))
        return [None if parameter.grad is None else next(decayed) for parameter in group["params"]]
    return found
