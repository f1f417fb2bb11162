# SPDX-License-Identifier: Apache-2.0
"""The measuring itself: pairing, order, intervals, targets; a paused training advances only in its turn."""

from __future__ import annotations

import math
import random
import threading

import pytest
import torch
from torch import nn

from fulgurite import FulguriteError, Intervention
from fulgurite.bench import (
    Case,
    Classifier,
    Estimate,
    Missing,
    Row,
    Target,
    Training,
    batches,
    calls,
    convolutional,
    interleave,
    peer,
    perceptron,
    run_case,
    trainers,
    training_memory,
)
from fulgurite.bench.running import _order


def test_every_variant_has_every_place_equally_often_in_a_cycle():
    """A variant that always came second would be measured with the caches that the first has filled."""
    names = ["a", "b", "c"]
    rounds = [_order(names, number) for number in range(6)]
    for name in names:
        assert sorted(order.index(name) for order in rounds) == [0, 0, 1, 1, 2, 2]


def test_rows_are_paired_by_round_and_the_warm_up_does_not_count():
    state = {"round": 0, "calls": 0}

    def drifting(offset: float):
        def block() -> float:
            state["calls"] += 1
            return 10.0 * ((state["calls"] - 1) // 2) + offset  # the machine gets slower from round to round

        return block

    rows = interleave({"a": drifting(1.0), "b": drifting(3.0)}, 8, reference="a")
    assert rows[0].values == tuple(10.0 * k + 1 for k in range(1, 9))
    difference = rows[1].difference
    assert (difference.median, difference.low, difference.high) == (2.0, 2.0, 2.0)
    assert rows[1].value.high > rows[1].value.low


def test_interval_of_the_median_covers_it_95_times_in_100():
    draw = random.Random(0)
    covered = 0
    for _ in range(2000):
        estimate = Estimate.of([draw.expovariate(1.0) for _ in range(25)])
        covered += estimate.low <= math.log(2) <= estimate.high
    assert 0.95 <= covered / 2000 <= 0.975  # order statistics cannot meet 95 % exactly; never less


def test_few_rounds_give_their_range():
    assert Estimate.of([3.0, 1.0, 2.0]) == Estimate(2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((1.0, 1.01, 1.02), "met"), ((1.2, 1.3, 1.4), "missed"), ((1.0, 1.04, 1.2), "unclear")],
)
def test_a_target_is_met_only_by_the_whole_interval(values, verdict):
    assert Target("x", "ratio", at_most=1.05).judge(Row("x", values, (1.0, 1.0, 1.0))) == verdict


def test_lower_bounds_are_judged_too():
    row = Row("x", (12.0, 13.0, 14.0), (1.0, 1.0, 1.0))
    assert Target("x", "ratio", at_least=10.0).judge(row) == "met"
    assert Target("x", "ratio", at_least=20.0).judge(row) == "missed"


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="`reference` to be one of 'a', but got 'b'"):
        interleave({"a": lambda: 1.0}, 1, reference="b")
    with pytest.raises(ValueError, match="`rounds` to be positive, but got 0"):
        interleave({"a": lambda: 1.0}, 0, reference="a")
    with pytest.raises(ValueError, match="`comparison` of Target"):
        Target("a", "quotient")


def test_calls_give_seconds_per_call():
    """A block of many calls is divided by their number."""
    done = {"n": 0}

    def function() -> None:
        done["n"] += 1

    (block,) = calls({"f": function}, block_seconds=1e-4).values()
    block()
    before = done["n"]
    seconds = block()
    assert done["n"] - before > 1
    assert 0 < seconds < 1e-2


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason():
    def make():
        import surely_not_installed

        return surely_not_installed.function

    blocks = calls({"ours": lambda: None, "peer": peer(make, "surely-not"), "other": peer(lambda: sum, "builtins")})
    assert not isinstance(blocks["other"], Missing)
    del blocks["other"]
    target = Target("peer", "ratio", at_least=1.0)
    ours, missing = run_case(Case("case", lambda: blocks, "ours", targets=(target,), rounds=2))
    assert (ours.variant, ours.missing, len(ours.values)) == ("ours", None, 2)
    assert missing.missing == "No module named 'surely_not_installed'; to measure it: pip install --no-deps surely-not"
    assert target.judge(missing) == "not measured"
    with pytest.raises(FulguriteError, match="surely_not_installed"):
        blocks["peer"]()


@pytest.mark.parametrize(("make", "features"), [(perceptron, 784), (convolutional, 768)])
@pytest.mark.parametrize("dropout", [None, 0.1])
def test_the_networks_of_the_benches_have_a_million_parameters_and_train(make, features, dropout):
    module = make(100, dropout)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(1e6, rel=0.05)
    inputs, targets = next(iter(batches(8, features, 100, 4)()))
    module.training_step((inputs, targets), 0).backward()
    assert all(bool((p.grad != 0).any()) for p in module.parameters())
    rates = [layer.p for layer in module.network.modules() if isinstance(layer, nn.Dropout | nn.Dropout2d)]
    assert rates == ([] if dropout is None else [0.1] * (2 if make is perceptron else 4))


def test_channels_change_the_network_and_its_last_layer_follows():
    module = convolutional(10, channels=(4, 8))
    assert module.network(torch.zeros(2, 768)).shape == (2, 10)
    assert module.network[-1].in_features == 8 * 4 * 4


def test_a_classifier_is_made_of_widths_or_of_a_network():
    widths = [layer.weight.shape for layer in Classifier((3, 5, 2)).network if isinstance(layer, nn.Linear)]
    assert widths == [(5, 3), (2, 5)]
    network = nn.Linear(3, 2)
    assert Classifier(network).network is network


class Counting(Intervention):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: object) -> None:
        self.steps += 1


def test_paused_trainings_advance_only_in_their_turn_and_end():
    counting = Counting()
    training = Training(lambda: Classifier((8, 4)), batches(64, 8, 4, 16), untimed_epochs=1, steps=5)
    blocks = trainers(training, {"alone": lambda: (), "counted": lambda: (counting,)})
    threads = threading.active_count()
    rows = None
    case = Case("case", lambda: blocks, "alone", rounds=3)
    rows = run_case(case)
    assert [row.variant for row in rows] == ["alone", "counted"]
    assert all(value > 0 for row in rows for value in row.values)
    assert 4 + 4 * 5 <= counting.steps <= 4 + 4 * 5 + 1  # an untimed epoch, a warm-up block, three blocks
    assert threading.active_count() == threads


def test_an_error_in_a_paused_training_comes_out():
    class Fails(Intervention):
        def on_train_start(self, *_: object) -> None:
            raise RuntimeError("broken")

    training = Training(lambda: Classifier((8, 4)), batches(64, 8, 4, 16))
    with pytest.raises(RuntimeError, match="broken"):
        run_case(Case("case", lambda: trainers(training, {"x": lambda: (Fails(),)}), "x", rounds=1))


def test_memory_counts_the_bytes_that_a_callback_keeps():
    class Keeps(Intervention):
        def on_train_start(self, *_: object) -> None:
            self.kept = torch.zeros(1000, dtype=torch.float64)

    training = Training(lambda: Classifier((8, 4)), batches(64, 8, 4, 16))
    blocks = training_memory(training, {"alone": lambda: (), "keeps": lambda: (Keeps(),)}, epochs=1)
    rows = run_case(Case("case", lambda: blocks, "alone", unit="bytes", rounds=1), rounds=50)
    assert len(rows[0].values) == 1
    assert rows[1].difference.median == 8000
