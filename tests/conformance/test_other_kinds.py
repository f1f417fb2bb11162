# SPDX-License-Identifier: Apache-2.0
"""For each check of datamodules, metrics, modules, optimizers, functions and tasks: something wrong that it must catch.

Beside each offender stands a twin that differs in nothing but the fault, and passes.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, random_split
from torchmetrics import Metric

from fulgurite import Classification
from fulgurite.plugin import Component
from fulgurite.testing import Case, all_checks, check_component
from fulgurite.testing.lab import small_data

# Datamodules


class Data(pl.LightningDataModule):
    """Right in all respects; its parts are Subsets of one dataset."""

    num_classes = 4
    input_shape: tuple[int, ...] = (1, 6, 6)
    workers = 0

    def split(self):
        return torch.Generator().manual_seed(0)

    def setup(self, stage):
        self.parts = random_split(small_data(64), [44, 10, 10], self.split())

    def loader(self, part, **kwargs):
        return DataLoader(part, batch_size=8, num_workers=self.workers, **kwargs)

    def train_dataloader(self):
        return self.loader(self.parts[0], shuffle=True)

    def val_dataloader(self):
        return self.loader(self.parts[1])

    def test_dataloader(self):
        return self.loader(self.parts[2])


class SplitByGlobalSeed(Data):
    def split(self):
        return None


class DrawsInSetup(Data):
    def setup(self, stage):
        torch.rand(1)
        super().setup(stage)


class OverlappingSubsets(Data):
    def setup(self, stage):
        super().setup(stage)
        self.parts[1].indices[0] = self.parts[0].indices[0]


class Indices(Data):
    """Names its indices, as Fulgurite's own do."""

    def setup(self, stage):
        super().setup(stage)
        self.train_indices, self.val_indices, self.test_indices = (torch.tensor(part.indices) for part in self.parts)


class OverlappingIndices(Indices):
    def setup(self, stage):
        super().setup(stage)
        self.test_indices[0] = self.train_indices[0]


class KeepsALambda(Data):
    def setup(self, stage):
        super().setup(stage)
        self.transform = lambda inputs: inputs


class ShufflesWhenUnpickled(Data):
    def __setstate__(self, state):
        self.__dict__.update(state)
        self.parts[0].indices.reverse()


class Downloads(Data):
    def prepare_data(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("192.0.2.1", 80), timeout=0.01).close()


class LooksUpAName(Data):
    def prepare_data(self):
        socket.getaddrinfo("data.invalid", 80)


class WithWorker(Data):
    """Processes of one machine talk through sockets that are no network."""

    workers = 1


class EveryRankTheWhole(Data):
    def train_dataloader(self):
        return self.loader(self.parts[0], sampler=DistributedSampler(self.parts[0], num_replicas=1, rank=0))


class HalfIsLeftOut(Data):
    def train_dataloader(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return self.loader(self.parts[0], sampler=DistributedSampler(self.parts[0], num_replicas=4, rank=rank))


class Stream(IterableDataset):
    def __init__(self, divided):
        self.divided = divided

    def __iter__(self):
        there = self.divided and torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
        data = small_data(44)
        return (data[i] for i in range(rank, 44, ranks))


class Streamed(Data):
    divided = True

    def train_dataloader(self):
        return self.loader(Stream(self.divided))


class UndividedStream(Streamed):
    divided = False


class TwoValidations(Data):
    """Several loaders of a part are usual."""

    def val_dataloader(self):
        return [self.loader(part) for part in self.parts[1:]]

    def test_dataloader(self):
        return []


class SplitByGlobalSeedTwice(TwoValidations, SplitByGlobalSeed):
    pass


class TooFewClasses(Data):
    num_classes = 3


class OtherShape(Data):
    input_shape = (6, 6)


# Metrics


class Accuracy(Metric):
    full_state_update = False
    higher_is_better: bool | None = True
    is_differentiable = False
    reduction = "sum"

    def __init__(self):
        super().__init__()
        self.add_state("hits", torch.tensor(0.0), self.reduction)
        self.add_state("total", torch.tensor(0.0), self.reduction)

    def update(self, scores, targets):
        self.hits += (scores.argmax(dim=1) == targets).sum()
        self.total += len(targets)

    def compute(self):
        return self.hits / self.total


class MeanOfMeans(Accuracy):
    def update(self, scores, targets):
        self.hits += (scores.argmax(dim=1) == targets).float().mean()
        self.total += 1


class PrefersTheLast(Accuracy):
    def update(self, scores, targets):
        self.hits *= 0.5
        super().update(scores, targets)


class MergesByMaximum(Accuracy):
    reduction = "max"


class ForgetsToReset(Accuracy):
    def __init__(self):
        super().__init__()
        self.ever = 0.0

    def update(self, scores, targets):
        super().update(scores, targets)
        self.ever += float((scores.argmax(dim=1) == targets).sum())

    def compute(self):
        return self.ever / self.total


class LosesStateInPickles(Accuracy):
    def __getstate__(self):
        return {**super().__getstate__(), "hits": torch.tensor(0.0)}


class OnlyFloat32(Accuracy):
    def update(self, scores, targets):
        super().update(scores.new_zeros(()).float().copy_(1) * torch.mm(scores, torch.eye(4)), targets)


class ZeroWhenEmpty(Accuracy):
    def compute(self):
        return self.hits / self.total.clamp_min(1)


class NoDirection(Accuracy):
    higher_is_better = None


def scores_and_targets():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (20,), generator=generator)
    return torch.randn(20, 4, generator=generator) + 2 * F.one_hot(targets, 4), targets


# Modules


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(x).tanh()


class _WrongTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0])


class WrongBackward(Layer):
    def forward(self, x):
        return _WrongTanh.apply(self.linear(x))


class BatchStatistics(Layer):
    def forward(self, x):
        return super().forward(x - x.mean(dim=0))


class NotSaved(Layer):
    def __init__(self):
        super().__init__()
        self.shift = torch.randn(3)

    def forward(self, x):
        return super().forward(x) + self.shift


class RunningMean(Layer):
    saved = True

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5), persistent=self.saved)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return super().forward(x - self.mean)


class RunningMeanNotSaved(RunningMean):
    saved = False


class BreaksTheGraph(Layer):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) < 1000 else x


class MixesTypes(Layer):
    def forward(self, x):
        return torch.zeros(len(x), 3).index_add(0, torch.arange(len(x)), self.linear(x)).tanh()


class KeepsTypes(Layer):
    def forward(self, x):
        return torch.zeros(len(x), 3).index_add(0, torch.arange(len(x)), self.linear(x).float()).tanh()


class Views(Layer):
    def forward(self, x):
        return super().forward(x.view(-1).view(x.shape))


class NeedsAnExample(Layer):
    def forward(self, x):
        return super().forward(x) * (1 + 0 * x.max())


def inputs():
    return (torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),)


# Optimizers


class Momentum(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, momentum=0.5, maximize=False, foreach=False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "maximize": maximize, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def update(self, group, parameters):
        if any(p.grad.is_sparse for p in parameters):
            raise RuntimeError("Momentum does not support sparse gradients.")
        for p in parameters:
            self.velocity(p).mul_(group["momentum"]).add_(p.grad, alpha=-1 if group["maximize"] else 1)
        if group["foreach"]:
            torch._foreach_add_(parameters, [self.velocity(p) for p in parameters], alpha=-group["lr"])
        else:
            for p in parameters:
                p.add_(self.velocity(p), alpha=-group["lr"])

    def velocity(self, p):
        return self.state[p].setdefault("velocity", torch.zeros_like(p))


class CountsForAll(Momentum):
    steps = 0

    def update(self, group, parameters):
        type(self).steps += 1
        super().update({**group, "lr": group["lr"] / type(self).steps}, parameters)


class Uphill(Momentum):
    def update(self, group, parameters):
        super().update({**group, "lr": -group["lr"]}, parameters)


class ReturnsNothing(Momentum):
    def step(self, closure=None):
        super().step(closure)


class KeepsStateElsewhere(Momentum):
    def velocity(self, p):
        return self.__dict__.setdefault("velocities", {}).setdefault(p, torch.zeros_like(p))


class UnsafeState(Momentum):
    def velocity(self, p):
        self.state[p]["where"] = pathlib.PurePosixPath("here")
        return super().velocity(p)


class IgnoresGroups(Momentum):
    def update(self, group, parameters):
        super().update(self.defaults, parameters)


class DecaysAll(Momentum):
    def update(self, group, parameters):
        for p in group["params"]:
            p.mul_(0.99)
        super().update(group, parameters)


class NeverMaximizes(Momentum):
    def update(self, group, parameters):
        super().update({**group, "maximize": False}, parameters)


class OtherForeach(Momentum):
    def update(self, group, parameters):
        super().update({**group, "momentum": 0.0} if group["foreach"] else group, parameters)


class TakesSparseForDense(Momentum):
    def update(self, group, parameters):
        for p in parameters:
            p.add_(p.sign(), alpha=-0.1 * group["lr"])
            p.add_(p.grad.to_dense(), alpha=-group["lr"])


class TakesSparse(Momentum):
    def update(self, group, parameters):
        for p in parameters:
            p.add_(p.grad, alpha=-group["lr"])


# Functions and losses


def scaled(x, y):
    return 2 * x * y


def writes(x, y):
    return x.mul_(2) * y


def draws(x, y):
    torch.rand(1)
    return scaled(x, y)


_calls: list[int] = []


def counts(x, y):
    _calls.append(1)
    return scaled(x, y) + len(_calls)


def in_float32(x, y):
    return scaled(x.float(), y.float())


def inverse(x, y):
    return torch.linalg.inv(torch.eye(4, dtype=x.dtype) + x.T @ x) @ y.T


def inverse_in_float32(x, y):
    x, y = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (x, y))
    return inverse(x, y)


def wrong_gradient(x, y):
    return _WrongTanh.apply(x) * y


def right_gradient(x, y):
    return x.tanh() * y


def views(x, y):
    return scaled(x, y) + x.view(-1).sum()


def pairs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)


def squared(outputs, targets):
    return (outputs - targets).square().mean()


def detached(outputs, targets):
    return squared(outputs.detach(), targets)


def accuracy_as_loss(outputs, targets):
    return squared(outputs.round(), targets)


# Tasks


class Task(Classification):
    def __init__(self, num_classes: int = 4) -> None:
        super().__init__(num_classes, (1, 6, 6))


class LosesAnExample(Task):
    def predict_step(self, batch, batch_idx):
        return super().predict_step(batch, batch_idx)[1:]


class CannotTest(Task):
    def test_step(self, batch, batch_idx):
        raise KeyError("never tried")


class TaskNotSaved(Task):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.randn(4)

    def forward(self, inputs):
        return super().forward(inputs) + self.shift


class Counting(Task):
    saved = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=self.saved)

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx) * (1 + self.count / 100)


class CountingSaved(Counting):
    saved = True


class CriterionTwice(Task):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return super().training_step(batch, batch_idx)


class LossByHand(Task):
    def training_step(self, batch, batch_idx):
        return -self(batch[0]).log_softmax(dim=1).gather(1, batch[1].unsqueeze(1)).mean()


class CriterionForShow(LossByHand):
    def training_step(self, batch, batch_idx):
        Task.training_step(self, batch, batch_idx)
        return super().training_step(batch, batch_idx)


class Sums(Task):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * len(batch[0]) / 10


class LearnsFromValidation(Task):
    def validation_step(self, batch, batch_idx):
        self.network[-1].bias.data.add_(0.01)
        super().validation_step(batch, batch_idx)


class WeighsRanks(Task):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.global_rank)


class LogsOneRank(Task):
    def validation_step(self, batch, batch_idx):
        self.log("val/own", self.step(batch).loss)


class NotForTheCommandLine(Task):
    def __init__(self, num_classes: str) -> None:  # what it gets is a number
        super().__init__(int(num_classes))
        self.num_classes = int(num_classes)


class Trial(NamedTuple):
    check: str
    wrong: Any
    right: Any
    says: str


def of_loss(function):
    return Component(function.__name__, f"{function.__module__}:{function.__name__}", "loss")


TRIALS = [
    Trial("splits_are_seeded", SplitByGlobalSeed, Data, "the val part depends on the global seed"),
    Trial("splits_are_seeded", SplitByGlobalSeedTwice, TwoValidations, "the val part depends on the global seed"),
    Trial("setup_draws_nothing", DrawsInSetup, Data, "draws from the global random streams"),
    Trial("splits_are_disjoint", OverlappingSubsets, Data, "an example is in two parts"),
    Trial("splits_are_disjoint", OverlappingIndices, Indices, "an example is in two parts"),
    Trial("it_pickles", KeepsALambda, Data, "pickle"),
    Trial("it_pickles", ShufflesWhenUnpickled, Data, "a pickled copy has other train examples"),
    Trial("no_network", Downloads, Data, "192.0.2.1"),
    Trial("no_network", LooksUpAName, WithWorker, "data.invalid"),
    Trial("ranks_partition_the_data", EveryRankTheWhole, Data, "44 examples are seen by both ranks"),
    Trial("ranks_partition_the_data", HalfIsLeftOut, Data, "examples are seen by no rank"),
    Trial("ranks_partition_the_data", UndividedStream, Streamed, "an iterable dataset must divide itself"),
    Trial("batches", TooFewClasses, Data, "a train target is outside 0 ... num_classes - 1"),
    Trial("batches", OtherShape, Data, "`input_shape` is [6, 6]"),
    Trial("batches_equal_the_whole", MeanOfMeans, Accuracy, "one batch and three uneven ones differ"),
    Trial("order_of_merging", PrefersTheLast, Accuracy, "two orders of batches differ"),
    Trial("order_of_merging", MergesByMaximum, Accuracy, "merged states and one metric differ"),
    Trial("reset", ForgetsToReset, Accuracy, "a reset metric and a new one differ"),
    Trial("metric_pickles", LosesStateInPickles, Accuracy, "a pickled copy differs"),
    Trial("metric_on_two_ranks", MergesByMaximum, Accuracy, "two uneven shards and one process differ"),
    Trial("metric_in_half_precision", OnlyFloat32, Accuracy, "RuntimeError"),
    Trial("empty_metric", ZeroWhenEmpty, Accuracy, "with nothing seen it gives [0.0]"),
    Trial("declares_its_direction", NoDirection, Accuracy, "`higher_is_better` is not declared"),
    Trial("module_gradient", WrongBackward, Layer, "backward is not the derivative of forward"),
    Trial("batch_invariance", BatchStatistics, Layer, "one by one give another result than together"),
    Trial("module_state_round_trip", NotSaved, Layer, "after load_state_dict it computes something else"),
    Trial("module_state_round_trip", RunningMeanNotSaved, RunningMean, "it computes something else"),
    Trial("module_compiles", BreaksTheGraph, Layer, "torch.compile cannot take it as one graph"),
    Trial("module_under_autocast", MixesTypes, KeepsTypes, "RuntimeError"),
    Trial("module_takes_non_contiguous_input", Views, Layer, "view size is not compatible"),
    Trial("module_takes_an_empty_batch", NeedsAnExample, Layer, "RuntimeError"),
    Trial("optimizer_is_deterministic", CountsForAll, Momentum, "two equal trainings differ"),
    Trial("optimizer_learns", Uphill, Momentum, "after 20 steps the loss went from"),
    Trial("optimizer_returns_the_loss", ReturnsNothing, Momentum, "step(closure) returned None"),
    Trial("optimizer_resumes", KeepsStateElsewhere, Momentum, "three steps after loading the state end elsewhere"),
    Trial("optimizer_resumes", UnsafeState, Momentum, "weights_only=True refuses its state"),
    Trial("optimizer_parameter_groups", IgnoresGroups, Momentum, "a parameter of shape [12] moved"),
    Trial("optimizer_skips_missing_gradients", DecaysAll, Momentum, "a parameter without a gradient has moved"),
    Trial("optimizer_maximizes", NeverMaximizes, Momentum, "with maximize=True the loss falls"),
    Trial("optimizer_foreach", OtherForeach, Momentum, "foreach=True and foreach=False differ"),
    Trial("optimizer_refuses_sparse_gradients", TakesSparseForDense, Momentum, "where the gradient has rows [1, 2]"),
    Trial("optimizer_refuses_sparse_gradients", TakesSparseForDense, TakesSparse, "where the gradient has rows [1, 2]"),
    Trial("arguments_are_left_alone", writes, scaled, "an argument was changed in place"),
    Trial("pure", draws, scaled, "draws from the global random streams"),
    Trial("pure", counts, scaled, "two calls give different results"),
    Trial("precision_is_kept", in_float32, scaled, "float64 in gives torch.float32 out"),
    Trial("half_precision", inverse, inverse_in_float32, "RuntimeError"),
    Trial("gradient", wrong_gradient, right_gradient, "backward is not the derivative of forward"),
    Trial("non_contiguous", views, scaled, "view size is not compatible"),
    Trial("loss_has_a_gradient", of_loss(detached), of_loss(squared), "the loss carries no gradient"),
    Trial("loss_has_a_gradient", of_loss(accuracy_as_loss), of_loss(squared), "the gradient is zero"),
    Trial("task_in_every_stage", LosesAnExample, Task, "predict gives 38 predictions for 44 examples"),
    Trial("task_in_every_stage", CannotTest, Task, "KeyError"),
    Trial("task_state_round_trip", TaskNotSaved, Task, "after loading a checkpoint it predicts otherwise"),
    Trial("task_resumes", Counting, CountingSaved, "the resumed run ends elsewhere"),
    Trial("task_shows_its_criterion", CriterionTwice, Task, "calls"),
    Trial("task_shows_its_criterion", LossByHand, Task, "RefusedError"),
    Trial("task_shows_its_criterion", CriterionForShow, Task, "has no effect"),
    Trial("task_accumulates", Sums, Task, "do not give what one batch of 22 gives"),
    Trial("task_validation_is_untouched", LearnsFromValidation, Task, "changes the trained parameters"),
    Trial("task_on_two_ranks", WeighsRanks, Task, "do not give what one gives with 22"),
    Trial("task_on_two_ranks", LogsOneRank, Task, "two ranks validate otherwise than one: val/own"),
    Trial("task_configuration", NotForTheCommandLine, Task, "the command line refuses its own arguments"),
]


def case_of(component: Any) -> Case:
    arguments: dict[type, Callable[[], tuple[Tensor, ...]]] = {Metric: scores_and_targets, nn.Module: inputs}
    if not isinstance(component, type):
        return Case(arguments=pairs)
    if component is NotForTheCommandLine:
        return Case(make=lambda: NotForTheCommandLine("4"))
    for base, made in arguments.items():
        if issubclass(component, base) and not issubclass(component, pl.LightningModule):
            return Case(arguments=made)
    return Case()


def outcome(component: Any, check: str) -> Any:
    (result,) = check_component(component, cases=[case_of(component)], names=[check])
    return result


def name_of(component: Any) -> str:
    return getattr(component, "__name__", None) or component.name


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: f"{trial.check}-{name_of(trial.wrong)}")
def test_a_check_catches_its_offender(trial):
    """Fails if the check lets the wrong one pass, or fails for another reason."""
    result = outcome(trial.wrong, trial.check)
    assert result.status == "fail", result
    assert trial.says in result.reason, result.detail


RIGHT = dict.fromkeys((trial.check, trial.right) for trial in TRIALS)


@pytest.mark.parametrize(("check", "right"), RIGHT, ids=[f"{check}-{name_of(right)}" for check, right in RIGHT])
def test_a_check_lets_the_honest_twin_pass(check, right):
    """Fails if the check accuses somebody who has done nothing wrong."""
    result = outcome(right, check)
    assert result.status == "pass", result.detail or result.reason


def test_every_check_has_an_offender():
    """Fails if a check is added without something that it must catch."""
    mine = ("datamodules", "metrics", "modules", "optimizers", "functions", "tasks")
    known = {name for name, found in all_checks().items() if found.run.__module__.rpartition(".")[2] in mine}
    assert known == {trial.check for trial in TRIALS}


def test_what_a_manifest_says_is_held_to():
    """Fails if a component that is not there, or of another kind, is passed over or ends the run."""
    for target, kind, says in (
        (f"{__name__}:nowhere", "metric", "AttributeError"),
        (f"{__name__}:Accuracy", "module", "the manifest calls it a module, but it is a metric"),
        (f"{__name__}:scaled", "optimizer", "no subclass of Optimizer"),
    ):
        (result,) = check_component(Component("Named", target, kind))
        assert (result.check, result.status) == ("manifest", "fail")
        assert says in result.reason
