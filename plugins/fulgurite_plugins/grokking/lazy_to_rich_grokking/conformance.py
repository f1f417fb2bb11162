# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the plugin's components."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.testing import Case
from fulgurite_plugins.grokking.lazy_to_rich_grokking.intervention import OutputScaling
from fulgurite_plugins.grokking.lazy_to_rich_grokking.metrics import GeneralizationDelay, KernelAlignment
from fulgurite_plugins.grokking.lazy_to_rich_grokking.modules import QuadraticPerceptron
from fulgurite_plugins.grokking.lazy_to_rich_grokking.monitor import LazyRichMonitor
from fulgurite_plugins.grokking.lazy_to_rich_grokking.scaling import scale_output


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _kernel() -> Tensor:
    rows = _normal(6, 8)
    return rows @ rows.mT


def _trajectory() -> tuple[Any, ...]:
    return _kernel(), _normal(6, 2, seed=1), _normal(6, 2, seed=2), torch.tensor([0.0, 0.5, 3.0])


def _curves() -> tuple[Any, ...]:
    steps = torch.arange(1, 24)
    return 0.85 / steps, 1.85 / steps, steps


def _scaled() -> nn.Module:
    layer = nn.utils.skip_init(nn.Linear, 3, 2).requires_grad_(False)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.zeros_(layer.bias)
    scale_output(layer, layer, 3.0, "none")
    return layer


def _toy() -> tuple[Any, ...]:
    return _normal(7, 3), 2.0, 0.25, torch.tensor([0.5, 1.0, -1.2])


def _flow() -> tuple[Any, ...]:
    return *_toy(), 1.0, 10


CASES = {
    "OutputScaling": (
        Case(make=lambda: OutputScaling(alpha=4.0), off=lambda: OutputScaling(alpha=1.0, center="none")),
        Case(
            label="antisymmetric",
            make=lambda: OutputScaling(alpha=0.5, center="antisymmetric"),
            off=lambda: OutputScaling(alpha=1.0, center="none"),
        ),
        Case(
            label="none",
            make=lambda: OutputScaling(alpha=0.5, center="none", init_scale=0.5),
            off=lambda: OutputScaling(alpha=1.0, center="none", init_scale=1.0),
        ),
    ),
    "LazyRichMonitor": Case(
        make=lambda: LazyRichMonitor(max_samples=16, every_n_steps=2, allow_batchnorm_eval=True),
        observes=True,
        inapplicable={
            "validation_is_untouched": "where there is validation data it measures their loss too, and remembers it (that "
            "validating more often changes nothing is tested with the plugin)",
        },
    ),
    "QuadraticPerceptron": Case(make=lambda: QuadraticPerceptron(3, 5), arguments=lambda: (_normal(4, 3),)),
    "KernelAlignment": Case(
        make=KernelAlignment,
        arguments=lambda: (_kernel(), _normal(6, 2, seed=1)),
        inapplicable=dict.fromkeys(
            ("batches_equal_the_whole", "order_of_merging", "metric_on_two_ranks"),
            "`update` takes blocks of a matrix, with the targets of rows and columns: no examples that could be divided "
            "along one dimension (the plugin's own tests cut blocks)",
        ),
    ),
    "GeneralizationDelay": Case(make=GeneralizationDelay, arguments=_curves),
    "merge": Case(arguments=lambda: (_scaled(),)),
    "kernel_alignment": Case(arguments=lambda: (_kernel(), _normal(6, 2, seed=1))),
    "kernel_regression": Case(arguments=lambda: (_kernel(), _normal(6, 2, seed=1))),
    "lazy_trajectory": Case(arguments=_trajectory),
    "generalization_delay": Case(arguments=lambda: (torch.tensor([0.5, 0.05]), torch.tensor([0.5, 0.2]))),
    "generalization_decomposition": Case(arguments=_toy),
    "population_gradient": Case(arguments=_toy),
    "population_flow": Case(arguments=_flow),
    "quadratic_ntk": Case(arguments=lambda: (_normal(7, 3), 0.25, _normal(4, 3, seed=1))),
}
