# SPDX-License-Identifier: Apache-2.0
"""Data Diet on two ranks: the same scores as on one, the same part and number of steps on both."""

from __future__ import annotations

from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from fulgurite.testing.processes import on_ranks
from fulgurite_plugins.data_selection import ForgettingEvents, PruneTrainingSet, ScoreExamples, load_scores
from tests import helpers
from tests.helpers import Plain, fit, weights
from tests.plugins.data_selection.test_data_diet_training import Drawn, Presentations, expected

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


def two_ranks() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)), "devices": 2}


class Frozen(Plain):
    """Does not move, so that scores do not depend on how the batches were made."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Everything in one pair of processes; 53 examples, so that one is padded."""
    folder = tmp_path_factory.mktemp("ranks")

    def train(rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        loader = lambda: helpers.loader(helpers.data(53), batch_size=8)  # noqa: E731
        scorer = ScoreExamples(("el2n", "grand"), (1,), directory=str(folder / "scores"))
        fit(Frozen(), [scorer], loader(), epochs=1, **two_ranks())
        found["latest"] = dict(scorer.latest)
        oracle, events = Presentations(), ForgettingEvents(directory=str(folder / "events"))
        fit(Plain(dropout=0.3), [oracle, events], loader(), epochs=4, **two_ranks())
        found |= {"events": events.scores(), "presented": oracle.rows, "state": events.state_dict()}
        for name, arguments in {
            "online": {"runs": 0, "epoch": 1},
            "inner": {"runs": 3, "epoch": 1, "directory": str(folder / "inner")},
            "random": {"strategy": "random", "match_steps": False},
            "all": {"keep": 1.0, "runs": 0, "epoch": 1},
        }.items():
            plugin, drawn, module = PruneTrainingSet(**{"keep": 0.4, "seed": 5, **arguments}), Drawn(), Plain()
            trainer = fit(module, [plugin, drawn], loader(), epochs=3, **two_ranks())
            found[name] = {
                "indices": plugin.indices,
                "values": plugin.values,
                "drawn": drawn.epochs,
                "steps": trainer.global_step,
                "weights": weights(module),
            }
        module = Plain()
        fit(module, [], loader(), epochs=3, **two_ranks())
        found["plain"] = weights(module)
        return found

    return on_ranks(train, seconds=200), folder


def test_scores_are_the_same_on_both_ranks_and_those_of_one(ranks, tmp_path):
    (a, b), folder = ranks
    one = ScoreExamples(("el2n", "grand"), (1,), directory=str(tmp_path))
    fit(Frozen(), [one], helpers.loader(helpers.data(53), batch_size=16), epochs=1)
    for name, values in one.latest.items():
        assert torch.equal(a["latest"][name], b["latest"][name])
        torch.testing.assert_close(a["latest"][name], values, rtol=1e-6, atol=1e-6)
    (file,) = (folder / "scores").iterdir()
    assert torch.equal(load_scores(file).values["el2n@1"], a["latest"]["el2n@1"])


def test_forgetting_events_are_merged_and_padding_counts_once(ranks):
    (a, b), folder = ranks
    assert torch.equal(a["events"].nan_to_num(-1), b["events"].nan_to_num(-1))
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert len(a["presented"]) == len(b["presented"]) == 4 * 27
    interleaved = list(chain.from_iterable(zip(a["presented"], b["presented"], strict=True)))
    per_epoch = [interleaved[start : start + 54][:53] for start in range(0, 4 * 54, 54)]  # the 54th is padded
    found = expected(list(chain.from_iterable(per_epoch)), 53)
    torch.testing.assert_close(a["events"], found, rtol=0, atol=0, equal_nan=True)
    assert float(found[found.isfinite()].sum()) > 3
    assert len(list((folder / "events").iterdir())) == 1


@pytest.mark.parametrize("name", ["online", "inner", "random"])
def test_both_ranks_train_on_the_same_part_for_the_same_number_of_steps(ranks, name):
    (a, b), _ = ranks
    first, second = a[name], b[name]
    assert torch.equal(first["indices"], second["indices"])
    assert len(first["indices"]) == 21
    assert torch.equal(first["weights"], second["weights"])
    assert first["steps"] == second["steps"] == (6 if name == "random" else 12)
    kept = set(first["indices"].tolist())
    for epoch, (own, other) in enumerate(zip(first["drawn"], second["drawn"], strict=True)):
        together = {*own, *other}
        assert together == (set(range(53)) if name == "online" and epoch == 0 else kept)
        assert len(own) == len(other)
    if name != "random":
        torch.testing.assert_close(first["values"], second["values"], rtol=0, atol=0)


def test_ranks_share_the_inner_runs_which_are_those_of_one_process(ranks, tmp_path):
    (a, _), folder = ranks
    assert len(list((folder / "inner").iterdir())) == 3
    one = PruneTrainingSet(keep=0.4, seed=5, runs=3, epoch=1, directory=str(tmp_path))
    fit(Plain(), [one], helpers.loader(helpers.data(53), batch_size=16), epochs=3)
    torch.testing.assert_close(a["inner"]["values"], one.values, rtol=1e-6, atol=1e-6)
    assert torch.equal(a["inner"]["indices"], one.indices)


def test_everything_kept_is_bit_equal_to_training_without_it(ranks):
    (a, _), _ = ranks
    assert torch.equal(a["all"]["weights"], a["plain"])
