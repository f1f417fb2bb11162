# SPDX-License-Identifier: Apache-2.0
"""Callbacks of general use that belong to no paper: calibration, cost and learning curves of any training."""

from fulgurite.plugin import Component, Plugin

plugin = Plugin(
    name="callbacks",
    family="general",
    summary="Calibration, the cost of a training step and learning curves, for modules that log none of this.",
    components=(
        Component(
            "Calibration",
            f"{__name__}.calibration:Calibration",
            "intervention",
            "ECE, NLL, Brier score and AURC in validation and test, with a reliability diagram on request.",
        ),
        Component(
            "StepCost",
            f"{__name__}.step_cost:StepCost",
            "callback",
            "The median step time, what each intervention takes of it, and peak memory.",
        ),
        Component(
            "LearningCurves",
            f"{__name__}.learning_curves:LearningCurves",
            "callback",
            "A live picture of what is logged; training and validation share an axis.",
        ),
    ),
    capabilities=("reads what is computed and logged; changes neither training nor the random numbers",),
    conformance=f"{__name__}.conformance:CASES",
)

__getattr__, __dir__ = plugin.exports()
