# SPDX-License-Identifier: Apache-2.0
"""Self-Tuning Networks: gated layers against plain ones and loops over examples, and the surgery that puts them in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.layers import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperEmbedding,
    HyperGRUCell,
    HyperLinear,
    HyperLSTMCell,
    affine,
    fuse,
)
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import (
    fuse_model,
    gate,
    gated_layers,
    hyper_parameters,
    ungate,
)

B, H = 6, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0))


LAYERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = {
    "linear": (HyperLinear, (5, 4), {}, randn(B, 5)),
    "linear without bias": (HyperLinear, (5, 4), {"bias": False}, randn(B, 5)),
    "linear over time": (HyperLinear, (5, 4), {}, randn(B, 2, 3, 5)),
    "conv1d": (HyperConv1d, (3, 4, 3), {"stride": 2}, randn(B, 3, 9)),
    "conv2d": (HyperConv2d, (4, 6, 3), {"padding": 1}, randn(B, 4, 6, 5)),
    "conv2d stride, dilation": (HyperConv2d, (4, 6, 3), {"stride": 2, "dilation": 2, "padding": 2}, randn(B, 4, 8, 8)),
    "conv2d groups": (HyperConv2d, (4, 6, 2), {"groups": 2}, randn(B, 4, 3, 3)),
    "conv2d depthwise": (HyperConv2d, (4, 8, 3), {"groups": 4, "bias": False}, randn(B, 4, 6, 6)),
    "conv2d same": (HyperConv2d, (2, 3, (3, 2)), {"padding": "same"}, randn(B, 2, 6, 6)),
    "conv2d circular": (HyperConv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, randn(B, 2, 6, 6)),
    "conv2d reflect": (HyperConv2d, (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, randn(B, 2, 6, 6)),
    "conv3d": (HyperConv3d, (2, 3, 2), {}, randn(B, 2, 3, 4, 3)),
    "embedding": (HyperEmbedding, (7, 4), {"padding_idx": 2}, ids(B, 3)),
}


def made(name: str, **options: Any) -> tuple[Any, Tensor]:
    kind, args, kwargs, x = LAYERS[name]
    torch.manual_seed(0)
    layer = kind(*args, num_hyper=H, generator=torch.Generator().manual_seed(1), **kwargs, **options).double()
    for module in layer.children():
        nn.init.normal_(module.weight)
    return layer, x


def plain(layer: Any) -> Any:
    return fuse(layer, None)


@pytest.fixture(params=[False, True], ids=["two kernels", "one kernel"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What layers do on the CPU, and what they do on an accelerator."""
    monkeypatch.setattr(affine, "in_one", lambda x: request.param)
    return request.param


# Exactness


@pytest.mark.parametrize("name", LAYERS)
def test_a_gated_layer_equals_a_loop_over_examples_with_weights_of_their_own(name: str, kernels: bool):
    layer, x = made(name)
    h = randn(B, H, seed=3)
    layer.conditioning.set(h=h)
    each = torch.cat([fuse(layer, h[i])(x[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(layer(x), each, rtol=0, atol=1e-12)
    single = layer.float()
    single.conditioning.set(h=h.float())
    x = x.float() if x.is_floating_point() else x
    torch.testing.assert_close(single(x), each.float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_the_effective_weight_is_the_equation(name: str):
    layer, _ = made(name)
    h = randn(H, seed=3)
    weight, bias = layer.effective(h)
    values = layer.gate.weight @ h
    if isinstance(layer, HyperEmbedding):
        torch.testing.assert_close(weight, layer.weight + layer.hyper_weight * values, rtol=0, atol=1e-14)
        return
    scale = values[: len(layer.weight)].view(-1, *[1] * (layer.weight.ndim - 1))
    torch.testing.assert_close(weight, layer.weight + scale * layer.hyper_weight, rtol=0, atol=1e-14)
    if bias is not None:
        shift = values[len(layer.weight) :] * layer.hyper_bias
        torch.testing.assert_close(bias, layer.bias + shift, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_without_gates_it_is_the_plain_layer(name: str, kernels: bool):
    """Bit for bit; one kernel of twice the width, with V = 0, may sum in another order."""
    for dtype, atol in ((torch.float64, 1e-14), (torch.float32, 5e-6)):
        layer, x = made(name)
        layer, x = layer.to(dtype), x.to(dtype) if x.is_floating_point() else x
        expected = plain(layer)(x)
        assert torch.equal(layer(x), expected)
        nn.init.zeros_(layer.gate.weight)
        layer.conditioning.set(h=randn(H).to(dtype))
        assert torch.equal(layer(x), expected)
        layer.conditioning.set(h=randn(B, H).to(dtype))
        if kernels:
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=atol)
        else:
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d groups", "embedding"])
def test_gradients_of_gated_layers(name: str, kernels: bool):
    layer, x = made(name, elementary_scale=True)
    x = x if x.is_floating_point() else x.where(x != 2, 3)  # the row of padding_idx has no gradient, as in torch
    parameters = dict(layer.named_parameters())

    def call(h: Tensor, *values: Tensor) -> Tensor:
        layer.conditioning.set(h=h)
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    for h in (randn(B, H, seed=3), *([] if kernels else [randn(H, seed=3)])):
        inputs = [h.requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters.values())]
        assert torch.autograd.gradcheck(call, inputs)


def test_the_elementary_scale_multiplies_weight_and_bias():
    layer, x = made("linear", elementary_scale=True)
    reference, _ = made("linear")
    layer.load_state_dict({**reference.state_dict(), "elementary_scale": torch.tensor(1.0)})
    for module in (layer, reference):
        module.conditioning.set(h=randn(B, H, seed=3))
    torch.testing.assert_close(layer(x), reference(x), rtol=0, atol=1e-14)
    before, elementary = layer(x), F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        layer.elementary_scale.fill_(1.5)
    torch.testing.assert_close(layer(x), before + 0.5 * elementary, rtol=0, atol=1e-12)


def test_initial_values_are_those_of_the_reference():
    layer = HyperLinear(400, 300, num_hyper=5, generator=torch.Generator().manual_seed(0))
    for parameter in (layer.hyper_weight, layer.hyper_bias):
        assert 0.045 < float(parameter.detach().abs().max()) <= 0.05
        assert abs(float(parameter.detach().std()) - 0.05 / 3**0.5) < 0.005
    assert layer.gate.weight.shape == (600, 5)
    assert abs(float(layer.gate.weight.detach().std()) - 0.01) < 0.001
    again = HyperLinear(400, 300, num_hyper=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.gate.weight, again.gate.weight)
    padded = HyperEmbedding(7, 4, padding_idx=2, num_hyper=H)
    assert not padded.hyper_weight[2].any()


# Cells


@pytest.mark.parametrize("kind", [HyperLSTMCell, HyperGRUCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_equal_a_loop_over_examples_and_the_cells_of_torch(kind: Any, bias: bool):
    torch.manual_seed(0)
    cell = kind(4, 3, bias=bias, num_hyper=H).double()
    for module in cell.children():
        nn.init.normal_(module.weight)
    lstm = kind is HyperLSTMCell
    x, h = randn(B, 4), randn(B, H, seed=3)
    state: Any = (randn(B, 3, seed=1), randn(B, 3, seed=2)) if lstm else randn(B, 3, seed=1)

    def row(i: int) -> Any:
        return tuple(part[i : i + 1] for part in state) if lstm else state[i : i + 1]

    def joined(states: list[Any]) -> Tensor:
        return torch.cat([torch.cat(part, 1) if lstm else part for part in states])

    for given in (state, None):
        cell.conditioning.set(h=h)
        together = joined([cell(x, given)])
        each = [fuse(cell, h[i])(x[i : i + 1], None if given is None else row(i)) for i in range(B)]
        assert type(fuse(cell, h[0])) is kind.plain
        torch.testing.assert_close(together, joined(each), rtol=0, atol=1e-12)
        cell.conditioning.set(h=h[0])
        torch.testing.assert_close(joined([cell(x, given)]), joined([fuse(cell, h[0])(x, given)]), rtol=0, atol=1e-12)
        cell.conditioning.clear()
        torch.testing.assert_close(joined([cell(x, given)]), joined([plain(cell)(x, given)]), rtol=0, atol=1e-12)


def test_a_cell_in_a_time_loop_has_the_gradient_of_what_it_computes():
    torch.manual_seed(0)
    cell = HyperLSTMCell(2, 2, num_hyper=H).double()
    x = randn(3, 2, 2)

    def run(h: Tensor, *values: Tensor) -> Tensor:
        cell.conditioning.set(h=h)
        state = None
        for t in range(3):
            parameters = dict(zip(dict(cell.named_parameters()), values, strict=True))
            state = torch.func.functional_call(cell, parameters, (x[t], state))
        assert state is not None
        return state[0]

    values = [p.detach().clone().requires_grad_() for p in cell.parameters()]
    assert torch.autograd.gradcheck(run, [randn(2, H, seed=3).requires_grad_(), *values])


# Layouts


@pytest.mark.parametrize("layout", ["batch*time", "time*batch", "time,batch"])
def test_layouts_say_where_the_examples_are(layout: Any, kernels: bool):
    T = 4
    x, h = randn(B, T, 5), randn(B, H, seed=3)
    reference, _ = made("linear")
    reference.conditioning.set(h=h)
    expected = reference(x)
    layer, _ = made("linear", layout=layout)
    layer.conditioning.set(h=h)
    if layout == "batch*time":
        torch.testing.assert_close(layer(x.flatten(0, 1)), expected.flatten(0, 1), rtol=0, atol=1e-14)
        return
    laid = x.transpose(0, 1)
    expected = expected.transpose(0, 1)
    if layout == "time*batch":
        laid, expected = laid.flatten(0, 1), expected.flatten(0, 1)
    torch.testing.assert_close(layer(laid), expected, rtol=0, atol=1e-14)


def test_a_convolution_over_the_frames_of_videos(kernels: bool):
    videos, h = randn(B, 4, 4, 3, 3), randn(B, H, seed=3)
    layer, _ = made("conv2d groups", layout="batch*time")
    layer.conditioning.set(h=h)
    each = torch.cat([fuse(layer, h[i])(videos[i]) for i in range(B)])
    torch.testing.assert_close(layer(videos.flatten(0, 1)), each, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "layout", "shape"),
    [
        ("linear", "batch", (B + 1, 5)),
        ("linear", "batch", (2 * B, 5)),
        ("linear", "batch", (5,)),
        ("linear", "batch*time", (2 * B + 1, 5)),
        ("linear", "time,batch", (B, 2, 5)),
        ("linear", "time,batch", (B, 5)),
        ("conv2d", "batch", (4, 6, 6)),
        ("conv2d", "batch", (2 * B, 4, 6, 6)),
    ],
)
def test_leading_dimensions_that_are_not_the_batch_are_an_error(name: str, layout: Any, shape: tuple[int, ...]):
    layer, _ = made(name, layout=layout)
    layer.conditioning.set(h=randn(B, H))
    with pytest.raises(ValueError, match=rf"laid out as '{layout.replace('*', '.')}' in a step of {B} examples"):
        layer(randn(*shape))


def test_bad_arguments_of_layers_are_named():
    with pytest.raises(ValueError, match="`num_hyper` of HyperLinear to be positive, but got 0"):
        HyperLinear(3, 2, num_hyper=0)
    with pytest.raises(ValueError, match="`layout` of HyperLinear to be one of .* but got 'rows'"):
        HyperLinear(3, 2, num_hyper=1, layout="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one leading dimension"):
        HyperConv1d(3, 2, 1, num_hyper=1, layout="time,batch")
    layer = HyperLinear(3, 2, num_hyper=2)
    for h in (torch.zeros(3), torch.zeros(4, 3)):
        layer.conditioning.set(h=h)
        with pytest.raises(ValueError, match="gated by 2 hyperparameters"):
            layer(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one row of 2, but got shape \\[4, 2\\]"):
        fuse(layer, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="to be a gated layer, but got Linear"):
        fuse(nn.Linear(2, 2), torch.zeros(2))  # type: ignore[arg-type]


# State, copies, precision, compilation


@pytest.mark.parametrize("name", ["linear", "conv2d groups", "embedding"])
def test_fuse_is_the_gated_layer_and_a_plain_checkpoint_survives_the_round_trip(name: str):
    layer, x = made(name)
    h = randn(H, seed=3)
    layer.conditioning.set(h=h)
    fused = fuse(layer, h)
    assert type(fused) is layer.plain
    assert "num_hyper" not in repr(fused)
    torch.testing.assert_close(fused(x), layer(x), rtol=0, atol=1e-12)
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in layer.parameters()}

    checkpoint = {key: torch.randn_like(value) for key, value in plain(layer).state_dict().items()}
    assert set(checkpoint) <= set(layer.state_dict())
    layer.load_state_dict(checkpoint)
    nn.init.zeros_(layer.gate.weight)
    for key, value in fuse(layer, h).state_dict().items():
        assert torch.equal(value, checkpoint[key])
    state = layer.state_dict()
    layer.load_state_dict(state)
    state.pop("hyper_weight")
    with pytest.raises(RuntimeError, match="Missing key.*hyper_weight"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        layer.load_state_dict({key: value for key, value in checkpoint.items() if key != "weight"})


def test_copies_follow_the_original_and_pickles_keep_what_rests():
    layer, x = made("linear")
    resting, drawn = randn(H, seed=1), randn(B, H, seed=2)
    layer.conditioning.rest(resting)
    at_rest = layer(x)
    layer.conditioning.set(h=drawn.requires_grad_(), values=drawn)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    loaded = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(loaded(x), at_rest, rtol=0, atol=0)
    assert loaded.conditioning.values is None
    assert not loaded.conditioning.h.requires_grad
    layer.conditioning.clear()
    torch.testing.assert_close(layer(x), at_rest, rtol=0, atol=0)
    torch.testing.assert_close(twin(x), at_rest, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_under_autocast_gates_are_computed_in_float32(name: str, kernels: bool):
    layer, x = made(name)
    layer = layer.float()
    x = x.float() if x.is_floating_point() else x
    h = torch.full((B, H), 1.0 + 2.0**-12)  # not a bfloat16 number
    layer.conditioning.set(h=h)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        scale, _ = layer.gates(h)
        assert scale.dtype is torch.float32
        result = layer(x)
        assert result.dtype is plain(layer)(x).dtype
    assert torch.equal(scale, layer.gates(h)[0])
    torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.05)
    half = copy.deepcopy(layer).bfloat16()
    half.conditioning = Conditioning()
    half.conditioning.set(h=h)
    assert half(x.bfloat16() if x.is_floating_point() else x).dtype is torch.bfloat16
    assert half.gates(h)[0].dtype is torch.float32


def test_compiled_layers_are_not_compiled_anew_for_each_step(kernels: bool):
    torch._dynamo.reset()
    layer, x = made("linear")
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for seed in range(4):
        layer.conditioning.set(h=randn(B, H, seed=seed))
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
    assert len(graphs) == 1
    for seed in range(3):
        layer.conditioning.set(h=randn(H, seed=seed))
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
    assert len(graphs) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_sees_the_same_hyperparameters(reentrant: bool):
    torch.manual_seed(0)
    shared = HyperLinear(5, 5, num_hyper=H).double()
    nn.init.normal_(shared.gate.weight)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh())
    x = randn(B, 5).requires_grad_()
    h = randn(B, H, seed=3)

    def gradients(call: Any) -> list[Tensor]:
        shared.conditioning.set(h=h)
        model.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        shared.conditioning.clear()
        return [x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr, list-item]

    direct = gradients(model)
    recomputed = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for a, b in zip(direct, recomputed, strict=True):
        assert torch.equal(a, b)


def test_per_example_gradients_of_torch_func_go_through_gated_layers():
    layer, x = made("linear")
    layer.conditioning.set(h=randn(H, seed=3))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    total = torch.func.grad(lambda values: torch.func.functional_call(layer, values, (x,)).square().sum())(parameters)
    for name in parameters:
        torch.testing.assert_close(each[name].sum(0), total[name], rtol=0, atol=1e-11)


# Surgery


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2))
        return self.head(self.norm(x).relu().mean(-1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def test_gates_are_put_in_place_and_taken_out_again():
    model, x = net(), ids(B, 3)
    before, names = model(x), list(model.state_dict())
    own = dict(model.named_parameters())
    conditioning = Conditioning()
    assert gate(model, conditioning, H) == ["embed", "conv", "head"]
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in own.items())
    assert torch.equal(model(x), before)
    assert all(p.dtype is torch.float64 for p in model.parameters())
    conditioning.set(h=randn(B, H))
    assert not torch.equal(model(x), before)
    extra = {id(p) for p in hyper_parameters(model)}
    assert extra == {id(p) for p in model.parameters()} - {id(p) for p in own.values()}
    model.load_state_dict(net().state_dict())

    other = Conditioning()
    gates = [p for p in model.parameters() if id(p) in extra]
    assert gate(model, other, H) == ["embed", "conv", "head"]
    assert all(layer.conditioning is other for layer in gated_layers(model).values())
    assert {id(p) for p in gates} == {id(p) for p in hyper_parameters(model)}
    with pytest.raises(ValueError, match="gated by 3 hyperparameters already, not by 2"):
        gate(model, other, 2)

    ungate(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in net().modules()]


def test_a_fused_model_is_the_gated_one_at_fixed_hyperparameters():
    model, x, conditioning = net(), ids(B, 3), Conditioning()
    gate(model, conditioning, H)
    for parameter in hyper_parameters(model):
        nn.init.normal_(parameter)
    h = randn(H, seed=3)
    fused = fuse_model(model, h)
    conditioning.set(h=h)
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)
    assert list(fused.state_dict()) == list(net().state_dict())
    assert len(gated_layers(model)) == 3
    torch.testing.assert_close(fuse_model(model, None)(x), net()(x), rtol=0, atol=0)
    single = fuse_model(made("linear")[0], h)
    assert type(single) is nn.Linear


def test_patterns_choose_layers_and_a_layout_can_be_given_by_pattern():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    assert gate(model, Conditioning(), H, patterns=["2.*"], layouts={"2.1": "batch*time"}) == ["2.0", "2.1"]
    assert [layer.layout for layer in gated_layers(model).values()] == ["batch", "batch*time"]
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="No layer of Sequential matches 'head.*'.* Its layers are: 0, 1, 2, 2.0, 2.1"):
        gate(nn.Sequential(*net_layers()), Conditioning(), H, patterns=["head.*"])
    with pytest.raises(ValueError, match="has no trainable layer that can be gated by \\['1'\\]"):
        gate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), Conditioning(), H, patterns=["1"])


def net_layers() -> list[nn.Module]:
    return [nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))]


def test_frozen_tied_and_parametrised_layers_are_left_out_the_latter_two_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model[2].weight = model[1].weight
    nn.utils.parametrizations.orthogonal(model[3])
    with pytest.warns(UserWarning, match="is not gated") as caught:
        assert gate(model, Conditioning(), H) == ["4"]
    messages = [str(warning.message) for warning in caught]
    assert [m.split(" is not gated: ")[0] for m in messages] == ["'1'", "'2'", "'3'"]
    assert "shares its weight" in messages[0]
    assert "parametrised" in messages[2]
    assert model[2].weight is model[1].weight

    reused = nn.Linear(4, 4)
    assert gate(nn.Sequential(reused, nn.ReLU(), reused), Conditioning(), H) == ["0"]


def test_recurrent_layers_and_lazy_ones_are_named():
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 3), "head": nn.Linear(3, 3)})
    with pytest.warns(UserWarning, match="'rnn' .LSTM. is not gated"):
        assert gate(model, Conditioning(), H) == ["head"]
    with pytest.raises(ValueError, match="recurrent layer .* HyperLSTMCell"):
        gate(nn.ModuleDict({"rnn": nn.LSTM(3, 3), "head": nn.Linear(3, 3)}), Conditioning(), H, patterns=["rnn"])
    with pytest.raises(ValueError, match="'0' is lazy: run a batch first"):
        gate(nn.Sequential(nn.LazyLinear(3)), Conditioning(), H)
    cells = nn.ModuleList([nn.LSTMCell(2, 3), nn.GRUCell(2, 3)])
    assert gate(cells, Conditioning(), H) == ["0", "1"]
    assert [type(cell) for cell in cells] == [HyperLSTMCell, HyperGRUCell]


def test_layers_that_are_read_and_not_called_are_not_gated_or_called_again():
    """Attention multiplies with the weight of its out_proj itself; a transformer layer in eval mode with all its weights."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, h, conditioning = torch.randn(B, 3, 8), torch.randn(B, H), Conditioning()
    assert gate(encoder, conditioning, H) == ["linear1", "linear2"]
    for parameter in hyper_parameters(encoder):
        nn.init.normal_(parameter)
    conditioning.set(h=h)
    with torch.inference_mode():
        fast = encoder(x)
    torch.testing.assert_close(fast, encoder(x).detach(), rtol=1e-5, atol=1e-5)
    each = torch.cat([fuse_model(encoder, h[i])(x[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(fast, each.detach(), rtol=1e-4, atol=1e-4)
    assert not any(len(m._forward_pre_hooks) for m in fuse_model(encoder, h[0]).modules())
    ungate(encoder)
    assert not any(len(m._forward_pre_hooks) for m in encoder.modules())


def test_gates_follow_from_their_generator_alone():
    first, second = net().float(), net().float()
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        gate(model, Conditioning(), H, generator=torch.Generator().manual_seed(7))
    for a, b in zip(hyper_parameters(first), hyper_parameters(second), strict=True):
        assert torch.equal(a, b)
