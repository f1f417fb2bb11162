# SPDX-License-Identifier: Apache-2.0
"""Blocks that time pure functions, ours and those of peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from fulgurite.bench.cases import Block, Missing
from fulgurite.bench.machine import synchronize

Function = Callable[[], object]


def calls(functions: Mapping[str, Function], block_seconds: float = 0.02) -> dict[str, Block]:
    """Return blocks that time functions: seconds per call, over as many calls as fill `block_seconds`."""
    return {
        name: function if isinstance(function, Missing) else _calls(function, block_seconds)
        for name, function in functions.items()
    }


def peer(make: Callable[[], Function], distribution: str) -> Function:
    """Return the function that a peer library is timed with, or what is missing.

    Args:
        make: Imports the peer and returns the function.
        distribution: What one would install to have it.

    Returns:
        The function, or `Missing`.
    """
    try:
        return make()
    except ImportError as error:
        return Missing(f"{error}; to measure it: pip install --no-deps {distribution}")


def _calls(function: Function, block_seconds: float) -> Block:
    number = 0

    def seconds(repeats: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize()
        return time.perf_counter() - start

    def block() -> float:
        nonlocal number
        if not number:
            function()
            number = max(1, math.ceil(block_seconds / seconds(3) * 3))
        return seconds(number) / number

    return block
