# SPDX-License-Identifier: Apache-2.0
"""The claim of Weight Compander: fewer errors where labels are noisy, and weights that are more equal, on digits."""

from __future__ import annotations

from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Variant

_EPOCHS = 120
_SHAPE = "WeightShape()"
_MIDDLE = "weight_shape/network.3.weight"
_CLIP = "fulgurite_plugins.reparametrization.weight_compander.controls.HardClip(at=1.2)"
_DECAY = "model.init_args.optimizer.init_args.weight_decay"


def _companded(name: str, a: float, b: float, more: str = "") -> Variant:
    return Variant(name, add=(f"WeightCompander(relative=({a}, {b}){more})", _SHAPE))


_PLAIN = Variant("baseline", add=(_SHAPE,))
_NOISY = (
    _PLAIN,
    _companded("WC 1.2", 1.2, 1.2),
    _companded("WC 0.8", 0.8, 0.8),
    _companded("WC 2", 2.0, 2.0),
    _companded("WC 1.5, 0.75", 1.5, 0.75),
    _companded("WC learned", 1.2, 1.2, ", learn=True"),
    Variant("decay 2e-2", add=(_SHAPE,), overrides={_DECAY: 2e-2}),
    Variant("clip 1.2", add=(_CLIP, _SHAPE)),
)
_CLEAN = (_PLAIN, _companded("WC 1.2", 1.2, 1.2), _companded("WC 2", 2.0, 2.0))


def _config(**data: Any) -> dict[str, Any]:
    """Return the training of the claim on certain data."""
    return {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "network": {
                    "class_path": "fulgurite.models.MLP",
                    "init_args": {"input_shape": [1, 8, 8], "num_classes": 10, "hidden": [256, 256]},
                },
                "optimizer": {
                    "class_path": "torch.optim.SGD",
                    "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
                },
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
                    "init_args": {"T_max": _EPOCHS},
                },
            },
        },
        "data": {
            "class_path": "Digits",
            "init_args": {"train_size": 250, "val_size": 0, "test_size": 1547, "batch_size": 50, **data},
        },
        "trainer": {"max_epochs": _EPOCHS, "accelerator": "cpu"},
    }


_DATA = (
    "Handwritten digits, 250 to train, 1547 to test; {labels}. The seed draws the initial weights and the order of the "
    "data; split and redrawn labels are the same for all seeds."
)

CLAIM = Claim(
    statement="A network whose labels are noisy makes fewer errors with Weight Compander (a = b = 1.2 standard deviations) "
    "than without it at the same weight decay, and its weights are more equal.",
    settings=(
        Setting(
            "noisy",
            _config(label_noise=0.15, noise_kind="uniform"),
            _NOISY,
            _DATA.format(labels="15 % of the training labels are redrawn uniformly"),
        ),
        Setting("clean", _config(), _CLEAN, _DATA.format(labels="labels as they are")),
    ),
    seeds=6,
    expectations=(
        Expectation("noisy", "WC 1.2", "baseline", "test/error", "lower", wins=6, margin=0.03),
        Expectation("noisy", "WC 1.2", "baseline", f"{_MIDDLE}/kurtosis", "lower", wins=6),
    ),
    refuted_when="No setting of a = b in {0.8, 1.2, 2} standard deviations gains 2 points of accuracy over the baseline.",
    findings=(
        "Parity with a tuned weight decay (2e-2), within one point, is what is expected: the method is then another way "
        "to have its effect.",
        "Clipping at 1.2 standard deviations stands beside it, to show what the bound alone does.",
        "On clean labels a cost in accuracy is expected.",
        "Fixed and learned amplitudes begin at the same value, so that the difference of theirs (the measure `a`) is what "
        "learning has made of it.",
    ),
    measures=(
        "test/error",
        "test/nll",
        f"{_MIDDLE}/kurtosis",
        f"{_MIDDLE}/near_zero",
        f"{_MIDDLE}/peak",
        f"{_MIDDLE}/a",
    ),
)
