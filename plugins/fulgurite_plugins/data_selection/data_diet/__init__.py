# SPDX-License-Identifier: Apache-2.0
"""Paul, Ganguli, Dziugaite (2021), Deep Learning on a Data Diet: Finding Important Examples Early in Training."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="data_diet",
    family="data_selection",
    summary="Scores every training example a few epochs into training: train on the half that matters, find wrong labels.",
    paper=Paper(
        title="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
        authors=("Mansheej Paul", "Surya Ganguli", "Gintare Karolina Dziugaite"),
        venue="NeurIPS",
        year=2021,
        identifier="arXiv:2107.07075",
        code="github.com/mansheej/data_diet",
        code_licence="Apache-2.0",
    ),
    components=(
        Component(
            "PruneTrainingSet", f"{__name__}.intervention:PruneTrainingSet", "intervention", "Trains on what matters."
        ),
        Component(
            "ScoreExamples", f"{__name__}.callbacks:ScoreExamples", "intervention", "Scores examples during training."
        ),
        Component(
            "ForgettingEvents", f"{__name__}.forgetting:ForgettingEvents", "intervention", "Counts forgetting events."
        ),
        Component("el2n", f"{__name__}.functional:el2n", "function", "Length of the error vector."),
        Component("l1_error", f"{__name__}.functional:l1_error", "function", "L1 norm of the error vector."),
        Component("max_margin", f"{__name__}.functional:max_margin", "function", "Best other class less the true."),
        Component("sum_margin", f"{__name__}.functional:sum_margin", "function", "Other classes less the true."),
        Component("grand", f"{__name__}.functional:grand", "function", "Norm of the example's own gradient."),
        Component("forgetting_counts", f"{__name__}.functional:forgetting_counts", "function", "Learnt, then lost."),
        Component("average_scores", f"{__name__}.functional:average_scores", "function", "Mean over runs."),
        Component("select_examples", f"{__name__}.functional:select_examples", "function", "Which examples to keep."),
        Component("load_scores", f"{__name__}.files:load_scores", "function", "Reads a file of scores."),
    ),
    capabilities=(
        "changes which examples are trained on; needs one DataLoader over a dataset with a length, no sampler of its own",
        "scoring runs on a copy of the module: training goes on bit for bit; refused for sharded parameters",
        "ForgettingEvents: sample indices, the outputs of the training step, one collective per epoch",
        "PruneTrainingSet(runs=R): R short inner trainings before the run, kept in files, shared between ranks",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
