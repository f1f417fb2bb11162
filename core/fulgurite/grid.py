# SPDX-License-Identifier: Apache-2.0
"""Every combination of the values of some arguments: what a sweep trains. Imports no torch.

Example:
    >>> grid = Grid({"data.label_noise": (0.0, 0.2), "trainer.max_epochs": (10, 20)})
    >>> list(grid.cells)[:2]
    ['label_noise=0.0, max_epochs=10', 'label_noise=0.0, max_epochs=20']
    >>> grid.cells["label_noise=0.0, max_epochs=20"]
    {'data.label_noise': 0.0, 'trainer.max_epochs': 20}
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import yaml

from fulgurite.claims import Setting, Variant
from fulgurite.errors import FulguriteError


@dataclass(frozen=True)
class Grid:
    """The values that arguments of a configuration take in turn.

    Args:
        axes: Dotted LightningCLI keys and their values; the last key varies fastest.

    Raises:
        FulguriteError: If an axis has no two distinct values.
    """

    axes: Mapping[str, tuple[Any, ...]]

    def __post_init__(self) -> None:
        for key, values in self.axes.items():
            if len(values) < 2 or len({repr(value) for value in values}) < len(values):
                raise FulguriteError(
                    f"Expected two or more distinct values of {key} in a grid, but got {', '.join(map(str, values))}."
                )

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Grid:
        """Return the grid of texts such as `"data.label_noise=0,0.2,0.4"`, with values as YAML has them.

        Raises:
            FulguriteError: If a text is none of that form, or a key comes twice.
        """
        axes: dict[str, tuple[Any, ...]] = {}
        for text in texts:
            key, equals, values = text.partition("=")
            key = key.strip()
            try:
                found = yaml.safe_load(f"[{values}]")
            except yaml.YAMLError:
                found = None
            if not (key and equals and found) or any(isinstance(value, (list, dict)) for value in found):
                raise FulguriteError(
                    f"Expected a grid as KEY=VALUE,VALUE,..., such as data.label_noise=0,0.2,0.4, but got {text!r}."
                )
            if key in axes:
                raise FulguriteError(f"Expected every grid to be of another key, but {key} comes twice.")
            axes[key] = tuple(_number(value) for value in found)
        return cls(axes)

    @cached_property
    def names(self) -> dict[str, str]:
        """What each key is called in tables: its last part, unless two keys share it."""
        short = {key: key.rpartition(".")[2] for key in self.axes}
        count = Counter(short.values())
        return {key: name if count[name] == 1 else key for key, name in short.items()}

    @cached_property
    def cells(self) -> dict[str, dict[str, Any]]:
        """The value of every key, by the name of the setting that has these values."""
        combined = (dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values()))
        return {", ".join(f"{self.names[key]}={value}" for key, value in cell.items()): cell for cell in combined}

    def settings(self, config: Mapping[str, Any], variants: Sequence[Variant]) -> list[Setting]:
        """Return one setting per cell, each with all variants.

        Args:
            config: Nested LightningCLI configuration.
            variants: What is compared in every cell.
        """
        return [
            Setting(name, config, tuple(replace(each, overrides={**cell, **each.overrides}) for each in variants))
            for name, cell in self.cells.items()
        ]


def _number(value: Any) -> Any:
    """Return a text such as `1e-3`, which YAML takes for one, as the number that it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
