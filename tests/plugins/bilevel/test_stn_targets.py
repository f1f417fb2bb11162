# SPDX-License-Identifier: Apache-2.0
"""Self-Tuning Networks: hyperparameters as users declare them, and what they act on inside a model and a trainer."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fulgurite import Intervention, LossCall, Schedule
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper, Knobs
from fulgurite_plugins.bilevel.self_tuning_networks.layers import HyperLSTMCell
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import fuse_model, gate
from fulgurite_plugins.bilevel.self_tuning_networks.targets import (
    ActivationPenalty,
    Cutout,
    Dropout,
    EmbeddingDropout,
    GaussianNoise,
    InputFunction,
    InterventionWeight,
    LabelSmoothing,
    TemporalActivationPenalty,
    WeightDecay,
    WeightDrop,
)
from tests.helpers import Plain, fit

INF = math.inf
TARGETS = "fulgurite_plugins.bilevel.self_tuning_networks.targets"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attached(module: nn.Module, *hypers: Hyper) -> tuple[Knobs, Conditioning]:
    knobs, conditioning = Knobs(hypers, module), Conditioning()
    knobs.attach(module, conditioning)
    return knobs, conditioning


def double(x: Tensor, value: Tensor) -> Tensor:
    return x * 2.0 * value.view(-1, 1)


# Declarations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": 0.0}, "`init` of Hyper 'k' to be strictly inside its range \\(0, 0.9\\), but got 0.0"),
        ({"init": 0.9}, "strictly inside its range \\(0, 0.9\\)"),
        ({"init": math.nan}, "strictly inside"),
        ({"range": (0.5, 0.2)}, "`range` of Hyper 'k' to be a lower and a higher end"),
        ({"range": (0.0, 1.5)}, "within \\(0, 1\\), as Dropout needs it"),
        ({"range": (0.2, 0.8), "init": 0.5, "discrete": True}, "a whole number inside"),
        ({"target": Cutout("length"), "range": (0, 24), "init": 3.5, "discrete": True}, "a whole number, as it is"),
        ({"target": Cutout("length"), "range": (0, 24), "init": 24, "discrete": True}, "strictly inside its range"),
        ({"scale": 0.0}, "`scale` of Hyper 'k' to be positive, but got 0.0"),
        (
            {"target": WeightDecay(), "range": (0, INF), "shared": False},
            "all examples of a batch have what WeightDecay",
        ),
        ({"target": Cutout("holes"), "range": (0, 20), "init": 1, "discrete": True}, "within \\(0, 9\\)"),
        ({"target": 3}, "a target or a function"),
    ],
)
def test_bad_declarations_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Hyper(**{"name": "k", "target": Dropout(), "init": 0.05, **arguments})


def test_bad_arguments_of_targets_are_named():
    for make, message in (
        (lambda: Dropout(layout="rows"), "`layout` of Dropout to be one of"),  # type: ignore[arg-type]
        (lambda: LabelSmoothing("rows"), "`layout` of LabelSmoothing"),  # type: ignore[arg-type]
        (lambda: Cutout("size"), "`part` of Cutout"),  # type: ignore[arg-type]
        (lambda: Cutout("length", holes=9), "`holes` in \\[0, most\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_all_hyperparameters_of_a_run_are_mapped_together():
    hypers = [
        Hyper("noise", GaussianNoise(), 0.1, (0, INF)),
        Hyper("length", Cutout("length"), 4, (0, 24), discrete=True, scale=1.0),
        Hyper("decay", WeightDecay(), 1e-3, (0, INF)),
        Hyper("twice", double, -1.0, (-INF, INF), shared=True),
    ]
    knobs = Knobs(hypers, nn.Linear(2, 2))
    assert len(knobs) == 4
    assert knobs.shared.tolist() == [False, False, True, True]
    lam, scale = knobs.initial()
    assert lam.dtype is scale.dtype is torch.float32
    assert scale.tolist() == [0.5, 1.0, 0.5, 0.5]
    torch.testing.assert_close(knobs.constrain(lam), torch.tensor([0.1, 4.5, 1e-3, -1.0]))
    torch.testing.assert_close(knobs.values(lam), torch.tensor([0.1, 4.0, 1e-3, -1.0]))
    extreme = torch.tensor([[-40.0], [40.0]]).expand(2, 4).clone().requires_grad_()
    assert knobs.values(extreme)[:, 1].tolist() == [0.0, 23.0]
    assert not knobs.values(extreme).requires_grad
    assert knobs.constrain(extreme).requires_grad
    assert (knobs.transforms_inputs, knobs.changes_loss) == (True, False)
    assert (knobs.penalises_activations, knobs.penalises_parameters) == (False, True)
    shifted = Knobs([Hyper("k", GaussianNoise(), 1, (0.5, 2.5), discrete=True)], nn.Linear(2, 2))
    assert shifted.values(torch.tensor([[-20.0], [0.0], [20.0]])).flatten().tolist() == [1.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="distinct names"):
        Knobs([hypers[0], hypers[0]], nn.Linear(2, 2))
    with pytest.raises(ValueError, match="distinct names, but got \\[\\]"):
        Knobs([], nn.Linear(2, 2))


def test_a_declaration_survives_a_file_and_a_command_line():
    hypers = [
        Hyper("rate", Dropout("net.*", per_layer=False, layout="batch*time"), 0.05),
        Hyper("holes", Cutout("holes", length=5), 1, (0, 4), discrete=True),
        Hyper("decay", WeightDecay("net.*"), 1e-4, (0.0, INF)),
        Hyper("twice", double, 1.0, (-INF, INF)),
    ]
    for hyper in hypers:
        again = Hyper.from_dict(json.loads(json.dumps(hyper.as_dict())))
        assert again.as_dict() == hyper.as_dict()
        assert vars(again.target) == vars(hyper.target) or isinstance(hyper.target, WeightDecay)
    with pytest.raises(ValueError, match="to name a target, but got 'builtins.dict'"):
        Hyper.from_dict({**hypers[0].as_dict(), "target": {"class_path": "builtins.dict"}})
    with pytest.raises(ValueError, match="'nowhere.Thing' to be the import path"):
        Hyper.from_dict({**hypers[0].as_dict(), "target": {"class_path": "nowhere.Thing"}})

    parser = ArgumentParser()
    parser.add_argument("--hyperparameters", type=list[Hyper])
    written = f"""
    - name: rate
      target: {{class_path: {TARGETS}.Dropout, init_args: {{pattern: net.*, per_layer: false}}}}
      init: 0.05
    - {{name: length, target: {{class_path: {TARGETS}.Cutout, init_args: {{part: length}}}}, init: 4, range: [0, 24],
       discrete: true}}
    - {{name: decay, target: {{class_path: WeightDecay}}, init: 0.001, range: [0, .inf], scale: 1.0}}
    - {{name: twice, target: {__name__}.double, init: 1, range: [-.inf, .inf]}}
    """
    config = parser.parse_object({"hyperparameters": yaml.safe_load(written)})
    rate, length, decay, twice = parser.instantiate(config).hyperparameters
    assert isinstance(rate, Hyper)
    assert (rate.target.pattern, rate.target.per_layer, rate.range) == ("net.*", False, (0.0, 0.9))
    assert (length.target.part, length.range, length.discrete) == ("length", (0.0, 24.0), True)
    assert (decay.range, decay.scale, decay.is_shared) == ((0.0, INF), 1.0, True)
    assert isinstance(twice.target, InputFunction)


def test_a_function_is_a_target():
    knobs = Knobs([Hyper("twice", double, 1.0, (-INF, INF))], nn.Linear(2, 2))
    x, values = randn(3, 2), torch.tensor([[1.0], [0.5], [2.0]])
    generator = torch.Generator()
    torch.testing.assert_close(knobs.transform(x, values, generator), 2 * x * values)
    torch.testing.assert_close(knobs.transform(x, values[1], generator), x)
    for bad in (torch.zeros(3, dtype=torch.long), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match="floating point with 3 examples"):
            knobs.transform(bad, values, generator)


# Dropout of activations


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_each_example_has_its_own_rate():
    model = nn.Sequential(nn.Dropout(0.5))
    _, conditioning = attached(model, Hyper("rate", Dropout(), 0.1))
    n, rates = 100_000, torch.tensor([[0.05], [0.4], [0.85]])
    conditioning.set(values=rates, seed=3)
    out = model(torch.ones(3, n))
    for row, rate in zip(out, rates.flatten(), strict=True):
        kept = row != 0
        torch.testing.assert_close(row[kept], torch.full((int(kept.sum()),), 1.0) / (1 - rate))
        deviation = math.sqrt(rate * (1 - rate) / n)
        assert abs(float((~kept).float().mean()) - rate) < 5 * deviation
    conditioning.set(values=torch.tensor([0.25]), seed=3)
    assert abs(float((model(torch.ones(3, n)) == 0).float().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Dropout1d, (5, 50, 7)), (nn.Dropout2d, (5, 50, 3, 2)), (nn.Dropout3d, (5, 50, 2, 3, 2))]
)
def test_whole_channels_are_dropped_where_the_layer_does_so(kind: Any, shape: tuple[int, ...]):
    model = nn.Sequential(kind(0.5))
    _, conditioning = attached(model, Hyper("rate", Dropout(), 0.1))
    conditioning.set(values=torch.linspace(0.1, 0.9, 5).view(5, 1), seed=1)
    out = model(torch.ones(shape)).flatten(2)
    assert bool((out == out[..., :1]).all())
    assert 0.2 < float((out[..., 0] == 0).float().mean()) < 0.8
    rates = 1 - 1 / out.amax(dim=(1, 2))
    torch.testing.assert_close(rates, torch.linspace(0.1, 0.9, 5))


def test_masks_are_those_of_ordinary_dropout_with_the_same_noise():
    """Hyperparameters that stand still: the model is the plain one with the same masks, in outputs and gradients."""
    model, x = net(), randn(6, 4)
    reference = copy.deepcopy(model)
    gate(model, conditioning := Conditioning(), 2)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.zeros_(parameter)
    Knobs([Hyper("rate", Dropout(), 0.1)], model).attach(model, conditioning)
    rates = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)) * 0.9
    conditioning.set(h=randn(6, 2), values=rates, seed=9)
    out = model(x)
    conditioning.set(values=rates, seed=9)
    a, b = (conditioning.uniform((6, 8), x.device) for _ in range(2))
    one, two = ((noise < 1 - rates[:, k : k + 1]) / (1 - rates[:, k : k + 1]) for k, noise in ((0, a), (1, b)))
    expected = reference[5](reference[3]((reference[0](x) * one).relu()) * two)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(y.square().sum(), m[0].weight)[0] for y, m in ((out, model), (expected, reference))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_hyperparameter_for_several_layers_becomes_one_for_each_unless_told_otherwise():
    model = net()
    knobs, conditioning = attached(model, Hyper("rate", Dropout(), 0.1))
    assert knobs.names == ["rate/1", "rate/4"]
    conditioning.set(values=torch.tensor([[0.0, 0.9]]).expand(500, 2), seed=0)
    assert not bool((model[1](torch.ones(500, 8)) == 0).any())
    assert abs(float((model[4](torch.ones(500, 8)) == 0).float().mean()) - 0.9) < 0.03
    knobs.detach()
    assert Knobs([Hyper("rate", Dropout(per_layer=False), 0.1)], model).names == ["rate"]
    assert Knobs([Hyper("rate", Dropout("1"), 0.1)], model).names == ["rate"]
    both = Knobs([Hyper("a", Dropout("1"), 0.1), Hyper("b", Dropout(per_layer=False), 0.1)], model)
    with pytest.raises(ValueError, match="one hyperparameter for the rate of '1', but got two"):
        both.attach(model, Conditioning())
    assert type(model[1]) is nn.Dropout  # let go again
    with pytest.raises(
        ValueError, match=r"Dropout\('head'\) matches no dropout layer of Sequential.* are: 1, 4.*F.dropout"
    ):
        Knobs([Hyper("rate", Dropout("head"), 0.1)], model)
    with pytest.raises(ValueError, match="are: none"):
        Knobs([Hyper("rate", Dropout(), 0.1)], nn.Linear(2, 2))


def test_dropout_layers_without_a_step_are_what_they_were_and_are_left_so():
    model, plain, x = net(), net(), randn(6, 4)
    knobs, conditioning = attached(model, Hyper("rate", Dropout(), 0.1))
    conditioning.set(values=torch.full((6, 2), 0.9))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    conditioning.clear()
    outs = []
    for m in (model.train(), plain.train()):
        torch.manual_seed(4)
        outs.append(m(x))
    assert torch.equal(*outs)
    knobs.attach(model, conditioning)  # once more, as in the next run of a trainer
    pickle.loads(pickle.dumps(model))(x)
    copy.deepcopy(model)(x)
    knobs.detach()
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_rates_find_their_examples_in_every_layout():
    rates = torch.tensor([[0.0], [0.9]])
    for layout, shape, zero in (
        ("batch", (2, 30, 20), lambda y: y[0]),
        ("time,batch", (30, 2, 20), lambda y: y[:, 0]),
        ("batch*time", (60, 20), lambda y: y[:30]),
        ("time*batch", (60, 20), lambda y: y[0::2]),
    ):
        model = nn.Sequential(nn.Dropout())
        _, conditioning = attached(model, Hyper("rate", Dropout(layout=layout), 0.1))  # type: ignore[arg-type]
        conditioning.set(values=rates)
        out = model(torch.ones(shape))
        assert bool((zero(out) == 1).all()), layout
        assert int((out == 0).sum()) > 400, layout
    with pytest.raises(ValueError, match="step of 2 examples"):
        model(torch.ones(61, 20))


def test_masks_follow_from_the_seed_of_the_step_alone():
    model, x = net(), randn(6, 4)
    _, conditioning = attached(model, Hyper("rate", Dropout(), 0.1))
    outs = []
    for seed, state in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(state)
        conditioning.set(values=torch.full((6, 2), 0.5), seed=seed)
        outs.append(model(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    again = model(x)
    assert not torch.equal(again, outs[2])  # new noise in every call
    conditioning.seal()
    assert not torch.equal(model(x), again)  # another plugin may run the model once more


class Reused(nn.Module):
    """One dropout layer in several checkpointed segments, twice in the first."""

    def __init__(self, reentrant: bool | None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout()
        self.options = None if reentrant is None else {"use_reentrant": reentrant, **options}

    def segment(self, x: Tensor) -> Tensor:
        return self.drop(self.first(self.drop(x)).tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.options is None:
            return self.drop(self.second(self.segment(x)).tanh())
        x = checkpoint(self.segment, x, **self.options)
        return checkpoint(lambda y: self.drop(self.second(y).tanh()), x, **self.options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_masks_are_the_same_in_the_recomputation_of_checkpointing(reentrant: bool):
    gradients = []
    for option in (None, reentrant):
        model = Reused(option)
        _, conditioning = attached(model, Hyper("rate", Dropout(), 0.1))
        x = randn(6, 8).requires_grad_()
        for step in range(2):  # and gradients accumulate over steps
            conditioning.set(values=torch.linspace(0.1, 0.8, 6).view(6, 1), seed=step)
            model(x).square().sum().backward()
            conditioning.clear()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for direct, recomputed in zip(*gradients, strict=True):
        assert torch.equal(direct, recomputed)


def test_a_recomputation_without_the_random_state_is_refused():
    model = Reused(False, preserve_rng_state=False)
    _, conditioning = attached(model, Hyper("rate", Dropout(), 0.1))
    conditioning.set(values=torch.full((6, 1), 0.5))
    loss = model(randn(6, 8)).sum()
    with pytest.raises(RefusedError, match="preserve_rng_state=True"):
        loss.backward()


def test_compiled_models_are_not_compiled_anew_for_each_step():
    torch._dynamo.reset()
    model, x = net(), randn(6, 4)
    gate(model, conditioning := Conditioning(), 2)
    Knobs([Hyper("rate", Dropout(), 0.1)], model).attach(model, conditioning)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    counts = []
    for step in range(4):
        values = torch.full((6, 2), 0.1 * (step + 1))
        conditioning.set(h=randn(6, 2, seed=step), values=values, seed=step)
        out = compiled(x)
        conditioning.set(h=randn(6, 2, seed=step), values=values, seed=step)
        torch.testing.assert_close(out, model(x))
        counts.append(len(graphs))
    assert counts[0] == counts[-1]
    model.eval()
    for step in range(3):
        conditioning.rest(randn(2, seed=step))
        torch.testing.assert_close(compiled(x), model(x))
        counts.append(len(graphs))
    assert counts[4] == counts[-1] > counts[0]
    torch._dynamo.reset()


# Dropout of embeddings and weights


def test_embedding_dropout_drops_words_throughout_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 6))
    gate(model, conditioning := Conditioning(), 1)
    knobs = Knobs([Hyper("words", EmbeddingDropout(), 0.1)], model)
    assert knobs.shared.tolist() == [True]
    knobs.attach(model, conditioning)
    ids = torch.arange(400).repeat(3, 1)
    h = randn(3, 1)
    conditioning.set(h=h)
    plain = model(ids)
    conditioning.set(h=h, values=torch.full((3, 1), 0.3), seed=2)
    out = model(ids)
    dropped = (out == 0).all(-1)
    assert torch.equal(dropped, dropped[:1].expand(3, -1))
    assert abs(float(dropped[0].float().mean()) - 0.3) < 5 * math.sqrt(0.21 / 400)
    torch.testing.assert_close(out[~dropped], plain[~dropped] / 0.7)
    assert torch.equal(model.eval()(ids), plain)
    knobs.detach()
    assert torch.equal(model.train()(ids), plain)
    with pytest.raises(ValueError, match="matches no nn.Embedding of Linear"):
        attached(nn.Linear(2, 2), Hyper("words", EmbeddingDropout(), 0.1))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_weight_drop_masks_the_whole_weight_and_puts_it_back(gated: bool, reentrant: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    conditioning, h = Conditioning(), randn(4, 1)
    if gated:
        gate(model, conditioning, 1)
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                nn.init.normal_(parameter)
    knobs = Knobs([Hyper("weights", WeightDrop("0.weight"), 0.1)], model)
    knobs.attach(model, conditioning)
    x, own = randn(4, 30).requires_grad_(), dict(model.named_parameters())
    conditioning.set(h=h if gated else None, values=torch.tensor([0.4]), seed=5)
    out = model(x)
    recomputed = checkpoint(model, x, use_reentrant=reentrant)
    assert dict(model.named_parameters()).keys() == own.keys()
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in own.items())

    conditioning.set(values=torch.tensor([0.4]), seed=5)
    mask = (conditioning.uniform((20, 30), x.device) < 0.6) / 0.6
    assert 0.3 < float((mask == 0).float().mean()) < 0.5
    reference = copy.deepcopy(model)
    Knobs([Hyper("weights", WeightDrop("0.weight"), 0.1)], reference).detach()
    for layer in reference.modules():
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
    with torch.no_grad():
        reference[0].weight.mul_(mask)
        if gated:
            reference[0].hyper_weight.mul_(mask)
    conditioning.set(h=h if gated else None)
    expected = reference(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(recomputed, out)  # another call, another mask

    conditioning.set(h=h if gated else None, values=torch.tensor([0.4]), seed=5)
    gradients = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        conditioning.set(h=h if gated else None, values=torch.tensor([0.4]), seed=5)
        model.zero_grad()
        call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for direct, again in zip(*gradients, strict=True):
        assert torch.equal(direct, again)
    knobs.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_weight_drop_reaches_recurrent_weights_and_survives_an_error():
    torch.manual_seed(0)
    rnn = nn.LSTM(4, 5, batch_first=True)
    knobs, conditioning = attached(rnn, Hyper("weights", WeightDrop("weight_hh_l0"), 0.1))
    x, own = randn(3, 2, 4), rnn.weight_hh_l0
    before = rnn(x)[0]
    conditioning.set(values=torch.tensor([0.5]), seed=1)
    masked = rnn(x)[0]
    torch.testing.assert_close(masked[:, 0], before[:, 0])  # the first step starts from a zero state
    assert not torch.allclose(masked[:, 1], before[:, 1])
    masked.sum().backward()
    assert own.grad is not None
    assert 0.2 < float((own.grad == 0).float().mean()) < 0.8
    with pytest.raises(RuntimeError):
        rnn(randn(3, 2, 7))
    assert rnn.weight_hh_l0 is own
    assert rnn._flat_weights[1] is own
    conditioning.clear()
    assert torch.equal(rnn(x)[0], before)
    knobs.detach()
    cell = nn.ModuleDict({"cell": nn.LSTMCell(4, 5)})
    gate(cell, Conditioning(), 1)
    assert isinstance(cell["cell"], HyperLSTMCell)
    attached(cell, Hyper("weights", WeightDrop("cell.weight_hh"), 0.1))
    with pytest.raises(ValueError, match="matches no weight of LSTM"):
        attached(rnn, Hyper("weights", WeightDrop("bias*"), 0.1))


# Penalties


def test_weight_decay_is_the_square_of_the_effective_weights_of_the_first_example():
    model = net().double()
    gate(model, conditioning := Conditioning(), 1, patterns=["0", "3"])
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.normal_(parameter)
    knobs = Knobs([Hyper("decay", WeightDecay(), 1e-3, (0, INF))], model)
    knobs.attach(model, conditioning)
    h, values = randn(6, 1).double(), torch.full((6, 1), 0.01, dtype=torch.float64)
    conditioning.set(h=h, values=values)
    fused = fuse_model(model, h[0])
    expected = 0.01 * sum(fused[k].weight.square().sum() for k in (0, 3, 5))
    (penalty,) = knobs.penalties(values, "parameters").values()
    torch.testing.assert_close(penalty, expected)
    assert knobs.penalties(values, "activations") == {}
    penalty.backward()
    torch.testing.assert_close(model[0].weight.grad, 0.02 * fused[0].weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(model[5].weight.grad, 0.02 * fused[5].weight, rtol=0, atol=1e-12)
    scale = model[0].gates(h[0])[0].unsqueeze(1)
    torch.testing.assert_close(model[0].hyper_weight.grad, 0.02 * scale * fused[0].weight, rtol=0, atol=1e-12)
    assert model[0].gate.weight.grad is not None
    assert all(layer.bias.grad is None for layer in (model[0], model[3], model[5]))
    assert {id(p) for p in knobs.decayed_parameters()} == {id(model[k].weight) for k in (0, 3, 5)}
    with pytest.raises(ValueError, match=r"WeightDecay\('encoder.\*'\) matches no trainable weight of Sequential"):
        attached(net(), Hyper("decay", WeightDecay("encoder.*"), 1e-3, (0, INF)))


def test_weight_decay_leaves_out_what_is_frozen_and_counts_tied_weights_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    model[2].weight = model[1].weight
    nn.init.zeros_(model[1].weight)
    knobs, conditioning = attached(model, Hyper("decay", WeightDecay(), 0.5, (0, INF)))
    conditioning.set(values=torch.tensor([0.5]))
    (penalty,) = knobs.penalties(torch.tensor([0.5]), "parameters").values()
    penalty.backward()
    assert not model[1].weight.grad.any()  # zero, and not NaN
    nn.init.ones_(model[1].weight)
    (penalty,) = knobs.penalties(torch.tensor([0.5]), "parameters").values()
    assert penalty.item() == pytest.approx(4.5)


@pytest.mark.parametrize("time_dim", [None, 1, 0])
def test_activation_penalties_are_mean_squares_of_what_layers_return(time_dim: int | None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 5, batch_first=True))
    target = ActivationPenalty("0") if time_dim is None else TemporalActivationPenalty("0", time_dim)
    knobs, conditioning = attached(model, Hyper("activity", target, 0.05, (0, INF)))
    x, values = randn(3, 6, 4), torch.full((3, 1), 0.2)
    assert knobs.penalties(values, "activations") == {}
    conditioning.set(values=values)
    out = model(x)[0]
    if time_dim is None:
        expected = out.square().mean()
    else:
        a, b = (out[:, 1:], out[:, :-1]) if time_dim == 1 else (out[1:], out[:-1])
        expected = (a - b).square().mean()
    penalty = knobs.penalties(values, "activations")["activity"]
    torch.testing.assert_close(penalty, 0.2 * expected)
    penalty.backward()
    assert model[0].weight_hh_l0.grad.any()
    assert knobs.penalties(values, "activations") == {}  # each call counts once
    conditioning.seal()
    model(x)
    conditioning.clear()
    model(x)
    conditioning.set(values=values)
    model.eval()(x)
    assert (
        knobs.penalties(values, "activations") == {}
    )  # neither after the forward pass, nor outside steps, nor in eval mode
    twin = copy.deepcopy(model.train())
    with torch.no_grad():
        twin(x)  # as a frozen teacher does
    assert torch.equal(pickle.loads(pickle.dumps(model))(x)[0], out)
    assert knobs.penalties(values, "activations") == {}
    knobs.detach()
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="matches no layer of Sequential. Its layers are: 0"):
        attached(model, Hyper("activity", ActivationPenalty("rnn"), 0.05, (0, INF)))


def test_activation_penalties_count_once_under_checkpointing():
    gradients = []
    for option in (None, False):
        model = Reused(option)
        knobs, conditioning = attached(model, Hyper("activity", ActivationPenalty("first"), 0.05, (0, INF)))
        conditioning.set(values=torch.full((6, 1), 0.3))
        model.drop.p = 0.0
        loss = model(randn(6, 8)).sum() + knobs.penalties(torch.full((6, 1), 0.3), "activations")["activity"]
        loss.backward()
        assert knobs.penalties(torch.full((6, 1), 0.3), "activations") == {}
        gradients.append(model.first.weight.grad)
    torch.testing.assert_close(*gradients)
    model.options = {"use_reentrant": True}
    conditioning.set(values=torch.full((6, 1), 0.3))
    with pytest.raises(RefusedError, match="Linear.* without gradients .*use_reentrant=False"):
        model(randn(6, 8).requires_grad_())


# The criterion


def call_of(fn: Any, outputs: Tensor, targets: Tensor, **arguments: Any) -> LossCall:
    return LossCall(fn, outputs, targets, arguments, fn.__name__, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_label_smoothing_is_that_of_cross_entropy_for_each_example(shape: tuple[int, ...]):
    logits, amounts = randn(*shape).double(), torch.linspace(0.0, 0.5, 6, dtype=torch.float64)
    labels = torch.randint(0, 5, (6, *shape[2:]), generator=torch.Generator().manual_seed(1))
    knobs = Knobs([Hyper("smoothing", LabelSmoothing(), 0.1, (0, 1))], nn.Linear(2, 2))
    call = call_of(F.cross_entropy, logits, labels, reduction="none")
    smoothed = knobs.on_loss(call, amounts.view(6, 1)).evaluate()
    each = torch.stack(
        [F.cross_entropy(logits[i : i + 1], labels[i : i + 1], label_smoothing=float(amounts[i])) for i in range(6)]
    )
    torch.testing.assert_close(smoothed.flatten(1).mean(1) if smoothed.ndim > 1 else smoothed, each)
    alike = knobs.on_loss(call_of(F.cross_entropy, logits, labels), torch.tensor([0.2])).evaluate()
    torch.testing.assert_close(alike, F.cross_entropy(logits, labels, label_smoothing=0.2))


def test_label_smoothing_of_binary_targets_goes_to_one_half_and_of_a_regression_is_an_error():
    logits, labels = randn(6).double(), torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=torch.float64)
    amounts = torch.linspace(0.0, 0.5, 6, dtype=torch.float64)
    call = call_of(F.binary_cross_entropy_with_logits, logits, labels)
    smoothed = LabelSmoothing().on_loss(call, amounts).evaluate()
    targets = labels * (1 - amounts) + amounts / 2
    torch.testing.assert_close(smoothed, F.binary_cross_entropy_with_logits(logits, targets))

    class Holder:
        module = nn.Linear(1, 1)

    with pytest.raises(FulguriteError, match="Expected a classification loss"):
        LabelSmoothing().on_loss(LossCall(F.mse_loss, logits, labels, {}, "mse_loss", Holder()), amounts)  # type: ignore[arg-type]
    flat = call_of(F.cross_entropy, randn(8, 3), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="LabelSmoothing expects tensors laid out as 'batch' in a step of 4"):
        LabelSmoothing().on_loss(flat, torch.full((4,), 0.1))
    rows = LabelSmoothing("batch*time").on_loss(flat, torch.tensor([0.0, 0.3, 0.6, 0.9])).targets[:, 1]
    torch.testing.assert_close(rows, torch.tensor([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]))


# Other interventions


class Weighted(Intervention):
    """An intervention with a weight, as papers have them."""

    def __init__(self, weight: Schedule) -> None:
        self.weight = weight
        self.seen: list[float] = []

    def on_loss(self, call: LossCall) -> LossCall:
        self.seen.append(self.weight.at(call.step.updates + 1, 100))
        return call


class Driver(Intervention):
    """Sets the value of a hyperparameter anew in each step."""

    def __init__(self, target: InterventionWeight) -> None:
        self.hyper, self.conditioning, self.step = Hyper("weight", target, 0.4), Conditioning(), 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.knobs = Knobs([self.hyper], pl_module)
        self.knobs.attach(pl_module, self.conditioning)
        self.knobs.attach(pl_module, self.conditioning, trainer)

    def transform_batch(self, batch: Any, step: Any) -> Any:
        self.step += 1
        self.conditioning.set(values=torch.full((16, 1), 0.1 * self.step))
        return batch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.knobs.detach()


def test_the_weight_of_another_intervention_follows_its_hyperparameter():
    schedule = Schedule(0.8)
    weighted = Weighted(schedule)
    assert Knobs([Hyper("weight", InterventionWeight("Weighted"), 0.4)], nn.Linear(2, 2)).shared.tolist() == [True]
    fit(Plain(), [Driver(InterventionWeight("Weighted")), weighted], epochs=1, limit_train_batches=3)
    assert weighted.seen == pytest.approx([0.1, 0.2, 0.3])
    assert weighted.weight is schedule
    assert weighted.weight.at(50, 100) == 0.4


def test_pskd_can_be_tuned_without_knowing_of_it():
    from fulgurite_plugins.distillation import PSKD

    pskd = PSKD(alpha=0.8)
    own = pskd.schedule
    driver = Driver(InterventionWeight("PSKD", "schedule"))
    fit(Plain(), [driver, pskd], epochs=2, limit_train_batches=3)
    assert pskd.weight == pytest.approx(0.6)
    assert pskd.schedule is own


def test_an_intervention_that_cannot_be_found_is_named():
    with pytest.raises(
        RefusedError, match="one PSKD among the trainer's callbacks.* found 0. .* are: Driver, Weighted"
    ):
        fit(Plain(), [Driver(InterventionWeight("PSKD")), Weighted(Schedule(0.8))], epochs=1)
    with pytest.raises(RefusedError, match="to hold one Schedule in 'alpha', but it holds weight"):
        fit(Plain(), [Driver(InterventionWeight("Weighted", "alpha")), Weighted(Schedule(0.8))], epochs=1)
