# SPDX-License-Identifier: Apache-2.0
"""The claims of batch_hessian_lr: batch Hessians are larger the smaller the batch, and set a learning rate, on digits."""

from __future__ import annotations

from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Summary, Variant

SIZES = (4, 16, 64, 256, 1024)
"""Batch sizes whose largest eigenvalues are measured."""

_PACKAGE = "fulgurite_plugins.curvature.batch_hessian_lr"
_SPECTRA, _LEARNER = "batch Hessians", "learner"
_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
_INVERSE = "inverse"
_K = "steps=8"


def _config(hidden: list[int], lr: float, momentum: float, **trainer: Any) -> dict[str, Any]:
    """Return a training of a tanh network on 1437 digits in batches of 64."""
    return {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "network": {"class_path": f"{_PACKAGE}.claim_network.TanhMLP", "init_args": {"hidden": hidden}},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": lr, "momentum": momentum}},
            },
        },
        "data": {"class_path": "Digits", "init_args": {"val_size": 0, "test_size": 360, "batch_size": 64}},
        "trainer": {"accelerator": "cpu", **trainer},
    }


def _fixed(lr: float) -> Variant:
    return Variant(f"lr {lr:g}", overrides={"model.optimizer.init_args.lr": lr})


def _number(metric: str, reference: float, direction: Any) -> Expectation:
    return Expectation(_SPECTRA, "SGD", reference, metric, direction, wins=5)


_STAGES = ("initial", "trained")
_GRID = "best of the grid"

CLAIM = Claim(
    statement="The largest eigenvalue of a batch Hessian exceeds that of all examples, the more the smaller the batch, and "
    "one over it is a learning rate as good as one from a grid.",
    settings=(
        Setting(
            _SPECTRA,
            _config([16], 0.1, 0.0, max_epochs=5, limit_train_batches=20),
            (Variant("SGD", add=(f"{_PACKAGE}.claim_spectra.BatchSpectra()",)),),
            "Handwritten digits, 1437 to train; MLP 64-16-10, tanh (1210 parameters); before and after 100 steps of SGD. "
            "Largest eigenvalues are means over 48 random batches of up to 64 examples, and over 12 larger ones.",
        ),
        Setting(
            _LEARNER,
            _config([64], 0.01, 0.9, max_epochs=15),
            (
                *map(_fixed, _RATES),
                Variant(_INVERSE, add=(f"SLQLearningRate({_K})",)),
                Variant(
                    "inverse, no momentum",
                    add=(f"SLQLearningRate({_K}, set_momentum=False)",),
                    overrides={"model.optimizer.init_args.momentum": 0.0},
                ),
                Variant("inverse, all examples", add=(f"SLQLearningRate({_K}, on='dataset')",)),
                Variant("polyak", add=(f"SLQLearningRate('polyak', {_K})",)),
                Variant("two over sum", add=(f"SLQLearningRate('two_over_sum', {_K})",)),
                Variant("rayleigh", add=("SLQLearningRate('rayleigh')",)),
            ),
            "Handwritten digits, 1437 to train, 360 to test; MLP 64-64-10, tanh; SGD with momentum 0.9, 15 epochs. The "
            "learner begins with a rate of 0.01 and measures on one batch at the start of each epoch but the first.",
            summaries=(Summary(_GRID, tuple(f"lr {lr:g}" for lr in _RATES), best="test/acc", best_is="higher"),),
        ),
    ),
    seeds=5,
    expectations=(
        *(_number(f"{stage}/ratio_{size}", 1.0, "higher") for stage in _STAGES for size in SIZES[:-1]),
        *(_number(f"{stage}/least_fall", 1.0, "higher") for stage in _STAGES),
        *(_number(f"{stage}/exponent", -1.1, "higher") for stage in _STAGES),
        *(_number(f"{stage}/exponent", -0.4, "lower") for stage in _STAGES),
        Expectation(_LEARNER, _INVERSE, _GRID, "test/acc", "higher", margin=-0.01),
        Expectation(_LEARNER, _INVERSE, 0.9, "test/acc", "higher", wins=5, description="No training diverges."),
    ),
    refuted_when="There is no excess with batches of 16; or the learner is worse than the median of the grid.",
    findings=(
        "The other rules stand beside the default, to show why it is the default.",
        "`predicted_4` is what the additive noise model predicts for batches of 4, over what was measured.",
    ),
    measures=(
        "test/acc",
        "test/nll",
        "train/loss",
        "slq/lr",
        *(f"{stage}/{name}" for stage in _STAGES for name in ("full", *(f"ratio_{s}" for s in SIZES), "exponent")),
        *(f"{stage}/predicted_4" for stage in _STAGES),
    ),
)
