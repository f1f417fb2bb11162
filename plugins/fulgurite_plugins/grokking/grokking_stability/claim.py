# SPDX-License-Identifier: Apache-2.0
"""The claims of the paper: grokking without delay, and collapse in the order of precisions, on modular addition."""

from __future__ import annotations

from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Variant

_HERE = "fulgurite_plugins.grokking.grokking_stability"
_PASSES = 25
_STEPS = 600
_LONG = 4500


def _config(modulus: int, fraction: float, hidden: int, steps: int, callback: dict[str, Any] | None) -> dict[str, Any]:
    """Return a training of full batches: an MLP without biases, AdamW without weight decay."""
    return {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "network": {
                    "class_path": f"{_HERE}.modules.ModularMLP",
                    "init_args": {"input_shape": [2 * modulus], "num_classes": modulus, "hidden": [hidden, hidden]},
                },
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-25, "weight_decay": 0.0},
                },
            },
        },
        "data": {
            "class_path": f"{_HERE}.claim_measures.ModularPasses",
            "init_args": {"modulus": modulus, "train_fraction": fraction, "passes": _PASSES},
        },
        "trainer": {
            "max_epochs": steps // _PASSES,
            "limit_val_batches": 0,
            "accelerator": "cpu",
            **({"callbacks": [callback]} if callback else {}),
        },
    }


def _in_precision(name: str, loss: str, dtype: str, **optimizer: float) -> Variant:
    times = f"{_HERE}.claim_measures.CollapseTimes('{dtype}', {_LONG})"
    return Variant(
        name,
        add=(f"ReplaceSoftmax(loss='{loss}', compute_dtype='{dtype}')", times),
        overrides={f"model.optimizer.init_args.{key}": value for key, value in optimizer.items()},
    )


def _number(variant: str, number: float, metric: str, direction: Any, setting: str = "addition") -> Expectation:
    return Expectation(setting, variant, number, metric, direction, wins=5)


CLAIM = Claim(
    statement="With perpendicular gradients a network generalises on modular addition almost as soon as it fits, without "
    "weight decay, where plain training does not; and softmax collapses the earlier, the lower the precision of the loss.",
    settings=(
        Setting(
            "addition",
            _config(
                59,
                0.5,
                200,
                _STEPS,
                {"class_path": f"{_HERE}.claim_measures.GrokkingTimes", "init_args": {"steps": [100, 200, _STEPS]}},
            ),
            (
                Variant("cross entropy"),
                Variant("weight decay 1", overrides={"model.optimizer.init_args.weight_decay": 1.0}),
                Variant("PerpGrad", add=("PerpGrad()",)),
            ),
            "Addition modulo 59, half of the pairs to train, in 600 steps of full batches. The seed draws the initial "
            "weights; the split is the same for all seeds.",
        ),
        Setting(
            "collapse",
            _config(29, 0.7, 128, _LONG, None),
            (
                _in_precision("float16", "cross_entropy", "float16", eps=1e-30),
                _in_precision("float32", "cross_entropy", "float32"),
                _in_precision("float64", "cross_entropy", "float64"),
                _in_precision("StableMax", "stablemax", "float64"),
            ),
            f"Addition modulo 29, seven tenths of the pairs to train, in {_LONG} steps of full batches; cross entropy in "
            "three precisions, and StableMax. The model is float32. The seed draws the initial weights.",
        ),
    ),
    seeds=5,
    expectations=(
        _number("PerpGrad", 0.95, "grokking/acc_at_200", "higher"),
        _number("cross entropy", 0.05, f"grokking/acc_at_{_STEPS}", "lower"),
        Expectation("addition", "PerpGrad", "weight decay 1", "grokking/step_95", "lower", wins=5),
        Expectation("collapse", "float16", "float32", "stability/collapse_40", "lower", wins=5),
        Expectation("collapse", "float32", "float64", "stability/collapse_40", "lower", wins=5),
        _number("float16", -0.5, "stability/zero_gradients_later_by", "higher", "collapse"),
        _number("float32", -0.5, "stability/zero_gradients_later_by", "higher", "collapse"),
        _number("StableMax", 0.001, "stability/zero_gradients", "lower", "collapse"),
    ),
    refuted_when="PerpGrad is no faster than weight decay, or plain training generalises as well; or collapse comes no "
    "earlier in a lower precision.",
    findings=(
        "A step that was not reached counts as the last one plus one.",
        "StableMax needs far longer trainings than these to generalise without regularisation; that its gradients do not "
        "vanish is what is tested.",
    ),
    measures=(
        "grokking/acc_at_100",
        "grokking/acc_at_200",
        f"grokking/acc_at_{_STEPS}",
        "grokking/step_95",
        "grokking/weight_norm",
        "stability/collapse_begins",
        "stability/collapse_40",
        "stability/zero_gradients_begin",
        "stability/collapse",
        "stability/zero_gradients",
        "stability/nlm_alignment",
        "train/loss",
        "test/acc",
    ),
)
