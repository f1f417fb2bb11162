# SPDX-License-Identifier: Apache-2.0
"""Cakaj, Mehnert, Yang (2023), Weight Compander: A Simple Weight Reparameterization for Regularization."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="weight_compander",
    family="reparametrization",
    summary="Computes weights by a bounded function that is steep at zero: none grows large, few linger near zero.",
    paper=Paper(
        title="Weight Compander: A Simple Weight Reparameterization for Regularization",
        authors=("Rinor Cakaj", "Jens Mehnert", "Bin Yang"),
        venue="IJCNN",
        year=2023,
        identifier="arXiv:2306.16993",
    ),
    components=(
        Component("WeightCompander", f"{__name__}.intervention:WeightCompander", "intervention", "The method."),
        Component("Compander", f"{__name__}.modules:Compander", "module", "The parametrisation of one tensor."),
        Component("Companding", f"{__name__}.functional:Companding", "function", "A companding function of one's own."),
        Component("compand", f"{__name__}.functional:compand", "function", "Free tensor to weights."),
        Component("expand", f"{__name__}.functional:expand", "function", "Weights to free tensor."),
        Component("compand_grad_scale", f"{__name__}.functional:compand_grad_scale", "function", "The slope."),
        Component("fold", f"{__name__}.surgery:fold", "function", "Plain weights again, in a model."),
        Component("fold_state_dict", f"{__name__}.surgery:fold_state_dict", "function", "... in a state dict."),
        Component("parameter_groups", f"{__name__}.surgery:parameter_groups", "function", "For one's own optimizer."),
        Component("weight_shape", f"{__name__}.diagnostics:weight_shape", "function", "What weights look like."),
        Component("WeightShape", f"{__name__}.diagnostics:WeightShape", "callback", "... logged in every epoch."),
    ),
    capabilities=(
        "changes the model: weights become parametrisations, and plain again when fit has ended (operate)",
        "no extra pass; one elementwise function of the weights per step",
        "learned a and b get a parameter group of their own, without weight decay",
        "refused under FSDP (1) and DeepSpeed; under ModelParallel it must be called before fully_shard",
        "works with manual optimization",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
