# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the callbacks."""

from __future__ import annotations

from fulgurite.testing import Case
from fulgurite_callbacks.calibration import Calibration
from fulgurite_callbacks.learning_curves import LearningCurves
from fulgurite_callbacks.step_cost import StepCost

CASES = {
    "Calibration": (
        Case(make=Calibration, off=Calibration, observes=True),
        Case(label="plot", make=lambda: Calibration(plot=True), off=Calibration, observes=True),
    ),
    "StepCost": Case(make=StepCost),
    "LearningCurves": Case(make=LearningCurves),
}
