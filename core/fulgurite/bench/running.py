# SPDX-License-Identifier: Apache-2.0
"""Running the variants of a case, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fulgurite.bench.cases import Block, Case, Missing, Row
from fulgurite.bench.training import PausedTraining
from fulgurite.quiet import quiet


def interleave(
    blocks: Mapping[str, Block],
    rounds: int,
    reference: str,
    warm_up: int = 1,
    after_block: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Run one block of every variant per round, in an order that rotates and turns around, and pair them by round.

    Args:
        blocks: The variants by name.
        rounds: Rounds that count.
        reference: The variant that the others are compared with.
        warm_up: Rounds before them that do not count.
        after_block: Called after every block, for a progress bar.

    Returns:
        One row per variant, in the order of `blocks`.

    Raises:
        ValueError: If `reference` is not a variant, or `rounds` is not positive.
    """
    if reference not in blocks:
        raise ValueError(f"Expected `reference` to be one of {', '.join(map(repr, blocks))}, but got {reference!r}.")
    if rounds < 1:
        raise ValueError(f"Expected `rounds` to be positive, but got {rounds!r}.")
    values: dict[str, list[float]] = {name: [] for name in blocks}
    for number in range(-warm_up, rounds):
        for name in _order(list(blocks), number):
            value = blocks[name]()
            if number >= 0:
                values[name].append(value)
            after_block()
    return [Row(name, tuple(found), tuple(values[reference])) for name, found in values.items()]


def _order(names: list[str], number: int) -> list[str]:
    """A B C, C B A, B C A, A C B ...: over 2n rounds every variant has every place twice."""
    start = number // 2 % len(names)
    rotated = names[start:] + names[:start]
    return rotated[::-1] if number % 2 else rotated


def run_case(case: Case, rounds: int | None = None, after_block: Callable[[], None] = lambda: None) -> list[Row]:
    """Build the variants of a case and measure them; a count of bytes keeps its own number of rounds."""
    timed = case.unit == "seconds"
    with quiet(), torch.random.fork_rng():
        made = case.blocks()
        blocks = {name: block for name, block in made.items() if not isinstance(block, Missing)}
        try:
            rows = interleave(
                blocks,
                rounds if rounds is not None and timed else case.rounds,
                case.reference,
                warm_up=int(timed),
                after_block=after_block,
            )
        finally:
            for block in blocks.values():
                if isinstance(block, PausedTraining):
                    block.close()
    return [*rows, *(Row(name, (), (), missing=m.reason) for name, m in made.items() if isinstance(m, Missing))]
