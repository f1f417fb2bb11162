# SPDX-License-Identifier: Apache-2.0
"""Every check on traces and state catches interventions that are wrong in its way, and passes their honest twins."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import itertools
import os
import random
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import SequentialSampler

from fulgurite.intervention import Intervention, Step
from fulgurite.testing import Case, all_checks, check_component
from fulgurite.testing.lab import Plain
from fulgurite.testing.surroundings import changed_settings, preserved, settings


def squares(module: nn.Module) -> Tensor:
    return torch.stack([parameter.square().sum() for parameter in module.parameters()]).sum()


class Decay(Intervention):
    """The honest intervention without state."""

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    def penalty(self, step: Step) -> Tensor:
        return self.strength * squares(step.module)


class Counting(Decay):
    """The honest intervention with state: it becomes stronger from step to step."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength)
        self.count = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 0:
            self.count = 0

    def penalty(self, step: Step) -> Tensor:
        self.count += 1
        return self.strength * self.count * squares(step.module) / 20

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Watch(pl.Callback):
    """The honest callback."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("squares", squares(pl_module).detach())


# --- off, effect, random numbers


class NeverQuiteOff(Decay):
    def penalty(self, step: Step) -> Tensor:
        return (self.strength + 1e-8) * squares(step.module)


class DrawsWhenOff(Decay):
    def transform_batch(self, batch: Any, step: Step) -> Any:
        torch.rand(1)
        return batch


class LowersRateAtTheEnd(Decay):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] *= 0.5


class Renormalises(Watch):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.99)


class Idle(Decay):
    def penalty(self, step: Step) -> Any:
        return None


class IdleAndCounting(Counting):
    def penalty(self, step: Step) -> Any:
        self.count += 1


class LogsAConstant(Decay):
    def penalty(self, step: Step) -> Any:
        return None

    def value(self, module: nn.Module) -> Any:
        return 1.0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("watched", self.value(pl_module))


class LogsSquares(LogsAConstant):
    def value(self, module: nn.Module) -> Any:
        return squares(module).detach()


class RemembersSquares(IdleAndCounting):
    """A probe: it logs nothing, and remembers something of the training."""

    def penalty(self, step: Step) -> Any:
        self.count += squares(step.module).detach()


class _AsItIs(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.clone()


class RenamesOnly(Intervention):
    """Parametrises a weight by what it is."""

    part: type[nn.Module] = _AsItIs

    def operate(self, module: pl.LightningModule) -> None:
        if not parametrize.is_parametrized(module.network[1]):
            parametrize.register_parametrization(module.network[1], "weight", self.part())


class AddsAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clone()


class AddsOnly(RenamesOnly):
    part = AddsAParameter


class LogsAfterAll(LogsSquares):
    pass


class Unobtrusive(Intervention):
    pass


class DecaysInSecret(Decay):
    pass


class LogsItself(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class DrawsFromTorch(Watch):
    def on_train_batch_start(self, *_: Any) -> None:
        torch.rand(1)


class DrawsFromNumpy(Watch):
    def on_train_batch_start(self, *_: Any) -> None:
        np.random.rand()  # noqa: NPY002


class DrawsFromPython(Watch):
    def on_train_batch_start(self, *_: Any) -> None:
        random.random()


class DrawsInValidation(Watch):
    def on_validation_batch_end(self, *_: Any) -> None:
        torch.rand(1)


class DrawsOfItsOwn(Watch):
    def on_train_batch_start(self, *_: Any) -> None:
        torch.rand(1, generator=torch.Generator().manual_seed(0))

    on_validation_batch_end = on_train_batch_start


class DrawsWhenMade(Decay):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength + 0 * random.random())


class DrawsOfItsOwnWhenMade(Decay):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength + 0 * random.Random(0).random())


class DataThatDraws(pl.LightningDataModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.order = torch.randperm(4)


class DataThatDrawsItsOwn(DataThatDraws):
    def __init__(self, seed: int = 0) -> None:
        pl.LightningDataModule.__init__(self)
        self.seed = seed
        self.order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))


# --- what is left behind

Undo = Callable[[], Any]


def replaced(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute on an instance, past `nn.Module.__setattr__`; return the undo."""
    found = owner.__dict__.get(name, owner)
    owner.__dict__[name] = value
    return lambda: owner.__dict__.pop(name) if found is owner else owner.__dict__.__setitem__(name, found)


def put(owner: Any, name: str, value: Any) -> Undo:
    return functools.partial(setattr, owner, name, *[getattr(owner, name), setattr(owner, name, value)][:1])


def train_loader(trainer: Any) -> Any:
    trainer.fit_loop.setup_data()
    return trainer.train_dataloader


def hook_on_layer(trainer: Any, module: Any) -> Undo:
    return module.network[1].register_forward_hook(lambda *_: None).remove


def hook_on_parameter(trainer: Any, module: Any) -> Undo:
    return next(module.parameters()).register_hook(lambda gradient: None).remove


def hook_on_all_modules(trainer: Any, module: Any) -> Undo:
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def hook_on_optimizer(trainer: Any, module: Any) -> Undo:
    return trainer.optimizers[0].register_step_post_hook(lambda *_: None).remove


def attribute_of_module(trainer: Any, module: Any) -> Undo:
    return replaced(module, "remembered", 3)


def patched_layer(trainer: Any, module: Any) -> Undo:
    return replaced(module.network[1], "forward", functools.partial(module.network[1].forward))


def patched_class(trainer: Any, module: Any) -> Undo:
    return put(
        nn.Sequential, "forward", functools.wraps(nn.Sequential.forward)(lambda s, x: [x := m(x) for m in s][-1])
    )


def patched_functional(trainer: Any, module: Any) -> Undo:
    return put(F, "relu", functools.wraps(F.relu)(lambda x, inplace=False: x.clamp_min(0)))


def patched_strategy(trainer: Any, module: Any) -> Undo:
    return replaced(trainer.strategy, "backward", functools.partial(trainer.strategy.backward))


def patched_precision(trainer: Any, module: Any) -> Undo:
    return replaced(trainer.precision_plugin, "convert_output", lambda data: data)


def frozen_layer(trainer: Any, module: Any) -> Undo:
    module.network[1].bias.requires_grad_(False)
    return lambda: module.network[1].bias.requires_grad_(True)


def layer_in_eval_mode(trainer: Any, module: Any) -> Undo:
    module.network.__class__ = type("Other", (nn.Sequential,), {})
    return lambda: setattr(module.network, "__class__", nn.Sequential)


def replaced_sampler(trainer: Any, module: Any) -> Undo:
    loader = train_loader(trainer)
    return put(loader.batch_sampler, "sampler", SequentialSampler(loader.dataset))


def changed_dataset(trainer: Any, module: Any) -> Undo:
    targets = train_loader(trainer).dataset.tensors[1]
    kept = targets.clone()
    targets.zero_()
    return lambda: targets.copy_(kept)


def setting_of_trainer(trainer: Any, module: Any) -> Undo:
    return put(trainer, "accumulate_grad_batches", 2)


def list_of_callbacks(trainer: Any, module: Any) -> Undo:
    trainer.callbacks.append(pl.Callback())
    return trainer.callbacks.pop


def default_dtype(trainer: Any, module: Any) -> Undo:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def deterministic(trainer: Any, module: Any) -> Undo:
    torch.use_deterministic_algorithms(True, warn_only=True)
    return lambda: torch.use_deterministic_algorithms(False)


def matmul_precision(trainer: Any, module: Any) -> Undo:
    torch.set_float32_matmul_precision("high")
    return lambda: torch.set_float32_matmul_precision("highest")


def number_of_threads(trainer: Any, module: Any) -> Undo:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return lambda: torch.set_num_threads(torch.get_num_threads() - 1)


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def entered(mode: Any) -> Undo:
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def function_mode(trainer: Any, module: Any) -> Undo:
    return entered(_FunctionMode())


def dispatch_mode(trainer: Any, module: Any) -> Undo:
    return entered(_DispatchMode())


def saved_tensors(trainer: Any, module: Any) -> Undo:
    return entered(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))


class Unimportant(Warning):
    pass


def warnings_filter(trainer: Any, module: Any) -> Undo:
    warnings.simplefilter("ignore", Unimportant)
    return lambda: warnings.filters.pop(0)


def environment_variable(trainer: Any, module: Any) -> Undo:
    os.environ["LEFT_BEHIND"] = "1"
    return lambda: os.environ.pop("LEFT_BEHIND")


def signal_handler(trainer: Any, module: Any) -> Undo:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    return lambda: signal.signal(signal.SIGUSR2, before)


def running_thread(trainer: Any, module: Any) -> Undo:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(3.0,), name="left-behind", daemon=True)
    thread.start()
    return lambda: (stop.set(), thread.join())


def running_process(trainer: Any, module: Any) -> Undo:
    process = subprocess.Popen(["sleep", "3"])
    return lambda: (process.kill(), process.wait())


LEFT: dict[Callable[[Any, Any], Undo], str] = {
    hook_on_layer: "the module's `network.1`, _forward_hooks was 0, now 1",
    hook_on_parameter: "hooks on `weight` was 0, now 1",
    hook_on_all_modules: "hooks on all modules or optimizers: _global_forward_hooks changed",
    hook_on_optimizer: "optimizer 0, `_optimizer_step_post_hooks` is left (1)",
    attribute_of_module: "the module, attribute `remembered` is left (3)",
    patched_layer: "the module's `network.1`, attribute `forward` is left",
    patched_class: "class Sequential, `forward`",
    patched_functional: "torch.nn.functional: relu changed",
    patched_strategy: "trainer.strategy.backward is left",
    patched_precision: "convert_output is left",
    frozen_layer: "dtype and requires_grad of `bias`",
    layer_in_eval_mode: "the module's `network`, class was Sequential, now ",
    replaced_sampler: "the batch sampler of the DataLoader, `sampler` was changed",
    changed_dataset: "the dataset of the DataLoader, `tensors` was changed",
    setting_of_trainer: "trainer.accumulate_grad_batches was 1, now 2",
    list_of_callbacks: "trainer.callbacks",
    default_dtype: "default dtype: torch.float32 before, torch.float64 after",
    deterministic: "deterministic algorithms: (False, False) before, (True, True) after",
    matmul_precision: "matmul precision: highest before, high after",
    function_mode: "number of function modes",
    dispatch_mode: "number of dispatch modes",
    saved_tensors: "hooks on saved tensors",
    warnings_filter: "warnings filters",
    environment_variable: "environment variables: LEFT_BEHIND changed",
    running_thread: "thread left-behind is still running",
    running_process: " is still running",
}


class Tidy(pl.Callback):
    """Disturbs something at the start of training, and puts it in order again whatever happens."""

    begin = "on_train_start"
    disturb: Callable[[Any, Any], Undo] = staticmethod(hook_on_layer)

    def __init__(self) -> None:
        self.undo: Undo | None = None

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        if self.undo is None:
            self.undo = type(self).disturb(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, pl_module)

    def end(self) -> None:
        if self.undo is not None:
            self.undo()
            self.undo = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end()


class Untidy(Tidy):
    def end(self) -> None:
        pass


class UntidyAfterErrors(Tidy):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pass


class UntidyAfterInterrupts(Tidy):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, Exception):
            self.end()


class UntidyBeforeTraining(Tidy):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._begin(trainer, pl_module)
        self.training = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.training = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.training:
            self.end()


class TidyBeforeTraining(UntidyBeforeTraining):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end()


class UntidyInValidation(Tidy):
    on_train_start = pl.Callback.on_train_start

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if trainer.training:
            self.end()


class TidyInValidation(UntidyInValidation):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end()


class Forgives(Tidy):
    """Skips batches whose step fails."""

    forgiven: type[BaseException] = RuntimeError

    @staticmethod
    def disturb(trainer: Any, module: Any) -> Undo:  # type: ignore[override]
        original = trainer.strategy.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except Forgives.forgiven:
                return None

        return replaced(trainer.strategy, "training_step", training_step)


class ForgivesInterrupts(Forgives):
    @staticmethod
    def disturb(trainer: Any, module: Any) -> Undo:  # type: ignore[override]
        original = trainer.strategy.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except KeyboardInterrupt:
                return None

        return replaced(trainer.strategy, "training_step", training_step)


class FailsWhileFailing(Tidy):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        raise ValueError("nothing to clean")


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class ParametrisesLate(Intervention):
    """Promises nothing, and leaves a parametrisation."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        parametrize.register_parametrization(pl_module.network[1], "weight", _Double())


class OperatesAgain(Intervention):
    """Changes the model once more when it is validated."""

    def operate(self, module: pl.LightningModule) -> None:
        parametrize.register_parametrization(module.network[1], "weight", _Double())


class Operates(OperatesAgain):
    """Changes the model in the hook that is there for it; the trained weights are those of the changed model."""

    def operate(self, module: pl.LightningModule) -> None:
        if not parametrize.is_parametrized(module.network[1]):
            super().operate(module)


class OperatesAndMore(Operates):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.network[3].register_forward_hook(lambda *_: None)


# --- two instances, fit twice, validation


class SharedByClass(Counting):
    counts: dict[str, int] = {"steps": 0}

    def penalty(self, step: Step) -> Tensor:
        self.counts["steps"] += 1
        return self.strength * squares(step.module)


class OwnCounts(SharedByClass):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength)
        self.counts = {"steps": 0}


_GLOBAL = {"steps": 0}


class SharedByModule(Decay):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength)
        self.counts = self.memory()

    def memory(self) -> dict[str, int]:
        return _GLOBAL

    def penalty(self, step: Step) -> Tensor:
        self.counts["steps"] += 1
        return self.strength * squares(step.module) / self.counts["steps"]


class SharedByNobody(SharedByModule):
    def memory(self) -> dict[str, int]:
        return {"steps": 0}


class WritesOnModule(Decay):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.strength = self.strength

    def penalty(self, step: Step) -> Tensor:
        return step.module.strength * squares(step.module)  # type: ignore[operator, return-value]


_ROWS = torch.zeros(3)
_TAGS = itertools.count()


class SharedTensor(Decay):
    def __init__(self, tag: int = 0) -> None:
        super().__init__()
        self.tag = tag
        self.rows = _ROWS

    def state_arguments(self) -> dict[str, Any]:
        return {"tag": self.tag}

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "rows": self.rows}


class OwnTensor(SharedTensor):
    def __init__(self, tag: int = 0) -> None:
        super().__init__(tag)
        self.rows = _ROWS.clone()


class Jealous(Decay):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if sum(isinstance(callback, Jealous) for callback in trainer.callbacks) > 1:
            raise RuntimeError("already there")


class NeverForgets(Counting):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pass


class ForgetsAtTheEnd(NeverForgets):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.count = 0


class ForgetsWhateverTheEnd(ForgetsAtTheEnd):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.count = 0


class LocksItself(Watch):
    busy = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.busy:
            raise RuntimeError("already in use")
        self.busy = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.busy = False


class UnlocksItself(LocksItself):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.busy = False


class KeepsHistory(Watch):
    def __init__(self) -> None:
        self.epochs = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs += 1
        pl_module.log("epochs", float(self.epochs))


class BeginsHistory(KeepsHistory):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs = 0


class WorksOnce(Decay):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        del self.strength


class CountsValidation(Counting):
    def on_validation_batch_end(self, *_: Any) -> None:
        self.count += 1


class RemembersValidation(Counting):
    validations = 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validations += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "validations": self.validations}


class RemembersValidate(RemembersValidation):
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations += trainer.state.fn == "validate"


# --- configuration


class StoresNothing(Decay):
    def __init__(self, strength: float = 0.1) -> None:
        self.given = strength

    def penalty(self, step: Step) -> Tensor:
        return self.given * squares(step.module)


class StoresTwice(Decay):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(2 * strength)


class Ignores(Decay):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(0.1)


class TakesAFunction(Decay):
    def __init__(self, strength: float = 0.1, function: Callable[[float], float] = lambda x: x) -> None:
        super().__init__(strength)
        self.function = function


class SetAfterwards(Decay):
    factor = 1.0

    def penalty(self, step: Step) -> Tensor:
        return self.factor * super().penalty(step)


def made_and_changed() -> SetAfterwards:
    made = SetAfterwards()
    made.factor = 2.0
    return made


class NormalisesItsArgument(Decay):
    """Honest: what is stored means the same, and is stored unchanged when it is given again."""

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        self.dtype = dtype.removeprefix("torch.")


class DataWithoutSeed(pl.LightningDataModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)


class DataWithSeed(DataWithoutSeed):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.seed = seed


# --- copies


class HoldsALambda(Decay):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength)
        self.scale = lambda x: x


class HoldsAFunction(HoldsALambda):
    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength)
        self.scale = squares  # type: ignore[assignment]


class Rows(Decay):
    """Remembers one number per class, and begins anew in each training."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(strength)
        self.rows = torch.zeros(4)

    def penalty(self, step: Step) -> Tensor:
        self.rows.index_add_(0, step.batch[1], torch.ones(len(step.batch[1])))
        return super().penalty(step)

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"].clone()


class CopiesShareRows(Rows):
    def __deepcopy__(self, memo: Any) -> Any:
        return copy.copy(self)


class CopiesForget(Rows):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": torch.zeros(4)}


class CopiesForgetTheirArguments(Decay):
    def __getstate__(self) -> dict[str, Any]:
        return {"strength": 0.1}


# --- state


class Mode(enum.Enum):
    FAST = 1


@dataclasses.dataclass
class Record:
    value: int = 0


class StateOfNumpy(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "more": np.zeros(2)}


class StateOfEnum(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "more": Mode.FAST}


class StateOfDataclass(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "more": Record()}


class StateOfNumpyInTraining(Counting):
    training = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.training = True

    def on_train_end(self, *_: Any) -> None:
        self.training = False

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "more": np.float64(1.0) if self.training else 1.0}


class StateWithoutVersion(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


class StateIsNotLoaded(Counting):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class StateBesides(Counting):
    """Writes into the checkpoint itself, past `state_dict`."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["more"] = Mode.FAST


class ShortKey(Counting):
    @property
    def state_key(self) -> str:
        return "counting"


class StatefulCallback(KeepsHistory):
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "epochs": self.epochs}


class StatefulCallbackWithKey(StatefulCallback):
    @property
    def state_key(self) -> str:
        return f"{__name__}.StatefulCallbackWithKey"


class Forgetful(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {}


class SavesWholeEpochs(Counting):
    """Right at the end of an epoch, of 6 batches; wrong in its middle."""

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "count": self.count // 6 * 6}


class LoadsInFitStart(Counting):
    restored: dict[str, Any] | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def _take(self) -> None:
        if self.restored is not None:
            self.count, self.restored = self.restored["count"], None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._take()


class LoadsInTrainStart(LoadsInFitStart):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._take()


class Row(NamedTuple):
    """A check, what it must catch, an honest twin, and a piece of the reason."""

    check: str
    offender: type
    twin: type
    reason: str


FIT, EXCEPTION, INTERRUPT = (f"nothing_left_after_{what}" for what in ("fit", "exception", "interrupt"))
TABLE = [
    Row("identity_when_off", NeverQuiteOff, Decay, "parameters differ from a training without it"),
    Row("identity_when_off", DrawsWhenOff, Decay, "parameters differ"),
    Row("identity_when_off", LowersRateAtTheEnd, Decay, "the state of the optimizer differs"),
    Row("identity_when_off", SetAfterwards, Decay, "`off` of the case makes a Idle, `make` a SetAfterwards"),
    Row("watches_only", Renormalises, Watch, "parameters differ"),
    Row("has_an_effect", Idle, Decay, "it trains what a training without it does"),
    Row("has_an_effect", LogsSquares, Decay, "`observes=True` in its case"),
    Row("has_an_effect", LogsAConstant, LogsAfterAll, "the same whatever is trained"),
    Row("has_an_effect", IdleAndCounting, RemembersSquares, "the same whatever is trained"),
    Row("has_an_effect", Unobtrusive, RemembersSquares, "it logs and remembers nothing"),
    Row("has_an_effect", DecaysInSecret, LogsAfterAll, "its case says that it only observes"),
    Row("has_an_effect", RenamesOnly, Operates, "the model has other parameters, and it trains what"),
    Row("has_an_effect", AddsOnly, Operates, "the model has other parameters, and it trains what"),
    Row("random_streams", DrawsFromTorch, DrawsOfItsOwn, "random streams stand elsewhere"),
    Row("random_streams", DrawsFromNumpy, DrawsOfItsOwn, "random streams stand elsewhere"),
    Row("random_streams", DrawsFromPython, DrawsOfItsOwn, "random streams stand elsewhere"),
    Row("random_streams", DrawsInValidation, DrawsOfItsOwn, "random streams stand elsewhere"),
    *(
        Row(
            FIT,
            type(f"Leaves_{disturb.__name__}", (Untidy,), {"disturb": staticmethod(disturb)}),
            type(f"Undoes_{disturb.__name__}", (Tidy,), {"disturb": staticmethod(disturb)}),
            reason,
        )
        for disturb, reason in LEFT.items()
    ),
    Row(FIT, ParametrisesLate, Operates, "the module's `network.1`, class was Linear, now ParametrizedLinear"),
    Row(FIT, OperatesAgain, Operates, "the module's `network.1.parametrizations.weight.1`, class is left"),
    Row(FIT, OperatesAndMore, Operates, "the module's `network.3`, _forward_hooks was 0, now 1"),
    Row(EXCEPTION, UntidyAfterErrors, Tidy, "_forward_hooks was 0, now 1 after an error in training_step"),
    Row(EXCEPTION, UntidyInValidation, TidyInValidation, "now 1 after an error in validation_step"),
    Row(EXCEPTION, UntidyBeforeTraining, TidyBeforeTraining, "now 1 after an error in configure_optimizers"),
    Row(EXCEPTION, Forgives, Tidy, "RuntimeError in the user's module was swallowed"),
    Row(EXCEPTION, FailsWhileFailing, Tidy, "RuntimeError is replaced by a ValueError"),
    Row(INTERRUPT, UntidyAfterInterrupts, Tidy, "_forward_hooks was 0, now 1"),
    Row(INTERRUPT, ForgivesInterrupts, Forgives, "KeyboardInterrupt in the user's module was swallowed"),
    Row("two_instances", SharedByClass, OwnCounts, "training changes counts of the class"),
    Row("two_instances", SharedByModule, SharedByNobody, "after another one has trained something else"),
    Row("two_instances", WritesOnModule, Decay, "beside an instance that is switched off it trains otherwise"),
    Row("two_instances", SharedTensor, OwnTensor, "one and the same tensor"),
    Row("two_instances", Jealous, Decay, "two instances fail: already there"),
    Row("fit_twice", NeverForgets, Counting, "a second training differs from a first"),
    Row("fit_twice", KeepsHistory, BeginsHistory, "logs other values than a first: epochs"),
    Row("fit_twice", StatefulCallback, BeginsHistory, "its state is another"),
    Row("fit_twice", WorksOnce, Decay, "has no attribute 'strength'"),
    Row("fit_after_error", ForgetsAtTheEnd, ForgetsWhateverTheEnd, "after a training that failed it trains otherwise"),
    Row("fit_after_error", LocksItself, UnlocksItself, "already in use"),
    Row("validation_is_untouched", CountsValidation, Counting, "changes the trained parameters"),
    Row("validation_is_untouched", RemembersValidation, Counting, "changes its final state"),
    Row("validation_is_untouched", RemembersValidate, Counting, "trainer.validate changes the state"),
    Row("constructor_draws_nothing", DrawsWhenMade, DrawsOfItsOwnWhenMade, "draws from the global random streams"),
    Row("constructor_draws_nothing", DataThatDraws, DataThatDrawsItsOwn, "draws from the global random streams"),
    Row("configuration_round_trip", StoresNothing, Decay, "argument `strength` is not stored"),
    Row("configuration_round_trip", StoresTwice, Decay, "`strength` was 0.2, and is 0.4"),
    Row("configuration_round_trip", Ignores, NormalisesItsArgument, "given strength=0.0 and stores 0.1, as if"),
    Row("configuration_round_trip", TakesAFunction, Decay, "cannot be written and read"),
    Row("configuration_round_trip", SetAfterwards, Decay, "built from its saved configuration it trains otherwise"),
    Row("configuration_round_trip", DataWithoutSeed, DataWithSeed, "argument `seed` is not stored"),
    Row("pickle_and_deepcopy", HoldsALambda, HoldsAFunction, "it cannot be pickled"),
    Row("pickle_and_deepcopy", CopiesShareRows, Rows, "training with a deep copy changes the original"),
    Row("pickle_and_deepcopy", CopiesForget, Rows, "a pickled copy of a trained instance has another state"),
    Row("pickle_and_deepcopy", CopiesForgetTheirArguments, Decay, "has other arguments than the original"),
    Row("state_loads_safely", StateOfNumpy, Counting, "weights_only=True refuses the checkpoint"),
    Row("state_loads_safely", StateOfEnum, Counting, "weights_only=True refuses the checkpoint"),
    Row("state_loads_safely", StateOfDataclass, Counting, "weights_only=True refuses the checkpoint"),
    Row("state_loads_safely", StateOfNumpyInTraining, Counting, "weights_only=True refuses the checkpoint"),
    Row("state_loads_safely", StateBesides, Counting, "weights_only=True refuses the checkpoint"),
    Row("state_loads_safely", StateWithoutVersion, Counting, "no version number"),
    Row("state_loads_safely", StateIsNotLoaded, Counting, "after `load_state_dict`, `state_dict` gives another"),
    Row("state_key", ShortKey, Counting, "state_key 'counting' does not say which package"),
    Row("state_key", StatefulCallback, StatefulCallbackWithKey, "does not say which package"),
    Row("resume_at_epoch_end", Forgetful, Counting, "the resumed run ends elsewhere"),
    Row("resume_in_mid_epoch", SavesWholeEpochs, Counting, "the resumed run ends elsewhere"),
    Row("resume_with_accumulation", SavesWholeEpochs, Counting, "the resumed run ends elsewhere"),
    Row("resume_when_restored_late", LoadsInFitStart, LoadsInTrainStart, "the resumed run ends elsewhere"),
]

CASES: dict[tuple[str, type], Case] = {
    ("identity_when_off", SetAfterwards): Case(make=SetAfterwards, off=Idle),
    ("has_an_effect", Idle): Case(make=Idle, module=LogsItself),
    **{
        ("has_an_effect", cls): Case(make=cls, observes=True)
        for cls in (LogsAConstant, LogsAfterAll, IdleAndCounting, RemembersSquares, Unobtrusive, DecaysInSecret)
    },
    ("configuration_round_trip", SetAfterwards): Case(make=made_and_changed),
    ("configuration_round_trip", NormalisesItsArgument): Case(make=lambda: NormalisesItsArgument("torch.float16")),
    ("two_instances", SharedTensor): Case(make=lambda: SharedTensor(next(_TAGS))),
    ("two_instances", OwnTensor): Case(make=lambda: OwnTensor(next(_TAGS))),
    ("pickle_and_deepcopy", CopiesForgetTheirArguments): Case(make=lambda: CopiesForgetTheirArguments(0.3)),
}


def default_case(cls: type) -> Case:
    return Case(make=cls, off=lambda: cls(strength=0.0)) if issubclass(cls, Decay) else Case(make=cls)


@functools.cache
def outcome(check: str, cls: type) -> Any:
    (result,) = check_component(cls, cases=[CASES.get((check, cls)) or default_case(cls)], names=[check])
    return result


def identity(row: Row) -> str:
    return f"{row.check}-{row.offender.__name__}"


@pytest.mark.parametrize("row", TABLE, ids=identity)
def test_the_offender_is_caught(row):
    result = outcome(row.check, row.offender)
    assert result.status == "fail", result
    assert row.reason in result.reason, result.detail


@pytest.mark.parametrize("row", TABLE, ids=identity)
def test_the_honest_twin_passes(row):
    result = outcome(row.check, row.twin)
    assert result.status == "pass", result.detail


def test_every_check_of_these_files_has_an_offender():
    files = ("fulgurite.testing.interventions.traces", "fulgurite.testing.interventions.state")
    mine = {found.name for found in all_checks().values() if found.run.__module__ in files}
    assert mine == {row.check for row in TABLE}


@pytest.mark.parametrize(
    "disturb", [default_dtype, number_of_threads, function_mode, dispatch_mode, patched_functional, signal_handler]
)
def test_what_a_component_leaves_in_the_process_does_not_reach_the_next_check(disturb):
    before = settings()
    with preserved():
        disturb(None, None)
        assert changed_settings(before)
    assert not changed_settings(before)
