# SPDX-License-Identifier: Apache-2.0
"""Prieto, Barsbey, Mediano, Birdal (2025), Grokking at the Edge of Numerical Stability."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="grokking_stability",
    family="grokking",
    summary="Gradients without their part along the weights, a softmax that cannot saturate, and a monitor of collapse.",
    paper=Paper(
        title="Grokking at the Edge of Numerical Stability",
        authors=("Lucas Prieto", "Melih Barsbey", "Pedro A. M. Mediano", "Tolga Birdal"),
        venue="ICLR",
        year=2025,
        identifier="arXiv:2501.04697",
        code="github.com/LucasPrietoAl/grokking-at-the-edge-of-numerical-stability",
        code_licence="MIT",
    ),
    components=(
        Component(
            "PerpGrad", f"{__name__}.intervention:PerpGrad", "intervention", "Gradients at right angles to weights."
        ),
        Component(
            "ReplaceSoftmax", f"{__name__}.intervention:ReplaceSoftmax", "intervention", "StableMax, for any module."
        ),
        Component(
            "NumericalStabilityMonitor",
            f"{__name__}.monitor:NumericalStabilityMonitor",
            "callback",
            "Softmax Collapse and naive loss minimisation, logged.",
        ),
        Component(
            "PerpGradOptimizer",
            f"{__name__}.optimizer:PerpGradOptimizer",
            "optimizer",
            "PerpGrad around any optimizer.",
        ),
        Component("PerpSGD", f"{__name__}.optimizer:PerpSGD", "optimizer", "SGD with PerpGrad, for a command line."),
        Component(
            "PerpAdamW", f"{__name__}.optimizer:PerpAdamW", "optimizer", "AdamW with PerpGrad, for a command line."
        ),
        Component(
            "StableMaxCrossEntropy", f"{__name__}.losses:StableMaxCrossEntropy", "loss", "StableMax, as a module."
        ),
        Component(
            "SoftmaxCollapse", f"{__name__}.metrics:SoftmaxCollapse", "metric", "Examples with a collapsed softmax."
        ),
        Component("ZeroLossFraction", f"{__name__}.metrics:ZeroLossFraction", "metric", "Examples with a loss of 0."),
        Component(
            "NLMAlignment", f"{__name__}.metrics:NLMAlignment", "metric", "How far descent points along the weights."
        ),
        Component("ModularMLP", f"{__name__}.modules:ModularMLP", "module", "A perceptron without biases."),
        Component("perp_grad_", f"{__name__}.projection:perp_grad_", "function", "PerpGrad, for one's own loop."),
        Component("stablemax", f"{__name__}.functional:stablemax", "function", "The probabilities."),
        Component("log_stablemax", f"{__name__}.functional:log_stablemax", "function", "Their logarithms."),
        Component(
            "stable_logits", f"{__name__}.functional:stable_logits", "function", "Logits whose softmax they are."
        ),
        Component(
            "stablemax_cross_entropy",
            f"{__name__}.functional:stablemax_cross_entropy",
            "function",
            "The loss, as cross_entropy is called.",
        ),
        Component(
            "softmax_collapse_fraction",
            f"{__name__}.collapse:softmax_collapse_fraction",
            "function",
            "Of a batch of logits.",
        ),
        Component(
            "zero_loss_fraction", f"{__name__}.collapse:zero_loss_fraction", "function", "Of logits and targets."
        ),
        Component("nlm_alignment", f"{__name__}.collapse:nlm_alignment", "function", "Of parameters and gradients."),
    ),
    capabilities=(
        "PerpGrad changes gradients before clipping (transform_gradients): no state, no extra pass, no synchronisation",
        "ReplaceSoftmax changes what the criterion is given (on_loss)",
        "sharded parameters (FSDP2): two all-reduces of some numbers per tensor; refused under FSDP (1) and DeepSpeed",
        "the monitor: one forward and backward pass over a fixed set of examples per measurement",
        "works with manual optimization",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
