# SPDX-License-Identifier: Apache-2.0
"""Achour, Malgouyres, Mamalet (2022), Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="orthogonal_convolutions",
    family="reparametrization",
    summary="Penalises every convolution, as an operator on images, until it is an isometry; certifies Lipschitz constants.",
    paper=Paper(
        title="Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
        authors=("El Mehdi Achour", "François Malgouyres", "Franck Mamalet"),
        venue="JMLR",
        year=2022,
        identifier="arXiv:2108.05623",
        code="github.com/deel-ai/deel-lip",
        code_licence="MIT",
    ),
    components=(
        Component(
            "OrthogonalConvPenalty",
            f"{__name__}.intervention:OrthogonalConvPenalty",
            "intervention",
            "The penalty, for any model with convolutions.",
        ),
        Component(
            "ConvOrthogonality",
            f"{__name__}.metrics:ConvOrthogonality",
            "metric",
            "Singular values, residual and bounds of every layer of a model.",
        ),
        Component("lorth", f"{__name__}.functional:lorth", "function", "The paper's regularizer of one kernel."),
        Component(
            "orthogonal_conv_exists",
            f"{__name__}.theory:orthogonal_conv_exists",
            "function",
            "Whether an orthogonal convolution of a shape exists, and why.",
        ),
        Component(
            "isometry_bounds",
            f"{__name__}.theory:isometry_bounds",
            "function",
            "How near to an isometry, for any size.",
        ),
        Component(
            "conv_singular_values",
            f"{__name__}.theory:conv_singular_values",
            "function",
            "All singular values of a convolution, exactly.",
        ),
        Component(
            "conv_operator_matrix",
            f"{__name__}.theory:conv_operator_matrix",
            "function",
            "The matrix of a convolution: a slow oracle.",
        ),
        Component(
            "lipschitz_certificate",
            f"{__name__}.certificate:lipschitz_certificate",
            "function",
            "An upper bound of a sequential network's Lipschitz constant.",
        ),
        Component(
            "orthogonal_conv_init_",
            f"{__name__}.initialisation:orthogonal_conv_init_",
            "function",
            "Fills a kernel with an orthogonal convolution.",
        ),
    ),
    capabilities=(
        "adds a penalty on parameters once per optimizer update (penalty)",
        "no extra pass; the cost does not depend on the batch",
        "sharded parameters (ModelParallel, FSDP2) are gathered; refused under FSDP and DeepSpeed",
        "refused with manual optimization, as every penalty is",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
