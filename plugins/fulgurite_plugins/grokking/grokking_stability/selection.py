# SPDX-License-Identifier: Apache-2.0
"""Which parameters are meant, by the patterns of their names."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from fulgurite.errors import RefusedError, check_argument, nearest

VECTORS = "vectors"
"""Stands for all parameters of fewer than two dimensions, as biases and the gains of norms are."""


def listed(patterns: str | list[str] | None, name: str) -> list[str]:
    """Return patterns that are separated by commas, or a list already, as a list; None as an empty one.

    Raises:
        ValueError: If one is no text, or empty.
    """
    found = [part.strip() for part in patterns.split(",")] if isinstance(patterns, str) and patterns else patterns or []
    good = isinstance(found, list) and all(isinstance(part, str) and part for part in found)
    check_argument(good, name, "PerpGrad", "patterns of names of parameters, such as 'encoder.*'", patterns)
    return list(found)


def left_out(module: nn.Module, include: list[str], exclude: list[str]) -> set[nn.Parameter]:
    """Return the parameters that are not to be changed.

    Args:
        module: The model.
        include: Patterns of names, or `"vectors"`; none for all parameters.
        exclude: Patterns of names, or `"vectors"`, that are left out of these.

    Raises:
        RefusedError: If a pattern means no parameter.
    """
    parameters = dict(module.named_parameters())
    for pattern in (*include, *exclude):
        if pattern != VECTORS and not any(_means(pattern, *item) for item in parameters.items()):
            raise RefusedError(
                f"PerpGrad: no parameter is called {pattern!r}.{nearest(pattern, parameters)} The first parameters are "
                f"{', '.join(list(parameters)[:8]) or 'none'}."
            )
    return {
        parameter
        for name, parameter in parameters.items()
        if (include and not any(_means(pattern, name, parameter) for pattern in include))
        or any(_means(pattern, name, parameter) for pattern in exclude)
    }


def _means(pattern: str, name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 if pattern == VECTORS else fnmatchcase(name, pattern)
