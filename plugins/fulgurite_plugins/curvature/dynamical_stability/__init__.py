# SPDX-License-Identifier: Apache-2.0
"""Wu, Su (2023), The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="dynamical_stability",
    family="curvature",
    summary="Tells how close a training is to the stability limits of SGD, and the largest stable learning rate.",
    paper=Paper(
        title="The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent",
        authors=("Lei Wu", "Weijie J. Su"),
        venue="ICML",
        year=2023,
        identifier="arXiv:2305.17490",
    ),
    components=(
        Component(
            "StabilityMonitor",
            f"{__name__}.callbacks:StabilityMonitor",
            "intervention",
            "Watches the limits during training.",
        ),
        Component(
            "StableLearningRate",
            f"{__name__}.controller:StableLearningRate",
            "intervention",
            "Sets the rate below the limit.",
        ),
        Component(
            "TracePenalty",
            f"{__name__}.intervention:TracePenalty",
            "intervention",
            "Penalises the trace that SGD bounds.",
        ),
        Component(
            "DiagonalLinearNetwork",
            f"{__name__}.modules:DiagonalLinearNetwork",
            "module",
            "Coefficients that are products.",
        ),
        Component(
            "TwoLayerReLU", f"{__name__}.modules:TwoLayerReLU", "module", "One hidden layer, without output bias."
        ),
        Component(
            "gauss_newton_trace",
            f"{__name__}.features:gauss_newton_trace",
            "function",
            "Trace of the Gauss-Newton matrix.",
        ),
        Component(
            "stability_radius",
            f"{__name__}.functional:stability_radius",
            "function",
            "Growth of the second moment in a step.",
        ),
        Component(
            "max_stable_lr",
            f"{__name__}.functional:max_stable_lr",
            "function",
            "Largest stable learning rate, exactly.",
        ),
        Component(
            "refined_trace_bound",
            f"{__name__}.functional:refined_trace_bound",
            "function",
            "Upper bound of it from norms alone.",
        ),
        Component("trace_bound", f"{__name__}.functional:trace_bound", "function", "Upper bound of it from the trace."),
        Component(
            "frobenius_norm", f"{__name__}.functional:frobenius_norm", "function", "Frobenius norm from the kernel."
        ),
        Component("lambda_max", f"{__name__}.functional:lambda_max", "function", "Largest eigenvalue from the kernel."),
        Component(
            "alignment_factor",
            f"{__name__}.functional:alignment_factor",
            "function",
            "How noise lies in sharp directions.",
        ),
        Component(
            "non_uniformity", f"{__name__}.functional:non_uniformity", "function", "Spread of the examples' curvature."
        ),
        Component(
            "stability_box",
            f"{__name__}.functional:stability_box",
            "function",
            "Limits of sharpness and non-uniformity.",
        ),
        Component("path_norm", f"{__name__}.functional:path_norm", "function", "Path norm of a two-layer network."),
    ),
    capabilities=(
        "observes: curvature on a fixed set of examples, in evaluation mode, after chosen epochs; nothing in a step",
        "refused for sharded parameters",
        "StableLearningRate sets the learning rate of SGD; refused with a scheduler or another optimizer",
        "TracePenalty: a backward pass per probe and one through it",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
