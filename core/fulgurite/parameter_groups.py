# SPDX-License-Identifier: Apache-2.0
"""Parameters that shall be optimised otherwise than the rest, in whatever optimizer somebody's module builds."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Options = Mapping[nn.Parameter, Mapping[str, Any]]

_OWN = "fulgurite"
"""The key that marks a group which has been split off, so that an optimizer around another does not split it again."""


@contextmanager
def grouped_apart(options: Callable[[], Options]) -> Iterator[None]:
    """Give parameters groups of their own in every optimizer that is constructed inside the block.

    It happens as the optimizer is constructed, so that schedulers made after it know of the groups. They stand after the
    user's groups, whose numbers stay what they were; `lr_scale` among the options multiplies the learning rate of the group
    that the parameters are taken from.

    Args:
        options: Returns the options of each such parameter, for instance `{p: {"weight_decay": 0.0, "lr_scale": 0.1}}`.
    """
    original = torch.optim.Optimizer.__init__
    made: list[tuple[dict[str, Any], int, torch.optim.Optimizer]] = []

    @functools.wraps(original)
    def init(self: torch.optim.Optimizer, params: Any, defaults: dict[str, Any]) -> None:
        groups, origins = _split(params, defaults, options())
        original(self, groups, defaults)
        made.extend((self.param_groups[own], origin, self) for own, origin in origins.items())

    torch.optim.Optimizer.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.optim.Optimizer.__init__ = original  # type: ignore[method-assign]
    for group, origin, optimizer in made:
        _check_scale(group, optimizer.param_groups[origin])


def _split(params: Any, defaults: Mapping[str, Any], options: Options) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Return the groups, the users' own first, and from which of these each of the others was taken."""
    given = [params] if isinstance(params, (Tensor, dict)) else list(params)
    groups = [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
    apart: list[dict[str, Any]] = []
    origins: dict[int, int] = {}
    for number, group in enumerate(groups):
        if _OWN in group:
            continue
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = [entry for entry in entries if _parameter(entry) not in options]
        for wanted, members in _by_options(entries, options):
            own = {**group, **wanted, "params": members, _OWN: True}
            if "lr_scale" in wanted:
                own["lr"] = group.get("lr", defaults.get("lr")) * wanted["lr_scale"]
            origins[len(groups) + len(apart)] = number
            apart.append(own)
    return groups + apart, origins


def _parameter(entry: Any) -> Any:
    """Return the parameter of an entry, which may be a pair of a name and a parameter."""
    return entry[1] if isinstance(entry, tuple) else entry


def _by_options(entries: Iterable[Any], options: Options) -> list[tuple[Mapping[str, Any], list[Any]]]:
    found: list[tuple[Mapping[str, Any], list[Any]]] = []
    for entry in entries:
        wanted = options.get(_parameter(entry))
        if wanted is None:
            continue
        members = next((members for known, members in found if known == wanted), None)
        if members is None:
            found.append((wanted, [entry]))
        else:
            members.append(entry)
    return found


def _check_scale(group: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Warn if a scheduler (`OneCycleLR` with one `max_lr`, for instance) has set all learning rates to one value."""
    scale = group.get("lr_scale", 1.0)
    if scale != 1.0 and float(origin["lr"]) != 0.0 and abs(float(group["lr"]) / float(origin["lr"]) / scale - 1) > 1e-3:
        warnings.warn(
            f"A scheduler set the learning rate of {len(group['params'])} parameters that a plugin wants at {scale:g} times "
            f"the rate of their group to {float(group['lr']):g}, where {float(origin['lr']) * scale:g} was meant. Use a "
            f"scheduler that multiplies the rates of all groups, or give it one rate per group.",
            stacklevel=2,
        )
