# SPDX-License-Identifier: Apache-2.0
"""Frantar, Kurtic, Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="m_fac",
    family="curvature",
    summary="Exact products with the inverse of an empirical Fisher: to prune a network, or as an optimizer.",
    paper=Paper(
        title="M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        authors=("Elias Frantar", "Eldar Kurtic", "Dan Alistarh"),
        venue="NeurIPS",
        year=2021,
        identifier="arXiv:2107.03356",
        code="github.com/IST-DASLab/M-FAC",
        code_licence="MIT",
    ),
    components=(
        Component(
            "MFAC", f"{__name__}.optimizer:MFAC", "optimizer", "SGD with an inverse Fisher of the last gradients."
        ),
        Component("MFACPruner", f"{__name__}.intervention:MFACPruner", "intervention", "Prunes, and makes up for it."),
        Component(
            "FisherInverse", f"{__name__}.fisher:FisherInverse", "argument", "Inverse of the Fisher of gradients."
        ),
        Component("woodbury_ihvp", f"{__name__}.functional:woodbury_ihvp", "function", "A product with the inverse."),
        Component("obs_saliency", f"{__name__}.functional:obs_saliency", "function", "What dropping a weight costs."),
        Component("obs_update", f"{__name__}.obs:obs_update", "function", "Drops weights, moves the others."),
        Component("densities", f"{__name__}.functional:densities", "function", "Densities of a pruning in rounds."),
    ),
    capabilities=(
        "MFAC: an optimizer; `num_grads` copies of the gradients, divided among ranks with shard=True",
        "MFACPruner: changes weights at epoch starts, keeps zeros after each step; refused for sharded parameters",
        "MFACPruner: `num_grads` backward passes per round, on training data, in evaluation mode, unnoticed by the training",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
