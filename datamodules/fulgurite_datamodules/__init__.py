# SPDX-License-Identifier: Apache-2.0
"""Data for classification: shipped inside a dependency, generated, or read from local files; nothing is downloaded."""

from fulgurite.plugin import Component, Plugin

plugin = Plugin(
    name="datamodules",
    family="general",
    summary="Data for classification that need no download, with fixed splits and label noise whose clean labels are kept.",
    components=(
        Component("Digits", f"{__name__}.digits:Digits", "datamodule", "1797 handwritten digits of 8x8 pixels."),
        Component("MNIST1D", f"{__name__}.mnist1d:MNIST1D", "datamodule", "5000 generated signals (extra: mnist1d)."),
        Component("CIFAR10", f"{__name__}.cifar:CIFAR10", "datamodule", "CIFAR-10 from a local folder."),
        Component("CIFAR100", f"{__name__}.cifar:CIFAR100", "datamodule", "CIFAR-100 from a local folder."),
        Component(
            "ModularArithmetic",
            f"{__name__}.modular_arithmetic:ModularArithmetic",
            "datamodule",
            "Pairs of integers modulo p and the result of an operation on them.",
        ),
        Component(
            "SparseRegression",
            f"{__name__}.synthetic_regression:SparseRegression",
            "datamodule",
            "A sparse linear target of Gaussian inputs.",
        ),
        Component(
            "SingleNeuron",
            f"{__name__}.synthetic_regression:SingleNeuron",
            "datamodule",
            "A single ReLU neuron of Gaussian inputs.",
        ),
        Component(
            "PolynomialRegression",
            f"{__name__}.polynomial_regression:PolynomialRegression",
            "datamodule",
            "A polynomial of one direction of Gaussian inputs.",
        ),
        Component(
            "TeacherStudent",
            f"{__name__}.polynomial_regression:TeacherStudent",
            "datamodule",
            "What a random network gives for Gaussian inputs.",
        ),
        Component(
            "SparseParity",
            f"{__name__}.sparse_parity:SparseParity",
            "datamodule",
            "Words of bits, labelled with the parity of a few of them.",
        ),
        Component(
            "flip_labels", f"{__name__}.noise:flip_labels", "function", "Wrong labels for a fraction of examples."
        ),
        Component(
            "stratified_order",
            f"{__name__}.splits:stratified_order",
            "function",
            "An order whose slices are stratified.",
        ),
    ),
    conformance=f"{__name__}.conformance:CASES",
)

__getattr__, __dir__ = plugin.exports()
