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
from fulgurite.errors import RefusedError
from fulgurite.intervention import HOOKS, Intervention, Step, named_losses
from fulgurite.losses import FUNCTIONAL_LOSSES, LossCall, LossCapture
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
        self.names = _distinct_names(interventions)
        self.updates = 0
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.timed = False
        self.tracker: SampleTracker | None = None
        self._undo: list[Callable[[], None]] = []
        self._step: Step | None = None
        self._hooks: dict[str, list[Intervention]] = {}
        self._laid: dict[str, Any] = {}
        self._readers: list[Intervention] = []
        self._matched: dict[Intervention, str] = {}
        self._inside: str | None = None

    @staticmethod
    def of(trainer: pl.Trainer) -> Splice | None:
        """Return the splice of a trainer, if one is in place."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Splice)), None)

    @classmethod
    def ensure(cls, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> Splice:
        """Return the trainer's splice; lay it if it is not there yet, for `fit` after a check of all interventions.

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
                self._patch(self.module, method, self._wrap_evaluation(getattr(self.module, method)))

    def _lay_training(self) -> None:
        module, hooks = self.module, self._hooks
        users = [self.names[i] for i in self.interventions if i.capabilities.sample_indices]
        if users:
            self.tracker = SampleTracker(" and ".join(users))
            self._patch(
                self.trainer.strategy, "process_dataloader", self._track(self.trainer.strategy.process_dataloader)
            )
            self._undo.append(self.tracker.detach)
        self._readers = [i for i in self.interventions if i.capabilities.reads_loss or i in hooks["on_loss"]]
        self._replays = any(i.capabilities.replays_step for i in self.interventions)
        self._capture = LossCapture(self._on_functional_loss)
        self._whole_step = any(self._criterion(i) in (None, *_FUNCTION_NAMES) for i in self._readers)
        acts = bool(self._readers or hooks["transform_batch"] or hooks["penalty"])
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
            for intervention in self._hooks["operate"]:
                with self._timing(intervention, "operate"):
                    intervention.operate(self.module)

        self._patch(self.module, "configure_model", configure_model)

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
        self._step = None

    def _leave(self, found: list[pl.Callback]) -> None:
        others = [callback for callback in self.trainer.callbacks if callback is not self]
        self.trainer.callbacks = found if others == found else others

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take everything out."""
        self.remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take everything out."""
        self.remove()

    # Criteria

    def _criterion(self, intervention: Intervention) -> str | None:
        """The name of the criterion: the user's word, else that of a Fulgurite task, else None: to be found."""
        return intervention.criterion or getattr(type(self.module), "fulgurite_criterion", None)

    def _lay_criteria(self) -> None:
        """Wrap the criteria that are named as attributes; they may not have existed in `setup`."""
        for name in {self._criterion(intervention) for intervention in self._readers} - {None, *_FUNCTION_NAMES}:
            criterion = getattr(self.module, str(name), None)
            if not callable(criterion):
                users = ", ".join(self.names[i] for i in self._readers if self._criterion(i) == name)
                raise RefusedError(
                    f"{users}: expected `criterion` to name a callable attribute of {type(self.module).__name__} or a loss "
                    f"of torch.nn.functional, but got {name!r}{'' if criterion is None else ' (not callable)'}. "
                    f"{self._loss_modules()}"
                )
            owner, attribute = (criterion, "forward") if isinstance(criterion, nn.Module) else (self.module, str(name))
            functional = isinstance(criterion, nn.modules.loss._Loss)
            self._patch(owner, attribute, self._wrap_criterion(str(name), getattr(owner, attribute), functional))

    def _wrap_criterion(self, name: str, original: Callable[..., Tensor], functional: bool) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def criterion(*args: Any, **kwargs: Any) -> Tensor:
            step = self._step
            if step is None or step.loss is not None or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            self._inside = name
            try:
                if not functional:
                    if len(args) < 2:
                        raise RefusedError(
                            f"Expected the criterion {name!r} of {type(self.module).__name__} to be called as (outputs, "
                            f"targets, ...), but it got {len(args)} positional arguments. Pass both by position."
                        )
                    call = LossCall(original, args[0], args[1], kwargs, name, step)
                    return self._on_loss(call, lambda: original(*args, **kwargs))
                with nullcontext() if self._whole_step else self._capture:
                    return original(*args, **kwargs)
            finally:
                self._inside = None

        return torch.compiler.disable(criterion)

    def _on_functional_loss(self, fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        step = self._step
        if step is None or not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        return self._on_loss(LossCall.bound(fn, args, kwargs, step), lambda: fn(*args, **kwargs))

    def _on_loss(self, call: LossCall, unchanged: Callable[[], Tensor]) -> Tensor:
        """Let the interventions that this call concerns change it, in order, and make it."""
        wanted = (call.name, self._inside) if call.fn in FUNCTIONAL_LOSSES else (self._inside,)
        automatic = call.fn in FUNCTIONAL_LOSSES
        readers = [i for i in self._readers if (c := self._criterion(i)) in wanted or (c is None and automatic)]
        if not readers or not getattr(call.outputs, "requires_grad", True):
            return unchanged()
        if call.step.outputs is None:
            call.step.outputs, call.step.targets = call.outputs, call.targets
        found = call
        for intervention in readers:
            self._match(intervention, call.name)
            if intervention in self._hooks["on_loss"]:
                with self._timing(intervention, "on_loss"):
                    changed = intervention.on_loss(call)
                if not isinstance(changed, LossCall):
                    raise TypeError(
                        f"Expected `on_loss` of {self.names[intervention]} to return a LossCall, but got "
                        f"{type(changed).__name__}. Return the call that shall be made; `return call` changes nothing."
                    )
                self._trace_loss(intervention, call, changed)
                call = changed
        return unchanged() if call is found else call.evaluate()

    def _match(self, intervention: Intervention, name: str) -> None:
        if intervention in self._matched:
            raise RefusedError(
                f"{self.names[intervention]}: the training step of {type(self.module).__name__} calls several losses "
                f"({self._matched[intervention]}, {name}), and which of them is meant is not clear. Name one with "
                f"`criterion=`: an attribute of the module that is called once in a step (such as self.main_loss), or a "
                f"function of torch.nn.functional. {self._loss_modules()}"
            )
        self._matched[intervention] = name

    def _check_found(self) -> None:
        for intervention in self._readers:
            if intervention not in self._matched:
                name = self._criterion(intervention)
                raise RefusedError(
                    f"{self.names[intervention]}: the training step of {type(self.module).__name__} returned a loss, but "
                    f"no call of {'a loss of torch.nn.functional' if name is None else repr(name)} with outputs that "
                    f"require gradients was seen. Name the criterion with `criterion=`: an attribute of the module that "
                    f"is called as (outputs, targets). {self._loss_modules()}"
                )

    def _loss_modules(self) -> str:
        known = named_losses(self.module)
        return f"Loss modules found: {', '.join(known)}." if known else "It has no loss modules as attributes."

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
        self._lay_criteria()
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
        self._step = None

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
        self._matched = {}
        if args:
            step.batch, rest = args[0], args[1:]
        else:
            step.batch, rest = kwargs.pop("batch"), ()
        for intervention in hooks["transform_batch"]:
            with self._timing(intervention, "transform_batch"):
                step.batch = intervention.transform_batch(step.batch, step)
        if self._replays:
            step.random_state = get_random_state(self.module.device)
        if self._whole_step:
            with self._capture:
                output = original(step.batch, *rest, **kwargs)
        else:
            output = original(step.batch, *rest, **kwargs)
        if output is None:
            return None
        step.loss = output["loss"] if isinstance(output, Mapping) else output
        if self._readers:
            self._check_found()
        if hooks["penalty"]:
            output = self._add_penalties(step, output)
        return output

    def _add_penalties(self, step: Step, output: Any) -> Any:
        total: Any = step.loss
        for intervention in self._hooks["penalty"]:
            prefix = self.names[intervention]
            with (
                self._timing(intervention, "penalty"),
                torch.autocast(self.module.device.type, enabled=False),
            ):
                penalty = intervention.penalty(step)
            if penalty is None:
                continue
            named = penalty if isinstance(penalty, Mapping) else {"penalty": penalty}
            for name, value in named.items():
                total = total + value
                self.module.log(f"{prefix}/{name}", value.detach())
            self._trace(intervention, "penalty", functools.partial(_floats, named))
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    # Evaluation

    def _wrap_evaluation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        observers = self._hooks["on_evaluation_loss"]
        calls: list[LossCall] = []
        step = Step(self.trainer, self.module, None, 0, 0)

        def observe(fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            calls.append(LossCall.bound(fn, args, kwargs, step))
            return fn(*args, **kwargs)

        capture = LossCapture(observe)

        @functools.wraps(original)
        def evaluation_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal step
            if self not in self.trainer.callbacks:
                return original(*args, **kwargs)
            calls.clear()
            batch = args[0] if args else kwargs.get("batch")
            step = Step(self.trainer, self.module, batch, args[1] if len(args) > 1 else 0, self.updates)
            with capture:
                result = original(*args, **kwargs)
            if not calls:
                raise RefusedError(
                    f"{', '.join(self.names[o] for o in observers)}: {type(self.module).__name__}.{original.__name__} "
                    f"called no loss of torch.nn.functional, so that its outputs and targets are not known. Compute the "
                    f"loss there too."
                )
            for observer in observers:
                for call in calls:
                    observer.on_evaluation_loss(call)
            return result

        return evaluation_step

    # Cost and trace

    def _timing(self, intervention: Intervention, hook: str) -> Any:
        return _Timer(self.seconds, (self.names[intervention], hook)) if self.timed else _NO_TIMER

    def _trace_loss(self, intervention: Intervention, before: LossCall, after: LossCall) -> None:
        self._trace(intervention, "on_loss", lambda: _differences(before, after))

    def _trace(self, intervention: Intervention, hook: str, describe: Callable[[], Any]) -> None:
        if log.isEnabledFor(logging.DEBUG):
            step = self._step.batch_idx if self._step is not None else "?"
            log.debug("batch %s: %s.%s: %s", step, self.names[intervention], hook, describe())


def check(trainer: pl.Trainer, module: pl.LightningModule, interventions: list[Intervention]) -> None:
    """Refuse, before training, a mixture that would train wrongly.

    Raises:
        RefusedError: Naming the plugins, what was found and what to change.
    """
    names = _distinct_names(interventions)
    strategy = lightning_adapter.strategy_name(trainer)
    precision = lightning_adapter.precision_name(trainer)
    owners: dict[str, str] = {}
    for intervention in interventions:
        name, wants = names[intervention], intervention.capabilities
        if strategy in wants.refused_strategies:
            raise RefusedError(
                f"{name} cannot be used with the strategy {strategy!r}: {wants.refused_strategies[strategy]}"
            )
        if precision in wants.refused_precisions:
            raise RefusedError(
                f"{name} cannot be used with precision={precision!r}: {wants.refused_precisions[precision]}"
            )
        if not module.automatic_optimization:
            if not wants.manual_optimization:
                raise RefusedError(
                    f"{name} cannot be used with manual optimization (automatic_optimization=False in "
                    f"{type(module).__name__}). Remove the plugin, or let Lightning step the optimizer."
                )
            if intervention.overrides("penalty"):
                raise RefusedError(
                    f"{name} adds a penalty to the loss that training_step returns, but {type(module).__name__} optimises "
                    f"manually: its backward pass is over by then. Remove the plugin, or let Lightning step the optimizer."
                )
        for item in wants.exclusive:
            if item in owners:
                raise RefusedError(f"{owners[item]} and {name} both take the {item} for themselves. Use one of them.")
            owners[item] = name


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
_FUNCTION_NAMES = frozenset(function.__name__ for function in FUNCTIONAL_LOSSES)


def _distinct_names(interventions: list[Intervention]) -> dict[Intervention, str]:
    """The name of each intervention; the second of two with one name is called `name_2`."""
    names: dict[Intervention, str] = {}
    for intervention in interventions:
        same = sum(other.name == intervention.name for other in names)
        names[intervention] = intervention.name if same == 0 else f"{intervention.name}_{same + 1}"
    return names


def _floats(named: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in named.items()}


def _differences(before: LossCall, after: LossCall) -> str:
    def describe(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return getattr(value, "__name__", repr(value))

    changes = [
        f"{field} {describe(getattr(before, field))} -> {describe(getattr(after, field))}"
        for field in ("fn", "outputs", "targets")
        if getattr(before, field) is not getattr(after, field)
    ]
    return "; ".join(changes) or "unchanged"
