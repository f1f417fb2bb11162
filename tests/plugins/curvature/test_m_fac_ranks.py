# SPDX-License-Identifier: Apache-2.0
"""M-FAC on two ranks (gloo, CPU), against one: sharded windows, local shards, pruning with shared work."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from fulgurite import distributed
from fulgurite.testing.processes import on_ranks
from fulgurite_plugins.curvature import MFAC, MFACPruner
from fulgurite_plugins.curvature.m_fac.obs import prune_once
from tests.helpers import Plain, data, fit, loader, weights
from tests.plugins.curvature.test_m_fac import drawn

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

SIZES = (7, 6, 1)
"""Neither group has an even number of columns."""


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(part.clone()) for part in drawn(14, seed=9).split(list(SIZES))]
    with torch.no_grad():
        made[0][3] = 0.0
    return made


def optimizer(made: list[nn.Parameter], **arguments: Any) -> MFAC:
    groups = [{"params": made[:1]}, {"params": made[1:], "lr": 0.02}]
    small = {
        "lr": 0.1,
        "num_grads": 4,
        "damping": 0.01,
        "storage_dtype": "float64",
        "momentum": 0.8,
        "weight_decay": 0.1,
    }
    return MFAC(groups, **{**small, **arguments})


def run(made: MFAC, parameters_: list[nn.Parameter], gradients: Tensor) -> Tensor:
    for gradient in gradients:
        for p, g in zip(parameters_, gradient.split(list(SIZES)), strict=True):
            p.grad = g.clone()
        made.step()
    return torch.cat([p.detach() for p in parameters_])


VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_group": {"per_group": True},
    "sparse": {"sparse": True},
    "bfloat16": {"storage_dtype": "bfloat16"},
}
PRUNINGS: dict[str, dict[str, Any]] = {
    "blocks": {"block_size": 16},
    "large blocks": {"block_size": 400},
    "whole": {"block_size": None},
    "joint": {"block_size": 16, "joint_update": True},
    "magnitude": {"method": "magnitude"},
}


class Sharded(Plain):
    def __init__(self, shard: bool = True) -> None:
        super().__init__()
        self.shard = shard

    def configure_optimizers(self) -> Any:
        return MFAC(self.parameters(), lr=0.05, momentum=0.9, num_grads=6, damping=0.01, shard=self.shard)


def in_order(batch_size: int, rank: int | None = None) -> DataLoader[Any]:
    examples = data(48)
    sampler = None if rank is None else DistributedSampler(examples, 2, rank, shuffle=False)
    return DataLoader(examples, batch_size, sampler=sampler)


def two_ranks() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)), "devices": 2}


def pruner(**arguments: Any) -> MFACPruner:
    return MFACPruner((0.4, 0.7), num_grads=5, grad_batch_size=8, recomputations=2, damping=1e-2, **arguments)


def collectives(made: MFAC, parameters_: list[nn.Parameter], gradient: Tensor) -> list[tuple[str, int]]:
    """Return what one step sends: which collective, and how many numbers."""
    sent: list[tuple[str, int]] = []
    originals = {name: getattr(torch.distributed, name) for name in ("all_reduce", "all_gather")}

    def watched(name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            sent.append((name, arguments[-1].numel()))
            return originals[name](*arguments, **keywords)

        return call

    for name in originals:
        setattr(torch.distributed, name, watched(name))
    try:
        run(made, parameters_, gradient.unsqueeze(0))
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    return sent


def on_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    gradients = drawn(9, 14)
    for name, arguments in VARIANTS.items():
        made = parameters()
        sharded = optimizer(made, shard=True, **arguments)
        found[name] = run(sharded, made, gradients)
        found[f"{name}: width"] = sum(p.window.size for p in sharded.preconditioners if p.window is not None)
        found[f"{name}: state"] = sharded.state_dict()
        again = parameters()
        resumed = optimizer(again, shard=True, **arguments)
        run(resumed, again, gradients[:5])
        state = resumed.state_dict()
        other = optimizer(again, shard=True, **arguments)
        other.load_state_dict(state)
        found[f"{name}: resumed"] = run(other, again, gradients[5:])
    spoilt = gradients.clone()
    spoilt[4, 13] = torch.nan  # a column of the second rank
    made = parameters()
    found["not finite"] = run(optimizer(made, shard=True), made, spoilt)
    made = parameters()
    counted = optimizer(made, shard=True)
    found["collectives"] = collectives(counted, made, gradients[0])
    found["local"] = local_shards(rank, gradients)
    found["dtensor"] = distributed_tensors(gradients)
    found["fully sharded"] = fully_sharded(rank)
    mine = gradients[rank::2]
    found["prune_once"] = {
        block: prune_once(drawn(14, seed=9), mine, 9, [14], [6], 0.01, block, joint=block == 3)
        for block in (3, 14, None)
    }
    found["concatenated"] = distributed.concatenated(torch.arange(3) + 10 * rank)
    torch.distributed.destroy_process_group()
    return found


def in_trainers(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, arguments in PRUNINGS.items():
        module = Plain()
        fit(module, [pruner(**arguments)], in_order(8, rank), epochs=3, use_distributed_sampler=False, **two_ranks())
        found[f"prune: {name}"] = weights(module)
    module = Sharded()
    fit(module, [], in_order(8, rank), epochs=3, use_distributed_sampler=False, **two_ranks())
    found["lightning"] = weights(module)
    return found


def local_shards(rank: int, gradients: Tensor) -> Tensor:
    """Each rank has a part of the parameters, of unequal length."""
    part = slice(0, 5) if rank == 0 else slice(5, 14)
    own = nn.Parameter(drawn(14, seed=9)[part].clone())
    made = MFAC([own], lr=0.1, num_grads=4, damping=0.01, storage_dtype="float64", shard="local")
    for gradient in gradients:
        own.grad = gradient[part].clone()
        made.step()
    return own.detach()


def distributed_tensors(gradients: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(drawn(14, seed=9), mesh, [Shard(0)]))
    made = MFAC([parameter], lr=0.1, num_grads=4, damping=0.01, storage_dtype="float64", momentum=0.5, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        made.step()
    return parameter.detach().full_tensor()


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def trained_network(network: nn.Module, made: MFAC, part: slice) -> None:
    x, y = data(16).tensors
    for _ in range(6):
        made.zero_grad()
        F.cross_entropy(network(x[part].double()), y[part]).backward()
        made.step()


def fsdp_optimizer(network: nn.Module) -> MFAC:
    arguments: dict[str, Any] = {"storage_dtype": "float64", "num_grads": 4, "damping": 0.01}
    return MFAC(network.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1, **arguments)


def fully_sharded(rank: int) -> dict[str, Any]:
    """FSDP2, and a checkpoint in its format, which has no place for a window."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network, other = small_network(), small_network()
    for each in (network, other):
        fully_shard(each, mesh=init_device_mesh("cpu", (2,)))
    made, restored = fsdp_optimizer(network), fsdp_optimizer(other)
    trained_network(network, made, slice(rank, None, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_optimizer_state_dict(other, restored, get_optimizer_state_dict(network, made))
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    return {
        "weights": torch.cat([p.detach().full_tensor().flatten() for p in network.parameters()]),
        "warned": any("has no window of gradients" in str(warning.message) for warning in caught),
        "momentum": all(
            torch.equal(
                *(o.state[p]["momentum_buffer"].full_tensor() for o, p in zip((made, restored), pair, strict=True))
            )
            for pair in pairs
        ),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(on_rank, seconds=100)


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Any]]:
    return on_ranks(in_trainers, seconds=200)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_sharded_window_makes_the_same_steps(ranks, name):
    made, gradients = parameters(), drawn(9, 14)
    alone = optimizer(made, **VARIANTS[name])
    expected = run(alone, made, gradients)
    tolerance = 1e-6 if name != "bfloat16" else 1e-4  # products of stored bfloat16 are summed in float32
    for rank in ranks:
        assert torch.equal(rank[name], ranks[0][name])
        assert torch.allclose(rank[name], expected, rtol=0, atol=tolerance)
        assert torch.equal(rank[f"{name}: resumed"], rank[name])
        assert rank[f"{name}: width"] == (7 if name == "sparse" else 8)  # a half of 6 or 7, and of 7, each rounded up
        saved, whole = rank[f"{name}: state"]["windows"], alone.state_dict()["windows"]
        for one, other in zip(saved, whole, strict=True):
            assert torch.allclose(one["window"]["gradients"], other["window"]["gradients"], atol=1e-5)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_both(ranks):
    made, gradients = parameters(), drawn(9, 14)
    alone = optimizer(made)
    expected = run(alone, made, torch.cat([gradients[:4], gradients[5:]]))
    for rank in ranks:
        assert torch.allclose(rank["not finite"], expected, rtol=0, atol=1e-9)


def test_one_reduction_and_one_gather_per_step(ranks):
    for rank in ranks:
        assert rank["collectives"] == [
            ("all_reduce", 5),
            ("all_gather", 8),
        ]  # m + 1; a half of 7 and of 7, each rounded up


def test_parameters_that_are_shards_already(ranks):
    weight, gradients = nn.Parameter(drawn(14, seed=9)), drawn(9, 14)
    alone = MFAC([weight], lr=0.1, num_grads=4, damping=0.01, storage_dtype="float64")
    for gradient in gradients:
        weight.grad = gradient.clone()
        alone.step()
    assert torch.allclose(torch.cat([rank["local"] for rank in ranks]), weight.detach(), rtol=0, atol=1e-9)


def test_distributed_tensors(ranks):
    weight, gradients = nn.Parameter(drawn(14, seed=9)), drawn(9, 14)
    arguments = {"momentum": 0.5, "weight_decay": 0.1}
    alone = MFAC([weight], lr=0.1, num_grads=4, damping=0.01, storage_dtype="float64", **arguments)
    for gradient in gradients:
        weight.grad = gradient.clone()
        alone.step()
    for rank in ranks:
        assert torch.allclose(rank["dtensor"], weight.detach(), rtol=0, atol=1e-9)


def test_fully_sharded_parameters(ranks):
    network = small_network()
    trained_network(network, fsdp_optimizer(network), slice(None))
    for rank in ranks:
        found = rank["fully sharded"]
        assert torch.allclose(found["weights"], weights(network), rtol=0, atol=1e-9)
        assert found["warned"]
        assert found["momentum"]


@pytest.mark.parametrize("block", [3, 14, None])
def test_pruning_shares_the_blocks(ranks, block):
    expected, dropped = prune_once(drawn(14, seed=9), drawn(9, 14), 9, [14], [6], 0.01, block, joint=block == 3)
    for rank in ranks:
        found, gone = rank["prune_once"][block]
        assert torch.equal(gone, dropped)
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", list(PRUNINGS))
def test_two_ranks_prune_like_one(trained, name):
    module = Plain()
    fit(module, [pruner(**PRUNINGS[name])], loader(data(48), batch_size=16, shuffle=False), epochs=3)
    for rank in trained:
        found = rank[f"prune: {name}"]
        assert torch.equal(found, trained[0][f"prune: {name}"])
        assert torch.equal(found == 0, weights(module) == 0)


def test_it_trains_sharded_under_ddp(trained):
    module = Sharded(shard=False)
    fit(module, [], in_order(16), epochs=3)
    for rank in trained:
        assert torch.equal(rank["lightning"], trained[0]["lightning"])


def test_concatenated(ranks):
    for rank in ranks:
        assert rank["concatenated"].tolist() == [0, 1, 2, 10, 11, 12]
    assert distributed.concatenated(torch.arange(2)).tolist() == [0, 1]
