# SPDX-License-Identifier: Apache-2.0
"""Every check of loops, batches, costs, precision and ranks catches a wrong intervention, and lets its twin pass."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fulgurite.distributed import gather_rows
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.testing import Case, all_checks, check_component, processes
from fulgurite.testing.lab import CLASSES

READS = Capabilities(reads_loss=True)


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def squares(module):
    return torch.stack([p.square().sum() for p in trainable(module)]).sum()


class Decay(Intervention):
    """Honest: a penalty on the squares of all weights."""

    def penalty(self, step):
        return 0.05 * squares(step.module)


class Smooth(Intervention):
    """Honest: label smoothing."""

    def on_loss(self, call):
        soft = call.soften()
        return soft.replace(targets=soft.targets * 0.6 + 0.4 / CLASSES)


# Batches


class VarianceOverOneLess(Intervention):
    capabilities = READS
    correction = 1

    def penalty(self, step):
        return -0.01 * step.outputs.var(dim=0, correction=self.correction).sum()


class VarianceOverAll(VarianceOverOneLess):
    correction = 0


class MeanOfNothing(Intervention):
    capabilities = READS

    def penalty(self, step):
        return 0.01 * step.outputs.square().sum(dim=1).mean()


class MeanOfAny(MeanOfNothing):
    def penalty(self, step):
        return 0.01 * step.outputs.square().sum() / max(1, len(step.outputs))


class DropsShortBatch(Intervention):
    kept = 0.0

    def on_loss(self, call):
        self.size = max(len(call.outputs), getattr(self, "size", 0))
        return call if len(call.outputs) == self.size else call.replace(outputs=call.outputs * self.kept)


class WeighsShortBatch(DropsShortBatch):
    kept = 0.5


class StoresNaN(Intervention):
    finite_only = False

    def __init__(self):
        self.mean = torch.zeros(CLASSES)

    def on_loss(self, call):
        mean = torch.lerp(self.mean, call.probabilities().mean(dim=0), 0.1)
        self.mean = torch.where(mean.isfinite(), mean, self.mean) if self.finite_only else mean
        return call

    def state_dict(self):
        return {"version": 1, "mean": self.mean}


class StoresFinite(StoresNaN):
    finite_only = True


class WarnsOfNaN(StoresFinite):
    words = "{name}: {count} means were not finite and were left out"

    def __init__(self):
        super().__init__()
        self.missing = 0

    def on_loss(self, call):
        self.missing += (~call.probabilities().mean(dim=0).isfinite()).any()
        return super().on_loss(call)

    def on_train_epoch_end(self, trainer, pl_module):
        if int(self.missing):
            warnings.warn(self.words.format(name=self.name, count=int(self.missing)), stacklevel=2)


class WarnsOfSomethingElse(WarnsOfNaN):
    words = "{name}: {count} of something"


class WarnsWithoutName(WarnsOfNaN):
    words = "{count} means were not finite"


class LogsNaN(WarnsOfNaN):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log(f"{self.name}/not_finite", self.missing.float())


class StopsAtNaN(StoresFinite):
    words = "the outputs of batch 2 are not finite"

    def on_loss(self, call):
        if not bool(call.outputs.isfinite().all()):
            raise FulguriteError(f"{self.name}: {self.words}")
        return super().on_loss(call)


class StopsAtNaNWithoutSaying(StopsAtNaN):
    words = "batch 2 cannot be used"


class MarksUnseenWithNaN(Intervention):
    def state_dict(self):
        return {"version": 1, "last": torch.tensor([0.5, torch.nan])}


class WritesIntoDataset(Intervention):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.train_dataloader.dataset.tensors[0].mul_(0.5)


class ScalesBatch(Intervention):
    def transform_batch(self, batch, step):
        return (batch[0] * 0.5, batch[1]) if step.trainer.current_epoch == 1 else batch


class ScheduleByLoader(Decay):
    def batches(self, trainer):
        return len(trainer.train_dataloader)

    def penalty(self, step):
        return super().penalty(step) * step.updates / (2 * self.batches(step.trainer))


class ScheduleByLimit(ScheduleByLoader):
    def batches(self, trainer):
        return trainer.num_training_batches


class ReplacesCollate(Intervention):
    def on_train_start(self, trainer, pl_module):
        loader = trainer.train_dataloader
        original = loader.collate_fn
        loader.collate_fn = lambda examples: [t * 0.5 if t.is_floating_point() else t for t in original(examples)]


class ScalesEveryBatch(Intervention):
    def transform_batch(self, batch, step):
        return batch[0] * 0.5, batch[1]


class ScalesNested(Intervention):
    def transform_batch(self, batch, step):
        return tree_map_only(torch.Tensor, lambda t: t * 0.5 if t.is_floating_point() else t, batch)


class OnlyPairs(Intervention):
    def transform_batch(self, batch, step):
        return (batch[0] * 0.5, batch[1]) if isinstance(batch, (list, tuple)) else self.otherwise(batch)

    def otherwise(self, batch):
        return batch


class NeedsLength(Decay):
    def unknown(self, loader):
        return len(loader)

    def on_train_start(self, trainer, pl_module):
        loader = trainer.train_dataloader
        self.batches = len(loader) if hasattr(loader.dataset, "__len__") else self.unknown(loader)


class RefusesStreams(NeedsLength):
    def unknown(self, loader):
        raise RefusedError(f"{self.name} needs the number of batches.")


class NeedsFiniteLength(Decay):
    def penalty(self, step):
        return super().penalty(step) / step.trainer.num_training_batches


class OnlyPairsOrRefuses(OnlyPairs):
    def otherwise(self, batch):
        raise RefusedError(f"{self.name}: expected a batch of inputs and targets, but got a {type(batch).__name__}.")


# Costs


class CountsInPython(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return inputs * (0.5 + 1e-9 * self.calls)


class CountsInBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls.add_(1)
        return inputs * (0.5 + 1e-9 * self.calls)


class Recompiles(Intervention):
    layer = CountsInPython

    def operate(self, module):
        module.network = nn.Sequential(module.network, self.layer())


class CompilesOnce(Recompiles):
    layer = CountsInBuffer


class KeepsOutputs(Intervention):
    def on_loss(self, call):
        self.last = self.kept(call.outputs)
        return call

    def kept(self, outputs):
        return outputs


class KeepsDetached(KeepsOutputs):
    def kept(self, outputs):
        return outputs.detach()


class AveragesWithGraph(Intervention):
    capabilities = READS

    def __init__(self):
        self.mean = torch.zeros(())

    def penalty(self, step):
        self.mean = 0.9 * self.mean + 0.1 * self.seen(step.loss)

    def seen(self, loss):
        return loss


class AveragesDetached(AveragesWithGraph):
    def seen(self, loss):
        return loss.detach()


class AppendsLosses(Intervention):
    def __init__(self):
        self.losses = []

    def penalty(self, step):
        self.losses.append(step.loss.detach())

    def on_train_epoch_end(self, trainer, pl_module):
        self.forget()

    def forget(self):
        pass


class AppendsUntilEpochEnd(AppendsLosses):
    def forget(self):
        self.losses.clear()


class GrowsOneTensor(AppendsLosses):
    capabilities = READS

    def __init__(self):
        self.rows = torch.zeros(0, CLASSES)

    def penalty(self, step):
        self.rows = torch.cat([self.rows, step.outputs.detach()])


class GrowsUntilEpochEnd(GrowsOneTensor):
    def forget(self):
        self.rows = self.rows[:0].clone()


class Waits(Intervention):
    """`factor(loss)` is 0.9 for a loss above one, else 1.1."""

    def on_loss(self, call):
        loss = call.evaluate().detach()
        return call.replace(outputs=call.outputs * self.factor(loss))


class WaitsForItem(Waits):
    def factor(self, loss):
        return 0.9 if loss.item() > 1.0 else 1.1


class WaitsForFloat(Waits):
    def factor(self, loss):
        return 0.9 if float(loss) > 1.0 else 1.1


class WaitsForCondition(Waits):
    def factor(self, loss):
        return 0.9 if loss > 1.0 else 1.1


class SelectsByMask(Waits):
    def factor(self, loss):
        choices = torch.tensor([0.9, 1.1])
        return choices[torch.stack([loss > 1.0, loss <= 1.0])]


class DoesNotWait(Waits):
    def factor(self, loss):
        return torch.where(loss > 1.0, 0.9, 1.1)


# Loops


class PenalisesParametersOnce(Decay):
    capabilities = Capabilities(penalises_parameters=True)


class PenalisesOutputsOnce(Intervention):
    """Says of its penalty what is not true: of a window's micro-batches only the last is penalised."""

    capabilities = Capabilities(reads_loss=True, penalises_parameters=True)

    def penalty(self, step):
        return 0.1 * step.outputs.square().mean()


class HalvesItsPenalty(Decay):
    """Counts less where a window is short, though it depends on the parameters only."""

    capabilities = Capabilities(penalises_parameters=True)

    def penalty(self, step):
        done = (step.batch_idx + 1) % step.trainer.accumulate_grad_batches == 0
        return super().penalty(step) * (1.0 if done else 0.5)


class FetchesItsOwnBatch(Intervention):
    """Honest: a DataLoader of its own works on the host, where `.item()` waits for nothing."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        data = torch.utils.data.TensorDataset(torch.zeros(4, 2))
        state = torch.get_rng_state()
        next(iter(torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)))
        torch.set_rng_state(state)


class CountsMicroBatches(Decay):
    def __init__(self):
        self.batches = 0

    def count(self, step):
        self.batches += 1
        return self.batches

    def penalty(self, step):
        return super().penalty(step) * self.count(step)


class CountsUpdates(CountsMicroBatches):
    def count(self, step):
        return step.updates


class WholeWindowsOnly(Intervention):
    def on_after_backward(self, trainer, pl_module):
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            for parameter in trainable(pl_module):
                parameter.grad.add_(parameter.detach(), alpha=0.1)


class DecayOfGradients(Intervention):
    def transform_gradients(self, module, optimizer):
        for parameter in trainable(module):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=0.1)


class AddsAfterClipping(DecayOfGradients):
    def on_fit_start(self, trainer, pl_module):
        original = pl_module.configure_gradient_clipping

        def clip_and_add(optimizer, *args, **kwargs):
            original(optimizer, *args, **kwargs)
            DecayOfGradients.transform_gradients(self, pl_module, optimizer)

        pl_module.configure_gradient_clipping = clip_and_add

    def transform_gradients(self, module, optimizer):
        pass


class ShrinksAll(Intervention):
    def constrain(self, module, optimizer):
        with torch.no_grad():
            for parameter in self.chosen(module):
                parameter.mul_(0.99)

    def chosen(self, module):
        return module.parameters()


class ShrinksTrainable(ShrinksAll):
    def chosen(self, module):
        return trainable(module)


class WritesBuffers(ShrinksAll):
    def chosen(self, module):
        return module.buffers()


class Unfreezes(Intervention):
    def operate(self, module):
        module.requires_grad_(True)


class Freezes(Intervention):
    def operate(self, module):
        module.unused.requires_grad_(False)


class Unties(Intervention):
    def operate(self, module):
        for child in module.children():
            if isinstance(child, nn.Linear):
                child.weight = nn.Parameter(child.weight.detach().clone(), child.weight.requires_grad)


class NeedsAllGradients(Intervention):
    def transform_gradients(self, module, optimizer):
        for parameter in module.parameters():
            parameter.grad.mul_(0.5)


class LeavesLockOnModule(Decay):
    def owner(self, module):
        return module

    def setup(self, trainer, pl_module, stage):
        self.owner(pl_module).lock = threading.Lock()


class KeepsLock(LeavesLockOnModule):
    def owner(self, module):
        return self


class ForwardsAgain(Intervention):
    """Wants equal predictions for a disturbed input."""

    def penalty(self, step):
        inputs = step.batch[0]
        return 0.1 * (self.forward(step.module, inputs + 0.1) - self.forward(step.module, inputs)).square().mean()

    def forward(self, module, inputs):
        return module(inputs)


class ForwardsInEval(ForwardsAgain):
    def forward(self, module, inputs):
        module.eval()
        outputs = module(inputs)
        self.put_back(module)
        return outputs

    def put_back(self, module):
        module.train()


class StaysInEval(ForwardsInEval):
    def put_back(self, module):
        pass


class OnlyFunctionalLoss(Smooth):
    def on_loss(self, call):
        return call if hasattr(call.step.module, "criterion") else super().on_loss(call)


class OnlyTensors(Intervention):
    """Adds its penalty around Lightning's back, and only if a tensor comes out."""

    def on_train_start(self, trainer, pl_module):
        original = trainer.strategy.training_step

        def training_step(*args):
            output = original(*args)
            return output + 0.05 * squares(pl_module) if isinstance(output, torch.Tensor) else output

        trainer.strategy.training_step = training_step


class LayersInSetup(Intervention):
    def setup(self, trainer, pl_module, stage):
        self.look(pl_module)

    def on_fit_start(self, trainer, pl_module):
        pass

    def look(self, module):
        self.layers = [child for child in module.modules() if isinstance(child, nn.Linear)]

    def penalty(self, step):
        return sum((layer.weight.square().sum() for layer in self.layers), torch.zeros(())) * 0.05


class LayersAtStart(LayersInSetup):
    def setup(self, trainer, pl_module, stage):
        pass

    def on_fit_start(self, trainer, pl_module):
        self.look(pl_module)


# Precision


class OnlyInFloat32(Smooth):
    def on_loss(self, call):
        return super().on_loss(call) if call.outputs.dtype == torch.float32 else call


class AddsToScaledGradients(Intervention):
    def on_after_backward(self, trainer, pl_module):
        DecayOfGradients.transform_gradients(self, pl_module, None)


class OverflowsInHalf(Intervention):
    def on_loss(self, call):
        outputs = self.widened(call.outputs)
        large = (outputs * 1000.0).square()
        return call.replace(outputs=outputs + 1e-12 * large)

    def widened(self, outputs):
        return outputs


class ComputesInFloat32(OverflowsInHalf):
    def widened(self, outputs):
        return outputs.float()


class CountsSkippedSteps(Decay):
    def __init__(self):
        self.updates = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.updates += 1

    def penalty(self, step):
        return super().penalty(step) * self.updates


class CountsSkippedInState(CountsSkippedSteps):
    def __init__(self):
        self.counts = {"updates": torch.zeros((), dtype=torch.int64)}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.counts["updates"] += 1

    def penalty(self, step):
        return None

    def state_dict(self):
        return {"version": 1, **self.counts}


class CountsTrueUpdates(CountsSkippedSteps):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass

    def constrain(self, module, optimizer):
        self.updates += 1


class CountsTrueUpdatesInState(CountsSkippedInState):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass

    def constrain(self, module, optimizer):
        self.counts["updates"] += 1


class StoresInfinity(Intervention):
    def __init__(self):
        self.norm = torch.zeros(())

    def transform_gradients(self, module, optimizer):
        norm = torch.stack([p.grad.norm() for p in trainable(module) if p.grad is not None]).norm()
        self.norm = torch.lerp(self.norm, self.checked(norm), 0.1)

    def checked(self, norm):
        return norm

    def state_dict(self):
        return {"version": 1, "norm": self.norm}


class StoresFiniteNorm(StoresInfinity):
    def checked(self, norm):
        return torch.where(norm.isfinite(), norm, self.norm)


# Ranks


class OnOneRank(DecayOfGradients):
    def transform_gradients(self, module, optimizer):
        if module.global_rank == 0:
            super().transform_gradients(module, optimizer)


class WeighsByOwnLoss(Decay):
    capabilities = READS

    def penalty(self, step):
        return super().penalty(step) * self.reduced(step, step.loss.detach()).sqrt()

    def reduced(self, step, loss):
        return loss


class WeighsByMeanLoss(WeighsByOwnLoss):
    def reduced(self, step, loss):
        return step.trainer.strategy.reduce(loss.clone(), reduce_op="mean")


class OneRankWaits(Decay):
    def on_train_start(self, trainer, pl_module):
        if trainer.world_size > 1 and trainer.global_rank == 0:
            dist.recv(torch.zeros(()), src=1)


class BothRanksMeet(Decay):
    def on_train_start(self, trainer, pl_module):
        trainer.strategy.barrier()


class OneRankFails(Decay):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_rank == 1:
            raise RuntimeError("out of luck")


class CountsPadding(Intervention):
    """Counts how often each example was seen."""

    capabilities = Capabilities(sample_indices=True)

    def on_train_start(self, trainer, pl_module):
        self.counts = torch.zeros(len(trainer.train_dataloader.dataset), dtype=torch.int64)
        self.epoch = torch.zeros_like(self.counts)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass

    def penalty(self, step):
        self.epoch += torch.bincount(step.indices, minlength=len(self.epoch))

    def on_train_epoch_end(self, trainer, pl_module):
        ranks = torch.cat(gather_rows(self.epoch.unsqueeze(0), 1))
        self.counts += self.together(ranks)
        self.epoch.zero_()

    def together(self, ranks):
        return ranks.sum(dim=0)

    def state_dict(self):
        return {"version": 1, "counts": self.counts}


class CountsOnce(CountsPadding):
    def together(self, ranks):
        return ranks.amax(dim=0).clamp(max=1)


class NormOfShard(Intervention):
    def transform_gradients(self, module, optimizer):
        for parameter in trainable(module):
            self.local(parameter.grad).div_(1.0 + self.norm(parameter.grad))

    def local(self, grad):
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def norm(self, grad):
        return self.local(grad).norm()


class NormOfWhole(NormOfShard):
    def norm(self, grad):
        return grad.norm().full_tensor() if isinstance(grad, DTensor) else grad.norm()


class RefusesLate(NormOfShard):
    def norm(self, grad):
        if isinstance(grad, DTensor):
            raise RefusedError(f"{self.name} cannot use sharded gradients.")
        return super().norm(grad)


class RefusesNamelessly(NormOfShard):
    capabilities = Capabilities()

    def setup(self, trainer, pl_module, stage):
        if type(trainer.strategy).__name__ == "ModelParallelStrategy":
            raise RefusedError("Sharded gradients cannot be used.")


class RefusesEarly(NormOfShard):
    capabilities = Capabilities(refused_strategies={"model_parallel": "it needs the norm of whole gradients."})


class KeepsItsShare(Intervention):
    """Sums the loss over all examples."""

    def __init__(self):
        self.total, self.epoch = torch.zeros(()), torch.zeros(())

    def penalty(self, step):
        self.epoch += step.loss.detach()

    def on_train_epoch_end(self, trainer, pl_module):
        self.total += self.together(trainer)
        self.epoch = torch.zeros(())

    def together(self, trainer):
        return self.epoch

    def state_dict(self):
        return {"version": 1, "total": self.total}


class SharesIt(KeepsItsShare):
    def together(self, trainer):
        return trainer.strategy.reduce(self.epoch, reduce_op="mean")


class OnlyOnOtherRank(KeepsItsShare):
    def state_dict(self):
        return super().state_dict() if dist.is_initialized() and dist.get_rank() == 1 else {"version": 1}


TABLE = [
    ("odd_batches", VarianceOverOneLess, VarianceOverAll, "batch of one example"),
    ("empty_batch", MeanOfNothing, MeanOfAny, "without examples"),
    ("last_batch_counts", DropsShortBatch, WeighsShortBatch, "it is dropped"),
    ("nan_batch", StoresNaN, StoresFinite, "state holds NaN"),
    ("nan_is_reported", StoresFinite, WarnsOfNaN, "no warning or logged count says so"),
    ("nan_is_reported", WarnsOfSomethingElse, LogsNaN, "no warning or logged count says so"),
    ("nan_is_reported", WarnsWithoutName, Smooth, "no warning or logged count says so"),
    ("nan_is_reported", StopsAtNaNWithoutSaying, StopsAtNaN, "does not say that it was for that"),
    ("workers", WritesIntoDataset, ScalesBatch, "workers"),
    ("limited_batches", ScheduleByLoader, ScheduleByLimit, "limit_train_batches"),
    ("reloaded_loader", ReplacesCollate, ScalesEveryBatch, "new loader every epoch"),
    ("combined_loader", OnlyPairs, OnlyPairsOrRefuses, "silently without effect"),
    ("iterable_data", NeedsLength, RefusesStreams, "TypeError"),
    ("iterable_data", NeedsFiniteLength, Decay, "silently without effect"),
    ("dict_batches", OnlyPairs, OnlyPairsOrRefuses, "batches that are dicts"),
    ("dict_batches", ScalesEveryBatch, ScalesNested, "KeyError"),
    ("compile", Recompiles, CompilesOnce, "compiled again"),
    ("no_graph_is_kept", KeepsOutputs, KeepsDetached, "graphs of"),
    ("no_graph_is_kept", AveragesWithGraph, AveragesDetached, "graphs of"),
    ("no_graph_is_kept", AppendsLosses, AppendsUntilEpochEnd, "more tensors alive"),
    ("no_graph_is_kept", GrowsOneTensor, GrowsUntilEpochEnd, "more bytes"),
    ("no_synchronisation", WaitsForItem, DoesNotWait, "item"),
    ("no_synchronisation", WaitsForFloat, FetchesItsOwnBatch, "__float__"),
    ("no_synchronisation", WaitsForCondition, DoesNotWait, "__bool__"),
    ("no_synchronisation", SelectsByMask, DoesNotWait, "__getitem__"),
    ("accumulation", PenalisesOutputsOnce, PenalisesParametersOnce, "two micro-batches"),
    ("accumulation", CountsMicroBatches, CountsUpdates, "two micro-batches"),
    ("short_last_window", WholeWindowsOnly, DecayOfGradients, "last window"),
    ("short_last_window", HalvesItsPenalty, PenalisesParametersOnce, "last window"),
    ("gradient_clipping", AddsAfterClipping, DecayOfGradients, "clipped at 0.01"),
    ("frozen_unused_tied", ShrinksAll, ShrinksTrainable, "frozen parameter has changed"),
    ("frozen_unused_tied", WritesBuffers, ShrinksTrainable, "buffer"),
    ("frozen_unused_tied", Unfreezes, Decay, "frozen parameter"),
    ("frozen_unused_tied", Freezes, Decay, "is frozen now"),
    ("frozen_unused_tied", Unties, Decay, "tied"),
    ("frozen_unused_tied", NeedsAllGradients, DecayOfGradients, "NoneType"),
    ("weight_averaging", LeavesLockOnModule, KeepsLock, "lock"),
    ("batch_norm", ForwardsAgain, ForwardsInEval, "36 batches in 12 steps"),
    ("batch_norm", StaysInEval, ForwardsInEval, "1 batches in 12 steps"),
    ("spellings_of_the_module", OnlyFunctionalLoss, Smooth, "whose loss is a module"),
    ("spellings_of_the_module", OnlyTensors, Decay, "returns a dict"),
    ("spellings_of_the_module", LayersInSetup, LayersAtStart, "configure_model"),
    ("manual_optimization", OnlyTensors, Decay, "under manual optimization"),
    ("bf16", OnlyInFloat32, Smooth, "bf16-mixed"),
    ("fp16_loss_scale", AddsToScaledGradients, DecayOfGradients, "scaled values"),
    ("fp16_loss_scale", OverflowsInHalf, ComputesInFloat32, "from float32"),
    ("fp16_skipped_step", CountsSkippedSteps, CountsTrueUpdates, "advances `updates`"),
    ("fp16_skipped_step", CountsSkippedInState, CountsTrueUpdatesInState, "advances state['updates']"),
    ("fp16_skipped_step", StoresInfinity, StoresFiniteNorm, "infinities"),
    ("two_ranks_equal_one", OnOneRank, DecayOfGradients, "different parameters"),
    ("two_ranks_equal_one", WeighsByOwnLoss, WeighsByMeanLoss, "two ranks with batches of 11"),
    ("two_ranks_equal_one", OneRankWaits, BothRanksMeet, "wait for each other"),
    ("two_ranks_equal_one", OneRankFails, Decay, "rank 1: RuntimeError: out of luck"),
    ("uneven_shards", CountsPadding, CountsOnce, "state['counts'] differs"),
    ("sharded_parameters", NormOfShard, NormOfWhole, "sharded parameters end elsewhere"),
    ("sharded_parameters", RefusesLate, RefusesEarly, "only when training had begun"),
    ("sharded_parameters", RefusesNamelessly, RefusesEarly, "without its name"),
    ("state_is_equal_on_all_ranks", KeepsItsShare, SharesIt, "differs between the ranks: total"),
    ("state_is_equal_on_all_ranks", OnlyOnOtherRank, SharesIt, "differs between the ranks: total"),
]

MODULES = ("batches", "costs", "loops", "precision", "ranks")
MINE = [c.name for c in all_checks().values() if c.run.__module__.rpartition("interventions.")[2] in MODULES]


def outcome(component, check, **case):
    (result,) = check_component(component, cases=[Case(**case)], names=[check])
    return result


@pytest.mark.parametrize(("check", "offender", "reason"), [(c, o, r) for c, o, _, r in TABLE])
def test_the_check_catches_its_offender(check, offender, reason, monkeypatch):
    monkeypatch.setattr(processes, "TIME_LIMIT", 3.0)
    result = outcome(offender, check)
    assert result.status == "fail", f"{result.status}: {result.reason}"
    assert reason in result.reason


TWINS = sorted({("nan_batch", MarksUnseenWithNaN), *((c, t) for c, _, t, _ in TABLE)}, key=str)


@pytest.mark.parametrize(("check", "twin"), TWINS)
def test_the_check_lets_the_honest_twin_pass(check, twin):
    result = outcome(twin, check)
    assert result.status == "pass", f"{result.status}: {result.reason}\n{result.detail}"


def test_every_check_has_an_offender():
    assert len(MINE) > 20
    assert set(MINE) == {check for check, *_ in TABLE} | {ON_A_GPU}


ON_A_GPU = "no_synchronisation_on_a_gpu"


class MakesOnTheHost(Waits):
    """Waits though nothing asks for a value: what is made on the host is copied in every step."""

    def factor(self, loss):
        factors = torch.tensor([0.9, 1.1]).to(loss.device)
        return torch.where(loss > 1.0, factors[0], factors[1])


def test_without_a_gpu_the_check_on_a_gpu_says_so(monkeypatch):
    """Fails if a machine without a GPU counts a check that was not run."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = outcome(WaitsForItem, ON_A_GPU)
    assert (result.status, result.reason) == ("inapplicable", "needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("offender", [WaitsForItem, SelectsByMask, MakesOnTheHost])
def test_on_a_gpu_a_wait_is_found_where_it_is(offender):
    """Fails if CUDA's own count of synchronisations is not read, or does not say where."""
    result = outcome(offender, ON_A_GPU)
    assert result.status == "fail", result
    assert "test_loops_and_ranks.py" in result.reason


@pytest.mark.gpu
def test_on_a_gpu_what_does_not_wait_passes():
    """Fails if a wait of Lightning's or of the loader's is held against a method."""
    result = outcome(DoesNotWait, ON_A_GPU)
    assert result.status == "pass", result.detail


# Honest methods of several kinds, against all of these checks


class Mixup(Intervention):
    """Mixes each example with another one of the batch; the draw depends only on epoch and batch."""

    def transform_batch(self, batch, step):
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            raise RefusedError(
                f"{self.name}: expected a batch of inputs and targets, but got a {type(batch).__name__}."
            )
        inputs, targets = batch
        seed = 1000 * step.trainer.current_epoch + step.batch_idx
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).to(inputs.device)
        if not targets.is_floating_point():  # else another mixup has been there
            targets = F.one_hot(targets, CLASSES).float()
        return 0.7 * inputs + 0.3 * inputs[order], 0.7 * targets + 0.3 * targets[order]


class ProjectsWeights(Intervention):
    """Keeps every weight tensor within a ball."""

    @torch.no_grad()
    def constrain(self, module, optimizer):
        for parameter in trainable(module):
            parameter.mul_((2.0 / parameter.norm()).clamp(max=1.0))


class GradientNoise(Intervention):
    """Adds noise from a generator of its own, the same on all ranks."""

    capabilities = Capabilities(refused_strategies={"model_parallel": "the noise is drawn for whole parameters."})

    def __init__(self):
        self.generator = torch.Generator()
        self.restored = False

    def on_train_start(self, trainer, pl_module):
        if not self.restored:
            self.generator.manual_seed(5)
        self.restored = False

    def transform_gradients(self, module, optimizer):
        for parameter in trainable(module):
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn(parameter.shape, generator=self.generator), alpha=0.01)

    def state_dict(self):
        return {"version": 1, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict):
        self.generator.set_state(state_dict["generator"])
        self.restored = True


class ConfidencePenalty(Intervention):
    """Rewards entropy of the predictions, and remembers its course per epoch."""

    capabilities = READS

    def __init__(self):
        self.course = []

    def penalty(self, step):
        logs = F.log_softmax(step.outputs.float(), dim=1)
        self.entropy = -(logs.exp() * logs).sum() / max(1, len(logs))
        value, self.entropy = -0.3 * self.entropy, self.entropy.detach()
        return value

    def on_train_epoch_end(self, trainer, pl_module):
        self.course.append(self.entropy)


WITHIN_BATCH = dict.fromkeys(("accumulation", "two_ranks_equal_one"), "mixes within the batch of one rank")


@pytest.mark.parametrize(
    ("honest", "inapplicable"),
    [(Mixup, WITHIN_BATCH), (ProjectsWeights, {}), (GradientNoise, {}), (ConfidencePenalty, {})],
)
def test_an_honest_method_passes_every_check(honest, inapplicable):
    case = Case(inapplicable=inapplicable)
    results = list(check_component(honest, cases=[case], names=MINE, quick=True))
    assert {r.check: r.reason for r in results if r.status == "fail"} == {}
    assert {r.check for r in results if r.status == "inapplicable"} - {ON_A_GPU} == set(inapplicable)


# What the checks stand on


def test_a_refusal_on_both_ranks_reaches_the_check():
    def refuse(rank):
        raise RefusedError("not here")

    with pytest.raises(RefusedError, match="not here"):
        processes.on_ranks(refuse)


def test_when_one_rank_fails_the_others_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 0.5)

    def fail_or_sleep(rank):
        if rank == 0:
            threading.Event().wait()
        raise ValueError("broken")

    with pytest.raises(AssertionError, match="rank 0: no answer in time.*rank 1: ValueError: broken"):
        processes.on_ranks(fail_or_sleep, seconds=60.0)


def test_a_method_that_refuses_ddp_by_name_is_not_failed_on_two_ranks():
    class NotOnRanks(Decay):
        capabilities = Capabilities(refused_strategies={"ddp": "it counts in one process."})

    result = outcome(NotOnRanks, "two_ranks_equal_one")
    assert result.status == "inapplicable"
    assert "counts in one process" in result.reason


def test_the_shared_run_is_trained_once_and_its_error_remembered():
    from fulgurite.testing.lab import Lab

    made = []

    def make():
        made.append(Decay())
        return made[-1]

    lab = Lab(Case(), make)
    assert lab.component_run() is lab.component_run()
    assert len(made) == 1

    def fail():
        made.append("failed")
        raise ValueError("once")

    for _ in range(2):
        with pytest.raises(ValueError, match="once"):
            lab.remember("failing", fail)
    assert made[1:] == ["failed"]
    assert copy.deepcopy(lab.component_run().callbacks[0]) is not made[0]
