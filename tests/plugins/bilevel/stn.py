# SPDX-License-Identifier: Apache-2.0
"""What the tests of the self-tuning callback share."""

from __future__ import annotations

import tempfile
from typing import Any

import lightning.pytorch as pl
import torch

from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.intervention import SelfTuning
from fulgurite_plugins.bilevel.self_tuning_networks.targets import Dropout, GaussianNoise, WeightDecay
from tests import helpers


class Slow(helpers.Plain):
    """A perceptron with dropout and a learning rate with which it does not diverge."""

    def __init__(self, dropout: float = 0.2, lr: float = 0.05) -> None:
        super().__init__(dropout=dropout)
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def noise(**kwargs: Any) -> Hyper:
    return Hyper("noise", GaussianNoise(), **{"init": 0.2, "range": (0.0, 1.0), **kwargs})


def rate(**kwargs: Any) -> Hyper:
    return Hyper("rate", Dropout(), **{"init": 0.3, **kwargs})


def decay(**kwargs: Any) -> Hyper:
    return Hyper("decay", WeightDecay(), **{"init": 0.01, "range": (0.0, 1.0), **kwargs})


def tuner(*hypers: Hyper, **kwargs: Any) -> SelfTuning:
    defaults: dict[str, Any] = {"warmup_epochs": 0.5, "lr": 0.05, "scale_lr": 0.05, "schedule_file": None}
    return SelfTuning([*hypers] or [rate(), noise()], **{**defaults, **kwargs})


def fit(callbacks: Any, module: Any = None, n: int = 160, **kwargs: Any) -> pl.Trainer:
    """Train on 160 examples in batches of 16: ten batches, eight of them when a fifth is held out."""
    loader = kwargs.pop("loader", None)
    if loader is None:
        loader = helpers.loader(helpers.data(n), shuffle=kwargs.pop("shuffle", True))
    kwargs.setdefault("default_root_dir", tempfile.gettempdir())
    return helpers.fit(Slow() if module is None else module, callbacks, loader, **kwargs)
