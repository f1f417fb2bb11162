# SPDX-License-Identifier: Apache-2.0
"""The claim of dynamical stability: SGD ends where `lr Tr(H) <= 2 B`, gradient descent does not, and errs more."""

from __future__ import annotations

import math
from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Variant

_PARTS = "fulgurite_plugins.curvature.dynamical_stability"
_EPOCHS, _STEPS = 10, 20_000
_CONVERGED = 1e-4
"""Training loss below which a solution interpolates."""


def _config(network: dict[str, Any], data: str) -> dict[str, Any]:
    """Return the training of the claim: half the squared error, plain SGD, a constant rate, 20,000 steps."""
    monitor = {"quantities": ["exact"], "every_n_epochs": 1}
    return {
        "model": {
            "class_path": "Regression",
            "init_args": {
                "network": network,
                "criterion": {"class_path": f"{_PARTS}.claim_parts.HalfSquaredError"},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": f"{_PARTS}.claim_parts.{data}"},
        "trainer": {
            "max_epochs": _EPOCHS,
            "accelerator": "cpu",
            "callbacks": [
                {"class_path": f"{_PARTS}.callbacks.StabilityMonitor", "init_args": monitor},
                {"class_path": f"{_PARTS}.claim_parts.Solution"},
            ],
        },
    }


def _sgd(lr: float, examples: int) -> Variant:
    data = {"data.batch_size": 1, "data.passes_per_epoch": math.ceil(_STEPS / _EPOCHS / examples)}
    return Variant(f"SGD {lr}", overrides={"model.optimizer.lr": lr, **data})


def _gd(lr: float) -> Variant:
    data = {"data.passes_per_epoch": _STEPS // _EPOCHS}
    return Variant(f"GD {lr}", overrides={"model.optimizer.lr": lr, **data})


def _expectations(setting: str, sgd: tuple[float, ...], gd: float) -> tuple[Expectation, ...]:
    bounded = tuple(
        Expectation(setting, f"SGD {lr}", 1.0, "stability/lr_trace", "lower", wins=5, description=f"lr Tr(H) / 2, {lr}")
        for lr in sgd
    )
    converged = tuple(
        Expectation(setting, name, _CONVERGED, "stability/loss", "lower", wins=5)
        for name in (f"SGD {sgd[-1]}", f"GD {gd}")
    )
    beyond = Expectation(setting, f"GD {gd}", 4 / gd, "stability/trace", "higher", wins=5, description="lr Tr(H) > 4")
    margin = -math.log(0.6)
    better = Expectation(setting, f"SGD {sgd[-1]}", f"GD {gd}", "test/log_mse", "lower", wins=5, margin=margin)
    return (*bounded, *converged, beyond, better)


_DIAGONAL_SGD, _DIAGONAL_GD = (0.01, 0.05, 0.08, 0.12), (0.01, 0.3)
_NEURON_SGD, _NEURON_GD = (0.003, 0.02), (0.003, 0.08)

CLAIM = Claim(
    statement="At solutions with zero loss that SGD with batch size 1 finds, the learning rate times the trace of the "
    "Hessian is at most 2, while gradient descent exceeds it; so that SGD with a large rate ends in solutions of "
    "smaller norm, which generalise better.",
    settings=(
        Setting(
            "diagonal",
            _config(
                {
                    "class_path": f"{_PARTS}.modules.DiagonalLinearNetwork",
                    "init_args": {"dim": 60, "init_scale": [0.5, 0.1]},
                },
                "SeededSparseRegression",
            ),
            (*(_sgd(lr, 30) for lr in _DIAGONAL_SGD), *(_gd(lr) for lr in _DIAGONAL_GD)),
            "A diagonal linear network on 30 Gaussian examples in 60 dimensions, three coefficients of which are not "
            "zero; 20,000 steps with batches of one example (SGD) or all (GD), at the learning rates in the names. The "
            "seed draws data, initial weights and order.",
        ),
        Setting(
            "neuron",
            _config(
                {"class_path": f"{_PARTS}.modules.TwoLayerReLU", "init_args": {"dim": 10, "width": 40}},
                "SeededSingleNeuron",
            ),
            (*(_sgd(lr, 40) for lr in _NEURON_SGD), *(_gd(lr) for lr in _NEURON_GD)),
            "A network of 40 ReLU units on 40 Gaussian examples in 10 dimensions of a single ReLU neuron; likewise.",
        ),
    ),
    seeds=5,
    expectations=(
        *_expectations("diagonal", _DIAGONAL_SGD, _DIAGONAL_GD[-1]),
        *_expectations("neuron", _NEURON_SGD, _NEURON_GD[-1]),
    ),
    refuted_when="A converged run of SGD has a learning rate times trace above 2, or no run of gradient descent has one "
    "above 4 at zero loss, or the test error of SGD at its largest rate is not below 0.6 times that of gradient "
    "descent.",
    findings=(
        "lr_trace is half the learning rate times the trace for batches of one example; for gradient descent the batch "
        "is the whole set, so that its trace is held against 4 over its learning rate.",
        "radius is the growth of the second moment in one step, exactly: at most 1 where SGD is mean-square stable.",
    ),
    measures=(
        "stability/trace",
        "stability/lr_trace",
        "stability/radius",
        "stability/lr_lambda",
        "stability/loss",
        "solution/l1_norm",
        "solution/path_norm",
        "test/mse",
        "test/log_mse",
    ),
)
