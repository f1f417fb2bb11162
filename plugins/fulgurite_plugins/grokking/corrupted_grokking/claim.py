# SPDX-License-Identifier: Apache-2.0
"""The claim: regularisation makes networks unlearn wrong labels, and neurons with spread-out spectra are what memorises."""

from __future__ import annotations

from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Variant
from fulgurite.statistics import Direction

_EPOCHS = 400
_CORRUPTED = 0.2
_MEASURES = ("SplitAccuracies(every_n_epochs=400)", "NeuronIPR(log_every_n_epochs=400)")
_GAPS = "fulgurite_plugins.grokking.corrupted_grokking.claim_measures.PruningGaps()"
_DECAY = "model.init_args.optimizer.init_args.weight_decay"
_DROPOUT = "model.init_args.network.init_args.dropout"


def _config() -> dict[str, Any]:
    """Return the training of the claim: modular addition, full batches, mean squared error, AdamW."""
    return {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "network": {"class_path": "QuadraticMLP", "init_args": {"p": 59, "width": 256, "dropout": 0.0}},
                "criterion": {"class_path": "OneHotMSE"},
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": 1e-2, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.0},
                },
            },
        },
        "data": {
            "class_path": "ModularArithmetic",
            "init_args": {
                "modulus": 59,
                "train_fraction": 0.6,
                "corrupted_fraction": _CORRUPTED,
                "exclude_true_label": True,
                "encoding": "tokens",
                "batch_size": None,
            },
        },
        "trainer": {"max_epochs": _EPOCHS, "accelerator": "cpu", "check_val_every_n_epoch": _EPOCHS},
    }


def _decay(decay: float, *measures: str) -> Variant:
    return Variant(f"decay {decay:g}", add=(*_MEASURES, *measures), overrides={_DECAY: decay})


def _dropout(rate: float) -> Variant:
    return Variant(f"dropout {rate:g}", add=_MEASURES, overrides={_DROPOUT: rate})


def _expected(
    variant: str, reference: str | float, metric: str, direction: Direction, margin: float = 0.0
) -> Expectation:
    return Expectation("addition", variant, reference, metric, direction, wins=4, margin=margin)


def _inverted(variant: str) -> tuple[Expectation, ...]:
    """All wrong labels are dropped, and everything else is right."""
    return (
        _expected(variant, 1 - _CORRUPTED - 0.03, "corruption/train", "higher"),
        _expected(variant, 1 - _CORRUPTED + 0.03, "corruption/train", "lower"),
        _expected(variant, 0.95, "corruption/test", "higher"),
    )


CLAIM = Claim(
    statement="A network for modular addition, of whose training labels a fifth is wrong, generalises and keeps the wrong "
    "labels; weight decay and dropout make it drop them, the more the stronger they are. Neurons with concentrated spectra "
    "generalise, the others memorise: without the latter it forgets the wrong labels, without the former how to add.",
    settings=(
        Setting(
            "addition",
            _config(),
            (_decay(0, _GAPS), _decay(5), _decay(15), _dropout(0.3), _dropout(0.6)),
            "Addition modulo 59, 2088 pairs to train and 1393 to test, 417 training labels redrawn from the wrong classes; "
            "a quadratic network of 256 neurons, 400 full batches. The seed draws the initial weights, and what dropout "
            "drops; split and wrong labels are the same for all seeds.",
        ),
    ),
    seeds=5,
    expectations=(
        _expected("decay 0", 0.95, "corruption/train", "higher"),
        _expected("decay 0", 0.95, "corruption/test", "higher"),
        _expected("decay 5", "decay 0", "corruption/as_labelled", "lower"),
        _expected("dropout 0.3", "decay 0", "corruption/as_labelled", "lower"),
        _expected("decay 15", "decay 5", "corruption/as_labelled", "lower"),
        _expected("dropout 0.6", "dropout 0.3", "corruption/as_labelled", "lower"),
        *_inverted("decay 15"),
        *_inverted("dropout 0.6"),
        _expected("decay 5", "decay 0", "ipr/mean", "higher"),
        _expected("decay 15", "decay 5", "ipr/mean", "higher"),
        _expected("dropout 0.3", "decay 0", "ipr/mean", "higher"),
        _expected("decay 0", -0.5, "prune/gap_30/as_labelled", "lower"),
        _expected("decay 0", 0.5, "prune/gap_30/test", "higher"),
    ),
    refuted_when="It does not matter which neurons are taken out first, or weight decay lowers the accuracy of the test "
    "before it makes the network drop wrong labels.",
    findings=(
        "The gap of pruning is the accuracy without the 30 % lowest minus that without the 30 % highest scores.",
    ),
    measures=(
        "corruption/train",
        "corruption/as_labelled",
        "corruption/true",
        "corruption/clean",
        "corruption/test",
        "ipr/mean",
        "prune/lowest_30/as_labelled",
        "prune/lowest_30/test",
        "prune/highest_30/as_labelled",
        "prune/highest_30/test",
    ),
)
