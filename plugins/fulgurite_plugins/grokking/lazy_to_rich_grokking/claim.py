# SPDX-License-Identifier: Apache-2.0
"""The claim: the lazier a training, the longer generalisation lags behind; on the paper's toy, and by its sample size."""

from __future__ import annotations

from typing import Any

from fulgurite.claims import Claim, Expectation, Setting, Variant

_HERE = "fulgurite_plugins.grokking.lazy_to_rich_grokking"
_DIM, _WIDTH, _STEPS, _STEPS_PER_EPOCH = 25, 400, 10_000, 100
_RATE = 1.0
"""Mean-field learning rate for half the mean squared error."""

_DELAY = "lazyrichmonitor/delay"
_TRAIN, _TEST = "ratio/train", "ratio/test"
_WHEN_LEARNT = "ratio/test_to_train_when_learnt"
_KERNEL = "ratio/test_to_kernel_regression"
_DISPLACEMENT, _ALIGNMENT = "lazyrichmonitor/displacement", "lazyrichmonitor/kernel_alignment"


def _config() -> dict[str, Any]:
    """Return the paper's toy: a quadratic perceptron on a quadratic target, full-batch gradient descent, no weight decay."""
    return {
        "model": {
            "class_path": "Regression",
            "init_args": {
                "network": {
                    "class_path": f"{_HERE}.modules.QuadraticPerceptron",
                    "init_args": {"input_dim": _DIM, "width": _WIDTH, "epsilon": 0.25},
                },
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": _RATE * _WIDTH / 2}},
            },
        },
        "data": {
            "class_path": "PolynomialRegression",
            "init_args": {"dim": _DIM, "train_size": 150, "test_size": 1000, "repeats": _STEPS_PER_EPOCH},
        },
        "trainer": {
            "max_epochs": _STEPS // _STEPS_PER_EPOCH,
            "accelerator": "cpu",
            "callbacks": [
                {
                    "class_path": f"{_HERE}.monitor.LazyRichMonitor",
                    "init_args": {"max_samples": 1000, "every_n_steps": 20},
                },
                {"class_path": f"{_HERE}.claim_measures.Ratios"},
            ],
        },
    }


_ALPHAS = tuple(Variant(f"alpha {alpha:g}", add=(f"OutputScaling(alpha={alpha})",)) for alpha in (0.5, 2.0, 8.0))
_SIZES = tuple(
    Variant(f"{size} examples", add=("OutputScaling(alpha=2.0)",), overrides={"data.train_size": size})
    for size in (40, 150, 600)
)


def _neighbours(metric: str, direction: Any) -> tuple[Expectation, ...]:
    return tuple(
        Expectation("alpha", lazier, richer, metric, direction, wins=5)
        for richer, lazier in (("alpha 0.5", "alpha 2"), ("alpha 2", "alpha 8"))
    )


CLAIM = Claim(
    statement="The lazier a training is, the longer the test loss lags behind the training loss; a rich one passes below "
    "what its first kernel can reach. With too few examples it never generalises, with many there is no delay.",
    settings=(
        Setting(
            "alpha",
            _config(),
            _ALPHAS,
            "A quadratic perceptron (25 inputs, 400 hidden units, epsilon 0.25) on 150 examples of a quadratic target, "
            "10,000 steps of full-batch gradient descent, centred, learning rate corrected. The seed draws the initial "
            "weights; the examples are the same for all seeds.",
        ),
        Setting("examples", _config(), _SIZES, "The same at alpha = 2, with 40, 150 and 600 examples."),
    ),
    seeds=5,
    expectations=(
        *_neighbours(_DELAY, "higher"),
        *_neighbours(_DISPLACEMENT, "lower"),
        *_neighbours(_ALIGNMENT, "lower"),
        Expectation("alpha", "alpha 8", 3.0, _WHEN_LEARNT, "higher", wins=5),
        Expectation("alpha", "alpha 0.5", 0.8, _KERNEL, "lower", wins=5),
        Expectation("examples", "40 examples", 0.1, _TEST, "higher", wins=5),
        Expectation("examples", "150 examples", "600 examples", _DELAY, "higher", wins=5),
        Expectation("examples", "600 examples", 0.3, _DELAY, "lower", wins=5),
    ),
    refuted_when="The delay does not grow with alpha, or at alpha = 0.5 the test loss never passes below 0.8 times that of "
    "kernel regression.",
    findings=(
        "A loss counts as learnt at a tenth of that of a network which gives zero. The delay is in decades of steps; where "
        "the test loss is not learnt within 10,000 steps, it is what it is at least.",
        "Almost no delay, with 600 examples, is taken to be less than a factor of two (0.3 decades).",
    ),
    measures=(_DELAY, _TRAIN, _TEST, _KERNEL, _WHEN_LEARNT, _DISPLACEMENT, _ALIGNMENT),
)
