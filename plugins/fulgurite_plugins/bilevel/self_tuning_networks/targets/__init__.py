# SPDX-License-Identifier: Apache-2.0
"""What a hyperparameter can act on."""

from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import (
    InputTarget,
    LossTarget,
    PenaltyTarget,
    Site,
    Target,
)
from fulgurite_plugins.bilevel.self_tuning_networks.targets.criterion import LabelSmoothing
from fulgurite_plugins.bilevel.self_tuning_networks.targets.dropout import Dropout, EmbeddingDropout, WeightDrop
from fulgurite_plugins.bilevel.self_tuning_networks.targets.images import ColorJitter, Cutout
from fulgurite_plugins.bilevel.self_tuning_networks.targets.inputs import (
    GaussianNoise,
    InputDropout,
    InputFunction,
    InputScale,
)
from fulgurite_plugins.bilevel.self_tuning_networks.targets.interventions import InterventionWeight
from fulgurite_plugins.bilevel.self_tuning_networks.targets.penalties import (
    ActivationPenalty,
    TemporalActivationPenalty,
    WeightDecay,
)

__all__ = [
    "ActivationPenalty",
    "ColorJitter",
    "Cutout",
    "Dropout",
    "EmbeddingDropout",
    "GaussianNoise",
    "InputDropout",
    "InputFunction",
    "InputScale",
    "InputTarget",
    "InterventionWeight",
    "LabelSmoothing",
    "LossTarget",
    "PenaltyTarget",
    "Site",
    "Target",
    "TemporalActivationPenalty",
    "WeightDecay",
    "WeightDrop",
]
