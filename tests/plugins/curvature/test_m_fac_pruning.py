# SPDX-License-Identifier: Apache-2.0
"""The OBS updates against exact minima, and the pruner in trainings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.random import derived_seed
from fulgurite_plugins.curvature import MFAC, MFACPruner
from fulgurite_plugins.curvature.m_fac.collection import gradient_rows, random_batches, recalibrate
from fulgurite_plugins.curvature.m_fac.fisher import FisherInverse
from fulgurite_plugins.curvature.m_fac.functional import obs_saliency
from fulgurite_plugins.curvature.m_fac.intervention import prunable
from fulgurite_plugins.curvature.m_fac.obs import lowest, obs_update, prune_once
from tests.helpers import Plain, data, fit, loader, weights
from tests.plugins.curvature.test_m_fac import DAMPING, D, M, dense, drawn


def minimum(matrix: Tensor, w: Tensor, dropped: Tensor) -> Tensor:
    """The weights at the minimum of the quadratic around `w`, with some of them zero."""
    free = (~dropped).nonzero().squeeze(1)
    fixed = dropped.nonzero().squeeze(1)
    result = torch.zeros_like(w)
    result[free] = w[free] + torch.linalg.solve(matrix[free][:, free], matrix[free][:, fixed] @ w[fixed])
    return result


@pytest.mark.parametrize("block_size", [None, D, 20, 7])
@pytest.mark.parametrize("joint", [False, True])
def test_dropping_one_weight_gives_the_exact_minimum(block_size, joint):
    """The Hessian of the quadratic is the Fisher of gradients equal to its rank-one terms."""
    if joint and block_size is None:
        pytest.skip("the joint update needs blocks")
    gradients, w = drawn(M, D), drawn(D, seed=4)
    inverse = FisherInverse(gradients, DAMPING, block_size)
    matrix = dense(gradients, DAMPING, block_size)
    for i in (0, 13, D - 1):
        dropped = torch.arange(D) == i
        found = obs_update(w, inverse, dropped, joint)
        assert float((found - minimum(matrix, w, dropped)).abs().max()) < 1e-9
        assert found[i] == 0.0
        rise = 0.5 * (found - w) @ matrix @ (found - w)
        assert torch.isclose(rise, obs_saliency(w, inverse.diag())[i], rtol=1e-9)


@pytest.mark.parametrize("block_size", [D, 20, 7])
def test_the_joint_update_is_the_exact_minimum_for_many(block_size):
    gradients, w = drawn(M, D), drawn(D, seed=4)
    inverse, dropped = FisherInverse(gradients, DAMPING, block_size), drawn(D, seed=5) > 0.3
    matrix = dense(gradients, DAMPING, block_size)
    found = obs_update(w, inverse, dropped, joint=True)
    assert float((found - minimum(matrix, w, dropped)).abs().max()) < 1e-9
    summed = obs_update(w, inverse, dropped)
    cost = [0.5 * (new - w) @ matrix @ (new - w) for new in (found, summed)]
    assert cost[0] < cost[1]


def test_updates_of_several_weights_are_added_up():
    gradients, w = drawn(M, D), drawn(D, seed=4)
    inverse, dropped = FisherInverse(gradients, DAMPING), torch.arange(D) % 5 == 0
    expected = w + sum(obs_update(w, inverse, torch.arange(D) == int(i)) - w for i in dropped.nonzero())
    found = obs_update(w, inverse, dropped)
    assert torch.allclose(found[~dropped], expected[~dropped], rtol=1e-9)
    assert found[dropped].count_nonzero() == 0


def test_the_lowest_of_each_part():
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0, 8.0])
    assert lowest(scores, [3, 2], [2, 0]).tolist() == [False, True, True, False, False]
    assert lowest(scores, [5], [3]).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("block_size", [None, 7])
def test_one_round_drops_the_least_salient(block_size):
    gradients, w = drawn(M, D), drawn(D, seed=4)
    inverse = FisherInverse(gradients, DAMPING, block_size)
    found, dropped = prune_once(w, gradients, M, [30, 20], [5, 11], DAMPING, block_size)
    saliency = obs_saliency(w, inverse.diag())
    for part, count in ((slice(0, 30), 5), (slice(30, 50), 11)):
        assert int(dropped[part].sum()) == count
        assert saliency[part][dropped[part]].max() < saliency[part][~dropped[part]].min()
    assert torch.allclose(found, obs_update(w, inverse, dropped), rtol=1e-12)


class Wide(Plain):
    """With dropout, batch norm and two kinds of prunable layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 12)),
            nn.Conv1d(1, 6, 3, padding=1),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(72, 5),
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def pruner(sparsities: Any = (0.5,), **arguments: Any) -> MFACPruner:
    small = {"num_grads": 6, "grad_batch_size": 8, "recomputations": 2, "damping": 1e-3}
    return MFACPruner(sparsities, **{**small, **arguments})


def prunable_weights(module: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in prunable(module, ("Linear", "Conv1d")).values()])


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("SGD", {}),
        ("Adam", {"scope": "layer"}),
        ("MFAC", {"method": "magnitude"}),
        ("SGD", {"block_size": None}),
        ("SGD", {"joint_update": True, "block_size": 16}),
    ],
    ids=str,
)
def test_zeros_are_kept_exactly_through_fine_tuning(optimizer, arguments):
    """100 steps with momentum and weight decay."""

    class Module(Wide):
        def configure_optimizers(self) -> Any:
            made: dict[str, Any] = {
                "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
                "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
                "MFAC": lambda p: MFAC(p, lr=0.01, momentum=0.9, weight_decay=0.01, num_grads=4, damping=0.01),
            }
            return made[optimizer](self.parameters())

    module, plugin = Module(), pruner((0.83,), **arguments)
    found = fit(module, [plugin], loader(batch_size=12), epochs=20)
    assert found.global_step == 100
    total = len(prunable_weights(module))
    zeros = int((prunable_weights(module) == 0.0).sum())
    layers = 1 if arguments.get("scope") != "layer" else 2
    assert abs(zeros - 0.83 * total) <= layers
    assert math.isclose(plugin.sparsity, zeros / total, abs_tol=1e-9)
    for name, weight in prunable(module, plugin.modules).items():
        assert torch.equal(weight == 0.0, ~plugin.masks[name])
        if layers == 2:
            assert abs(int((weight == 0.0).sum()) - 0.83 * weight.numel()) <= 1


def recorded(plugin: MFACPruner, module: Plain, **arguments: Any) -> list[tuple[float, float]]:
    """The sparsity and the learning rate in each epoch."""
    import lightning.pytorch as pl

    class Record(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                zeros = float((prunable_weights(pl_module) == 0).double().mean())
                self.seen.append((round(zeros, 2), trainer.optimizers[0].param_groups[0]["lr"]))

    record = Record()
    fit(module, [plugin, record], **arguments)
    return record.seen


def test_the_schedule_of_prunings_and_rates():
    plugin = pruner((0.25, 0.5, 0.75), every_n_epochs=2, start_epoch=1, finetune_lrs=(0.1, 0.05, 0.02), lr_drop=0.1)
    module = Plain()
    seen = recorded(plugin, module, epochs=8)
    assert [sparsity for sparsity, _ in seen] == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75]
    assert [rate for _, rate in seen] == pytest.approx([0.5, 0.1, 0.01, 0.05, 0.005, 0.02, 0.02, 0.02])


def test_pruning_after_the_last_epoch_is_the_last_thing():
    module, plain, plugin = Plain(), Plain(), pruner((0.5,), start_epoch=2)
    assert [sparsity for sparsity, _ in recorded(plugin, module, epochs=2)] == [0.0, 0.0]
    assert plugin.done == 1
    assert int((prunable_weights(module) == 0).sum()) == 136
    fit(plain, epochs=2)  # the training before it is untouched
    for name in ("net.0.bias", "net.2.bias"):
        assert torch.equal(dict(module.named_parameters())[name], dict(plain.named_parameters())[name])


def test_magnitude_drops_the_smallest_and_moves_nothing():
    module, plain = Plain(), Plain()
    fit(module, [pruner((0.5,), start_epoch=1, method="magnitude")], epochs=1)
    fit(plain, epochs=1)
    before, after = prunable_weights(plain), prunable_weights(module)
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    assert before[~kept].abs().max() <= before[kept].abs().min()
    assert int(kept.sum()) == len(before) // 2


def test_recomputed_rounds_are_the_algorithm_step_by_step():
    """One pruning in three rounds, done again here from the gradients of the same batches."""
    module, plain = Plain(), Plain()
    plugin = pruner((0.7,), start_epoch=1, recomputations=3, block_size=10, seed=3)
    fit(module, [plugin], epochs=1)
    found = fit(plain, epochs=1)
    found.fit_loop.setup_data()
    parameters = list(prunable(plain, ("Linear",)).values())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    kept = torch.ones_like(flat, dtype=torch.bool)
    for number in range(3):
        seed = derived_seed(3, 0, number)
        rows = []
        for x, y in random_batches(found, 6, 8, seed):
            plain.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            rows.append(torch.cat([p.grad.flatten() for p in parameters])[kept])
        density = 0.3 ** ((number + 1) / 3)
        drop = int(kept.sum()) - round(density * len(flat))
        matrix = dense(torch.stack(rows).double(), 1e-3, 10)
        inverse = torch.linalg.inv(matrix)
        w = flat[kept].double()
        saliency = w**2 / (2 * inverse.diag())
        gone = saliency <= saliency.sort().values[drop - 1]
        w = torch.where(gone, 0.0, w - inverse @ torch.where(gone, w / inverse.diag(), 0.0))
        flat[kept] = w.float()
        kept[kept.clone()] = ~gone
        with torch.no_grad():
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.copy_(piece.view_as(p))
    assert torch.equal(prunable_weights(module) != 0, kept)
    assert torch.allclose(prunable_weights(module), flat, rtol=1e-3, atol=1e-5)


def test_collecting_gradients_is_unnoticed_and_in_evaluation_mode():
    module = Wide()
    found = fit(module, epochs=1)
    found.fit_loop.setup_data()
    module.train()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    state = torch.get_rng_state()
    parameters = list(prunable(module, ("Linear", "Conv1d")).values())
    kept = torch.ones(sum(p.numel() for p in parameters), dtype=torch.bool)
    kept[::3] = False
    for p in module.parameters():
        p.grad = None
    rows = gradient_rows(found, module, parameters, kept, 5, 8, seed=11)
    assert rows.shape == (5, int(kept.sum()))
    assert all(p.grad is None for p in module.parameters())
    assert all(child.training for child in module.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    module.eval()
    for row, (x, y) in zip(rows, random_batches(found, 5, 8, 11), strict=True):
        expected = torch.autograd.grad(F.cross_entropy(module(x), y), parameters)
        assert torch.allclose(row, torch.cat([g.flatten() for g in expected])[kept], rtol=1e-5, atol=1e-7)


def test_random_batches_use_each_example_alike():
    found = fit(Plain(), loader_=loader(data(20), batch_size=4), epochs=1)
    found.fit_loop.setup_data()
    drawn_examples = torch.cat([x for x, _ in random_batches(found, 7, 8, 0)])
    assert drawn_examples.shape == (56, 12)
    _, counts = drawn_examples.unique(dim=0, return_counts=True)
    assert len(counts) == 20
    assert set(counts.tolist()) == {2, 3}


def test_batch_norm_is_recalibrated():
    module = Wide()
    found = fit(module, epochs=1)
    found.fit_loop.setup_data()
    layer = module.net[2]
    modes = [child.training for child in module.modules()]
    recalibrate(found, module, 4, 15, seed=2)
    assert [child.training for child in module.modules()] == modes
    assert layer.momentum == 0.1
    means = [module.net[1](x.unsqueeze(1)).mean((0, 2)) for x, _ in random_batches(found, 4, 15, 2)]
    assert torch.allclose(layer.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    with_option, without = Wide(), Wide()
    for each, option in ((with_option, True), (without, False)):
        fit(each, [pruner((0.8,), start_epoch=1, recalibrate_batchnorm=option)], epochs=1)
    assert torch.equal(weights(with_option), weights(without))
    assert not torch.equal(with_option.net[2].running_var, without.net[2].running_var)


def test_it_resumes_with_its_masks(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def made() -> MFACPruner:
        return pruner((0.3, 0.6), every_n_epochs=2)

    whole, resumed, plugin = Plain(), Plain(), made()
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fixed = {"loader_": loader(shuffle=False), "epochs": 4}
    fit(whole, [made(), saving], enable_checkpointing=True, **fixed)
    for epoch in (0, 1, 2):
        fit(resumed, [plugin], ckpt=tmp_path / f"epoch={epoch}.ckpt", **fixed)
        assert torch.equal(weights(whole), weights(resumed))
        assert plugin.done == 2
    plugin._weights = {}
    with pytest.raises(RefusedError, match=r"masks for net.0.weight, net.2.weight, which this model does not have"):
        plugin._bind()


def test_a_tied_a_frozen_and_a_parametrised_weight():
    module = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    )
    module[1].weight = module[0].weight
    module[2].weight.requires_grad = False
    assert list(prunable(module, ("Linear",))) == ["0.weight"]


@pytest.mark.parametrize(
    ("module", "plugin", "arguments", "message"),
    [
        (Plain, {"modules": ("Conv2d",)}, {}, "found no trainable weight of a Conv2d in Plain"),
        (Plain, {"start_epoch": 3}, {"epochs": 2}, "at the start of epoch 3, but training ends after 2 epochs"),
    ],
)
def test_refusals(module, plugin, arguments, message):
    with pytest.raises(RefusedError, match=message):
        fit(module(), [pruner(**plugin)], **arguments)


def test_a_scheduler_beside_its_own_rates_is_refused():
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    fit(Scheduled(), [pruner()], epochs=1)
    with pytest.raises(RefusedError, match="finetune_lrs.*scheduler would overwrite"):
        fit(Scheduled(), [pruner(finetune_lrs=(0.1,))], epochs=1)


def test_data_without_indices_are_refused():
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(data(16))

    with pytest.raises(RefusedError, match="MFACPruner"):
        fit(Plain(), [pruner()], torch.utils.data.DataLoader(Stream(), 8), epochs=1)
    fit(Plain(), [pruner(method="magnitude")], torch.utils.data.DataLoader(Stream(), 8), epochs=1)


def test_a_loss_that_is_not_finite_is_an_error():
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * torch.nan

    with pytest.raises(FulguriteError, match="gradient of a mini-batch is not finite"):
        fit(Broken(), [pruner()], epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sparsities": (0.5, 0.5)},
            r"`sparsities` of MFACPruner to be numbers in \[0, 1\) that rise, but got \(0.5, 0.5\)",
        ),
        ({"sparsities": (0.5, 0.3)}, "`sparsities` of MFACPruner"),
        ({"sparsities": (1.0,)}, "`sparsities` of MFACPruner"),
        ({"sparsities": ()}, "`sparsities` of MFACPruner"),
        ({"damping": 0.0}, "`damping` of MFACPruner to be a positive number"),
        ({"num_grads": 0}, "`num_grads` of MFACPruner to be an integer of at least 1, but got 0"),
        ({"block_size": 0}, "`block_size` of MFACPruner"),
        ({"recomputations": 0}, "`recomputations` of MFACPruner"),
        ({"every_n_epochs": 0}, "`every_n_epochs` of MFACPruner"),
        ({"scope": "all"}, "`scope` of MFACPruner to be one of 'global', 'layer'"),
        ({"method": "random"}, "`method` of MFACPruner"),
        ({"modules": ("Linearr",)}, "`modules` of MFACPruner to be names of layers of torch.nn, but got 'Linearr'"),
        ({"finetune_lrs": (0.1, 0.2)}, "`finetune_lrs` of MFACPruner to be 1 positive numbers, one per pruning"),
        ({"joint_update": True, "block_size": None}, "`joint_update` of MFACPruner to be False without blocks"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruner(**{"sparsities": (0.5,), **arguments})


def test_without_a_sparsity_nothing_changes():
    off, plain = Plain(dropout=0.2), Plain(dropout=0.2)
    fit(off, [pruner((0.0,))])
    fit(plain)
    assert torch.equal(weights(off), weights(plain))
