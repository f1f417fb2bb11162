# SPDX-License-Identifier: Apache-2.0
"""OrthogonalConvPenalty in training, and ConvOrthogonality: what they count, report, refuse and leave alone."""

from __future__ import annotations

import copy
import logging
import pickle
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from fulgurite import Schedule
from fulgurite.compatibility import check
from fulgurite.errors import RefusedError
from fulgurite.testing.lab import small_data
from fulgurite.testing.processes import on_ranks
from fulgurite_plugins.reparametrization import ConvOrthogonality, OrthogonalConvPenalty, conv_operator_matrix, lorth
from fulgurite_plugins.reparametrization.orthogonal_convolutions.layers import find_layers
from tests import helpers
from tests.helpers import weights


class Images(pl.LightningModule):
    """Somebody's module with convolutions of several kinds."""

    def __init__(self, **conv: Any) -> None:
        super().__init__()
        conv = {"padding": 1, "padding_mode": "circular", **conv}
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, **conv),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, **conv),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, **conv),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, groups=2, **conv),
            nn.ConvTranspose2d(6, 2, 2, stride=2),
            nn.Flatten(),
            nn.Linear(72, 4),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def loader(n: int = 40, **kwargs: Any) -> DataLoader:
    return DataLoader(small_data(n), **{"batch_size": 8, **kwargs})


def fit(module: pl.LightningModule, callbacks: Any = (), data: Any = None, **kwargs: Any) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    trainer = helpers.trainer(callbacks, **kwargs)
    trainer.fit(module, loader() if data is None else data)
    return trainer


class Logged(pl.Callback):
    """Keeps what was logged in every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class ByHand(Images):
    """The penalty written into the training step by hand, one layer after the other."""

    factor = 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        layers = [m for m in self.net if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        values = [lorth(m.weight, m.stride, m.dilation, m.groups, method="conv") for m in layers]
        return super().training_step(batch, batch_idx) + self.factor * (sum(values) + lorth(self.net[-1].weight))


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> bool:
    return bool((weights(a) - weights(b)).abs().max() <= tolerance)


# The penalty


@pytest.mark.parametrize("method", ["auto", "lags", "conv"])
def test_it_is_the_sum_over_layers_that_a_user_would_write(method):
    ours, theirs, plain = Images(), ByHand(), Images()
    logged = Logged()
    fit(ours, [OrthogonalConvPenalty(0.1, method=method), logged])
    fit(theirs)
    fit(plain)
    assert close(ours, theirs)
    assert not close(ours, plain, 1e-2)
    last = logged.steps[-1]
    assert last["orthogonalconvpenalty/penalty"] == pytest.approx(0.1 * last["orthogonalconvpenalty/lorth"])
    assert last["orthogonalconvpenalty/lorth"] < 0.2 * logged.steps[0]["orthogonalconvpenalty/lorth"]


def test_zero_weight_changes_nothing():
    plain, off = Images(), Images()
    fit(plain)
    fit(off, [OrthogonalConvPenalty(0.0)])
    assert torch.equal(weights(plain), weights(off))


def test_it_counts_once_per_update_whatever_the_accumulation():
    """Three micro-batches make an update, and the last one of the epoch is made of two."""
    ours, theirs = Images(), ByHand()
    fit(ours, [OrthogonalConvPenalty(0.1), logged := Logged()], accumulate_grad_batches=3, epochs=1)
    assert len(logged.steps) == 5
    theirs.factor = 0.0
    plain = Images()
    fit(theirs, accumulate_grad_batches=3, epochs=1)
    fit(plain, accumulate_grad_batches=3, epochs=1)
    assert torch.equal(weights(theirs), weights(plain))
    by_hand = Images()
    fit(by_hand, [_AddsGradient(0.1)], accumulate_grad_batches=3, epochs=1)
    assert close(ours, by_hand)


class _AddsGradient(pl.Callback):
    """Adds the gradient of the penalty once before each update, after the window is complete."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        layers = find_layers(pl_module)
        (self.weight * sum(lorth(x.module.weight, x.stride, groups=x.groups) for x in layers)).backward()


def test_every_n_steps_multiplies_the_weight():
    seldom, logged = Images(), Logged()
    fit(seldom, [OrthogonalConvPenalty(0.02, every_n_steps=2), logged], epochs=1)
    values = [step["orthogonalconvpenalty/penalty"] for step in logged.steps]
    assert values[0] == values[1]
    assert values[1] != values[2] == values[3] != values[4]
    first = logged.steps[0]
    assert first["orthogonalconvpenalty/penalty"] == pytest.approx(2 * 0.02 * first["orthogonalconvpenalty/lorth"])


def test_schedule_reduction_scale_and_variants():
    def first(**kwargs: Any) -> dict[str, float]:
        logged = Logged()
        fit(Images(), [OrthogonalConvPenalty(**kwargs), logged], epochs=1, limit_train_batches=1)
        return {name.partition("/")[2]: value for name, value in logged.steps[0].items()}

    module = Images()
    fit(module, epochs=1, limit_train_batches=0)
    layers = find_layers(module)
    total = float(sum(lorth(x.module.weight, x.stride, groups=x.groups) for x in layers))
    assert first()["lorth"] == pytest.approx(total, rel=1e-5)
    assert first(reduction="mean")["lorth"] == pytest.approx(total / 6, rel=1e-5)
    ramp = first(weight=Schedule(1.0, shape="linear", unit="step"))  # one step of one: the end of the ramp
    assert ramp["penalty"] == pytest.approx(ramp["lorth"])
    halves = float(sum(lorth(x.module.weight / 2, x.stride, groups=x.groups) for x in layers))
    assert first(scale_target=2.0)["lorth"] == pytest.approx(halves, rel=1e-5)
    kernel = first(variant="kernel")["kernel"]
    wang = first(variant="wang")["wang"]
    assert len({round(v, 3) for v in (total, kernel, wang)}) == 3


def test_scale_target_aims_at_a_multiple_of_an_isometry():
    module = Images()
    fit(module, [OrthogonalConvPenalty(3.0, modules="net.0", scale_target=2.0)], epochs=60)
    sigma = torch.linalg.svdvals(conv_operator_matrix(module.net[0].weight.detach(), 1, 6))
    assert sigma.min() > 1.8
    assert sigma.max() < 2.1


# Which layers


def test_layers_by_name_pattern_stem_and_kind():
    model = Images()

    def names(*args: Any, **kwargs: Any) -> list[str]:
        return [layer.name for layer in find_layers(model, *args, **kwargs)]

    assert names() == ["net.0", "net.2", "net.4", "net.6", "net.7", "net.9"]
    assert names(include_linear=False) == ["net.0", "net.2", "net.4", "net.6", "net.7"]
    assert names(skip_first=True)[0] == "net.2"
    assert names(["net.9", "net.[02]"]) == ["net.9", "net.0", "net.2"]
    assert names("net.*") == names()
    with pytest.raises(ValueError, match="'net.1' is a ReLU"):
        names("net.1")
    with pytest.raises(ValueError, match="'net' is a Sequential. To take the layers inside it, write 'net.\\*'"):
        names("net")
    with pytest.raises(ValueError, match="nothing fits 'nett.0'. Did you mean 'net.0'"):
        names("nett.0")


def test_shared_modules_and_weights_count_once():
    model = nn.Module()
    model.a = model.b = nn.Conv2d(3, 3, 3)
    model.c, model.d = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, stride=2)
    model.c.weight = model.d.weight = model.a.weight
    assert [layer.name for layer in find_layers(model)] == ["a", "d"]


def test_frozen_layers_are_left_out_until_they_learn():
    def penalty(frozen: bool) -> float:
        module, logged = Images(), Logged()
        module.net[2].weight.requires_grad_(not frozen)
        fit(module, [OrthogonalConvPenalty(), logged], epochs=1, limit_train_batches=1)
        return logged.steps[0]["orthogonalconvpenalty/lorth"]

    module = Images()
    fit(module, epochs=1, limit_train_batches=0)
    assert penalty(False) - penalty(True) == pytest.approx(float(lorth(module.net[2].weight)), rel=1e-4)


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights_are_penalised_without_a_step_of_their_buffers(parametrization):
    module, untouched = Images(), Images()
    for m in (module, untouched):
        torch.manual_seed(0)
        getattr(nn.utils.parametrizations, parametrization)(m.net[2])
    trainer = helpers.trainer([OrthogonalConvPenalty(0.1), logged := Logged()], epochs=1)
    trainer.fit(module, loader())
    helpers.trainer(epochs=1).fit(untouched, loader())
    assert module.net[2].parametrizations["weight"].training
    assert logged.steps[-1]["orthogonalconvpenalty/lorth"] < logged.steps[0]["orthogonalconvpenalty/lorth"]
    frozen = find_layers(module)[1]
    with torch.no_grad():
        before = copy.deepcopy(module.state_dict())
        frozen.weight()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_weight_decay_is_taken_away_on_request():
    module = Images()
    trainer = fit(module, [OrthogonalConvPenalty(modules="net.[0-8]", exempt_from_weight_decay=True)])
    (optimizer,) = trainer.optimizers
    exempt = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    assert {id(p) for p in exempt} == {id(module.net[i].weight) for i in (0, 2, 4, 6, 7)}


# What is said before training


def test_report_of_existence_and_bounds(caplog):
    with caplog.at_level(logging.INFO):
        fit(Images(), [OrthogonalConvPenalty(modules=["net.*"])], epochs=1)
    (report,) = [r.getMessage() for r in caplog.records if "before training" in r.getMessage()]
    lines = report.splitlines()
    assert lines[0] == "Orthogonal convolutions: 6 layers before training"
    assert lines[1].split() == ["layer", "kernel", "stride", "case", "L_orth", "eps", "Lipschitz", "<="]
    assert lines[2].split()[:4] == ["net.0", "4x1x3x3", "1x1", "column"]
    assert lines[3].endswith("square: hard to bring to 0")
    assert lines[5].split()[:4] == ["net.6", "6x2x3x3", "/2", "2x2"]
    assert lines[7].split()[:4] == ["net.9", "4x72", "1", "row"]


class Impossible(Images):
    def __init__(self) -> None:
        super().__init__()
        self.net[6] = nn.Conv2d(4, 6, 1, stride=2)


def test_impossible_layers_are_refused_or_skipped(caplog):
    with pytest.raises(RefusedError, match=r"net\.6: row case, M = 6 <= C\*S\^n = 16, but M > 4, .* at most 4 filters"):
        fit(Impossible(), [OrthogonalConvPenalty()])
    with caplog.at_level(logging.INFO):
        fit(Impossible(), [OrthogonalConvPenalty(on_impossible="skip")], epochs=1)
    assert any("net.6 is left out: row case" in r.getMessage() for r in caplog.records)


def test_warnings_of_borders_and_batch_norms_once():
    module = Images(padding_mode="zeros")
    module.net[3] = nn.BatchNorm2d(4)
    with pytest.warns(UserWarning, match="OrthogonalConvPenalty") as caught:
        fit(module, [OrthogonalConvPenalty()], epochs=2)
    texts = [str(w.message) for w in caught if "OrthogonalConvPenalty" in str(w.message)]
    assert len(texts) == 2
    assert "net.0 (padding_mode='zeros')" in texts[0]
    assert "net.7" not in texts[0]
    assert "net.2 (before net.3)" in texts[1]
    assert "net.0 (before" not in texts[1]


@pytest.mark.parametrize(("padding", "border"), [(1, None), (0, "no padding"), ("same", None)])
def test_circular_padding_counts_only_if_it_is_whole(padding, border):
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=padding, padding_mode="circular" if padding else "zeros"))
    assert find_layers(model)[0].border() == border
    assert find_layers(nn.Sequential(nn.Conv2d(3, 3, 1)))[0].border() is None
    short = nn.Sequential(nn.Conv2d(3, 3, 5, padding=1, padding_mode="circular"))
    assert "padding=(1, 1)" in str(find_layers(short)[0].border())


class Lazy(Images):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.LazyConv2d(4, 3, padding=1)


def test_refusals():
    with pytest.raises(RefusedError, match=r"net\.0 has no weight yet \(a lazy layer\)"):
        find_layers(Lazy())
    broken = Images()
    trainer = helpers.trainer([OrthogonalConvPenalty()], epochs=1)
    broken.net[4].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(RefusedError, match=r"the weight of net\.4 is not finite"):
        trainer.fit(broken, loader())
    norms = Images()
    norms.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36))
    with pytest.raises(RefusedError, match="there is no layer to be penalised in Images"):
        helpers.trainer([OrthogonalConvPenalty()], epochs=1).fit(norms, loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.1}, "`weight` .* at least 0 .*got -0.1"),
        ({"weight": float("nan")}, "`weight` .*got nan"),
        ({"weight": Schedule(-1.0)}, "`weight` .*got -1.0"),
        ({"variant": "cayley"}, "`variant` .* 'lorth', 'kernel', 'wang', but got 'cayley'"),
        ({"method": "svd"}, "`method` .* 'auto', 'lags', 'fft', 'conv', but got 'svd'"),
        ({"reduction": "max"}, "`reduction` .* 'sum', 'mean'"),
        ({"on_impossible": "warn"}, "`on_impossible` .* 'raise', 'skip'"),
        ({"scale_target": 0}, "`scale_target` .* positive number, but got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` .* positive integer, but got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OrthogonalConvPenalty(**arguments)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_shard_in_their_own_way_are_refused(strategy, monkeypatch):
    from fulgurite import lightning_adapter

    monkeypatch.setattr(lightning_adapter, "strategy_name", lambda trainer: strategy)
    callback = OrthogonalConvPenalty()
    with pytest.raises(RefusedError, match=f"orthogonalconvpenalty cannot be used with the strategy '{strategy}'"):
        check(helpers.trainer([callback]), Images(), [callback])


def test_the_callback_lets_go_of_the_model():
    callback = OrthogonalConvPenalty()
    fit(Images(), [callback], epochs=1)
    assert callback.layers == []
    pickle.dumps(callback)
    with pytest.raises(RefusedError):
        fit(Impossible(), [callback])
    assert callback.layers == []


# Sharded parameters


class Sharded(Images):
    """Shards every convolution of its own, so that weights are shards when the penalty reads them, and the rest."""

    def __init__(self, separately: bool) -> None:
        super().__init__()
        self.separately = separately

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if self.separately:
            for layer in (self.net[0], self.net[2], self.net[6]):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class SeesShards(OrthogonalConvPenalty):
    """Notes whether a weight was a shard in the penalty."""

    sharded = False

    def penalty(self, step: Any) -> Any:
        self.sharded |= any(isinstance(layer.module.weight, DTensor) for layer in self.layers)
        return super().penalty(step)


@pytest.mark.parametrize("separately", [True, False])
def test_sharded_parameters_end_where_replicated_ones_do(separately):
    timeout = timedelta(seconds=60)

    def train(rank: int, sharded: bool) -> tuple[Tensor, bool]:
        if sharded:
            module: pl.LightningModule = Sharded(separately)
            strategy: Any = ModelParallelStrategy(2, 1, process_group_backend="gloo", timeout=timeout)
        else:
            module = Images()
            strategy = DDPStrategy(process_group_backend="gloo", timeout=timeout)
        data = loader(sampler=DistributedSampler(small_data(40), num_replicas=2, rank=rank, shuffle=False))
        callback = SeesShards(0.1)
        fit(module, [callback, ConvOrthogonalityAtEnd()], data, strategy=strategy, devices=2, accumulate_grad_batches=2)
        parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
        return torch.cat([p.detach().flatten() for p in parts]), callback.sharded

    (sharded, seen), (other, _) = on_ranks(lambda rank: train(rank, True))
    (whole, _), _ = on_ranks(lambda rank: train(rank, False))
    assert seen == separately
    assert torch.equal(sharded, other)
    torch.testing.assert_close(sharded, whole, rtol=0, atol=1e-5)


class ConvOrthogonalityAtEnd(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metric = ConvOrthogonality()
        metric.update(pl_module)
        assert len(metric.compute()) == 42


# The metric


def test_metric_against_the_dense_operator():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(7, 3)
    )
    model[0].requires_grad_(False)
    metric = ConvOrthogonality(output_size=4)
    metric.update(model)
    found = metric.compute()
    matrix = conv_operator_matrix(model[0].weight, 2, 8)
    sigma = torch.linalg.svdvals(matrix)
    residual = torch.linalg.eigvalsh(matrix @ matrix.mT) - 1
    expected = {
        "lorth": lorth(model[0].weight, 2),
        "err_f": residual.norm(),
        "err_s": residual.abs().max(),
        "sigma_min": sigma.min(),
        "sigma_max": sigma.max(),
        "border_gap": torch.tensor(0.0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[f"0/{name}"], value, rtol=1e-4, atol=1e-5)
    assert found["0/sigma_max"] <= found["0/lipschitz_upper"]
    torch.testing.assert_close(found["2/sigma_max"], torch.linalg.matrix_norm(model[2].weight, ord=2))
    assert float(found["0/err_f"]) ** 2 == pytest.approx(16 * float(found["0/lorth"]), rel=1e-4)
    metric.reset()
    with pytest.raises(ValueError, match="given a model by `update`"):
        metric.compute()
    with pytest.raises(ValueError, match="a Linear holds none. Wrap a single layer"):
        metric.update(model[2])
    with pytest.raises(ValueError, match="`output_size` of ConvOrthogonality"):
        ConvOrthogonality(output_size=0)


@pytest.mark.parametrize(
    ("layer", "taps", "gap"),
    [
        (nn.Conv1d(1, 1, 3, padding=1), [0.0, 1.0, 0.0], 0.0),
        (nn.Conv1d(1, 1, 3, padding=1), [1.0, 1.0, 1.0], 2 / 3),
        (nn.Conv1d(1, 1, 3, padding=1, stride=2), [1.0, 1.0, 1.0], 1 / 3),
        (nn.Conv1d(1, 1, 3, padding=1, stride=2), [0.0, 3.0, 4.0], 0.0),
        (nn.Conv1d(1, 2, 3), [1.0, 1.0, 1.0], 1.0),
        (nn.Conv1d(2, 1, 3), [1.0, 1.0, 1.0], 0.0),
        (nn.Conv1d(1, 2, 2, stride=2), [1.0, 1.0], 0.0),
        (nn.Conv1d(1, 1, 3, padding="same", dilation=2), [1.0, 2.0, 2.0], 5 / 9),
    ],
)
def test_border_gap(layer, taps, gap):
    """By hand, and whether an orthogonal kernel keeps the residual of the real, zero-padded operator at zero."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(taps).expand_as(layer.weight))
    metric = ConvOrthogonality()
    metric.update(nn.Sequential(layer))
    assert metric.compute()["0/border_gap"] == pytest.approx(gap, abs=1e-6)


def test_metric_logs_in_a_validation_epoch():
    class Watched(Images):
        def on_validation_epoch_end(self) -> None:
            metric = ConvOrthogonality(modules="net.0", output_size=5)
            metric.update(self)
            self.log_dict(metric.compute())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer = helpers.trainer(epochs=1)
    trainer.fit(Watched(), loader(), loader())
    assert "net.0/sigma_max" in trainer.callback_metrics
