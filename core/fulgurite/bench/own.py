# SPDX-License-Identifier: Apache-2.0
"""Core's own cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from fulgurite.bench.cases import Bench, Block, Case, Target
from fulgurite.bench.training import Training, trainers
from fulgurite.bench.workloads import Classifier, batches
from fulgurite.intervention import Intervention
from fulgurite.losses import LossCall


class _EmptyOnLoss(Intervention):
    """Changes nothing, but wants to see the call of the criterion."""

    def on_loss(self, call: LossCall) -> LossCall:
        return call


class _EmptyPenalty(Intervention):
    """Adds nothing to the loss, but wraps the training step to find that out."""

    def penalty(self, step: Any) -> None:
        return None


def _empty_interventions() -> Mapping[str, Block]:
    training = Training(lambda: Classifier((16, 32, 10)), batches(6400, 16, 10, 16), steps=100)
    return trainers(
        training,
        {
            "trainer alone": lambda: (),
            "pl.Callback()": lambda: (pl.Callback(),),
            "Intervention()": lambda: (Intervention(),),
            "empty penalty": lambda: (_EmptyPenalty(),),
            "empty on_loss": lambda: (_EmptyOnLoss(),),
        },
    )


BENCH = Bench(
    cases=(
        Case(
            name="An intervention that does nothing, on a very small network (batch 16)",
            blocks=_empty_interventions,
            reference="trainer alone",
            targets=(Target("Intervention()", "difference", at_most=30e-6),),
        ),
    )
)
"""Core's own cases."""
