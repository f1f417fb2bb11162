# SPDX-License-Identifier: Apache-2.0
"""Two ranks: what they compute together is what one computes alone, and none waits for the other for ever."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from fulgurite.errors import RefusedError
from fulgurite.testing.check import InapplicableError, check, expect, refused
from fulgurite.testing.interventions.precision import numbers
from fulgurite.testing.lab import Lab, Plain, copied_state, equal_states
from fulgurite.testing.processes import on_ranks

_TIMEOUT = timedelta(seconds=60)
_EVEN, _UNEVEN = 44, 43


def _on_two_ranks(lab: Lab, examples: int, batch_size: int, frozen: bool = False) -> list[dict[str, Any]]:
    """Train with DDP on two ranks, once; return weights, state and number of updates of each."""

    def train(rank: int) -> dict[str, Any]:
        run = lab.fit(
            [lab.make()],
            module=_Still() if frozen else None,
            loader=_in_order(lab, examples, batch_size, rank),
            strategy=DDPStrategy(process_group_backend="gloo", timeout=_TIMEOUT),
            devices=2,
            max_epochs=3,
            use_distributed_sampler=True,
        )
        return {
            "weights": run.weights,
            "state": copied_state(run.callbacks[0]),
            "numbers": numbers(run.callbacks[0]),
            "updates": run.trainer.global_step,
        }

    try:
        return lab.remember(f"DDP: {examples}, {batch_size}, {frozen}", lambda: on_ranks(train))
    except RefusedError as refusal:
        raise InapplicableError(refused(lab.make(), refusal)) from None


def _in_order(lab: Lab, examples: int, batch_size: int, rank: int | None = None) -> Any:
    """Return a loader in a fixed order; of two ranks' batches together come those that one rank gets."""
    data = lab.examples(examples)
    sampler: Any = None if rank is None else DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=batch_size, sampler=sampler)


def _expect_no_drift(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    expect(bool(first["weights"].isfinite().all()), "parameters are not finite")
    expect(torch.equal(first["weights"], second["weights"]), "the ranks end with different parameters")
    expect(first["updates"] == second["updates"], "the ranks make different numbers of updates")


@check("intervention")
def check_two_ranks_equal_one(lab: Lab) -> None:
    """On two devices it trains another model than on one with the same global batch."""
    ranks = _on_two_ranks(lab, _EVEN, 11)
    _expect_no_drift(ranks)
    one = lab.component_run("two batches of 22", loader=lab.in_order(22), max_epochs=3)
    apart = float((one.weights - ranks[0]["weights"]).abs().max())
    expect(
        apart <= lab.rounding,
        f"two ranks with batches of 11 do not give what one gives with 22 (difference {apart:.2g})",
    )
    expect(one.trainer.global_step == ranks[0]["updates"], "the number of updates differs")


class _Still(Plain):
    """Does not move, so that what a method remembers depends only on which examples it sees."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@check("intervention")
def check_uneven_shards(lab: Lab) -> None:
    """With examples that the ranks cannot share evenly it hangs, the ranks drift apart, or padded examples count twice."""
    _expect_no_drift(_on_two_ranks(lab, _UNEVEN, 8))
    if lab.case.module is not None:
        return
    one = lab.fit([lab.make()], module=_Still(), loader=_in_order(lab, _UNEVEN, 16), max_epochs=3)
    mine, shared = numbers(one.callbacks[0]), _on_two_ranks(lab, _UNEVEN, 8, frozen=True)[0]["numbers"]
    wrong = [n for n in mine.keys() & shared.keys() if n.startswith("state") and _differ(mine[n], shared[n])]
    expect(
        not wrong,
        f"two ranks, with one example padded, do not remember what one rank does: {', '.join(sorted(wrong))} differs",
    )


def _differ(one: Any, two: Any) -> bool:
    """Whether counts, or values per example, differ; other values may, as means over batches do."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return type(one) is int and type(two) is int and one != two
    if one.is_floating_point() and (one.ndim == 0 or len(one) != _UNEVEN):
        return False
    return one.shape != two.shape or not torch.allclose(one.double(), two.double(), atol=1e-3, equal_nan=True)


class _Sharded(Plain):
    """Shards its network as users of ModelParallelStrategy do."""

    def configure_model(self) -> None:
        """Shard the network over all ranks."""
        mesh: DeviceMesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        fully_shard(self.network, mesh=mesh)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note that training has begun."""
        self.begun = True


@check("intervention", quick=False)
def check_sharded_parameters(lab: Lab) -> str | None:
    """With parameters sharded by ModelParallelStrategy (FSDP2) it trains otherwise, instead of doing right or refusing."""
    lab.needs_default_module()

    def train(rank: int) -> Any:
        module = _Sharded()
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo", timeout=_TIMEOUT)
        loader = _in_order(lab, _EVEN, 11, rank)
        try:
            lab.fit([lab.make()], module=module, loader=loader, strategy=strategy, devices=2, max_epochs=3)
        except RefusedError as refusal:
            expect(not hasattr(module, "begun"), f"refused, but only when training had begun: {refusal}")
            raise
        tensors = [_whole(t) for t in (*module.parameters(), *module.buffers())]
        return torch.cat([t.flatten().double() for t in tensors if t.is_floating_point()])

    try:
        sharded, _ = on_ranks(train)
    except RefusedError as refusal:
        return refused(lab.make(), refusal)
    apart = float((_on_two_ranks(lab, _EVEN, 11)[0]["weights"] - sharded).abs().max())
    expect(apart <= lab.rounding, f"sharded parameters end elsewhere than replicated ones (difference {apart:.2g})")
    return None


def _whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


@check("intervention")
def check_state_is_equal_on_all_ranks(lab: Lab) -> None:
    """A checkpoint, which rank 0 writes, lacks what the other ranks know."""
    first, second = (rank["state"] for rank in _on_two_ranks(lab, _EVEN, 11))
    different = [
        key
        for key, value in second.items()
        if not (equal_states(first.get(key), value) or _stands_for_rank_zeros(first.get(key), value))
    ]
    expect(not different, f"the state differs between the ranks: {', '.join(sorted(different))}")


def _stands_for_rank_zeros(first: Any, second: Any) -> bool:
    """Whether the other rank's state is an empty stand-in, because rank 0's is the one that is saved."""
    return isinstance(second, dict) and set(second) <= {"version"} and isinstance(first, dict)
