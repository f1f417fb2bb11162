# SPDX-License-Identifier: Apache-2.0
"""The mathematics of corrupted grokking: ratios, solutions, curves, phases, networks and the stacked sweep."""

from __future__ import annotations

import copy
import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite_datamodules import ModularArithmetic
from fulgurite_plugins.grokking import corrupted_grokking
from fulgurite_plugins.grokking.corrupted_grokking import (
    MultiplicativeBasis,
    OneHotMSE,
    QuadraticMLP,
    TokenTransformer,
    classify_phase,
    gini,
    inverse_participation_ratio,
    inversion_times,
    modular_addition_solution,
    modular_multiplication_solution,
    neuron_scores,
    prune_curve,
    split_accuracies,
    train_grid,
)
from fulgurite_plugins.grokking.corrupted_grokking.solutions import powers_of_primitive_root


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(found: Any, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol
    )


def table(p: int, multiply: bool = False) -> Tensor:
    n = torch.arange(p)
    return (n[:, None] * n if multiply else n[:, None] + n) % p


def outputs(solution: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    U, V, W = solution
    return (U.T[:, None] + V.T[None]).square() @ W.T


# Closed-form solutions


@pytest.mark.parametrize("p", [5, 11, 23, 97])
def test_the_solution_of_addition_is_right_everywhere_and_has_the_means_of_the_derivation(p: int) -> None:
    solution = modular_addition_solution(p, 500)
    logits, target = outputs(solution), table(p)
    assert torch.equal(logits.argmax(2), target)
    hits = logits.gather(2, target[..., None])
    close(hits.mean(), 1.0, 1e-10)
    close((logits.sum() - hits.sum()) / (p * p * (p - 1)), -1 / (p - 1), 1e-10)
    close(neuron_scores(solution[:2], solution[2:]), torch.ones(500))


@pytest.mark.parametrize("p", [5, 11, 23, 97])
def test_the_solution_of_multiplication_is_right_everywhere_zero_included(p: int) -> None:
    solution = modular_multiplication_solution(p, 502)
    logits = outputs(solution)
    assert torch.equal(logits.argmax(2), table(p, multiply=True))
    zero = torch.zeros(p, p, dtype=torch.float64)
    zero[0], zero[:, 0] = 1, 1
    close(logits[..., 0], zero)  # the two neurons of the zero are its indicator, and nothing else speaks of it
    waves = [weight[:-2] for weight in solution[:2]], [solution.W[:, :-2]]
    close(neuron_scores(*waves, basis=MultiplicativeBasis(p)), torch.ones(500))
    assert (
        float(neuron_scores(*waves).mean()) < 0.8 or p == 5
    )  # they have no single frequency in the numbers themselves


def test_the_phases_of_a_solution_come_from_its_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (modular_addition_solution(7, 9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first.U, modular_addition_solution(7, 9).U)
    assert modular_addition_solution(7, 9, dtype=torch.float32).W.dtype == torch.float32


@pytest.mark.parametrize("p", [3, 5, 7, 23, 97])
def test_powers_of_a_primitive_root_reach_every_number_but_zero(p: int) -> None:
    powers = powers_of_primitive_root(p)
    assert torch.equal(powers.sort().values, torch.arange(1, p))
    assert torch.equal(powers[1:], powers[:-1] * powers[1] % p if p > 3 else powers[1:])


# Ratios


def naive_ratio(row: Tensor, r: float) -> float:
    """The definition, one frequency at a time, by sums of sines and cosines."""
    p = len(row)
    angles = 2 * torch.pi * torch.arange(p, dtype=torch.float64) / p
    z = [
        float(((row * torch.cos(k * angles)).sum() ** 2 + (row * torch.sin(k * angles)).sum() ** 2) ** 0.5)
        for k in range(p // 2 + 1)
    ]
    norm = sum(x * x for x in z) ** 0.5
    return sum((x / norm) ** (2 * r) for x in z)


@pytest.mark.parametrize("p", [5, 8, 23])
@pytest.mark.parametrize("r", [2, 1.5, 3])
def test_the_ratio_is_its_definition(p: int, r: float) -> None:
    rows = random(4, p)
    close(inverse_participation_ratio(rows, r), [naive_ratio(row, r) for row in rows])


def test_the_ratio_lies_between_its_bounds_and_ignores_scale_sign_and_shifts() -> None:
    rows = random(200, 23)
    ratio = inverse_participation_ratio(rows)
    assert 1 / 12 <= float(ratio.min()) <= float(ratio.max()) <= 1
    for same in (1e-30 * rows, 1e30 * rows, -rows, rows.roll(5, dims=1)):
        close(inverse_participation_ratio(same), ratio)


@pytest.mark.parametrize("p", [5, 23, 97])
def test_a_single_number_is_flat_and_a_wave_is_one(p: int) -> None:
    close(
        inverse_participation_ratio(torch.eye(p, dtype=torch.float64)),
        torch.full((p,), 1 / (p // 2 + 1), dtype=torch.float64),
    )
    waves = torch.cos(2 * torch.pi * torch.arange(1, p)[:, None].double() * torch.arange(p) / p + 0.3)
    close(inverse_participation_ratio(waves), torch.ones(p - 1))


@pytest.mark.parametrize(("p", "measured"), [(23, 0.158), (59, 0.0654), (97, 0.0403)])
def test_the_mean_ratio_of_gaussian_rows(p: int, measured: float) -> None:
    mean = float(inverse_participation_ratio(random(20_000, p, dtype=torch.float32)).mean())
    assert abs(mean / measured - 1) < 0.03


def test_weights_of_zero_have_the_ratio_zero_and_a_finite_gradient() -> None:
    rows = torch.zeros(2, 7, requires_grad=True)
    ratio = inverse_participation_ratio(rows)
    assert ratio.tolist() == [0, 0]
    assert float(gini(torch.zeros(4))) == 0
    assert neuron_scores([torch.zeros(3, 7)], [torch.ones(7, 3)]).isfinite().all()


def test_bases_are_matrices_or_functions() -> None:
    rows, basis = random(4, 6), random(9, 6, seed=1)
    weights = (rows @ basis.T).abs()
    expected = (weights**4).sum(1) / (weights**2).sum(1) ** 2
    close(inverse_participation_ratio(rows, basis=basis), expected)
    close(inverse_participation_ratio(rows, basis=lambda w: w @ basis.T), expected)
    close(inverse_participation_ratio(torch.eye(6), basis=torch.eye(6)), torch.ones(6))
    with pytest.raises(ValueError, match=r"shape \[K, 6\] for neurons with 6 inputs, but got \[9, 5\]"):
        inverse_participation_ratio(rows, basis=basis[:, :5])


def test_gini_is_its_definition() -> None:
    values = random(5, 7).abs()
    pairs = (values[:, :, None] - values[:, None]).abs().mean((1, 2))
    close(gini(values), pairs / (2 * values.mean(1)))
    close(gini(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), [0, 0.5])


def test_scores_are_means_over_rows_and_columns() -> None:
    U, V, W = random(4, 7), random(4, 7, seed=1), random(9, 4, seed=2)
    ratios = [inverse_participation_ratio(rows) for rows in (U, V, W.T)]
    close(neuron_scores([U, V], [W]), sum(ratios) / 3)


# Curves, splits and phases


def test_the_curve_equals_a_forward_pass_per_number_of_neurons() -> None:
    hidden, outgoing, bias = random(40, 9), random(5, 9, seed=1), random(5, seed=2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    found = prune_curve(hidden, outgoing, order, bias)
    for q in range(9):
        kept = hidden.clone()
        kept[:, order[:q]] = 0
        assert torch.equal(found[q], (kept @ outgoing.T + bias).argmax(1))


def test_accuracies_of_the_parts_add_up_exactly() -> None:
    """n_train acc_train = n_corr acc_corr + n_clean acc_clean, with whole numbers on both sides."""
    generator = torch.Generator().manual_seed(0)
    predictions, labels, truth = torch.randint(3, (3, 101), generator=generator)
    mask = torch.rand(101, generator=generator) < 0.3
    labels = torch.where(mask, labels, truth)
    found = split_accuracies(predictions[None], labels, truth, mask)
    corrupted, clean = int(mask.sum()), int((~mask).sum())
    total = found["as_labelled"] * corrupted + found["clean"] * clean
    assert round(float(found["train"] * 101)) == round(float(total)) == int((predictions == labels).sum())
    close(found["true"], (predictions == truth)[mask].double().mean()[None])
    assert split_accuracies(predictions, labels, truth, torch.zeros_like(mask))["true"].isnan()


@pytest.mark.parametrize(
    ("train", "test", "phase"),
    [
        (1.00, 1.00, "coexistence"),
        (0.98, 0.98, "coexistence"),
        (0.786, 1.00, "partial inversion"),
        (0.654, 1.00, "full inversion"),
        (1.00, 0.02, "memorisation"),
        (0.009, 0.011, "forgetting"),
        (0.50, 0.30, "confusion"),
        (0.40, 1.00, "confusion"),
    ],
)
def test_phases_of_the_published_runs(train: float, test: float, phase: str) -> None:
    assert classify_phase(train, test, corrupted=0.35, chance=1 / 97) == phase


def test_every_point_of_the_square_has_a_phase() -> None:
    for train, test in itertools.product(range(21), repeat=2):
        assert classify_phase(train / 20, test / 20, 0.3, 0.1)
    with pytest.raises(ValueError, match=r"`test` of classify_phase to be in \[0, 1\], but got 1.5"):
        classify_phase(1.0, 1.5, 0.3, 0.1)


def test_times_of_the_two_stages() -> None:
    epochs = [60, 120, 180, 240]
    train, test = [1.0, 1.0, 0.8, 0.66], [0.02, 0.77, 1.0, 1.0]
    assert inversion_times(epochs, train, test, 0.35) == (180, 240)
    assert inversion_times(epochs, train, [0.02, 0.5, 0.6, 0.9], 0.35) == (None, None)
    assert inversion_times(epochs, [1.0] * 4, test, 0.35) == (180, None)
    assert inversion_times(epochs, [0.3, 0.5, 0.6, 0.66], test, 0.35) == (180, None)  # it never fitted the wrong labels


# Networks


@pytest.mark.parametrize("arguments", [{}, {"norm": "batch"}, {"norm": "layer"}, {"activation": "relu"}])
def test_one_hot_vectors_and_tokens_give_the_same(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = QuadraticMLP(11, width=32, **arguments)
    tokens = torch.cartesian_prod(torch.arange(11), torch.arange(11))
    one_hot = F.one_hot(tokens, 11).flatten(1).float()
    results = []
    for inputs in (tokens, one_hot):
        twin = copy.deepcopy(network)
        result = twin(inputs)
        result.square().sum().backward()
        results.append([result, *(p.grad for p in twin.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if not arguments:
        U, V, W = network.U.weight, network.V.weight, network.W.weight
        expected = (U.T[tokens[:, 0]] + V.T[tokens[:, 1]]).square() @ W.T
        torch.testing.assert_close(results[0][0], expected, rtol=0, atol=1e-6)


def test_initial_weights_have_the_deviation_of_the_study() -> None:
    torch.manual_seed(0)
    network = QuadraticMLP(97, width=500)
    for layer in (network.U, network.V, network.W):
        assert abs(float(layer.weight.std()) / (0.5 / 1000 ** (1 / 3)) - 1) < 0.02


def test_dropout_acts_before_the_square() -> None:
    torch.manual_seed(0)
    network = QuadraticMLP(7, width=400, dropout=0.5)
    tokens = torch.tensor([[1, 2]])
    dropped = network.hidden(tokens)
    network.eval()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 4 * network.hidden(tokens)[kept])  # (x / 0.5)^2
    assert 150 < int(kept.sum()) < 250


def test_the_closed_form_runs_in_the_network() -> None:
    U, V, W = modular_addition_solution(11, 300, dtype=torch.float32)
    network = QuadraticMLP(11, width=300)
    network.load_state_dict({"U.weight": U, "V.weight": V, "W.weight": W})
    data = ModularArithmetic(11, train_fraction=1.0)
    (batch,) = data.train_dataloader()
    assert torch.equal(network(batch[0]).argmax(1), batch[1])


def test_the_transformer_sees_order_and_learns() -> None:
    torch.manual_seed(0)
    network = TokenTransformer(7, d=16, heads=2, n_layer=2, layer_norm=True)
    data = ModularArithmetic(7, "subtract", 1.0, encoding="tokens")
    (batch,) = data.train_dataloader()
    assert not torch.allclose(network(batch[0]), network(batch[0].flip(1)))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()
    assert float((network(batch[0]).argmax(1) == batch[1]).double().mean()) > 0.9
    with pytest.raises(ValueError, match=r"Expected tokens \[B, 2\] \(int64\), but TokenTransformer got torch.float32"):
        network(torch.zeros(3, 14))


def test_the_loss_is_the_mean_squared_error_of_one_hot_targets() -> None:
    logits, classes = random(6, 4).requires_grad_(), torch.tensor([0, 3, 1, 2, 2, 0])
    loss = OneHotMSE()(logits, classes)
    close(loss, F.mse_loss(logits, F.one_hot(classes, 4).double()))
    assert torch.autograd.gradcheck(partial(OneHotMSE(), targets=classes), logits)
    with pytest.raises(ValueError, match=r"integer classes \[B\], but OneHotMSE got"):
        OneHotMSE()(logits, torch.zeros(6, 4))


# The sweep


def test_stacked_networks_train_as_each_would_alone() -> None:
    """Against the module, its datamodule and torch's AdamW, one network after the other."""
    p, width, epochs = 7, 12, 30
    found = train_grid(p, (0.5, 0.8), (0.1, 0.4), weight_decay=0.5, width=width, epochs=epochs, seeds=(1, 2))
    for (i, fraction), (j, wrong), (k, seed) in itertools.product(
        enumerate((0.5, 0.8)), enumerate((0.1, 0.4)), enumerate((1, 2))
    ):
        data = ModularArithmetic(p, "add", fraction, wrong, True, encoding="tokens", pair_seed=seed, noise_seed=seed)
        (batch,) = data.train_dataloader()
        network = QuadraticMLP(p, width)
        generator = torch.Generator().manual_seed(seed)
        std = 0.5 / (2 * width) ** (1 / 3)
        drawn = [std * torch.randn(shape, generator=generator) for shape in ((p, width), (p, width), (width, p))]
        network.load_state_dict(dict(zip(network.state_dict(), (weight.T for weight in drawn), strict=True)))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.5)
        for _ in range(epochs):
            optimizer.zero_grad()
            OneHotMSE()(network(batch[0]), batch[1]).backward()
            optimizer.step()
        predictions = network(batch[0]).argmax(1)
        for name, value in split_accuracies(predictions, batch[1], data.true_labels, data.is_corrupted).items():
            close(found[name][i, j, k], value)
        inputs, labels = next(iter(data.test_dataloader()))
        close(found["test"][i, j, k], (network(inputs).argmax(1) == labels).double().mean())


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: modular_addition_solution(4, 5), "`p` of modular_addition_solution to be an odd number"),
        (lambda: modular_addition_solution(5, 0), "`width` to be at least 1, but got 0"),
        (lambda: modular_multiplication_solution(9, 5), "odd prime, of which there is a primitive root, but got 9"),
        (lambda: modular_multiplication_solution(5, 2), "`width` of modular_multiplication_solution to be at least 3"),
        (lambda: MultiplicativeBasis(10), "odd prime"),
        (lambda: MultiplicativeBasis(5)(torch.zeros(3, 6)), "neurons with 5 inputs for this basis, but got 6"),
        (lambda: inverse_participation_ratio(torch.ones(3), r=1), "`r` to be above 1, but got 1"),
        (lambda: neuron_scores([], []), "at least one weight, but got none"),
        (lambda: prune_curve(torch.ones(2, 3), torch.ones(4, 2), torch.arange(3)), "same neurons, but got 3, 2 and 3"),
        (lambda: QuadraticMLP(7, dropout=1.0), r"`dropout` of QuadraticMLP to be in \[0, 1\), but got 1.0"),
        (lambda: QuadraticMLP(7, width=0), "`width` of QuadraticMLP to be at least 1, but got 0"),
        (lambda: QuadraticMLP(7, norm="group"), "`norm` of QuadraticMLP to be one of"),
        (lambda: QuadraticMLP(7, activation="tanh"), "`activation` of QuadraticMLP to be one of"),
        (lambda: TokenTransformer(7, d=10, heads=4), "`d` of TokenTransformer to be a multiple of its 4 heads"),
        (lambda: train_grid(5, (0.5,), (0.2,), dropout=1.0), "`dropout` of train_grid"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_everything_public_is_there_and_bases_can_be_pickled() -> None:
    for component in corrupted_grokking.plugin.components:
        assert getattr(corrupted_grokking, component.name) is component.load()
    basis = pickle.loads(pickle.dumps(MultiplicativeBasis(7)))
    assert torch.equal(basis(torch.eye(7)), MultiplicativeBasis(7)(torch.eye(7)))
    assert isinstance(QuadraticMLP(5, norm="batch").norm, nn.BatchNorm1d)
