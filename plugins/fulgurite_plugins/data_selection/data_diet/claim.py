# SPDX-License-Identifier: Apache-2.0
"""The claim of Data Diet: trained on the hardest half by EL2N, a network is better than on a random half, on digits."""

from __future__ import annotations

from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Variant

_EPOCHS, _STEPS = 15, 270
_SCORES = "fulgurite-reproduce-data_diet/scores"
"""Where finished inner runs are kept, so that all trainings on one split share them."""

_WINDOW = "EL2N epoch 10, without the top 10% 30%"


def _config(label_noise: float = 0.0) -> dict[str, Any]:
    """Return the training of the claim: an MLP 64-128-128-10, 270 steps whatever is kept, a rate that falls to 0."""
    return {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "optimizer": {
                    "class_path": "torch.optim.SGD",
                    "init_args": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
                },
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.LinearLR",
                    "init_args": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": _STEPS},
                },
                "lr_interval": "step",
            },
        },
        "data": {
            "class_path": "fulgurite_plugins.data_selection.data_diet.claim_data.SplitDigits",
            "init_args": {"label_noise": label_noise},
        },
        "trainer": {"max_epochs": _EPOCHS, "accelerator": "cpu"},
    }


def _kept(name: str, keep: float, score: str, epoch: int, strategy: str = "hardest", offset: float = 0.0) -> Variant:
    """Return a variant that trains on a part chosen by scores of ten inner runs."""
    chosen = f"strategy={strategy!r}, offset={offset!r}, directory={_SCORES!r}"
    return Variant(
        f"{name} {keep:.0%}", add=(f"PruneTrainingSet(keep={keep}, score={score!r}, epoch={epoch}, {chosen})",)
    )


def _random(keep: float) -> Variant:
    return Variant(f"random {keep:.0%}", add=(f"PruneTrainingSet(keep={keep}, strategy='random')",))


def _better(setting: str, variant: str, reference: str, margin: float = 0.0, wins: int | None = 10) -> Expectation:
    return Expectation(setting, variant, reference, "test/acc", "higher", wins=wins, margin=margin)


CLAIM = Claim(
    statement="A classifier trained on the hardest half of the training set by EL2N, a few epochs into training and "
    "averaged over runs, has a higher accuracy than one trained on a random half for as many steps; with wrong labels, one "
    "trained on a window that leaves out the very hardest has.",
    settings=(
        Setting(
            "clean",
            _config(),
            (
                Variant("baseline"),
                *(_random(keep) for keep in (0.5, 0.3)),
                *(_kept("EL2N epoch 10", keep, "el2n", 10) for keep in (0.5, 0.3)),
                *(_kept("EL2N epoch 10, easiest", keep, "el2n", 10, "easiest") for keep in (0.5, 0.3)),
                _kept("EL2N epoch 2", 0.5, "el2n", 2),
                _kept("GraNd epoch 2", 0.5, "grand", 2),
                *(_kept("GraNd epoch 0", keep, "grand", 0) for keep in (0.5, 0.3)),
                *(_kept("forgetting", keep, "forgetting", _EPOCHS) for keep in (0.5, 0.3)),
            ),
            "Handwritten digits, 1200 to train, 597 to test. Seed s takes split s modulo 3, and draws the initial weights, "
            "the order of the data and the random part; scores come from ten other trainings on the split. Every training "
            "has 270 steps.",
        ),
        Setting(
            "noisy",
            _config(label_noise=0.1),
            (
                Variant("baseline"),
                _random(0.3),
                _kept("EL2N epoch 10", 0.3, "el2n", 10),
                _kept(_WINDOW.removesuffix(" 30%"), 0.3, "el2n", 10, "window", 0.6),
            ),
            "The same, with a tenth of the training labels permuted among each other.",
        ),
    ),
    seeds=12,
    expectations=(
        _better("clean", "EL2N epoch 10 50%", "random 50%", margin=0.01, wins=None),
        _better("clean", "EL2N epoch 10 30%", "random 30%", margin=0.02, wins=None),
        _better("clean", "EL2N epoch 10 50%", "EL2N epoch 10, easiest 50%"),
        Expectation("clean", "GraNd epoch 0 50%", "random 50%", "test/acc", "lower", margin=-0.01),
        _better("noisy", _WINDOW, "EL2N epoch 10 30%", margin=0.05, wins=None),
        _better("noisy", _WINDOW, "random 30%"),
    ),
    refuted_when="Without noise the hardest examples by EL2N at epoch 10 are not better than random ones on average, or "
    "with noise the window is not better than the hardest. That GraNd at initialisation is no better than random is part of "
    "what is known (arXiv:2303.14753), against the paper.",
    findings=(
        "EL2N and GraNd at epoch 2 stand beside them, to show what scoring early does.",
        "How well the scores find wrong labels, and how far runs agree, is in the report of `fulgurite score`.",
    ),
    measures=("test/acc", "test/nll"),
)
