# SPDX-License-Identifier: Apache-2.0
"""How the conformance kit makes small instances of the components of Data Diet."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from fulgurite.testing import Case
from fulgurite_plugins.data_selection.data_diet.callbacks import ScoreExamples
from fulgurite_plugins.data_selection.data_diet.files import Scores, save_scores
from fulgurite_plugins.data_selection.data_diet.forgetting import ForgettingEvents
from fulgurite_plugins.data_selection.data_diet.intervention import PruneTrainingSet


def _logits(rows: int = 7) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def _logits_and_classes() -> tuple[Any, ...]:
    return _logits(), torch.tensor([0, 1, 2, 3, 0, 1, 2])


def _network_and_batch() -> tuple[Any, ...]:
    network = nn.Sequential(skip_init(nn.Linear, 4, 5), nn.Tanh(), skip_init(nn.Linear, 5, 4))
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return network, _logits(), torch.tensor([0, 1, 2, 3, 0, 1, 2])


def _scores() -> torch.Tensor:
    return torch.rand(20, generator=torch.Generator().manual_seed(1))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with a file of scores, which lasts as long as the process."""
    folder = tempfile.TemporaryDirectory()
    save_scores(Path(folder.name) / "scores.safetensors", Scores({"el2n@1": _scores()}))
    return folder


def _file() -> tuple[Any, ...]:
    return (str(Path(_folder().name) / "scores.safetensors"),)


def _score() -> ScoreExamples:
    return ScoreExamples(epochs=(1,))


def _score_by_gradients() -> ScoreExamples:
    return ScoreExamples(("grand",), epochs=(1,))


_WHOLE = {
    "limited_batches": "it chooses from the whole training set, which a loader of the first three batches is not",
}
_ORDER = {
    **_WHOLE,
    "two_ranks_equal_one": "the order of a pruned training set is the plugin's own, and divides into other batches on two "
    "ranks; that both ranks train on the same part, with the same number of steps, is tested with the plugin",
}

_CHANGED_OUTPUT = (
    "the kit's module multiplies what its network has returned before the criterion gets it; GraNd needs a network whose "
    "output is what the criterion gets, and refuses others by name, which is tested with the plugin"
)

_MODEL = "its first argument is a model, whose precision the kit does not change with that of the inputs"

_NAN = {
    "nan_batch": "scores that are NaN are refused, with the examples named: what would be chosen by them is arbitrary",
}
_INNER = dict.fromkeys(
    ("nothing_left_after_exception", "nothing_left_after_interrupt"),
    "the error falls in an inner run, inside on_fit_start, the name of which Lightning leaves on the module whichever "
    "callback fails there; the other cases check the rest",
)
_RELOADED = {
    "random_streams": "Lightning begins a loader that is asked for again in the middle of training twice, which draws one "
    "number more; the data are other ones from there on anyway",
}

CASES = {
    "PruneTrainingSet": (
        Case(
            make=lambda: PruneTrainingSet(keep=0.5, runs=0, epoch=1),
            off=lambda: PruneTrainingSet(keep=1.0, runs=0, epoch=1),
            label="online",
            inapplicable=_ORDER | _NAN | _RELOADED,
        ),
        Case(
            make=lambda: PruneTrainingSet(keep=0.5, strategy="random", seed=3, match_steps=False),
            off=lambda: PruneTrainingSet(keep=1.0, strategy="random"),
            label="random",
            inapplicable=_ORDER,
        ),
        Case(
            make=lambda: PruneTrainingSet(keep=0.5, runs=2, epoch=1, seed=3),
            off=lambda: PruneTrainingSet(keep=1.0, runs=1, epoch=0),
            label="inner runs",
            inapplicable=_ORDER | _NAN | _INNER,
        ),
    ),
    "ScoreExamples": (  # it never changes anything, and is off when it is on
        Case(make=_score, off=_score, observes=True),
        Case(
            label="grand",
            make=_score_by_gradients,
            off=_score_by_gradients,
            observes=True,
            inapplicable=dict.fromkeys(("nan_batch", "nan_is_reported"), _CHANGED_OUTPUT),
        ),
    ),
    "ForgettingEvents": Case(make=ForgettingEvents, off=ForgettingEvents, observes=True),  # likewise
    "el2n": Case(arguments=_logits_and_classes),
    "l1_error": Case(arguments=_logits_and_classes),
    "max_margin": Case(arguments=_logits_and_classes),
    "sum_margin": Case(arguments=_logits_and_classes),
    "grand": Case(
        arguments=_network_and_batch,
        inapplicable=dict.fromkeys(("precision_is_kept", "half_precision", "gradient"), _MODEL),
    ),
    "forgetting_counts": Case(arguments=lambda: (_logits(20) > 0,)),
    "average_scores": Case(arguments=lambda: (torch.stack([_scores(), _scores()]),)),
    "select_examples": Case(arguments=lambda: (_scores(), 8)),
    "load_scores": Case(arguments=_file),
}
