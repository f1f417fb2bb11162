# SPDX-License-Identifier: Apache-2.0
"""The checks of metrics: torchmetrics' own contract."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import torch
from torch import Tensor

from fulgurite.testing.check import InapplicableError, check, expect
from fulgurite.testing.lab import Lab
from fulgurite.testing.processes import on_ranks


def _examples(lab: Lab) -> tuple[Tensor, ...]:
    """Return what one `update` takes; the first dimension is the examples."""
    if lab.case.arguments is None:
        raise InapplicableError("the case names no `arguments` for `update`")
    return lab.case.arguments()


def _value(metric: Any) -> Tensor:
    """Return what it computes, as one vector."""
    value = metric.compute()
    values = list(value.values()) if isinstance(value, dict) else value
    parts = values if isinstance(values, (list, tuple)) else [values]
    return torch.cat([torch.as_tensor(part).double().flatten() for part in parts])


def _updated(lab: Lab, *slices: slice) -> Any:
    metric = lab.make()
    for part in slices:
        metric.update(*(argument[part] for argument in _examples(lab)))
    return metric


def _equal(a: Tensor, b: Tensor, reason: str) -> None:
    expect(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True), f"{reason}: {a.tolist()} and {b.tolist()}")


@check("metric")
def check_batches_equal_the_whole(lab: Lab) -> None:
    """The value depends on how the examples were divided into batches."""
    whole, parts = _updated(lab, slice(None)), _updated(lab, slice(0, 7), slice(7, 8), slice(8, None))
    _equal(_value(whole), _value(parts), "one batch and three uneven ones differ")


@check("metric")
def check_order_of_merging(lab: Lab) -> None:
    """The value depends on the order in which examples or ranks come."""
    forwards, backwards = _updated(lab, slice(0, 7), slice(7, None)), _updated(lab, slice(7, None), slice(0, 7))
    _equal(_value(forwards), _value(backwards), "two orders of batches differ")
    first, second = _updated(lab, slice(0, 7)), _updated(lab, slice(7, None))
    if first.full_state_update is not False or first.dist_sync_on_step:
        return  # torchmetrics merges no states of such metrics
    second.merge_state(first)
    _equal(_value(second), _value(forwards), "merged states and one metric differ")


@check("metric")
def check_reset(lab: Lab) -> None:
    """After `reset` it remembers the last epoch, or computes what it had computed before."""
    metric, fresh = _updated(lab, slice(None)), _updated(lab, slice(0, 9))
    metric.compute()
    metric.reset()
    metric.update(*(argument[:9] for argument in _examples(lab)))
    _equal(_value(metric), _value(fresh), "a reset metric and a new one differ")


@check("metric")
def check_metric_pickles(lab: Lab) -> None:
    """Spawned processes cannot get it, or a copy forgets what it has seen."""
    metric = _updated(lab, slice(None))
    _equal(_value(pickle.loads(pickle.dumps(metric))), _value(metric), "a pickled copy differs")


@check("metric")
def check_metric_on_two_ranks(lab: Lab) -> None:
    """On two ranks, with uneven shards or none on one, the value is not that of one process."""
    whole = _value(_updated(lab, slice(None)))

    def compute(rank: int) -> Tensor:
        torch.distributed.init_process_group("gloo")
        try:
            uneven = _value(_updated(lab, slice(0, 7) if rank == 0 else slice(7, None)))
            empty = _value(_updated(lab, *([slice(None)] if rank == 0 else [])))
            return torch.stack([uneven, empty])
        finally:
            torch.distributed.destroy_process_group()

    for values in on_ranks(compute):
        _equal(values[0], whole, "two uneven shards and one process differ")
        _equal(values[1], whole, "a rank without examples changes the value")


@check("metric")
def check_metric_in_half_precision(lab: Lab) -> None:
    """Predictions of a mixed-precision model give another value or an error."""
    halves = tuple(a.bfloat16() if a.is_floating_point() else a for a in _examples(lab))
    metric = lab.make()
    metric.update(*halves)
    apart = float((_value(metric) - _value(_updated(lab, slice(None)))).abs().max())
    expect(apart <= 0.05, f"bfloat16 predictions change the value by {apart:.2g}")


@check("metric")
def check_empty_metric(lab: Lab) -> None:
    """With nothing seen it gives a number that looks like a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = _value(lab.make())
        except ValueError:
            return
    expect(bool(value.isnan().all()), f"with nothing seen it gives {value.tolist()}; expected nan or ValueError")


@check("metric")
def check_declares_its_direction(lab: Lab) -> None:
    """Nobody can tell whether higher is better, and model selection picks the worst."""
    metric = lab.make()
    expect(metric.higher_is_better is not None, "`higher_is_better` is not declared")
    expect(metric.is_differentiable is not None, "`is_differentiable` is not declared")
