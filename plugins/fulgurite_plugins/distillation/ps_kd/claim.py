# SPDX-License-Identifier: Apache-2.0
"""The claim of PS-KD: a lower negative log-likelihood than cross entropy and label smoothing give, on digits."""

from __future__ import annotations

from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Variant

_EPOCHS = 60
_VARIANTS = (
    Variant("baseline"),
    Variant("label smoothing 0.1", overrides={"model.label_smoothing": 0.1}),
    Variant("PSKD 0.8", add=("PSKD(alpha=0.8)",)),
    Variant("constant 0.8", add=("PSKD(alpha=Schedule.constant(0.8))",)),
)


def _config(**data: Any) -> dict[str, Any]:
    """Return the training of the claim on certain data: an MLP 64-128-128-10, the default network, with ReLU."""
    return {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "optimizer": {
                    "class_path": "torch.optim.SGD",
                    "init_args": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
                },
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.MultiStepLR",
                    "init_args": {"milestones": [_EPOCHS // 2, 3 * _EPOCHS // 4], "gamma": 0.1},
                },
            },
        },
        "data": {"class_path": "Digits", "init_args": {"val_size": 0, "test_size": 997, "batch_size": 64, **data}},
        "trainer": {"max_epochs": _EPOCHS, "accelerator": "cpu"},
    }


def _expectations(setting: str) -> tuple[Expectation, ...]:
    return tuple(
        Expectation(setting, "PSKD 0.8", reference, "test/nll", "lower", wins=7)
        for reference in ("baseline", "label smoothing 0.1")
    )


CLAIM = Claim(
    statement="A classifier trained with PS-KD has a lower negative log-likelihood than one trained with cross entropy, and "
    "than one trained with label smoothing.",
    settings=(
        Setting(
            "noisy",
            _config(label_noise=0.4, noise_kind="uniform"),
            _VARIANTS,
            "Handwritten digits, 800 to train, 997 to test; 40 % of the training labels are redrawn uniformly. The seed "
            "draws the initial weights and the order of the data; split and redrawn labels are the same for all seeds.",
        ),
        Setting(
            "clean",
            _config(train_size=300),
            _VARIANTS,
            "Handwritten digits, 300 to train, 997 to test; labels as they are. The seed draws the initial weights and "
            "the order of the data; the split is the same for all seeds.",
        ),
    ),
    seeds=8,
    expectations=(*_expectations("noisy"), *_expectations("clean")),
    refuted_when="The mean NLL is not below that of cross entropy. A mean NLL that is not below that of label smoothing "
    "counts as not reproduced, too.",
    findings=(
        "Error, ECE and AURC are measured, but the claim does not stand on them: a lower error is not expected in every "
        "setting, and a model taught with soft targets under label noise may be underconfident, which ECE counts.",
        "A constant weight of 0.8 stands beside the ramp, to show what the ramp itself is for.",
    ),
    measures=("test/nll", "test/error", "test/ece", "test/aurc"),
)
