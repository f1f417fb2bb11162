# SPDX-License-Identifier: Apache-2.0
"""The rival of the claim: a random search over the rates, whose draws are other ones for each seed."""

from __future__ import annotations

import os

import numpy as np

from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.replay import JitterSchedule
from fulgurite_plugins.bilevel.self_tuning_networks.targets import Dropout, InputDropout


class RandomRates(JitterSchedule):
    """Train with three fixed rates of dropout, uniform in (0, 0.9), that the global seed and a number determine.

    Args:
        draw: The number of the draw.
    """

    def __init__(self, draw: int) -> None:
        self.draw = draw
        generator = np.random.default_rng([int(os.environ.get("PL_GLOBAL_SEED", 0)), draw])
        rates = generator.uniform(0.0, 0.9, 3).tolist()
        places = {"input": InputDropout(), "hidden 1": Dropout("network.3"), "hidden 2": Dropout("network.6")}
        super().__init__(
            [Hyper(name, *each) for name, *each in zip(places, places.values(), rates, strict=True)], std=0.0
        )
