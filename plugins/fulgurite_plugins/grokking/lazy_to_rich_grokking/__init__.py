# SPDX-License-Identifier: Apache-2.0
"""Kumar, Bordelon, Gershman, Pehlevan (2024), Grokking as the Transition from Lazy to Rich Training Dynamics."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="lazy_to_rich_grokking",
    family="grokking",
    summary="One knob that makes a training lazy or rich, and measures that say why a model generalises late.",
    paper=Paper(
        title="Grokking as the Transition from Lazy to Rich Training Dynamics",
        authors=("Tanishq Kumar", "Blake Bordelon", "Samuel J. Gershman", "Cengiz Pehlevan"),
        venue="ICLR",
        year=2024,
        identifier="arXiv:2310.06110",
    ),
    components=(
        Component("OutputScaling", f"{__name__}.intervention:OutputScaling", "intervention", "Lazy or rich: the knob."),
        Component("LazyRichMonitor", f"{__name__}.monitor:LazyRichMonitor", "intervention", "... and how lazy it was."),
        Component("QuadraticPerceptron", f"{__name__}.modules:QuadraticPerceptron", "module", "The paper's toy."),
        Component(
            "KernelAlignment", f"{__name__}.metrics:KernelAlignment", "metric", "Of a kernel that comes in blocks."
        ),
        Component(
            "GeneralizationDelay", f"{__name__}.metrics:GeneralizationDelay", "metric", "Decades of test behind train."
        ),
        Component("merge", f"{__name__}.scaling:merge", "function", "Folds the scale into the last layer."),
        Component("kernel_alignment", f"{__name__}.functional:kernel_alignment", "function", "Of kernel and targets."),
        Component(
            "kernel_regression", f"{__name__}.functional:kernel_regression", "function", "What a fixed kernel fits."
        ),
        Component(
            "lazy_trajectory", f"{__name__}.functional:lazy_trajectory", "function", "... and how it gets there."
        ),
        Component(
            "generalization_delay", f"{__name__}.functional:generalization_delay", "function", "From two curves."
        ),
        Component(
            "generalization_decomposition",
            f"{__name__}.toy:generalization_decomposition",
            "function",
            "The toy's test loss in closed form.",
        ),
        Component("population_gradient", f"{__name__}.toy:population_gradient", "function", "Its gradient."),
        Component("population_flow", f"{__name__}.toy:population_flow", "function", "Its training on infinite data."),
        Component("quadratic_ntk", f"{__name__}.toy:quadratic_ntk", "function", "Its tangent kernel."),
    ),
    capabilities=(
        "OutputScaling changes the model (operate), and the learning rates of optimizers and schedules, once per fit",
        "center='copy': one more forward pass without gradients; 'antisymmetric': twice the work; 'none': free",
        "LazyRichMonitor changes nothing; one kernel of a few hundred examples every so many steps",
        "refused under FSDP and DeepSpeed; LazyRichMonitor, and a centred network, also under ModelParallel",
        "works with manual optimization",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
