# SPDX-License-Identifier: Apache-2.0
"""Kim, Ji, Yoon, Hwang (2021), Self-Knowledge Distillation with Progressive Refinement of Targets."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="ps_kd",
    family="distillation",
    summary="Softens hard labels with the model's own predictions of the previous epoch, trusted more as training goes on.",
    paper=Paper(
        title="Self-Knowledge Distillation with Progressive Refinement of Targets",
        authors=("Kyungyul Kim", "ByeongMoon Ji", "Doyoung Yoon", "Sangheum Hwang"),
        venue="ICCV",
        year=2021,
        identifier="arXiv:2006.12000",
        code="github.com/lgcnsai/PS-KD-Pytorch",
        code_licence="MIT",
    ),
    components=(
        Component("PSKD", f"{__name__}.intervention:PSKD", "intervention", "The method, for any classifier."),
        Component(
            "refine_targets", f"{__name__}.functional:refine_targets", "function", "Targets mixed with the past."
        ),
        Component("progressive_weight", f"{__name__}.functional:progressive_weight", "function", "The linear ramp."),
        Component(
            "pskd_gradient_ratio", f"{__name__}.functional:pskd_gradient_ratio", "function", "Hard-example weighting."
        ),
    ),
    capabilities=(
        "changes the targets of the criterion (on_loss)",
        "teacher='memory': sample indices, one [N, C] array, one collective per epoch, no extra pass",
        "teacher='snapshot': one extra forward pass, a copy of the weights; refused under FSDP, ModelParallel, DeepSpeed",
        "works with manual optimization",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
