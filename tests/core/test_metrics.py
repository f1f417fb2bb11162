# SPDX-License-Identifier: Apache-2.0
"""AURC, E-AURC, Brier score and negative log-likelihood against slow oracles and closed forms."""

import itertools
import math
import pickle
import random

import pytest
import torch
from torch import Tensor

from fulgurite.metrics import AURC, BrierScore, ExcessAURC, NegativeLogLikelihood, aurc, excess_aurc
from fulgurite.testing.processes import on_ranks

METRICS = (AURC, ExcessAURC, BrierScore, NegativeLogLikelihood)


def oracle_aurc(confidence: list[float], correct: list[bool]) -> float:
    """The definition in plain Python; a tied block counts the expected errors among its first members."""
    examples = sorted(zip(confidence, correct, strict=True), key=lambda example: -example[0])
    risks, errors, k = [], 0.0, 0
    for _, block in itertools.groupby(examples, key=lambda example: example[0]):
        members = list(block)
        wrong = sum(not right for _, right in members)
        risks += [(errors + wrong * i / len(members)) / (k + i) for i in range(1, len(members) + 1)]
        errors, k = errors + wrong, k + len(members)
    return math.fsum(risks) / len(risks)


def oracle_excess(confidence: list[float], correct: list[bool]) -> float:
    n, e = len(correct), sum(not right for right in correct)
    return oracle_aurc(confidence, correct) - math.fsum(i / (n - e + i) for i in range(1, e + 1)) / n


def batch(n: int = 40, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator)
    return logits.softmax(1), torch.randint(classes, (n,), generator=generator)


def test_functions_equal_the_formulas_on_1000_random_cases_with_ties():
    draw = random.Random(0)
    for _ in range(1000):
        n = draw.randint(1, 30)
        levels = draw.choice([2, 5, 1000])
        confidence = [draw.randrange(levels) / levels for _ in range(n)]
        correct = [draw.random() < 0.7 for _ in range(n)]
        tensors = torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct)
        assert abs(aurc(*tensors).item() - oracle_aurc(confidence, correct)) < 1e-12
        assert abs(excess_aurc(*tensors).item() - oracle_excess(confidence, correct)) < 1e-12


def test_ties_are_the_average_over_all_orderings():
    """The formula for a tied block is right, not merely deterministic."""
    confidence = [0.9, 0.5, 0.5, 0.5, 0.5, 0.2]
    correct = [True, True, False, False, True, False]
    orders = [[0, *middle, 5] for middle in itertools.permutations([1, 2, 3, 4])]
    distinct = [1.0 - rank / 10 for rank in range(6)]
    mean = math.fsum(oracle_aurc(distinct, [correct[i] for i in order]) for order in orders) / len(orders)
    assert abs(aurc(torch.tensor(confidence), torch.tensor(correct)).item() - mean) < 1e-12


def test_hand_computed_value():
    """Risks 0, 1/2, 1/3: their mean is 5/18, and the unavoidable part is (1/3) * 1/3."""
    confidence, correct = torch.tensor([0.7, 0.9, 0.8]), torch.tensor([True, True, False])
    assert aurc(confidence, correct).item() == pytest.approx(5 / 18, abs=1e-15)
    assert excess_aurc(confidence, correct).item() == pytest.approx(5 / 18 - 1 / 9, abs=1e-15)


def test_perfect_ranking_has_no_excess():
    for errors in range(51):
        correct = torch.arange(50) < 50 - errors
        assert abs(excess_aurc(torch.linspace(1, 0.1, 50), correct).item()) < 1e-12


def test_input_order_does_not_matter_to_the_last_bit():
    """Two ranks merge their halves in another order than one process."""
    generator = torch.Generator().manual_seed(1)
    confidence = torch.randint(7, (200,), generator=generator) / 7
    correct = torch.rand(200, generator=generator) < 0.6
    for _ in range(10):
        order = torch.randperm(200, generator=generator)
        assert torch.equal(aurc(confidence[order], correct[order]), aurc(confidence, correct))
        assert torch.equal(excess_aurc(confidence[order], correct[order]), excess_aurc(confidence, correct))


def test_invariant_under_monotone_maps_of_confidence():
    confidence = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    correct = confidence > 0.4 * torch.rand(100, generator=torch.Generator().manual_seed(3))
    assert torch.equal(aurc(confidence**3 + 2, correct), aurc(confidence, correct))
    assert not torch.equal(aurc(-confidence, correct), aurc(confidence, correct))


def test_nan_confidence_is_not_ranked_and_empty_input_is_nan():
    assert aurc(torch.tensor([0.5, math.nan]), torch.tensor([True, False])).isnan()
    assert aurc(torch.empty(0), torch.empty(0, dtype=torch.bool)).isnan()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"vectors of one length.*\(3,\) and \(2,\)"):
        aurc(torch.rand(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"\[N, C\].*\(4, 3\) and torch.int64 \(5,\)"):
        AURC().update(torch.rand(4, 3), torch.zeros(5, dtype=torch.long))


def test_metrics_equal_their_definitions():
    preds, target = batch()
    confidence, predicted = preds.max(1)
    correct = (predicted == target).tolist()
    rows = list(zip(preds.tolist(), target.tolist(), strict=True))
    expected = {
        AURC: oracle_aurc(confidence.tolist(), correct),
        ExcessAURC: oracle_excess(confidence.tolist(), correct),
        BrierScore: sum((p - (c == truth)) ** 2 for row, truth in rows for c, p in enumerate(row)) / 40,
        NegativeLogLikelihood: -sum(math.log(row[truth]) for row, truth in rows) / 40,
    }
    for kind in METRICS:
        assert kind()(preds, target).item() == pytest.approx(expected[kind], rel=1e-5), kind.__name__


@pytest.mark.parametrize("kind", METRICS)
def test_logits_and_probabilities_agree(kind):
    preds, target = batch()
    assert kind()(preds.log() + 1.5, target).item() == pytest.approx(kind()(preds, target).item(), rel=1e-5)


def test_log_likelihood_of_extreme_predictions():
    """Logits do not lose what a softmax in float32 loses; a zero probability does not make the mean infinite."""
    target = torch.tensor([0])
    assert NegativeLogLikelihood()(torch.tensor([[-200.0, 0.0]]), target).item() == pytest.approx(200.0)
    tiny = torch.finfo(torch.float32).tiny
    assert NegativeLogLikelihood()(torch.tensor([[0.0, 1.0]]), target).item() == pytest.approx(-math.log(tiny))


def test_half_precision_predictions():
    preds, target = batch()
    for kind in METRICS:
        assert kind()(preds.bfloat16(), target).item() == pytest.approx(kind()(preds, target).item(), abs=0.02)


@pytest.mark.parametrize("kind", METRICS)
def test_batches_merge_reset_and_pickle(kind):
    """Uneven batches, `merge_state`, a pickled copy and a reset metric all give the value of one batch."""
    preds, target = batch()
    whole = kind()(preds, target)

    first, second = kind(), kind()
    first.update(preds[:13], target[:13])
    second.update(preds[13:], target[13:])
    second.merge_state(first)
    torch.testing.assert_close(second.compute(), whole, rtol=1e-6, atol=1e-7)

    first.update(preds[13:], target[13:])
    first = pickle.loads(pickle.dumps(first))
    torch.testing.assert_close(first.compute(), whole, rtol=1e-6, atol=1e-7)

    first.reset()
    first.update(preds, target)
    assert torch.equal(first.compute(), whole)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen_is_treated_as_in_torchmetrics():
    for kind in (AURC, ExcessAURC):
        with pytest.raises(ValueError, match="No samples to concatenate"):
            kind().compute()
    for kind in (BrierScore, NegativeLogLikelihood):
        assert kind().compute().isnan()


def _compute(rank: int) -> dict[str, Tensor]:
    torch.distributed.init_process_group("gloo")
    preds, target = batch()
    values = {}
    for name, split in (("uneven", 27), ("empty", 40)):
        mine = slice(0, split) if rank == 0 else slice(split, None)
        for kind in METRICS:
            metric = kind()
            if len(target[mine]):
                metric.update(preds[mine], target[mine])
            values[f"{name}-{kind.__name__}"] = metric.compute()
    torch.distributed.destroy_process_group()
    return values


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one():
    """Also with uneven shards, and with a rank that has no data at all."""
    preds, target = batch()
    for values in on_ranks(_compute):
        for kind in METRICS:
            whole = kind()(preds, target)
            for name in ("uneven", "empty"):
                exact = 0.0 if issubclass(kind, AURC) else 1e-6
                torch.testing.assert_close(values[f"{name}-{kind.__name__}"], whole, rtol=exact, atol=0.0)
