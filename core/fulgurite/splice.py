# SPDX-License-Identifier: Apache-2.0
"""The one place where interventions enter somebody's module: laid in `setup`, dispatched in every step, taken out again."""

from __future__ import annotations

import functools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.compatibility import check, distinct_names
from fulgurite.criteria import Criteria, observed
from fulgurite.errors import RefusedError
from fulgurite.intervention import HOOKS, Intervention, Step
from fulgurite.losses import without_autocast
from fulgurite.parameter_groups import grouped_apart
from fulgurite.random import get_random_state
from fulgurite.samples import SampleTracker

log = logging.getLogger(__name__)


class Splice(pl.Callback):
    """Composes all interventions of a trainer into one module, in the order of `Trainer.callbacks`.

    It is laid by the first intervention that Lightning sets up: one function around the original bound `training_step`, and
    only what the overridden hooks need. While it is in place it stands first among the trainer's callbacks. It stays out of
    pickles and deep copies of the module, does nothing while Lightning's tuners have taken the callbacks away, and leaves
    module, loaders and trainer as they were found after `fit`, an exception or an interrupt.

    Args:
        trainer: The trainer.
        module: Its module.
        interventions: The interventions, in order.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, interventions: list[Intervention]) -> None:
        self.trainer: Any = trainer  # Lightning declares no `callbacks` on its Trainer
        self.module = module
        self.interventions = interventions
        self.names = distinct_names(interventions)
        self.updates = 0
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.timed = False
        self.tracker: SampleTracker | None = None
        self._undo: list[Callable[[], None]] = []
        self._step: Step | None = None
        self._hooks: dict[str, list[Intervention]] = {}
        self._laid: dict[str, Any] = {}
        self._criteria: Criteria | None = None

    @staticmethod
    def of(trainer: pl.Trainer) -> Splice | None:
        """Return the splice of a trainer, if one is in place."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Splice)), None)

    @classmethod
    def ensure(cls, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> Splice | None:
        """Return the trainer's splice; lay it if it is not there yet, for `fit` after a check of all interventions.

        If no intervention wants anything of core, nothing is laid and nothing returned.

        Raises:
            RefusedError: If some intervention would train wrongly in this trainer.
        """
        splice = cls.of(trainer)
        if splice is not None:
            return splice
        found = trainer.callbacks  # type: ignore[attr-defined]
        interventions = [callback for callback in found if isinstance(callback, Intervention)]
        stage = str(getattr(stage, "value", stage))
        if stage == "fit":
            check(trainer, module, interventions)
        if not any(intervention.acts for intervention in interventions):
            return None
        splice = cls(trainer, module, interventions)
        trainer.callbacks = [splice, *found]  # type: ignore[attr-defined]
        splice._undo.append(lambda: splice._leave(found))
        splice._lay(stage)
        return splice

    @property
    def state_key(self) -> str:
        """The key of the splice's own state in a checkpoint."""
        return "fulgurite.Splice"

    def state_dict(self) -> dict[str, Any]:
        """Return the number of true updates."""
        return {"version": 1, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of true updates."""
        self.updates = state_dict["updates"]

    def implementing(self, hook: str) -> list[Intervention]:
        """Return the interventions that implement a hook, in order."""
        return [intervention for intervention in self.interventions if intervention.overrides(hook)]

    # Laying and taking out

    def _lay(self, stage: str) -> None:
        self._hooks = {hook: self.implementing(hook) for hook in HOOKS}
        self._lay_copies()
        if self._hooks["operate"]:
            self._lay_surgery()
        if stage == "fit":
            self._lay_training()
        if self._hooks["on_evaluation_loss"]:
            for method in ("validation_step", "test_step"):
                original = getattr(self.module, method)
                observers, compiled = self._hooks["on_evaluation_loss"], lightning_adapter.is_compiled(self.module)
                wrapped = observed(original, observers, self.names, self._evaluation_step, compiled)
                self._patch(self.module, method, wrapped)

    def _lay_training(self) -> None:
        module, hooks = self.module, self._hooks
        if hooks["parameter_options"]:
            self._patch(module, "configure_optimizers", self._wrap_optimizers(module.configure_optimizers))
        users = [self.names[i] for i in self.interventions if i.capabilities.sample_indices]
        if users:
            self.tracker = SampleTracker(" and ".join(users))
            self._patch(
                self.trainer.strategy, "process_dataloader", self._track(self.trainer.strategy.process_dataloader)
            )
            self._undo.append(self.tracker.detach)
        readers = [i for i in self.interventions if i.capabilities.reads_loss or i in hooks["on_loss"]]
        if readers:
            self._criteria = Criteria(module, readers, self.names, self._patch, self._timing, self._trace)
        self._replays = any(i.capabilities.replays_step for i in self.interventions)
        acts = bool(readers or hooks["transform_batch"] or hooks["penalty"])
        self._needs_step = acts or self._replays or self.tracker is not None
        if acts:
            if lightning_adapter.takes_iterator(module):
                raise RefusedError(
                    f"{', '.join(self.names.values())}: {type(module).__name__}.training_step takes `dataloader_iter` and "
                    f"fetches its own batches, so that a plugin cannot see them. Let training_step take `batch`."
                )
            self._patch(module, "training_step", self._wrap_training(module.training_step))
        if lightning_adapter.is_compiled(module):
            for name, replacement in lightning_adapter.loggers_outside_graph(module).items():
                self._patch(module, name, replacement)

    def _lay_copies(self) -> None:
        """Keep everything that is laid on the module out of its pickles and deep copies, which are plain modules."""
        module = self.module
        original = module.__getstate__

        def getstate() -> dict[str, Any]:
            state = dict(original())
            for name, found in self._laid.items():
                state.pop(name, None)
                if found is not _ABSENT:
                    state[name] = found
            if lightning_adapter.is_compiled(module):
                for name in lightning_adapter.COMPILED_METHODS:
                    state.pop(name, None)
                state["_compiler_ctx"] = None
            return state

        self._patch(module, "__getstate__", getstate)

    def _lay_surgery(self) -> None:
        original, operated = self.module.configure_model, False

        # Once, because WeightAveraging calls the hook too. Not `functools.wraps`: Lightning would look through it, and skip
        # the hook of a module that does not override it.
        def configure_model() -> None:
            nonlocal operated
            original()
            if operated:
                return
            operated = True
            earlier: list[str] = []
            for intervention in self._hooks["operate"]:
                try:
                    with self._timing(intervention, "operate"):
                        intervention.operate(self.module)
                except RefusedError as refusal:
                    if not earlier:
                        raise
                    raise RefusedError(f"{refusal} The model had been changed by {', '.join(earlier)}.") from refusal
                earlier.append(self.names[intervention])

        self._patch(self.module, "configure_model", configure_model)

    def _wrap_optimizers(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def options() -> dict[nn.Parameter, dict[str, Any]]:
            found: dict[nn.Parameter, dict[str, Any]] = {}
            for intervention in self._hooks["parameter_options"]:
                for parameter, wanted in intervention.parameter_options(self.module).items():
                    found.setdefault(parameter, {}).update(wanted)
            return found

        @functools.wraps(original)
        def configure_optimizers(*args: Any, **kwargs: Any) -> Any:
            with grouped_apart(options):
                return original(*args, **kwargs)

        return configure_optimizers

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute, past `nn.Module.__setattr__`, and remember how to undo it."""
        found = owner.__dict__.get(name, _ABSENT)
        owner.__dict__[name] = value
        if owner is self.module:
            self._laid.setdefault(name, found)

        def undo() -> None:
            if owner.__dict__.get(name) is not value:
                log.warning("%s.%s was replaced during training; it is left as it is.", type(owner).__name__, name)
            elif found is _ABSENT:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = found

        self._undo.append(undo)

    def remove(self) -> None:
        """Leave module, loaders and trainer as they were found."""
        while self._undo:
            self._undo.pop()()
        self._forget_step()

    def _forget_step(self) -> None:
        self._step = None
        if self._criteria is not None:
            self._criteria.step = None

    def _leave(self, found: list[pl.Callback]) -> None:
        others = [callback for callback in self.trainer.callbacks if callback is not self]
        self.trainer.callbacks = found if others == found else others

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take everything out."""
        self.remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take everything out."""
        self.remove()

    # Training

    def _track(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(original)
        def process_dataloader(loader: Any) -> Any:
            loader = original(loader)
            if lightning_adapter.is_training_stage(self.trainer) and self.tracker is not None:
                self.tracker.attach(loader)
            return loader

        return process_dataloader

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the optimizers' true updates, and let constraints follow them."""
        for number, optimizer in enumerate(trainer.strategy.optimizers):
            handle = optimizer.register_step_post_hook(functools.partial(self._after_update, number == 0))
            self._undo.append(handle.remove)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the named criteria, which may not have existed in `setup`."""
        if self.updates == 0:  # an earlier `fit`, or a checkpoint that was saved when the splice was not there
            self.updates = trainer.global_step
        if self._criteria is not None:
            self._criteria.lay()
        if self.tracker is not None:
            self.tracker.check_loaders(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step."""
        if self._needs_step:
            indices = None if self.tracker is None else self.tracker.next()
            self._step = Step(trainer, pl_module, batch, batch_idx, self.updates, indices)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget the step, and with it the graph that it may hold."""
        self._forget_step()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let interventions change gradients, before clipping."""
        for intervention in self._hooks["transform_gradients"]:
            with self._timing(intervention, "transform_gradients"):
                intervention.transform_gradients(pl_module, optimizer)

    def _after_update(self, counts: bool, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self not in self.trainer.callbacks:  # a tuner's trial step
            return
        self.updates += counts
        for intervention in self._hooks["constrain"]:
            with self._timing(intervention, "constrain"):
                intervention.constrain(self.module, optimizer)

    def _wrap_training(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the bound training step once; Lightning reads its signature through `__wrapped__`."""

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = self._step
            if step is None or self not in self.trainer.callbacks:
                return original(*args, **kwargs)
            return self._run_step(step, original, args, kwargs)

        return training_step

    def _run_step(self, step: Step, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hooks = self._hooks
        step.updates, step.outputs, step.targets, step.loss = self.updates, None, None, None
        if args:
            step.batch, rest = args[0], args[1:]
        else:
            step.batch, rest = kwargs.pop("batch"), ()
        for intervention in hooks["transform_batch"]:
            with self._timing(intervention, "transform_batch"):
                step.batch = intervention.transform_batch(step.batch, step)
        if self._replays:
            step.random_state = get_random_state(self.module.device)
        if self._criteria is None:
            output = original(step.batch, *rest, **kwargs)
        else:
            with self._criteria.watching(step):
                output = original(step.batch, *rest, **kwargs)
        if output is None:
            return None
        step.loss = output["loss"] if isinstance(output, Mapping) else output
        if self._criteria is not None:
            self._criteria.check_found()
        if hooks["penalty"]:
            output = self._add_penalties(step, output)
        return output

    def _add_penalties(self, step: Step, output: Any) -> Any:
        total: Any = step.loss
        for intervention in self._hooks["penalty"]:
            factor = 1.0
            if intervention.capabilities.penalises_parameters:
                if not step.completes_update:
                    continue
                factor = self.trainer.accumulate_grad_batches  # by which Lightning divides the loss
            prefix = self.names[intervention]
            with (
                self._timing(intervention, "penalty"),
                without_autocast(self.module.device.type),
            ):
                penalty = intervention.penalty(step)
            if penalty is None:
                continue
            named = penalty if isinstance(penalty, Mapping) else {"penalty": penalty}
            for name, value in named.items():
                total = total + (value if factor == 1 else factor * value)
                self.module.log(f"{prefix}/{name}", value.detach())
            self._trace(intervention, "penalty", functools.partial(_floats, named))
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    # Evaluation

    def _evaluation_step(self, batch: Any, batch_idx: int) -> Step | None:
        if self not in self.trainer.callbacks:
            return None
        return Step(self.trainer, self.module, batch, batch_idx, self.updates)

    # Cost and trace

    def _timing(self, intervention: Intervention, hook: str) -> Any:
        return _Timer(self.seconds, (self.names[intervention], hook)) if self.timed else _NO_TIMER

    def _trace(self, intervention: Intervention, hook: str, describe: Callable[[], Any]) -> None:
        if log.isEnabledFor(logging.DEBUG):
            step = self._step.batch_idx if self._step is not None else "?"
            log.debug("batch %s: %s.%s: %s", step, self.names[intervention], hook, describe())


class _Timer:
    """Adds the seconds of a block to a table."""

    __slots__ = ("begin", "key", "table")

    def __init__(self, table: dict[tuple[str, str], float], key: tuple[str, str]) -> None:
        self.table = table
        self.key = key

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.table[self.key] += time.perf_counter() - self.begin


_NO_TIMER = nullcontext()
_ABSENT = object()


def _floats(named: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in named.items()}
