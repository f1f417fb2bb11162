# SPDX-License-Identifier: Apache-2.0
"""Data Diet in trainers: scoring leaves no trace, events equal an oracle, pruned runs train on what was chosen."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fulgurite import Capabilities, Intervention, LossCall
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.tasks import Classification
from fulgurite_plugins.data_selection import (
    ForgettingEvents,
    PruneTrainingSet,
    ScoreExamples,
    el2n,
    forgetting_counts,
    grand,
    load_scores,
    select_examples,
)
from fulgurite_plugins.data_selection.data_diet.files import Scores, describe_dataset
from fulgurite_plugins.distillation import PSKD
from tests import helpers
from tests.helpers import DictBatch, Manual, ModuleLoss, NegativeLogLikelihood, Plain, fit, weights


def score(module: pl.LightningModule, folder: Path, loader: Any = None, **arguments: Any) -> Scores:
    given = {"epochs": (1,), "directory": str(folder), **arguments}
    fit(module, [ScoreExamples(**given)], loader, epochs=1)
    return load_scores(folder / f"seed=1-epoch={given['epochs'][-1]:g}.safetensors")


def streams() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


# ScoreExamples


class Busy(Plain):
    """Keeps everything that a pass could disturb: batch norm, dropout, metrics, lists, logged values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 5))
        self.net[2].eval()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=5)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss, on_epoch=True)
        self.losses.append(loss.detach())
        return loss


class Augmented(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(12) + random.random() + np.random.rand(), y  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:ScoreExamples. the training set gives another input")
def test_scoring_changes_nothing_of_the_training(tmp_path):
    """Parameters, buffers, gradients, modes, metrics, lists, logged values, every random stream: bit for bit."""
    left: list[Any] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            gradients = [p.grad.clone() for p in module.parameters()]
            modes = [child.training for child in module.modules()]
            left[-1].append((gradients, modes, [b.clone() for b in module.buffers()], streams()))

    runs = []
    for callbacks in ([], [ScoreExamples(("el2n", "grand"), (0, 0.5, 1, 2), directory=str(tmp_path))]):
        left.append([])
        module = Busy()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        trainer = fit(module, [*callbacks, Watch()], DataLoader(Augmented(*helpers.data().tensors), 16, shuffle=True))
        runs.append((weights(module), module.losses, dict(trainer.callback_metrics)))
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)
    logged = {name: value for name, value in runs[1][2].items() if "scoreexamples" not in name}
    torch.testing.assert_close(runs[0][2], logged, rtol=0, atol=0)
    for (a, b, c, d), (e, f, g, h) in zip(*left, strict=True):
        torch.testing.assert_close((a, c), (e, g), rtol=0, atol=0)
        assert (b, d) == (f, h)
    assert len(list(tmp_path.iterdir())) == 4


class Bare(Plain):
    """Remembers itself at the end of each epoch."""

    def on_train_epoch_end(self) -> None:
        self.__dict__.setdefault("kept", []).append(copy.deepcopy(self.net).eval())


def test_scores_are_those_of_the_model_in_evaluation_mode_at_that_epoch(tmp_path):
    x, y = helpers.data().tensors
    module = Bare(dropout=0.4)
    fit(module, [ScoreExamples(("el2n", "grand", "l1"), (1, 2), directory=str(tmp_path))], epochs=2)
    for epoch, network in enumerate(module.kept, start=1):
        found = load_scores(tmp_path / f"seed=1-epoch={epoch}.safetensors")
        torch.testing.assert_close(found.values[f"el2n@{epoch}"], el2n(network(x).detach(), y))
        torch.testing.assert_close(found.values[f"grand@{epoch}"], grand(network, x, y))
        assert torch.equal(found.targets, y)
    assert found.provenance["dataset"] == describe_dataset(helpers.data())
    assert found.provenance["runs"] == [{"seed": 1, "epoch": 2, "steps": 8}]
    assert found.provenance["model"] == {"type": "Bare", "parameters": 293}


@pytest.mark.parametrize(
    "module", [ModuleLoss, NegativeLogLikelihood, helpers.OneArgument, helpers.DictReturned, Manual]
)
def test_every_spelling_of_the_module_has_the_same_scores(module, tmp_path):
    kept = module()
    found = score(kept, tmp_path).values["el2n@1"]
    x, y = helpers.data().tensors
    torch.testing.assert_close(found, el2n(kept.net(x).detach(), y))


def test_dictionaries_tasks_and_samplers_of_ones_own(tmp_path):
    x, y = helpers.data().tensors
    items = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    kept = DictBatch()
    torch.testing.assert_close(
        score(kept, tmp_path, DataLoader(items, 16)).values["el2n@1"], el2n(kept.net(x).detach(), y)
    )
    weighted = DataLoader(TensorDataset(x, y), 16, sampler=WeightedRandomSampler([1.0] * 60, 20))
    kept = Plain()
    torch.testing.assert_close(score(kept, tmp_path, weighted).values["el2n@1"], el2n(kept.net(x).detach(), y))
    task = Classification(5, (12,))
    found = score(task, tmp_path, scores=("el2n", "grand")).values
    torch.testing.assert_close(found["el2n@1"], el2n(task(x).detach(), y))
    torch.testing.assert_close(found["grand@1"], grand(task.network, x, y))


class Weighted(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weight = torch.arange(1.0, 6.0)
        return F.cross_entropy(self(batch[0]), batch[1], weight=weight, label_smoothing=0.1)


def test_grand_takes_the_modules_own_loss_and_only_what_is_trained(tmp_path):
    x, y = helpers.data().tensors
    module = Weighted()
    module.net[0].requires_grad_(False)
    found = score(module, tmp_path, scores=("grand", "el2n")).values

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, weight=torch.arange(1.0, 6.0), label_smoothing=0.1, reduction="none")

    torch.testing.assert_close(found["grand@1"], grand(module.net[2], module.net[:2](x), y, own))
    torch.testing.assert_close(found["el2n@1"], el2n(module.net(x).detach(), y))
    last = score(Plain(), tmp_path, scores=("grand",), parameters="last_layer").values["grand@1"]
    assert bool((last < score(Plain(), tmp_path, scores=("grand",)).values["grand@1"]).all())


def test_random_transforms_are_noticed_and_a_clean_dataset_or_several_passes_help(tmp_path):
    x, y = helpers.data().tensors
    augmented = DataLoader(Augmented(x, y), 16, shuffle=True)
    with pytest.warns(UserWarning, match="those of augmented inputs. Pass `dataset`"):
        score(Plain(), tmp_path, augmented)
    module = Plain()
    found = score(module, tmp_path, augmented, dataset=TensorDataset(x, y)).values["el2n@1"]
    torch.testing.assert_close(found, el2n(module.net(x).detach(), y))
    module = Plain()
    module.clean = lambda: TensorDataset(x, y)  # type: ignore[assignment]
    found = score(module, tmp_path, augmented, dataset="clean").values["el2n@1"]
    torch.testing.assert_close(found, el2n(module.net(x).detach(), y))
    module = Plain()
    several = score(module, tmp_path, augmented, augmentations=200).values["el2n@1"]
    assert float((several - found).abs().mean()) > 0  # the offsets shift the inputs, but the mean is steady
    again = score(Plain(), tmp_path, augmented, augmentations=200).values["el2n@1"]
    assert float((several - again).abs().max()) < 0.06


class Regression(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 5).float())


class Custom(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.main_loss(self(batch[0]), batch[1]) + 0.1 * F.mse_loss(
            self(batch[0]), torch.zeros(len(batch[0]), 5)
        )

    def main_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.log_softmax(1).gather(1, targets.unsqueeze(1)).mean()


def test_regression_has_the_length_of_its_error_and_criteria_can_be_named(tmp_path):
    x, y = helpers.data().tensors
    with pytest.raises(
        RefusedError, match="'el2n' is a score of classifiers, but the training step calls mse_loss.*'error'"
    ):
        score(Regression(), tmp_path)
    module = Regression()
    found = score(module, tmp_path, scores=("error", "grand")).values
    torch.testing.assert_close(found["error@1"], (module.net(x) - F.one_hot(y, 5)).norm(dim=1).detach())
    module = Custom()
    found = score(module, tmp_path, criterion="main_loss").values
    torch.testing.assert_close(found["el2n@1"], el2n(module.net(x).detach(), y))
    with pytest.raises(RefusedError, match="'main_loss' is no loss of torch.nn.functional"):
        score(Custom(), tmp_path, criterion="main_loss", scores=("grand",))


class Doubled(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(2 * self(batch[0]), batch[1])


class Halved(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0][::2]), batch[1][::2])


class Silent(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -self(batch[0]).log_softmax(1).gather(1, batch[1].unsqueeze(1)).mean()


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(helpers.data(8))


@pytest.mark.parametrize(
    ("module", "loader", "arguments", "message"),
    [
        (
            Doubled,
            None,
            {"scores": ("grand",)},
            "'grand' needs the network whose output.*no module of Doubled returned",
        ),
        (Halved, None, {}, r"for a batch of 16 examples the criterion cross_entropy got outputs of shape \[8, 5\]"),
        (Silent, None, {}, "that of Silent calls no loss of torch.nn.functional. Name one with `criterion=`"),
        (Custom, None, {"criterion": "other"}, "`criterion` to name a callable attribute of Custom.*'other'"),
        (Plain, lambda: DataLoader(Stream(), 4), {}, "a DataLoader over Stream. Use a map-style dataset"),
        (Plain, None, {"dataset": helpers.data(7)}, "hold the 60 training examples, in their order, but it has 7"),
        (Plain, None, {"dataset": "plain"}, "but neither has 'plain'"),
        (Plain, None, {"epochs": (3,)}, "`epochs` within the 1 epochs of the trainer, but got 3"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(module, loader, arguments, message, tmp_path):
    with pytest.raises(RefusedError, match=f"ScoreExamples.*{message}"):
        score(module(), tmp_path, None if loader is None else loader(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": "el2n"}, "several names, such as"),
        ({"scores": ()}, "at least one score of el2n"),
        ({"scores": ("eln2",)}, "got 'eln2'. Did you mean 'el2n'"),
        ({"epochs": ()}, "`epochs` of ScoreExamples to be numbers of epochs"),
        ({"epochs": (-1,)}, r"but got \(-1,\)"),
        ({"augmentations": 0}, "`augmentations` of ScoreExamples to be a positive number, but got 0"),
    ],
)
def test_wrong_arguments_of_score_examples(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreExamples(**arguments)


def test_stop_ends_training_after_the_last_scoring(tmp_path):
    trainer = fit(Plain(), [ScoreExamples(epochs=(1, 2), directory=str(tmp_path), stop=True)], epochs=9)
    assert trainer.global_step == 8
    with pytest.warns(UserWarning, match="ended before the scores of epoch 2 were computed"):
        fit(Plain(), [ScoreExamples(epochs=(1, 2), directory=str(tmp_path))], epochs=9, max_steps=5)


# ForgettingEvents


class Presentations(Intervention):
    """Writes down what the step predicts, as an oracle would."""

    capabilities = Capabilities(sample_indices=True)

    def __init__(self) -> None:
        self.rows: list[tuple[int, bool]] = []

    def on_loss(self, call: LossCall) -> LossCall:
        right = call.outputs.argmax(1) == call.step.targets
        self.rows += list(zip(call.step.indices.tolist(), right.tolist(), strict=True))
        return call


def expected(rows: list[tuple[int, bool]], n: int) -> Tensor:
    """By the definition, one example after another."""
    scores = []
    for example in range(n):
        own = [correct for index, correct in rows if index == example]
        scores.append(float(forgetting_counts(torch.tensor(own).view(-1, 1))) if own else math.nan)
    return torch.tensor(scores)


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("replacement", [False, True])
def test_forgetting_events_equal_the_oracle_over_five_epochs(replacement, tmp_path):
    oracle, events = Presentations(), ForgettingEvents(epochs=(2,), directory=str(tmp_path))
    loader = helpers.loader(batch_size=7)
    if replacement:
        loader = DataLoader(helpers.data(), 7, sampler=WeightedRandomSampler([1.0] * 60, 60))
        with pytest.warns(UserWarning, match="WeightedRandomSampler draws with replacement"):
            fit(Plain(dropout=0.5), [oracle, events], loader, epochs=5)
    else:
        fit(Plain(dropout=0.5), [oracle, events], loader, epochs=5)
    whole = expected(oracle.rows, 60)
    equal(events.scores(), whole)
    assert float(whole[whole.isfinite()].sum()) > 5
    equal(load_scores(tmp_path / "forgetting-seed=1-epoch=5.safetensors").values["forgetting@5"], whole)
    early = load_scores(tmp_path / "forgetting-seed=1-epoch=2.safetensors")
    equal(early.values["forgetting@2"], expected(oracle.rows[:120], 60))
    if not replacement:
        assert early.provenance["presentations"] == {"forgetting@2": 2}


def test_counting_changes_nothing():
    alone, counted = Plain(dropout=0.2), Plain(dropout=0.2)
    fit(alone, epochs=3)
    fit(counted, [ForgettingEvents()], epochs=3)
    assert torch.equal(weights(alone), weights(counted))


def test_counts_survive_a_stop_in_mid_epoch(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def train(callbacks: Any, ckpt: Any = None) -> Tensor:
        events = ForgettingEvents(directory=str(tmp_path))
        loader = StatefulDataLoader(helpers.data(), batch_size=16, shuffle=True)
        fit(Plain(), [events, *callbacks], loader, epochs=4, ckpt=ckpt)
        return events.scores()

    counted = train([Save()])
    equal(train([], tmp_path / "a.ckpt"), counted)
    assert float(counted[counted.isfinite()].sum()) > 3
    loader = StatefulDataLoader(helpers.data(50), batch_size=16, shuffle=True)
    with pytest.raises(RefusedError, match="has 50 examples, but the checkpoint of ForgettingEvents counts 60"):
        fit(Plain(), [ForgettingEvents()], loader, epochs=4, ckpt=tmp_path / "a.ckpt")


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(RefusedError, match="has no scores yet"):
        ForgettingEvents().scores()
    with pytest.raises(ValueError, match="positive integers"):
        ForgettingEvents(epochs=(0.5,))
    with pytest.raises(RefusedError, match="drew 16 examples for this batch, but the criterion got outputs for 8"):
        fit(Halved(), [ForgettingEvents()])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scoring_leaves_manual_optimizers_alone(tmp_path):
    class ZeroesFirst(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    runs = []
    for callbacks in ([], [ScoreExamples(("el2n", "grand"), (0, 1), directory=str(tmp_path))]):
        module = ZeroesFirst()
        fit(module, callbacks)
        runs.append((weights(module), [p.grad for p in module.parameters()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


# PruneTrainingSet


class Drawn(Intervention):
    """Notes the indices of each epoch."""

    capabilities = Capabilities(sample_indices=True)

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epochs.append([])

    def transform_batch(self, batch: Any, step: Any) -> Any:
        self.epochs[-1] += step.indices.tolist()
        return batch


def prune(module: Plain | None = None, epochs: int = 3, loader: Any = None, **arguments: Any) -> Any:
    plugin, drawn = PruneTrainingSet(**arguments), Drawn()
    module = Plain() if module is None else module
    trainer = fit(module, [plugin, drawn], loader, epochs=epochs)
    return plugin, drawn.epochs, trainer, module


def test_a_tensor_of_scores_decides_what_is_trained_on():
    scores = torch.rand(60, generator=torch.Generator().manual_seed(4))
    for arguments in (
        {"keep": 0.5},
        {"keep": 17, "strategy": "easiest"},
        {"keep": 0.3, "strategy": "window", "offset": 0.6},
        {"keep": 0.4, "balanced": True},
    ):
        plugin, epochs, trainer, _ = prune(source=scores, **arguments)
        labels = helpers.data().tensors[1] if arguments.pop("balanced", False) else None
        kept = select_examples(scores, labels=labels, **arguments)
        assert torch.equal(plugin.indices, kept)
        assert [set(drawn) for drawn in epochs] == [set(kept.tolist())] * 3
        assert [len(drawn) for drawn in epochs] == [60] * 3
        assert trainer.global_step == 12  # as with all data
        shorter = prune(source=scores, match_steps=False, **arguments, **({} if labels is None else {"balanced": True}))
        assert sorted(shorter[1][0]) == kept.tolist()
        assert shorter[2].global_step == 3 * math.ceil(len(kept) / 16)


def test_everything_kept_is_bit_equal_to_training_without_it(tmp_path):
    plain = Plain()
    fit(plain, epochs=3)
    for arguments in (
        {"source": torch.rand(60)},
        {"strategy": "random"},
        {"runs": 0, "epoch": 1},
        {"runs": 2, "epoch": 1, "directory": str(tmp_path)},
    ):
        *_, module = prune(keep=1.0, **arguments)
        assert torch.equal(weights(module), weights(plain)), arguments


def test_validation_and_the_random_streams_are_left_alone():
    class Validated(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.__dict__.setdefault("seen", []).append(len(batch[0]))

    module = Validated()
    fit(module, [PruneTrainingSet(keep=5, strategy="random")], val=helpers.loader(shuffle=False), epochs=2)
    assert module.seen == [16, 16] + [16, 16, 16, 12] * 2  # the sanity check, and twice everything
    torch.manual_seed(3)
    before = streams()
    select_examples(torch.rand(9, generator=torch.Generator()), 3, "random")
    assert streams() == before


def test_online_goes_on_with_the_part_that_the_run_itself_has_scored(tmp_path):
    scorer = ScoreExamples(epochs=(2,), directory=str(tmp_path))
    plugin, drawn = PruneTrainingSet(keep=0.25, runs=0, epoch=2), Drawn()
    trainer = fit(Plain(), [scorer, plugin, drawn], epochs=4)
    kept = select_examples(scorer.latest["el2n@2"], 0.25)
    assert torch.equal(plugin.indices, kept)
    assert [set(epoch) == set(kept.tolist()) for epoch in drawn.epochs] == [False, False, True, True]
    assert trainer.global_step == 16
    assert float(trainer.callback_metrics["prunetrainingset/kept"]) == 0.25


def test_inner_runs_leave_the_run_its_own_initial_weights_and_random_streams(tmp_path):
    """The run that follows equals one that was given the same part as a tensor."""
    arguments: dict[str, Any] = {"keep": 0.5, "seed": 7}
    inner, epochs, trainer, module = prune(runs=2, epoch=1, directory=str(tmp_path), **arguments)
    given, same_epochs, _, expected_module = prune(source=inner.values, **arguments)
    assert torch.equal(inner.indices, given.indices)
    assert epochs == same_epochs
    assert torch.equal(weights(module), weights(expected_module))
    assert trainer.global_step == 12
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    runs = [load_scores(file) for file in files]
    torch.testing.assert_close(inner.values, (runs[0].values["el2n@1"] + runs[1].values["el2n@1"]) / 2)
    assert not torch.equal(runs[0].values["el2n@1"], runs[1].values["el2n@1"])
    assert runs[0].provenance["runs"][0]["steps"] == 4


def test_inner_runs_are_ordinary_trainings_of_the_users_module(tmp_path):
    """By hand: new weights and order from the seed, the module's own step and optimizer, then EL2N."""
    inner = prune(runs=1, epoch=2, directory=str(tmp_path), seed=0)[0]
    module = Plain()
    torch.manual_seed(0)
    for layer in module.net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    loader = helpers.loader(helpers.data(), batch_size=16)
    trainer = helpers.trainer(epochs=2)
    trainer.fit(module, loader)
    x, y = helpers.data().tensors
    torch.testing.assert_close(inner.values, el2n(module.net(x).detach(), y))


def test_inner_runs_survive_a_kill_and_are_not_run_again(tmp_path):
    trained = []

    class Counting(Plain):
        def on_train_start(self) -> None:
            trained.append(self.global_step)
            if len(trained) == 3:
                raise KeyboardInterrupt

    arguments: dict[str, Any] = {"runs": 3, "epoch": 1, "seed": 0}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Counting(), [PruneTrainingSet(**arguments)], epochs=2, default_root_dir=tmp_path)
    (unfinished,) = (tmp_path / "scores").iterdir()
    assert len(list(unfinished.iterdir())) == 2
    plugin = PruneTrainingSet(**arguments)
    fit(Counting(), [plugin], epochs=2, default_root_dir=tmp_path)
    assert len(trained) == 3 + 1 + 1  # the one that was killed, and the run itself
    assert not unfinished.exists()
    whole = PruneTrainingSet(**arguments)
    fit(Counting(), [whole], epochs=2, default_root_dir=tmp_path / "other")
    torch.testing.assert_close(plugin.values, whole.values)


@pytest.mark.parametrize("score_name", ["grand", "forgetting", "max_margin"])
def test_other_scores_of_inner_runs(score_name, tmp_path):
    plugin = prune(score=score_name, runs=2, epoch=2, directory=str(tmp_path))[0]
    assert len(plugin.indices) == 30
    assert [load_scores(file).pick(score_name)[0] for file in tmp_path.iterdir()] == [f"{score_name}@2"] * 2
    if score_name == "forgetting":
        assert set(load_scores(next(tmp_path.iterdir())).values["forgetting@2"].tolist()) <= {0.0, 1.0, math.inf}


def test_layers_that_cannot_be_reset_are_named_and_reinit_helps(tmp_path):
    class Scaled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.scale

    with pytest.raises(RefusedError, match=r"the module \(Scaled\) has parameters and no `reset_parameters`.*`reinit`"):
        prune(Scaled(), runs=1, epoch=1, directory=str(tmp_path))

    def reinit(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.normal_()

    plugin = prune(Scaled(), runs=1, epoch=1, reinit=reinit, directory=str(tmp_path))[0]
    assert len(plugin.indices) == 30


@pytest.mark.parametrize(
    "arguments",
    [
        {"source": torch.rand(60, generator=torch.Generator().manual_seed(1)), "keep": 0.3},
        {"strategy": "random", "keep": 0.3, "match_steps": False},
        {"runs": 0, "epoch": 1, "keep": 0.3},
        {"runs": 2, "epoch": 1, "keep": 0.3},
    ],
)
@pytest.mark.parametrize("at", [3, 7])  # in the middle of epochs of four and of two steps
def test_resume_is_exact(arguments, at, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def train(callbacks: Any, ckpt: Any = None) -> tuple[Tensor, PruneTrainingSet]:
        plugin, module = PruneTrainingSet(seed=3, **arguments), Plain()
        loader = StatefulDataLoader(helpers.data(), batch_size=16, shuffle=True)
        fit(module, [plugin, *callbacks], loader, epochs=4, ckpt=ckpt, default_root_dir=tmp_path)
        return weights(module), plugin

    whole, first = train([Save()])
    resumed, second = train([], tmp_path / "a.ckpt")
    assert torch.equal(whole, resumed)
    assert torch.equal(first.indices, second.indices)


def test_files_are_checked_against_the_data(tmp_path):
    path = str(tmp_path / "seed=1-epoch=1.safetensors")
    found = score(Plain(), tmp_path)
    plugin = prune(source=path)[0]
    assert torch.equal(plugin.indices, select_examples(found.values["el2n@1"], 0.5))
    assert torch.equal(plugin.indices, prune(source=path, score="el2n@1")[0].indices)
    for data in (helpers.data(50), helpers.data(seed=1)):
        with pytest.raises(FulguriteError, match="size is 50.*size is 60|fingerprint is"):
            prune(source=path, loader=helpers.loader(data))
    with pytest.raises(FulguriteError, match="which has el2n@1, but got 'grand'"):
        prune(source=path, score="grand")
    with pytest.raises(FulguriteError, match="a score for each of the 60 training examples, but scores has 59"):
        prune(source=torch.rand(59))
    with pytest.raises(
        ValueError, match="the scores that were given to have a score for each of 60 examples, but 60 are NaN"
    ):
        prune(source=torch.full((60,), math.nan))
    with pytest.raises(RefusedError, match="between 1 and the 60 examples.*but got 61"):
        prune(source=torch.rand(60), keep=61)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, r"`keep` of PruneTrainingSet to be in \(0, 1\], or a positive integer, but got 0.0"),
        ({"keep": 1.2}, "but got 1.2"),
        (
            {"offset": 1.0},
            r"`offset` of PruneTrainingSet to be in \[0, 1\), or an integer that is not negative, but got 1.0",
        ),
        ({"keep": 0.6, "offset": 0.5, "strategy": "window"}, r"keep \+ offset .* at most 1, but got 0.6 \+ 0.5"),
        ({"strategy": "hard"}, "one of 'hardest', 'easiest', 'window', 'random', but got 'hard'"),
        ({"score": "el2"}, "got 'el2'. Did you mean 'el2n'"),
        ({"score": "forgetting", "runs": 0}, "to be among el2n.*but got 'forgetting'"),
        ({"runs": -1}, "`runs` of PruneTrainingSet to be 0, 1, 2 ..., but got -1"),
        ({"runs": 0, "epoch": 0.5}, "a whole number of epochs after which the run goes on"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruneTrainingSet(**arguments)


def test_lost_classes_and_batches_that_would_not_fill_are_named():
    x, y = helpers.data().tensors
    data = TensorDataset(x, y)
    data.classes = ["ant", "bee", "cat", "dog", "elk"]  # type: ignore[attr-defined]
    scores = y.float()
    keep = int((y == 4).sum())
    with pytest.warns(
        UserWarning, match="keeps no example of 4 classes: ant, bee, cat, dog. Keep more, or use balanced=True"
    ):
        prune(source=scores, keep=keep, loader=helpers.loader(data))
    full = helpers.loader(drop_last=True)
    with pytest.raises(RefusedError, match="keeps 9 examples, fewer than the batch size 16.*drop_last=True"):
        prune(source=torch.rand(60), keep=9, match_steps=False, loader=full)
    assert prune(source=torch.rand(60), keep=9, loader=full)[2].global_step == 9
    with pytest.raises(RefusedError, match="both take the training set for themselves"):
        fit(Plain(), [PruneTrainingSet(strategy="random"), PruneTrainingSet(strategy="random", keep=0.3)])


def test_data_without_indices_are_refused_by_name():
    for arguments in ({"strategy": "random"}, {"runs": 0, "epoch": 1}):
        with pytest.raises(RefusedError, match="PruneTrainingSet.*DataLoader over Stream"):
            prune(loader=DataLoader(Stream(), 4), **arguments)


def test_wrong_labels_among_the_kept_are_logged():
    from fulgurite_datamodules import Digits

    data = Digits(train_size=200, label_noise=0.2, noise_kind="permute")
    data.setup()
    wrong = data.train_targets != data.train_clean_targets
    plugin = PruneTrainingSet(keep=0.5, source=wrong.float() + torch.linspace(0, 0.1, 200), strategy="easiest")
    trainer = helpers.trainer([plugin], epochs=1)
    trainer.fit(Classification(10, (1, 8, 8)), datamodule=data)
    assert 20 < int(wrong.sum()) < 40
    assert float(trainer.callback_metrics["prunetrainingset/wrong_labels_kept"]) == 0.0


# Composition


def test_ps_kd_on_a_pruned_set_remembers_the_kept_examples_and_no_others():
    scores = torch.rand(60, generator=torch.Generator().manual_seed(4))
    for order in (0, 1):
        prune_, distil = PruneTrainingSet(source=scores, keep=0.5), PSKD(alpha=0.8)
        module = Plain()
        trainer = fit(module, [prune_, distil] if order == 0 else [distil, prune_], epochs=4)
        assert distil.memory is not None
        assert distil.memory.seen.nonzero().flatten().tolist() == prune_.indices.tolist()
        assert trainer.global_step == 16
        assert weights(module).isfinite().all()
    without = Plain()
    fit(without, [PruneTrainingSet(source=scores, keep=0.5)], epochs=4)
    assert not torch.equal(weights(without), weights(module))
