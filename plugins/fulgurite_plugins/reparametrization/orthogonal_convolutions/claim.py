# SPDX-License-Identifier: Apache-2.0
"""The claim of orthogonal convolutions: robustness that rises with the penalty, at little cost in accuracy, on digits."""

from __future__ import annotations

from fulgurite.claims import Claim, Expectation, Setting, Variant

_HERE = "fulgurite_plugins.reparametrization.orthogonal_convolutions.robustness"
_EPOCHS, _BATCHES = 40, 10

_CONFIG = {
    "model": {
        "class_path": "Classification",
        "init_args": {
            "network": f"{_HERE}.CircularConvNet",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.OneCycleLR",
                "init_args": {"max_lr": 5e-3, "total_steps": _EPOCHS * _BATCHES},
            },
            "lr_interval": "step",
        },
    },
    "data": {
        "class_path": "Digits",
        "init_args": {"train_size": 600, "val_size": 0, "test_size": 500, "batch_size": 64},
    },
    "trainer": {
        "max_epochs": _EPOCHS,
        "accelerator": "cpu",
        "callbacks": [{"class_path": f"{_HERE}.RobustAccuracy"}],
    },
}


def _penalty(weight: float, variant: str = "lorth") -> Variant:
    added = f"OrthogonalConvPenalty(weight={weight}, variant='{variant}')"
    return Variant(f"{variant} {weight:g}", add=(added,))


def _more_robust(variant: str, reference: str, margin: float = 0.0) -> Expectation:
    return Expectation("digits", variant, reference, "test/pgd_0.6", "higher", margin=margin)


CLAIM = Claim(
    statement="The accuracy of a network under attack rises with the penalty, far more than its accuracy on clean images "
    "falls; and at equal clean accuracy it is no less robust than with the penalty on the kernel as a matrix.",
    settings=(
        Setting(
            "digits",
            _CONFIG,
            (
                Variant("baseline"),
                _penalty(1.0, "kernel"),
                _penalty(0.01),
                _penalty(0.03),
                _penalty(0.1),
                _penalty(1.0),
                _penalty(10.0),
            ),
            "Handwritten digits, 600 to train, 500 to test; three circular convolutions (16, 32, 64 filters, strides 1, 2, "
            "2) and a linear layer, no batch norm. pgd_r is the accuracy under attack of radius r (projected gradient, "
            "Euclidean norm, 15 steps; inputs range over 1), lipschitz the certified constant. The seed draws the initial "
            "weights and the order of the data.",
        ),
    ),
    seeds=5,
    expectations=(
        _more_robust("lorth 0.1", "baseline", margin=0.2),
        Expectation("digits", "lorth 0.1", "baseline", "test/acc", "higher", margin=-0.05),
        _more_robust("lorth 0.01", "baseline"),
        _more_robust("lorth 0.1", "lorth 0.01"),
        _more_robust("lorth 1", "lorth 0.1"),
        _more_robust("lorth 0.03", "kernel 1", margin=-0.05),
    ),
    refuted_when="Robustness does not rise with the weight up to 1, the clean accuracy at 0.1 is more than 5 points lower, "
    "or at equal clean accuracy (lorth 0.03 and kernel 1) lorth is more than 5 points less robust than the kernel penalty.",
    findings=(
        "A weight of 10 is expected to be too much: a network of Lipschitz constant 1 cannot reach the margins that cross "
        "entropy asks for.",
        "The penalty on the kernel as a matrix is expected on about the same curve; what lorth has beside that is the "
        "certificate.",
    ),
    measures=("test/acc", "test/pgd_0.3", "test/pgd_0.6", "test/pgd_1.0", "test/lipschitz"),
)
