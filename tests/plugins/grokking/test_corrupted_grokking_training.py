# SPDX-License-Identifier: Apache-2.0
"""Corrupted grokking in trainings: labels, split accuracies, ratios and pruning, and what they refuse."""

from __future__ import annotations

import copy
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from fulgurite import spec
from fulgurite.cli.train import assemble
from fulgurite.errors import RefusedError
from fulgurite.experiment import with_overrides
from fulgurite.tasks import Classification
from fulgurite.testing.processes import on_ranks
from fulgurite_datamodules import Digits, ModularArithmetic
from fulgurite_plugins.grokking.corrupted_grokking import (
    CorruptionAccuracy,
    InversionDetector,
    IPRPruning,
    LabelCorruption,
    NeuronIPR,
    OneHotMSE,
    PruningCurves,
    QuadraticMLP,
    SplitAccuracies,
    modular_addition_solution,
)
from fulgurite_plugins.grokking.corrupted_grokking.claim import CLAIM
from fulgurite_plugins.grokking.corrupted_grokking.corruption import labels_of
from fulgurite_plugins.grokking.corrupted_grokking.neurons import find_neurons
from fulgurite_plugins.grokking.corrupted_grokking.surgery import remove
from tests.helpers import DictBatch, Plain, data, fit, loader, trainer

ddp = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


class Numbered(Dataset[Any]):
    """Examples that say their own index, so that a test knows whom a label belongs to."""

    def __init__(self, n: int = 37, classes: int = 5) -> None:
        self.targets = torch.arange(n) * 7 % classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((12,), float(index)), self.targets[index]


class Watching(Plain):
    """Remembers the label that its training step saw of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, set[int]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for x, y in zip(*batch, strict=True) if self.training else ():  # a measurement calls it in evaluation mode
            self.seen.setdefault(int(x[0]), set()).add(int(y))
        return F.cross_entropy(self(0.01 * batch[0]), batch[1])


def seen_labels(corruption: LabelCorruption, **arguments: Any) -> Tensor:
    module = Watching()
    fit(module, [corruption], DataLoader(Numbered(), **{"batch_size": 8, "shuffle": True, **arguments}), epochs=2)
    assert all(len(labels) == 1 for labels in module.seen.values())
    return torch.tensor([next(iter(module.seen[i])) for i in range(37)])


# Wrong labels


def test_each_example_gets_its_own_label_in_every_epoch_batch_size_and_worker() -> None:
    """And the wrapped dataset shows the same labels."""
    make = partial(LabelCorruption, 0.4, num_classes=5, seed=3)
    first = make()
    labels = seen_labels(first)
    assert torch.equal(labels, seen_labels(make(), batch_size=3, shuffle=False))
    assert torch.equal(labels, seen_labels(make(), num_workers=2))
    wrapped = make().wrap(Numbered())
    assert torch.equal(labels, torch.stack([label for _, label in wrapped]))
    assert torch.equal(wrapped.is_corrupted, first.is_corrupted)
    assert torch.equal(first.true_labels, Numbered().targets)
    assert torch.equal(wrapped.true_labels, Numbered().targets)
    assert not torch.equal(labels, LabelCorruption(0.4, 5, seed=4).wrap(Numbered()).targets)


@pytest.mark.parametrize("exclude", [True, False])
def test_exactly_the_floor_of_the_fraction_is_redrawn(exclude: bool) -> None:
    wrapped = LabelCorruption(0.29, 5, exclude_true_label=exclude).wrap(Numbered(1000))
    assert int(wrapped.is_corrupted.sum()) == 290  # 0.29 * 1000 is 290 in floats; 0.29 * 100 is not 29
    assert int(LabelCorruption(0.29, 5).wrap(Numbered(100)).is_corrupted.sum()) == 29
    wrong = wrapped.targets != wrapped.true_labels
    assert not bool((wrong & ~wrapped.is_corrupted).any())
    if exclude:
        assert torch.equal(wrong, wrapped.is_corrupted)
    else:  # a perfect memoriser is right on one in five: 58 of 290, with a deviation of 6.8
        assert abs(int((~wrong & wrapped.is_corrupted).sum()) - 58) <= 20


def test_only_eligible_examples_are_corrupted() -> None:
    wrapped = LabelCorruption(0.5, 5, exclude_true_label=True, indices=[3, 4, 20, 30]).wrap(Numbered())
    assert set(wrapped.is_corrupted.nonzero().flatten().tolist()) < {3, 4, 20, 30}
    assert int(wrapped.is_corrupted.sum()) == 2


def test_dicts_and_tuples_and_plain_numbers_are_taken() -> None:
    class Dicts(Numbered):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return {"x": x, "y": int(y)}

    wrapped = LabelCorruption(1.0, 5, exclude_true_label=True, key="y").wrap(Dicts())
    assert isinstance(wrapped[0]["y"], int)
    assert wrapped[0]["y"] == int(wrapped.targets[0]) != int(wrapped.true_labels[0])
    module = DictBatch()
    fit(module, [LabelCorruption(0.5, 5, key="y")], DataLoader(Dicts(), 8))
    listed = LabelCorruption(0.5, 5).wrap([(0.0, 1)] * 4)  # a list is a dataset
    assert listed[0][0] == 0.0


def test_the_number_of_classes_is_found() -> None:
    def classes(module: pl.LightningModule, *arguments: Any) -> int:
        plugin = LabelCorruption(0.5)
        trainer([plugin], epochs=1).fit(module, *arguments)
        return plugin.classes

    task = Classification(10, input_shape=(1, 8, 8))
    assert classes(task, Digits(train_size=32)) == 10
    assert classes(Plain(), loader()) == 5


def test_validation_keeps_its_labels() -> None:
    seen: list[Tensor] = []

    class Validating(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch[1])

    held = data(30, seed=1)
    fit(Validating(), [LabelCorruption(1.0, 5, exclude_true_label=True)], val=DataLoader(held, 30), epochs=1)
    assert torch.equal(seen[-1], held.tensors[1])


def test_a_resumed_training_goes_on_with_its_map_and_refuses_another_size(tmp_path: Any) -> None:
    corruption = LabelCorruption(0.5, 5)
    run = fit(Plain(), [corruption], epochs=1)
    run.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    offsets = next(s["offsets"] for s in checkpoint["callbacks"].values() if "offsets" in s)
    assert len(offsets) == 60
    resumed = LabelCorruption(0.5, 5)
    resumed.load_state_dict({"version": 1, "offsets": offsets.flip(0)})
    assert torch.equal(resumed.state_dict()["offsets"], offsets.flip(0))
    fit(Plain(), [resumed], epochs=1)
    assert torch.equal(resumed.state_dict()["offsets"], offsets.flip(0))
    other = LabelCorruption(0.5, 5)
    other.load_state_dict({"version": 1, "offsets": offsets})
    with pytest.raises(RefusedError, match="wrong labels for 60 examples, but the training set now has 44"):
        fit(Plain(), [other], loader(data(44)))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(12), 0)] * 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelCorruption(0.5).wrap(Stream()), r"index of every example, .* wrap\(list\(dataset\)\)"),
        (lambda: LabelCorruption(0.5).wrap(TensorDataset(torch.zeros(4, 2), torch.rand(4))), "integer classes"),
        (lambda: LabelCorruption(0.5).wrap(TensorDataset(torch.zeros(4, 2), torch.eye(4).long())), r"int64 \[4, 4\]"),
        (lambda: fit(Plain(), [LabelCorruption(0.5, 5)], DataLoader(Stream(), 4)), "its examples have no index"),
        (lambda: fit(Plain(), [LabelCorruption(0.5, 3)]), "from 3 classes, but a batch has the label 4"),
        (lambda: fit(Plain(), [LabelCorruption(0.5, 5, key="label")]), "but the batch has list"),
        (
            lambda: fit(Plain(), [LabelCorruption(0.5, 5)], loader(LabelCorruption(0.5, 5).wrap(data()))),
            "that it has wrapped already",
        ),
        (
            lambda: fit(
                Plain(), [LabelCorruption(0.5, 5)], loader(TensorDataset(torch.zeros(8, 12), torch.rand(8, 5)))
            ),
            r"labels of the batch are torch.float32 \[8, 5\]",
        ),
    ],
)
def test_labels_that_cannot_be_corrupted_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        make()


# Accuracies


def test_split_accuracies_are_those_of_the_final_weights(tmp_path: Any) -> None:
    """In evaluation mode, on labels as they are trained on, whatever the loader's order, batches and dropped examples."""
    corruption, splits = LabelCorruption(0.5, 5, seed=2), SplitAccuracies(every_n_epochs=2)
    module, held = Plain(dropout=0.5), data(33, seed=1)
    run = fit(module, [corruption, splits], loader(drop_last=True), DataLoader(held, 10), epochs=3)
    module.eval()
    inputs, truth = data().tensors
    labels = LabelCorruption(0.5, 5, seed=2).wrap(data()).targets
    predictions, mask = module(inputs).argmax(1), corruption.is_corrupted
    assert mask is not None
    expected = {
        "train": predictions == labels,
        "as_labelled": (predictions == labels)[mask],
        "true": (predictions == truth)[mask],
        "clean": (predictions == truth)[~mask],
        "test": module(held.tensors[0]).argmax(1) == held.tensors[1],
    }
    for name, hits in expected.items():
        assert float(run.callback_metrics[f"corruption/{name}"]) == pytest.approx(float(hits.double().mean())), name


def test_splits_are_found_in_wrapped_datasets_subsets_and_datamodules() -> None:
    wrapped = LabelCorruption(0.5, 5).wrap(data())
    for dataset in (wrapped, Subset(wrapped, range(10, 50))):
        run = fit(Plain(), [SplitAccuracies()], loader(dataset), epochs=1)
        assert "corruption/true" in run.callback_metrics
    for module, datamodule in (
        (Classification(10, input_shape=(1, 8, 8)), Digits(train_size=64, label_noise=0.3)),
        (Classification(5, network=QuadraticMLP(5, 8)), ModularArithmetic(5, corrupted_fraction=0.3)),
    ):
        run = trainer([SplitAccuracies()], epochs=1)
        run.fit(module, datamodule)
        assert 0 <= float(run.callback_metrics["corruption/train"]) <= 1
    with pytest.raises(
        RefusedError, match="Expected a LabelCorruption before this callback, .* the 60 training examples"
    ):
        fit(Plain(), [SplitAccuracies()])


def test_one_hot_targets_count_as_classes() -> None:
    class Squared(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 5).float())

    results = [fit(module, [LabelCorruption(0.5, 5), SplitAccuracies()], epochs=1) for module in (Squared(), Squared())]
    assert results[0].callback_metrics["corruption/clean"] == results[1].callback_metrics["corruption/clean"]


def test_counted_leaves_out_repeated_examples() -> None:
    logits, labels = torch.eye(4), torch.tensor([0, 1, 3, 3])
    truth, mask = torch.tensor([0, 1, 2, 3]), torch.tensor([False, True, True, False])
    metric = CorruptionAccuracy()
    metric.update(logits, labels, truth, mask)
    metric.update(logits, labels, truth, mask, counted=torch.zeros(4, dtype=torch.bool))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == {"train": 0.75, "as_labelled": 0.5, "true": 1.0, "clean": 1.0}
    with pytest.raises(ValueError, match=r"of the same examples, but got shapes \[4, 4\], \[3\]"):
        metric.update(logits, labels[:3], truth, mask)


class Scripted(Plain):
    """Predicts wrong labels too, until it drops them: what grokking and inversion look like, without the wait."""

    def __init__(self, labels: Tensor, truth: Tensor, held: Tensor) -> None:
        super().__init__()
        self.answers = [(labels, torch.zeros_like(held)), (labels, held), (truth, held), (truth, held)]

    def forward(self, x: Tensor) -> Tensor:
        train, held = self.answers[min(self.current_epoch, 3)]
        index = x[:, 0].long()
        answer = torch.where(index >= 1000, held[index % 1000 % len(held)], train[index % 1000 % len(train)])
        return F.one_hot(answer, 5).float() + 0 * self.net(x)


def test_the_detector_reports_both_times_and_remembers_them() -> None:
    truth = torch.arange(40) % 5 + 0
    held = (torch.arange(20) + 1) % 4 + 1
    wrapped = LabelCorruption(0.25, 5, exclude_true_label=True).wrap(
        TensorDataset(torch.arange(40.0)[:, None].expand(40, 12), truth)
    )
    val = DataLoader(TensorDataset((1000 + torch.arange(20.0))[:, None].expand(20, 12), held), 20)
    detector = InversionDetector(every_n_epochs=1)
    run = fit(Scripted(wrapped.targets, truth, held), [detector], loader(wrapped), val, epochs=4)
    assert (detector.grokked_at, detector.inverted_at) == (2, 3)
    assert [row[1] for row in detector.history] == pytest.approx([1.0, 1.0, 0.75, 0.75])
    assert float(run.callback_metrics["corruption/inverted_at"]) == 3
    again = InversionDetector(every_n_epochs=1)
    again.load_state_dict(detector.state_dict())
    assert again.history == detector.history
    with pytest.raises(RefusedError, match="InversionDetector needs validation data"):
        fit(Plain(), [LabelCorruption(0.2, 5), InversionDetector()])


# Ratios and pruning


def quadratic(p: int = 11, width: int = 24, **arguments: Any) -> Classification:
    torch.manual_seed(5)
    optimizer = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.98), weight_decay=1.0)
    return Classification(p, network=QuadraticMLP(p, width, **arguments), criterion=OneHotMSE(), optimizer=optimizer)


def run_on_table(module: pl.LightningModule, *callbacks: Any, epochs: int = 6, **arguments: Any) -> pl.Trainer:
    run = trainer(callbacks, epochs=epochs, **arguments)
    run.fit(module, ModularArithmetic(11, train_fraction=0.7, corrupted_fraction=0.2, encoding="tokens"))
    return run


def test_ratios_are_logged_and_are_one_for_the_solution() -> None:
    module = quadratic(width=200)
    U, V, W = modular_addition_solution(11, 200, dtype=torch.float32)
    module.network.load_state_dict({"U.weight": U, "V.weight": V, "W.weight": W})
    module.make_optimizer = partial(torch.optim.SGD, lr=0.0)
    ipr = NeuronIPR()
    run = run_on_table(module, ipr, epochs=1)
    assert ipr.scores is not None
    torch.testing.assert_close(ipr.scores, torch.ones(200))
    assert float(run.callback_metrics["ipr/lowest"]) == pytest.approx(1)


def test_the_batch_norm_reading_is_the_rank_correlation() -> None:
    module, ipr = quadratic(norm="batch"), NeuronIPR()
    run = run_on_table(module, ipr)
    norm = module.network.norm
    scale = (norm.weight.abs() / (norm.running_var + norm.eps).sqrt()).detach()
    assert ipr.scores is not None
    ranks = torch.stack([ipr.scores.argsort().argsort(), scale.argsort().argsort()]).double()
    expected = torch.corrcoef(ranks)[0, 1]
    assert float(run.callback_metrics["ipr/batch_norm_correlation"]) == pytest.approx(float(expected), abs=1e-6)


def test_neurons_without_weights_are_left_out_with_one_warning() -> None:
    module = quadratic()
    with torch.no_grad():
        for weight in (module.network.U.weight[:3], module.network.V.weight[:3], module.network.W.weight[:, :3]):
            weight.zero_()
    module.make_optimizer = partial(torch.optim.SGD, lr=0.0)
    with pytest.warns(UserWarning, match="3 of 24 neurons have no weights") as caught:
        run = run_on_table(module, NeuronIPR(log_every_n_epochs=1), epochs=3)
    assert sum("have no weights" in str(w.message) for w in caught) == 1
    assert float(run.callback_metrics["ipr/lowest"]) > 0


def zeroed(module: pl.LightningModule, neurons: Tensor) -> bool:
    """Whether exactly these neurons have no weights."""
    network = module.network
    norms = [network.U.weight.norm(dim=1), network.V.weight.norm(dim=1), network.W.weight.norm(dim=0)]
    dead = torch.zeros(len(norms[0]), dtype=torch.bool).index_fill_(0, neurons, True)
    return all(torch.equal(norm == 0, dead) for norm in norms)


@pytest.mark.parametrize("mode", ["zero", "mask"])
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_pruned_neurons_stay_away_while_the_others_train(mode: Any, norm: Any) -> None:
    """Momentum, weight decay and what batch norm makes of a zero would bring them back."""
    module, pruning = quadratic(norm=norm), IPRPruning(0.5, mode=mode, at_epoch=3)
    before = module.network.W.weight.detach().clone()
    run_on_table(module, pruning, epochs=8)
    assert pruning.pruned is not None
    assert len(pruning.pruned) == 12
    assert zeroed(module, pruning.pruned)
    assert not torch.equal(module.network.W.weight, before)
    assert "weight" in module.network.U._parameters  # masks are made plain


def test_both_modes_train_the_same_network() -> None:
    """Masks have no gradient, zeros are written again: the weights that stay must not know which it was."""
    modules = [quadratic(), quadratic()]
    for module, mode in zip(modules, ("zero", "mask"), strict=True):
        run_on_table(module, IPRPruning(0.5, mode=mode, at_epoch=3), epochs=8)  # type: ignore[arg-type]
    for a, b in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(a, b)


def test_orders_take_the_lowest_the_highest_or_some_at_random() -> None:
    chosen = {}
    for order in ("lowest", "highest", "random"):
        module, pruning = quadratic(), IPRPruning(0.25, order=order)  # type: ignore[arg-type]
        ipr = NeuronIPR()
        run_on_table(module, ipr, pruning)
        assert ipr.scores is not None
        assert pruning.pruned is not None
        chosen[order] = pruning.pruned
        ranked = ipr.scores.argsort()
    assert set(chosen["lowest"].tolist()) == set(ranked[:6].tolist())
    assert set(chosen["highest"].tolist()) == set(ranked[-6:].tolist())
    assert len(chosen["random"].unique()) == 6


@pytest.mark.parametrize("norm", [None, "batch"])
def test_removing_equals_zeroing(norm: Any) -> None:
    """The largest difference of outputs is below 1e-6, and the layers are really smaller."""
    results = []
    for mode in ("zero", "remove"):
        module = quadratic(norm=norm)
        run_on_table(module, IPRPruning(0.4, mode=mode))  # type: ignore[arg-type]
        module.eval()
        pairs = torch.cartesian_prod(torch.arange(11), torch.arange(11))
        results.append((module(pairs), module))
    difference = (results[0][0] - results[1][0]).abs().max()
    assert float(difference) < 1e-6
    network = results[1][1].network
    assert network.U.weight.shape == (15, 11)
    assert network.W.in_features == 15
    assert network.U.out_features == 15


def test_removing_in_mid_training_goes_on_with_the_optimizer_state() -> None:
    """Against zeros: the neurons that stay must take the same steps."""
    results = []
    for mode in ("zero", "remove"):
        module, pruning = quadratic(), IPRPruning(0.5, mode=mode, at_epoch=3)  # type: ignore[arg-type]
        run = run_on_table(module, pruning, epochs=8)
        assert pruning.pruned is not None
        kept = torch.ones(24, dtype=torch.bool).index_fill_(0, pruning.pruned, False)
        results.append(module.network.U.weight[kept] if mode == "zero" else module.network.U.weight)
        state = run.optimizers[0].state[module.network.U.weight]
        assert state["exp_avg"].shape == module.network.U.weight.shape
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", ["zero", "mask", "remove"])
def test_a_training_that_was_pruned_resumes(tmp_path: Any, mode: Any) -> None:
    make = partial(IPRPruning, 0.5, mode=mode, at_epoch=2)
    whole, pruning = quadratic(), make()
    run_on_table(whole, pruning, epochs=6)
    saver = ModelCheckpoint(tmp_path, "c", every_n_epochs=4, save_top_k=-1)
    run_on_table(quadratic(), make(), saver, epochs=4, enable_checkpointing=True)
    resumed, again = quadratic(), make()
    run = trainer([again], epochs=6)
    source = ModularArithmetic(11, train_fraction=0.7, corrupted_fraction=0.2, encoding="tokens")
    run.fit(resumed, source, ckpt_path=tmp_path / "c.ckpt")
    assert torch.equal(again.pruned, pruning.pruned)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    tested = trainer([make()])  # a checkpoint of the middle of training, in a plain model
    tested.test(quadratic(), source, ckpt_path=tmp_path / "c.ckpt", verbose=False)


def test_biases_and_batch_norms_go_with_their_neurons() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 3))
    model(torch.randn(20, 4))
    model.eval()
    inputs = torch.randn(5, 4)
    kept = torch.tensor([0, 2, 5])
    expected = model[2](model[1](model[0](inputs)))[:, kept] @ model[3].weight[:, kept].T + model[3].bias
    remove(find_neurons(model, "auto", "the test"), kept)
    torch.testing.assert_close(model(inputs), expected)


def test_curves_are_those_of_networks_with_zeros() -> None:
    """At every number of neurons: accuracies of the curve, and of a copy in which as many are pruned."""
    module, curves = quadratic(width=8, norm="batch"), PruningCurves(fractions=(0.25,))
    run = run_on_table(module, curves, epochs=20)
    source = ModularArithmetic(11, train_fraction=0.7, corrupted_fraction=0.2, encoding="tokens")
    (batch,) = source.train_dataloader()
    (held,) = source.val_dataloader()
    module.eval()
    scores = find_neurons(module, "auto", "the test").scores(2, "fourier")
    for q in range(8):
        gone = scores.argsort()[:q]
        with torch.no_grad():
            module.network.U.weight[gone], module.network.V.weight[gone], module.network.W.weight[:, gone] = 0, 0, 0
            fits = module(batch[0]).argmax(1) == batch[1]
            test = (module(held[0]).argmax(1) == held[1]).double().mean()
        mask = source.is_corrupted
        assert float(curves.curves["lowest"]["train"][q]) == pytest.approx(float(fits.double().mean()))
        assert float(curves.curves["lowest"]["as_labelled"][q]) == pytest.approx(float(fits[mask].double().mean()))
        assert float(curves.curves["lowest"]["test"][q]) == pytest.approx(float(test))
    assert run.callback_metrics["prune/lowest_25/test"] == curves.curves["lowest"]["test"][2].float()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: run_on_table(quadratic(), NeuronIPR(basis=torch.eye(12))),
            r"The basis has 12 components, but the neurons have 11 weights in `network.U`",
        ),
        (
            lambda: fit(Late(), [NeuronIPR()]),
            r"looks for linear layers .* but Late has net \(12 to 5\)",
        ),
        (
            lambda: run_on_table(quadratic(), IPRPruning(0.5, layers={"in": ["network.X"], "out": ["network.W"]})),
            "`layers` names 'network.X', but Classification has network.U",
        ),
        (
            lambda: run_on_table(quadratic(), IPRPruning(0.5, layers={"in": ["network.U"], "out": ["network.V"]})),
            r"lead to the same neurons .* have \[24, 11\] neurons",
        ),
        (
            lambda: run_on_table(quadratic(norm="layer"), IPRPruning(0.5, mode="remove")),
            "a LayerNorm normalises the neurons together",
        ),
        (lambda: run_on_table(quadratic(norm="layer"), PruningCurves()), "LayerNorm makes each neuron depend"),
        (
            lambda: run_on_table(quadratic(), IPRPruning(0.5, mode="remove"), EMAWeightAveraging()),
            "the copy of the model in EMAWeightAveraging keeps its size",
        ),
    ],
)
def test_what_cannot_be_scored_or_pruned_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        make()


class Late(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelCorruption(1.1), r"`fraction` of LabelCorruption to be in \[0, 1\], but got 1.1"),
        (lambda: LabelCorruption(0.5, 1), "`num_classes` of LabelCorruption to be at least 2, or 'auto', but got 1"),
        (
            lambda: LabelCorruption(0.5, 5, indices=[40]).wrap(Numbered()),
            "`indices` of LabelCorruption to be in 0 ... 36",
        ),
        (lambda: IPRPruning(1.0), r"`fraction` of IPRPruning to be in \[0, 1\): some neurons must stay, but got 1.0"),
        (lambda: IPRPruning(0.5, order="first"), "`order` of IPRPruning to be one of 'lowest', 'highest', 'random'"),
        (lambda: IPRPruning(0.5, mode="hide"), "`mode` of IPRPruning"),
        (lambda: IPRPruning(0.5, at_epoch=-1), "`at_epoch` of IPRPruning"),
        (lambda: NeuronIPR(r=1), "`r` of NeuronIPR to be above 1"),
        (lambda: NeuronIPR(log_every_n_epochs=0), "`log_every_n_epochs` of NeuronIPR"),
        (lambda: PruningCurves(fractions=(1.0,)), "`fractions` of PruningCurves"),
        (lambda: SplitAccuracies(every_n_epochs=0), "`every_n_epochs` of SplitAccuracies"),
        (lambda: InversionDetector(tolerance=2), "`tolerance` of InversionDetector"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_labels_are_read_from_items_where_the_attribute_is_transformed() -> None:
    class Transformed(Numbered):
        target_transform = staticmethod(lambda label: 4 - label)

        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x, int(self.target_transform(y))

    assert torch.equal(labels_of(Transformed()), 4 - Numbered().targets)


# Ranks


def two_ranks() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)), "devices": 2}


class Frozen(Watching):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@ddp
@pytest.mark.xdist_group("distributed")
def test_two_ranks_have_the_labels_and_accuracies_of_one() -> None:
    """37 examples on two ranks: the sampler repeats one, which must not be counted twice."""

    def train(arguments: dict[str, Any]) -> dict[str, Any]:
        module = Frozen()
        callbacks = [LabelCorruption(0.4, 5, seed=3), SplitAccuracies(batch_size=5)]
        run = fit(module, callbacks, DataLoader(Numbered(), 4), DataLoader(Numbered(21), 4), epochs=1, **arguments)
        metrics = {name: float(value) for name, value in run.callback_metrics.items() if "corruption/" in name}
        return {"seen": module.seen, "metrics": metrics}

    alone = train({})
    first, second = on_ranks(lambda rank: train(two_ranks()))
    assert {**first["seen"], **second["seen"]} == alone["seen"]
    assert first["metrics"] == pytest.approx(second["metrics"])
    assert first["metrics"] == pytest.approx(alone["metrics"], abs=1e-7)


@ddp
@pytest.mark.xdist_group("distributed")
def test_removing_in_mid_training_is_refused_on_two_ranks() -> None:
    def train(rank: int) -> str:
        with pytest.raises(RefusedError) as caught:
            fit(Plain(), [IPRPruning(0.5, mode="remove", at_epoch=1)], **two_ranks())
        return str(caught.value)

    assert all("do not fit its buckets of gradients" in message for message in on_ranks(train))


# The claim


def test_every_variant_of_the_claim_trains_full_batches_and_logs_what_is_expected_of_it(tmp_path: Any) -> None:
    """A datamodule that got the batch size of another one would train 33 times as many updates."""
    (setting,) = CLAIM.settings
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for variant in setting.variants:
        config = copy.deepcopy(dict(setting.config))
        config["model"]["init_args"]["network"]["init_args"] |= {"p": 7, "width": 10}
        config["data"]["init_args"]["modulus"] = 7
        config["trainer"] |= {**off, "max_epochs": 2, "default_root_dir": str(tmp_path)}
        config = with_overrides(config, variant.overrides)
        cli = assemble(config, callbacks=[spec.build(text) for text in variant.add], seed=0)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        assert cli.trainer.global_step == 2
        decay = cli.trainer.optimizers[0].param_groups[0]["weight_decay"]
        assert variant.name in (f"decay {decay:g}", f"dropout {cli.model.network.dropout.p:g}")
        wanted = {
            expected.metric for expected in CLAIM.expectations if variant.name in (expected.variant, expected.reference)
        }
        assert wanted <= set(cli.trainer.callback_metrics)
