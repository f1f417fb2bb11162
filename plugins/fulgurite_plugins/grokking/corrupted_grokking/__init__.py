# SPDX-License-Identifier: Apache-2.0
"""Doshi, Das, He, Gromov (2024), To grok or not to grok: generalization and memorization on corrupted data."""

from fulgurite.plugin import Component, Paper, Plugin

plugin = Plugin(
    name="corrupted_grokking",
    family="grokking",
    summary="Tells whether a model generalises or memorises wrong labels, neuron by neuron, and prunes what memorises.",
    paper=Paper(
        title="To grok or not to grok: Disentangling generalization and memorization on corrupted algorithmic datasets",
        authors=("Darshil Doshi", "Aritra Das", "Tianyu He", "Andrey Gromov"),
        venue="ICLR",
        year=2024,
        identifier="arXiv:2310.13061",
        code="github.com/d-doshi/Grokking",
        code_licence="none",
    ),
    components=(
        Component(
            "LabelCorruption",
            f"{__name__}.corruption:LabelCorruption",
            "intervention",
            "Wrong labels for a part of any training set.",
        ),
        Component(
            "CorruptionAccuracy",
            f"{__name__}.splits:CorruptionAccuracy",
            "metric",
            "Accuracies on clean and on corrupted examples.",
        ),
        Component(
            "SplitAccuracies",
            f"{__name__}.splits:SplitAccuracies",
            "callback",
            "Logs these accuracies during training.",
        ),
        Component(
            "InversionDetector",
            f"{__name__}.splits:InversionDetector",
            "callback",
            "Logs when a training grokked, and when it unlearned wrong labels.",
        ),
        Component(
            "NeuronIPR",
            f"{__name__}.ipr:NeuronIPR",
            "callback",
            "Logs how concentrated the weights of hidden neurons are.",
        ),
        Component(
            "IPRPruning", f"{__name__}.pruning:IPRPruning", "intervention", "Prunes neurons in the order of that."
        ),
        Component(
            "PruningCurves",
            f"{__name__}.curves:PruningCurves",
            "callback",
            "Logs accuracies without part of the neurons.",
        ),
        Component(
            "QuadraticMLP",
            f"{__name__}.networks:QuadraticMLP",
            "module",
            "The network of the study, for modular arithmetic.",
        ),
        Component(
            "TokenTransformer",
            f"{__name__}.networks:TokenTransformer",
            "module",
            "A small transformer for modular arithmetic.",
        ),
        Component("OneHotMSE", f"{__name__}.networks:OneHotMSE", "loss", "The loss of the study."),
        Component("train_grid", f"{__name__}.sweep:train_grid", "function", "Trains all networks of a phase diagram."),
        Component(
            "inverse_participation_ratio",
            f"{__name__}.functional:inverse_participation_ratio",
            "function",
            "How concentrated weights are in a basis.",
        ),
        Component("gini", f"{__name__}.functional:gini", "function", "How unequal numbers are."),
        Component(
            "neuron_scores", f"{__name__}.functional:neuron_scores", "function", "The mean ratio of each neuron."
        ),
        Component(
            "prune_curve",
            f"{__name__}.functional:prune_curve",
            "function",
            "What a network predicts without its first neurons.",
        ),
        Component(
            "split_accuracies",
            f"{__name__}.functional:split_accuracies",
            "function",
            "Accuracies of predictions on clean and corrupted examples.",
        ),
        Component(
            "classify_phase",
            f"{__name__}.functional:classify_phase",
            "function",
            "The name of the phase of a training.",
        ),
        Component(
            "inversion_times",
            f"{__name__}.functional:inversion_times",
            "function",
            "When a training grokked and unlearned.",
        ),
        Component(
            "modular_addition_solution",
            f"{__name__}.solutions:modular_addition_solution",
            "function",
            "Weights that solve modular addition.",
        ),
        Component(
            "modular_multiplication_solution",
            f"{__name__}.solutions:modular_multiplication_solution",
            "function",
            "Weights that solve modular multiplication.",
        ),
        Component(
            "MultiplicativeBasis", f"{__name__}.solutions:MultiplicativeBasis", "argument", "The basis for products."
        ),
    ),
    capabilities=(
        "LabelCorruption: needs sample indices; refuses data that have none",
        "IPRPruning: changes weights, by zeros, masks or smaller layers; the last refused under DDP in mid-training",
        "SplitAccuracies, InversionDetector: one pass over training and validation data per measurement",
        "weights that FSDP and DeepSpeed hide are refused by NeuronIPR and IPRPruning",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
