# SPDX-License-Identifier: Apache-2.0
"""What is to be run: every setting with every variant and seed, and what determines each run. Imports no torch."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fulgurite.claims import Setting
from fulgurite.errors import FulguriteError

_SUBCLASS_SECTIONS = ("model", "data")
"""Sections of a LightningCLI configuration whose arguments stand under `init_args`."""


@dataclass(frozen=True)
class Run:
    """One training: one setting, one variant, one seed.

    Args:
        setting: Name of the setting.
        variant: Name of the variant.
        seed: The seed of initial weights, order of the data and whatever else is random.
        config: Nested LightningCLI configuration, the variant's overrides included.
        add: Components that are added to the trainer, as text.
    """

    setting: str
    variant: str
    seed: int
    config: Mapping[str, Any]
    add: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the run inside a comparison."""
        return (self.setting, self.variant, self.seed)

    @property
    def slug(self) -> str:
        """A name for files: readable, and different for every run."""
        readable = re.sub(r"[^\w.=-]+", "-", f"{self.setting}-{self.variant}")[:60].strip("-")
        return f"{readable}-{hashlib.sha256(repr(self.key).encode()).hexdigest()[:6]}-seed{self.seed}"

    def fingerprint(self, sources: str = "") -> str:
        """Hash everything that determines the run.

        Args:
            sources: Hash of code that no version number describes: that of the user.
        """
        versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning", "fulgurite")}
        content = json.dumps([asdict(self), versions, sources], sort_keys=True, default=repr)
        return hashlib.sha256(content.encode()).hexdigest()


def plan(settings: Iterable[Setting], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of a comparison, all variants of a seed together, so that what is done first can be compared.

    Raises:
        FulguriteError: If an override does not fit the configuration.
    """
    settings = list(settings)
    return [
        Run(setting.name, variant.name, seed, with_overrides(setting.config, variant.overrides), variant.add)
        for seed in seeds
        for setting in settings
        for variant in setting.variants
    ]


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with dotted keys set, as `fulgurite fit --model.label_smoothing=0.1` sets them.

    Raises:
        FulguriteError: If a key leads through something that is not a section.

    Example:
        >>> with_overrides({"trainer": {"max_epochs": 5}}, {"model.label_smoothing": 0.1, "trainer.max_epochs": 3})
        {'trainer': {'max_epochs': 3}, 'model': {'init_args': {'label_smoothing': 0.1}}}
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for key, value in overrides.items():
        *sections, last = (name for name in key.split(".") if name != "init_args")
        node = result
        for depth, name in enumerate(sections):
            section = node.get(name) or {}
            if isinstance(section, str):
                section = {"class_path": section}
            if not isinstance(section, dict):
                raise FulguriteError(
                    f"Expected the override {key!r} to lead through sections of the configuration, but {name!r} is "
                    f"{section!r}."
                )
            node[name] = node = section
            takes_init_args = "class_path" in section or "init_args" in section
            plain = not section and depth == 0 and name in _SUBCLASS_SECTIONS
            if last != "class_path" and (takes_init_args or plain):
                node = section.setdefault("init_args", {})
        node[last] = value
    return result
