# SPDX-License-Identifier: Apache-2.0
"""Which interventions go into which trainer, and together: refused before training, not found out after it."""

from __future__ import annotations

import lightning.pytorch as pl

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError
from fulgurite.intervention import Intervention


def check(trainer: pl.Trainer, module: pl.LightningModule, interventions: list[Intervention]) -> None:
    """Refuse, before training, a mixture that would train wrongly.

    Raises:
        RefusedError: Naming the plugins, what was found and what to change.
    """
    names = distinct_names(interventions)
    strategy = lightning_adapter.strategy_name(trainer)
    precision = lightning_adapter.precision_name(trainer)
    owners: dict[str, str] = {}
    for intervention in interventions:
        name, wants = names[intervention], intervention.capabilities
        if strategy in wants.refused_strategies:
            raise RefusedError(
                f"{name} cannot be used with the strategy {strategy!r}: {wants.refused_strategies[strategy]}"
            )
        if precision in wants.refused_precisions:
            raise RefusedError(
                f"{name} cannot be used with precision={precision!r}: {wants.refused_precisions[precision]}"
            )
        if not module.automatic_optimization:
            if not wants.manual_optimization:
                raise RefusedError(
                    f"{name} cannot be used with manual optimization (automatic_optimization=False in "
                    f"{type(module).__name__}). Remove the plugin, or let Lightning step the optimizer."
                )
            if intervention.overrides("penalty"):
                raise RefusedError(
                    f"{name} adds a penalty to the loss that training_step returns, but {type(module).__name__} optimises "
                    f"manually: its backward pass is over by then. Remove the plugin, or let Lightning step the optimizer."
                )
        for item in wants.exclusive:
            if item in owners:
                raise RefusedError(f"{owners[item]} and {name} both take the {item} for themselves. Use one of them.")
            owners[item] = name


def distinct_names(interventions: list[Intervention]) -> dict[Intervention, str]:
    """Return the name of each intervention; the second of two with one name is called `name_2`."""
    names: dict[Intervention, str] = {}
    for intervention in interventions:
        same = sum(other.name == intervention.name for other in names)
        names[intervention] = intervention.name if same == 0 else f"{intervention.name}_{same + 1}"
    return names
