# SPDX-License-Identifier: Apache-2.0
"""The claim of Self-Tuning Networks: what it compares, and its random search."""

from __future__ import annotations

import copy

import pytest
import torch

from fulgurite import spec
from fulgurite.claims import judge
from fulgurite.cli.train import assemble
from fulgurite.records import RunRecord
from fulgurite_plugins.bilevel.self_tuning_networks.claim import CLAIM, CONFIG, DRAWS, STARTS
from fulgurite_plugins.bilevel.self_tuning_networks.claim_search import RandomRates

OFF = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def rates_of(seed: int, draw: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    return [hyper.init for hyper in RandomRates(draw).hyperparameters]


def test_a_draw_is_determined_by_seed_and_number(monkeypatch):
    drawn = {(seed, draw): rates_of(seed, draw, monkeypatch) for seed in range(6) for draw in range(1, DRAWS + 1)}
    assert rates_of(3, 7, monkeypatch) == drawn[3, 7]
    values = torch.tensor(list(drawn.values()))
    assert len(values.unique()) == 3 * 60
    assert 0.0 < float(values.min()) < 0.05 < 0.85 < float(values.max()) < 0.9
    assert (values.mean(0) - 0.45).abs().max() < 4 * 0.9 / (12 * 60) ** 0.5


def test_every_variant_of_the_claim_trains_the_same_number_of_updates_with_its_own_rates(tmp_path, monkeypatch):
    config = copy.deepcopy(CONFIG)
    config["trainer"] |= {**OFF, "max_epochs": 1, "check_val_every_n_epoch": 1, "default_root_dir": str(tmp_path)}
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    for variant in CLAIM.settings[0].variants:
        (callback,) = (spec.build(text.replace("warmup_epochs=30", "warmup_epochs=0")) for text in variant.add)
        cli = assemble(config, callbacks=[callback], seed=5)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        assert callback.updates == 5
        if "tuned" not in variant.name:
            logged = [float(v) for k, v in cli.trainer.callback_metrics.items() if k.startswith(("jitters", "randomr"))]
            inits = [hyper.init for hyper in callback.hyperparameters]
            assert logged == pytest.approx([inits[0], inits[1], inits[-1]])


def test_a_training_takes_less_than_a_sixth_of_the_steps_of_the_random_search():
    updates = 5 * CONFIG["trainer"]["max_epochs"]
    steps_of_hyperparameters = (updates - 30 * 5) // 2
    assert steps_of_hyperparameters == 925
    assert 6 * (updates + steps_of_hyperparameters) < DRAWS * updates


def records(fixed: dict[float, float], tuned: dict[float, float], search: float) -> list[RunRecord]:
    """Return six seeds of runs that differ by little; the best of the search has the lowest held-out loss."""
    made = []
    for seed in range(6):
        values = {f"fixed at {s}": fixed[s] for s in STARTS} | {f"tuned from {s}": tuned[s] for s in STARTS}
        values |= {f"random {draw}": search + 0.1 * (draw != 4) for draw in range(1, DRAWS + 1)}
        for number, (name, value) in enumerate(values.items()):
            near = value + 1e-3 * ((seed * 7 + number * 5) % 6)
            made.append(RunRecord("digits", name, seed, "ok", metrics={"test/nll": near, "val/nll": near}))
    return made


FIXED = dict(zip(STARTS, (0.60, 0.49, 2.29), strict=True))
SPECIFIED = dict(zip(STARTS, (0.403, 0.402, 0.441), strict=True))


def test_what_the_specification_measured_would_be_reproduced():
    verdict = judge(CLAIM, records(FIXED, SPECIFIED, 0.407))
    assert verdict.outcome == "reproduced", verdict
    assert len(verdict.results) == 7


@pytest.mark.parametrize(
    ("tuned", "search", "refuted"),
    [
        ((0.403, 0.402, 0.541), 0.5, ["digits: test/nll of spread of tuned lower than 0.12"]),
        (
            (0.39, 0.40, 0.49),
            0.407,
            ["digits: test/nll of tuned from 0.8 lower than of random search, or worse by at most 0.061"],
        ),
        (
            (0.403, 0.502, 0.441),
            0.5,
            ["digits: test/nll of tuned from 0.4 lower than of fixed at 0.4, in at least 5 seeds"],
        ),
    ],
)
def test_what_would_refute_it_does(tuned, search, refuted):
    verdict = judge(CLAIM, records(FIXED, dict(zip(STARTS, tuned, strict=True)), search))
    assert [str(result.expectation) for result in verdict.results if result.status == "refuted"] == refuted
    assert verdict.outcome == "not reproduced"
