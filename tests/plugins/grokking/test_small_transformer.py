# SPDX-License-Identifier: Apache-2.0
"""The transformer of the studies of grokking, on modular arithmetic: what it computes, and under the plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from fulgurite.cli import main
from fulgurite.landscape import ntk_gram
from fulgurite.models import SmallTransformer
from fulgurite.tasks import Classification
from fulgurite_datamodules import ModularArithmetic
from fulgurite_plugins.grokking import (
    OutputScaling,
    PerpGrad,
    ReplaceSoftmax,
    TokenTransformer,
    stablemax_cross_entropy,
)
from tests.helpers import trainer


def small(**arguments: Any) -> SmallTransformer:
    torch.manual_seed(0)
    return SmallTransformer((2,), 7, **{"width": 16, "heads": 2, "feedforward": 32, "dropout": 0.0, **arguments})


def pairs(modulus: int = 7) -> Tensor:
    return torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))


@pytest.mark.parametrize(("classes", "tokens", "depth"), [(113, None, 1), (5, 9, 3)])
def test_the_number_of_parameters_is_that_of_the_study(classes: int, tokens: int | None, depth: int) -> None:
    """Width d = 128, h = 2048 hidden units: attention 4 d (d + 1), perceptron 2 d h + d + h, two norms 4 d."""
    d, h = 128, 2048
    layer = 4 * d * (d + 1) + 2 * d * h + d + h + 4 * d
    network = SmallTransformer((2,), classes, tokens, depth=depth)
    expected = (tokens or classes) * d + depth * layer + (d + 1) * classes
    assert sum(p.numel() for p in network.parameters()) == expected
    if depth == 1:
        assert expected == 622_065
    assert len({float(layer.linear1.weight.detach().sum()) for layer in network.layers}) == depth  # drawn one by one


def oracle(network: SmallTransformer, tokens: Tensor, heads: int) -> Tensor:
    """Compute what the one layer gives for the last token alone, product by product."""
    (layer,) = network.layers
    x = network.embedding.weight[tokens]
    attention = layer.self_attn
    queries, keys, values = (
        (x @ w.T + b).unflatten(-1, (heads, -1))
        for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    )
    scores = torch.einsum("bhd,bthd->bht", queries[:, -1], keys) / queries.shape[-1] ** 0.5
    attended = torch.einsum("bht,bthd->bhd", scores.softmax(-1), values).flatten(1)

    def norm(v: Tensor, of: Any) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + of.eps).sqrt() * of.weight + of.bias

    h = norm(x[:, -1] + attended @ attention.out_proj.weight.T + attention.out_proj.bias, layer.norm1)
    hidden = (h @ layer.linear1.weight.T + layer.linear1.bias).relu()
    h = norm(h + hidden @ layer.linear2.weight.T + layer.linear2.bias, layer.norm2)
    return h @ network.head.weight.T + network.head.bias


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_logits_are_those_of_the_last_token(training: bool, length: int) -> None:
    """Also through torch's fused kernel, which is taken in evaluation without gradients."""
    network = small().double().train(training)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(7, (11, length), generator=torch.Generator().manual_seed(1))
    expected = oracle(network, tokens, heads=2)
    assert expected.shape == (11, 7)
    torch.testing.assert_close(network(tokens), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), expected, rtol=0, atol=1e-12)


def test_the_last_token_is_told_from_the_others_and_these_not_from_each_other() -> None:
    network, tokens = small().double(), torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(network(tokens), network(tokens[:, [1, 0, 2]]), rtol=0, atol=1e-12)
    assert not torch.allclose(network(tokens), network(tokens[:, [0, 2, 1]]), atol=1e-3)


def test_dropout_is_off_in_evaluation_only() -> None:
    network = small(dropout=0.5)
    assert not torch.equal(network(pairs()), network(pairs()))
    network.eval()
    assert torch.equal(network(pairs()), network(pairs()))
    assert network(pairs()[:0]).shape == (0, 7)


def test_it_fits_a_table() -> None:
    """Subtraction, for which the order of the two numbers matters, with the size and the learning rate of the study.

    At a width of 16 many networks do not: attention ends on the own token alone for two pairs.
    """
    data = ModularArithmetic(5, "subtract", 1.0, encoding="tokens", exclude_zero=True)
    (batch,) = data.train_dataloader()
    torch.manual_seed(0)
    network = SmallTransformer(data.input_shape, data.num_classes)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()
    assert torch.equal(network.eval()(batch[0]).argmax(1), batch[1])


def test_its_tangent_kernel_is_exact() -> None:
    """Layer by layer, as the monitor of lazy training computes it, against all Jacobians."""
    network, tokens = small().double().eval(), pairs()[:5]
    logits = network(tokens)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(logit, list(network.parameters()), retain_graph=True)])
        for logit in logits.flatten()
    ]
    jacobian = torch.stack(rows)
    expected = (jacobian @ jacobian.T).reshape(5, 7, 5, 7)
    torch.testing.assert_close(ntk_gram(network, tokens), expected, rtol=1e-9, atol=1e-9)


# Under the plugins


@pytest.mark.parametrize("plugins", [("PerpGrad",), ("ReplaceSoftmax",), ("PerpGrad", "ReplaceSoftmax")])
def test_it_trains_from_a_configuration_file(plugins: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    """The study's task, by short names."""
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "network": {"class_path": "SmallTransformer", "init_args": {"feedforward": 64}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.0}},
            },
        },
        "data": {
            "class_path": "ModularArithmetic",
            "init_args": {"modulus": 11, "train_fraction": 0.4, "encoding": "tokens", "exclude_zero": True},
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
            "callbacks": [{"class_path": name} for name in plugins],
        },
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "mine.yaml"]) == 0
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2
    assert state["state_dict"]["network.embedding.weight"].shape == (11, 128)
    assert state["state_dict"]["network.layers.0.linear1.weight"].shape == (64, 128)


def steps(count: int, *callbacks: Any) -> SmallTransformer:
    """Take steps of a full batch, from the same weights each time."""
    network = small()
    task = Classification(7, network=network, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer(callbacks, epochs=count, limit_val_batches=0).fit(task, ModularArithmetic(7, encoding="tokens"))
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    return network


def test_gradients_are_perpendicular_to_every_tensor() -> None:
    start, one, several = small(), steps(1, PerpGrad()), steps(3, PerpGrad())
    for (name, before), after, later in zip(
        start.named_parameters(), one.parameters(), several.parameters(), strict=True
    ):
        step, weight = (after - before).double().flatten(), before.double().flatten()
        assert abs(step @ weight) <= 1e-5 * step.norm() * weight.norm(), name
        assert not torch.equal(after, later), name


def test_the_loss_becomes_stablemax() -> None:
    (batch,) = ModularArithmetic(7, encoding="tokens").train_dataloader()
    expected = small()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        stablemax_cross_entropy(expected(batch[0]).double(), batch[1]).backward()
        optimizer.step()
    for trained, own in zip(steps(3, ReplaceSoftmax()).parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [small, lambda: TokenTransformer(7, d=16, heads=2)])
def test_a_centred_transformer_is_zero_at_the_start(make: Any) -> None:
    network = make()
    before = network(pairs())
    OutputScaling(4.0, init_scale=2.0).operate(network)
    assert bool((network(pairs()) == 0).all())
    assert bool((before != 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_shape": (1, 8, 8)},
            r"`input_shape` of SmallTransformer.*but got \(1, 8, 8\).*SmallConvNet",
        ),
        ({"width": 10, "heads": 4}, "`width` of SmallTransformer to be a multiple of its 4 heads, but got 10"),
        ({"depth": 0}, "`depth` of SmallTransformer to be at least 1, but got 0"),
        ({"tokens": 0}, "`tokens` of SmallTransformer to be at least 1, but got 0"),
        ({"dropout": 1.0}, r"`dropout` of SmallTransformer to be in \[0, 1\), but got 1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallTransformer(**{"input_shape": (2,), "num_classes": 5, **arguments})


def test_vectors_in_the_place_of_tokens_are_named() -> None:
    with pytest.raises(ValueError, match=r"tokens .B, length. .int64., but SmallTransformer got torch.float32 .3, 14."):
        small()(torch.zeros(3, 14))
