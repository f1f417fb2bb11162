# SPDX-License-Identifier: Apache-2.0
"""Perpendicular gradients around any optimizer, for training without a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from fulgurite.errors import check_argument
from fulgurite_plugins.grokking.grokking_stability.projection import Scope, check_projection, perp_grad_


class PerpGradOptimizer(Optimizer):
    """An optimizer whose steps begin with `perp_grad_`; everything else is that of the optimizer that it wraps.

    `param_groups`, `state` and `defaults` are those of `base`, not copies: learning-rate schedules, checkpoints and
    `GradScaler` work on either. Gradients must be complete when `step` is called: reduced, accumulated, unscaled. With a
    closure, they are projected each time that it has been called.

    Args:
        base: The optimizer.
        rescale: Whether gradients keep their length.
        scope: `"tensor"`, `"row"` or `"global"`; see `perp_grad_`.
        skip_scalars: Whether to leave parameters of one entry alone.
        eps: Added to the squared norm of the weights.
        exclude: Parameters to leave alone.

    Raises:
        ValueError: If `base` is no optimizer, or an argument is outside its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = PerpGradOptimizer(torch.optim.SGD([w], lr=0.1))
        >>> w[0].backward()
        >>> optimizer.step()
        >>> w  # moved at a right angle
        Parameter containing:
        tensor([2.9200, 4.0600], requires_grad=True)
    """

    def __init__(
        self,
        base: Optimizer,
        rescale: bool = True,
        scope: Scope = "tensor",
        skip_scalars: bool = True,
        eps: float = 1e-30,
        exclude: list[torch.Tensor] | None = None,
    ) -> None:
        check_argument(isinstance(base, Optimizer), "base", "PerpGradOptimizer", "an optimizer of torch", base)
        check_projection(scope, eps, "PerpGradOptimizer")
        self.base = base
        self.rescale = rescale
        self.scope: Scope = scope
        self.skip_scalars = skip_scalars
        self.eps = eps
        self.exclude = frozenset(exclude or ())
        self.__setstate__({})  # what torch's own __init__ makes beside groups, state and defaults: tables of hooks

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the wrapped optimizer."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The default options of the wrapped optimizer."""
        return self.base.defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project the gradients and take a step of the wrapped optimizer.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            What the wrapped optimizer returns: the loss of the closure.
        """
        if closure is None:
            self._project()
            return self.base.step()

        def projected() -> Any:
            loss = closure()
            self._project()
            return loss

        return self.base.step(projected)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimizer, which can be loaded into one that is not wrapped."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer."""
        self.base.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"PerpGradOptimizer({self.base!r})"

    def _project(self) -> None:
        parameters = (p for group in self.param_groups for p in group["params"] if p not in self.exclude)
        perp_grad_(parameters, self.rescale, self.scope, self.skip_scalars, self.eps)


class _Perpendicular(Optimizer):
    """A step that begins with `perp_grad_` on all parameters, as it is by default."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project the gradients and take a step.

        Args:
            closure: Computes the loss and its gradients, which are projected each time that it has been called.

        Returns:
            The loss of the closure.
        """
        if closure is None:
            perp_grad_(self._parameters())
            return super().step()

        def projected() -> Any:
            loss = closure()
            perp_grad_(self._parameters())
            return loss

        return super().step(projected)

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


class PerpSGD(_Perpendicular, torch.optim.SGD):
    """SGD on gradients at right angles to the weights: `PerpGradOptimizer` around `torch.optim.SGD`, for a command line.

    Arguments are those of `torch.optim.SGD`.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = PerpSGD([w], lr=0.1)
        >>> w[0].backward()
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([2.9200, 4.0600], requires_grad=True)
    """


class PerpAdamW(_Perpendicular, torch.optim.AdamW):
    """AdamW on gradients at right angles to the weights: `PerpGradOptimizer` around `torch.optim.AdamW`, for a command line.

    Arguments are those of `torch.optim.AdamW`.
    """
