# SPDX-License-Identifier: Apache-2.0
"""Configuration and state: from a constructor to YAML and back, through pickles, through checkpoints."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import SingleDeviceStrategy

from fulgurite.intervention import Intervention
from fulgurite.testing.check import CheckError, InapplicableError, check, expect
from fulgurite.testing.lab import Lab, Run, copied_state, equal_states
from fulgurite.testing.surroundings import fingerprint


def stored_arguments(component: Any) -> dict[str, Any]:
    """Return the constructor's arguments as the instance stores them, under their own names."""
    arguments = {}
    for name, parameter in inspect.signature(type(component)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        expect(hasattr(component, name), f"the constructor's argument `{name}` is not stored as an attribute")
        arguments[name] = getattr(component, name)
    return arguments


def _recorded(make: Callable[[], Any], cls: Any) -> tuple[Any, dict[str, Any]]:
    """Return what `make` makes, and the arguments that the constructor of `cls` was given."""
    given: dict[str, Any] = {}
    if not isinstance(cls, type):
        return make(), given
    original: Any = vars(cls).get("__init__", cls.__init__)  # type: ignore[misc]

    @functools.wraps(original)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls and not given:
            given.update(inspect.signature(original).bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)

    with mock.patch.object(cls, "__init__", recording):
        return make(), dict(list(given.items())[1:])


def _expect_stored(component: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the stored arguments; each must have become what was given, not what it is without being given."""
    stored = stored_arguments(component)
    for name, value in given.items():
        if name not in stored or _alike(value, stored[name]):
            continue
        try:
            without = type(component)(**{key: other for key, other in given.items() if key != name})
        except TypeError:  # it has no default
            raise CheckError(f"the constructor was given {name}={value!r} and stores {stored[name]!r}") from None
        expect(
            not _alike(getattr(without, name), stored[name]),
            f"the constructor was given {name}={value!r} and stores {stored[name]!r}, as if it had been given nothing",
        )
    return stored


def _alike(a: Any, b: Any) -> bool:
    try:
        return equal_states(a, b) or str(a) == str(b)
    except (TypeError, ValueError, RuntimeError):  # no truth value
        return a is b


@check("intervention", "callback", "datamodule")
def check_configuration_round_trip(lab: Lab) -> None:
    """A run cannot be repeated from its saved configuration, or the class cannot be used from a command line at all."""
    rebuilt = _round_trip(*_recorded(lab.make, lab.target))
    if lab.case.off is not None:
        _round_trip(*_recorded(lab.case.off, lab.target))
    if isinstance(rebuilt, Intervention):
        weights = lab.fit([rebuilt]).weights, lab.component_run().weights
        expect(equal_states(*weights), "built from its saved configuration it trains otherwise")


def _round_trip(component: Any, given: dict[str, Any]) -> Any:
    """Return the component that is built from the written configuration of another one."""
    arguments = _expect_stored(component, given)
    base = pl.LightningDataModule if isinstance(component, pl.LightningDataModule) else pl.Callback
    kind = type(component)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "component")
    config = {"component": {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}}
    try:
        text = parser.dump(parser.parse_object(config))
        again = parser.parse_string(text)
        rebuilt = parser.instantiate_classes(again).component
    except (ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckError(
            f"a configuration with {arguments} cannot be written and read: {' '.join(lines)[:200]}"
        ) from error
    expect(parser.dump(again) == text, "the configuration changes when it is written and read again")
    for name, value in stored_arguments(rebuilt).items():
        expect(
            _alike(value, arguments[name]),
            f"`{name}` was {arguments[name]!r}, and is {value!r} after writing and reading the configuration",
        )
    return rebuilt


@check("intervention", "callback")
def check_pickle_and_deepcopy(lab: Lab) -> None:
    """Spawned processes cannot get it, or a copy forgets, or shares state with the original."""
    component = lab.make()
    for how, copied in _copies(component):
        same = equal_states(stored_arguments(copied), stored_arguments(component))
        expect(same, f"{how} has other arguments than the original")
    lab.fit([component])
    for name in _LIGHTNINGS:
        vars(component).pop(name, None)  # bound methods of the trained module, which need not pickle
    original, contents = copied_state(component), fingerprint(_data(component))
    for how, twin in _copies(component):
        expect(equal_states(copied_state(twin), original), f"{how} of a trained instance has another state")
        lab.fit([twin], loader=lab.loader(batch_size=5), max_epochs=3)
        untouched = equal_states(copied_state(component), original) and fingerprint(_data(component)) == contents
        expect(untouched, f"training with {how} changes the original")


_LIGHTNINGS = ("log", "log_dict")
"""What Lightning puts on every callback that it trains with."""


def _copies(component: Any) -> Iterator[tuple[str, Any]]:
    try:
        yield "a pickled copy", pickle.loads(pickle.dumps(component))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise CheckError(f"it cannot be pickled: {error}") from error
    yield "a deep copy", copy.deepcopy(component)


def _data(component: Any) -> dict[str, Any]:
    """Return the attributes that are data: not what Lightning puts on every callback."""
    return {name: value for name, value in vars(component).items() if name not in _LIGHTNINGS}


@check("intervention", "callback")
def check_state_loads_safely(lab: Lab) -> None:
    """A checkpoint with its state cannot be loaded with `weights_only=True`, which is Lightning's default."""
    component = lab.make()
    with tempfile.TemporaryDirectory() as folder:
        early, late = Path(folder) / "early.ckpt", Path(folder) / "late.ckpt"
        run = lab.fit([component, _Save(early)])
        run.trainer.save_checkpoint(late)
        for path in (early, late):
            try:
                states = torch.load(path, weights_only=True)["callbacks"]
            except pickle.UnpicklingError as error:
                raise CheckError(f"weights_only=True refuses the checkpoint: {_refused(error)}") from error
    state = copied_state(component)
    if not state:
        return
    key = component.state_key
    expect(key in states, f"its state is not in the checkpoint under {key!r}")
    expect(isinstance(state, dict) and "version" in state, "its state has no version number")
    expect(equal_states(states[key], state), "the checkpoint holds another state than state_dict gives")
    loaded = lab.make()
    loaded.load_state_dict(states[key])
    expect(equal_states(copied_state(loaded), state), "after `load_state_dict`, `state_dict` gives another state")


def _refused(error: Exception) -> str:
    """Return the sentence that names what was refused."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])


@check("intervention", "callback")
def check_state_key(lab: Lab) -> None:
    """Two plugins with classes of one name overwrite each other's state in a checkpoint."""
    component = lab.make()
    if not isinstance(component, Intervention) and not lab.component_run().callbacks[0].state_dict():
        raise InapplicableError("it has no state")
    package = type(component).__module__.partition(".")[0]
    expect(
        package in component.state_key, f"state_key {component.state_key!r} does not say which package it belongs to"
    )


@check("intervention")
def check_resume_at_epoch_end(lab: Lab) -> None:
    """A run that was stopped at the end of an epoch goes on otherwise than one that was not."""
    _resumes(lab, mid_epoch=False, loader=lambda: lab.loader(shuffle=False))


@check("intervention")
def check_resume_in_mid_epoch(lab: Lab) -> None:
    """A run that was stopped in the middle of an epoch goes on otherwise than one that was not."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        raise InapplicableError("needs the extra `resume` (torchdata), which is not installed") from None
    _resumes(lab, mid_epoch=True, loader=lambda: StatefulDataLoader(lab.dataset(), batch_size=8, shuffle=True))


@check("intervention")
def check_resume_with_accumulation(lab: Lab) -> None:
    """With gradient accumulation, a run that was stopped between two updates goes on otherwise."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        raise InapplicableError("needs the extra `resume` (torchdata), which is not installed") from None
    _resumes(
        lab,
        mid_epoch=True,  # between two windows: Lightning itself forgets the gradients of an open one
        loader=lambda: StatefulDataLoader(lab.dataset(), batch_size=8, shuffle=True),
        accumulate_grad_batches=2,
    )


class _RestoresLate(SingleDeviceStrategy):
    """Restores in the order of the sharded strategies: callbacks after `on_fit_start`."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Say that the model must be set up first."""
        return True


@check("intervention")
def check_resume_when_restored_late(lab: Lab) -> None:
    """Sharded strategies bring state back only after `on_fit_start`, where the method does not look for it any more."""
    lab.needs_default("strategy")
    _resumes(lab, mid_epoch=False, loader=lambda: lab.loader(shuffle=False), strategy=lambda: _RestoresLate("cpu"))


def _resumes(
    lab: Lab,
    mid_epoch: bool,
    loader: Callable[[], Any],
    strategy: Callable[[], Any] | None = None,
    **trainer: Any,
) -> None:
    """Compare a run of three epochs with one that goes on from a checkpoint, of the second epoch or of its middle."""
    with tempfile.TemporaryDirectory() as folder:
        if mid_epoch:
            path = Path(folder) / "stopped.ckpt"
            saver: pl.Callback = _Save(path)
        else:
            path = Path(folder) / "epoch=1.ckpt"
            saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        own = isinstance(saver, ModelCheckpoint)  # else Lightning adds one, which writes into the working directory
        whole = lab.fit([lab.make(), saver], loader=loader(), max_epochs=3, enable_checkpointing=own, **trainer)
        if strategy is not None:
            trainer["strategy"] = strategy()
        resumed = lab.fit([lab.make()], loader=loader(), max_epochs=3, checkpoint=path, **trainer)
    _same(whole, resumed)


def _same(whole: Run, resumed: Run) -> None:
    apart = float((whole.weights - resumed.weights).abs().max())
    expect(apart == 0.0, f"the resumed run ends elsewhere (largest difference {apart:.2g})")
    states = copied_state(whole.callbacks[0]), copied_state(resumed.callbacks[0])
    expect(equal_states(*states), "the state of the method is another one after the resumed run")
    updates = whole.trainer.global_step, resumed.trainer.global_step
    expect(updates[0] == updates[1], f"{updates[0]} updates without a stop, {updates[1]} with one")


class _Save(pl.Callback):
    """Saves a checkpoint in the middle of the second epoch: after two batches, also of a training set that was reduced."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.save_checkpoint(self.path)
