# SPDX-License-Identifier: Apache-2.0
"""What an intervention leaves behind: nothing when it is off, nothing when training has ended, whatever ended it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fulgurite.errors import RefusedError
from fulgurite.intervention import Intervention
from fulgurite.testing.check import CheckError, InapplicableError, check, expect
from fulgurite.testing.interventions import findings
from fulgurite.testing.lab import Lab, RandomStreams, Run, copied_state, equal_states, seed
from fulgurite.testing.surroundings import changed_settings, fingerprint, helpers, helpers_since, preserved, settings
from fulgurite.testing.trainers import contained, make_trainer

_LIGHTNINGS = ("_hparams", "_hparams_initial", "_current_fx_name")
"""What Lightning itself leaves on a module: the last for good if an exception passes through a callback's hook."""


def _validated(lab: Lab) -> tuple[Run, Run]:
    """Return the training without and with the component, both with validation."""
    alone = lab.reference("validated", validation=lab.loader(shuffle=False))
    return alone, lab.component_run("validated", validation=lab.loader(shuffle=False))


def _expect_equal(a: Run, b: Run, reason: str) -> None:
    if a.weights.shape != b.weights.shape:
        raise CheckError(f"{reason} ({len(a.weights)} and {len(b.weights)} of them)")
    expect(
        torch.equal(a.weights, b.weights),
        f"{reason} (largest difference {float((a.weights - b.weights).abs().max()):.2g})",
    )


@check("intervention")
def check_identity_when_off(lab: Lab) -> None:
    """A weight of zero still changes parameters or random numbers, so that no ablation can be trusted."""
    if lab.case.off is None:
        raise InapplicableError("the case names no setting that changes nothing (`off`)")
    switched, component = lab.case.off(), lab.make()
    expect(
        type(switched) is type(component),
        f"`off` of the case makes a {type(switched).__name__}, `make` a {type(component).__name__}",
    )
    alone = _validated(lab)[0]
    off = lab.fit([switched], validation=lab.loader(shuffle=False))
    _expect_equal(alone, off, "parameters differ from a training without it")
    expect(off.streams.same_as(alone.streams), "it has drawn from the global random streams")
    expect(off.trainer.global_step == alone.trainer.global_step, "it changes the number of updates")
    optimizers = [[optimizer.state_dict() for optimizer in run.trainer.optimizers] for run in (alone, off)]
    expect(equal_states(*optimizers), "the state of the optimizer differs from a training without it")
    expect(equal_states(alone.module.state_dict(), off.module.state_dict()), "the module has other buffers than before")


@check("callback")
def check_watches_only(lab: Lab) -> None:
    """A callback that only watches changes the trained parameters."""
    alone, run = _validated(lab)
    _expect_equal(alone, run, "parameters differ from a training without it")
    expect(equal_states(alone.module.state_dict(), run.module.state_dict()), "the module has other buffers than before")


@check("intervention")
def check_has_an_effect(lab: Lab) -> None:
    """The method does nothing, or logs what the training has no part in; every other check lets that pass."""
    alone, run = _validated(lab)
    if lab.case.observes:
        _expect_equal(
            alone, run, "its case says that it only observes, and parameters differ from a training without it"
        )
        _expect_observed(lab, alone, run)
        return
    words = (
        "it trains what a training without it does; one that only logs or remembers says `observes=True` in its case"
    )
    if run.has_the_weights_of(alone):
        expect(not torch.equal(alone.weights, run.weights), words)
    else:
        expect(
            not torch.equal(_outputs(lab, alone), _outputs(lab, run)), f"the model has other parameters, and {words}"
        )


def _expect_observed(lab: Lab, alone: Run, run: Run) -> None:
    """Expect that what it logs and remembers is another when something else is trained."""
    other = lab.fit([lab.make()], validation=lab.loader(shuffle=False), start=2)
    seen = [_observed(one, alone) for one in (run, other)]
    expect(any(seen[0]), "it logs and remembers nothing")
    expect(not equal_states(*seen), "what it logs and remembers is the same whatever is trained")


def _observed(run: Run, alone: Run) -> tuple[dict[str, Any], Any]:
    """Return what the component has logged, and its state."""
    metrics = run.trainer.callback_metrics
    logged = {name: metrics[name] for name in metrics.keys() - alone.trainer.callback_metrics.keys()}
    return logged, copied_state(run.callbacks[0])


def _outputs(lab: Lab, run: Run) -> torch.Tensor:
    """Return what the trained model says of the training examples."""
    examples: Any = lab.examples()
    inputs = torch.stack([examples[i][0] for i in range(len(examples))])
    with torch.no_grad():
        outputs = run.module.eval()(inputs)
    run.module.train()
    return outputs


@check("intervention", "callback")
def check_random_streams(lab: Lab) -> None:
    """It draws from the global random streams, so that a comparison with the baseline sees other batches."""
    # Not shuffled: whoever chooses the examples draws another order, and of their own stream.
    arguments: dict[str, Any] = {"loader": lab.loader(shuffle=False), "validation": lab.loader(shuffle=False)}
    alone = lab.reference("validated, in order", **arguments)
    run = lab.component_run("validated, in order", **arguments)
    expect(
        run.streams.same_as(alone.streams), "after training, the global random streams stand elsewhere than without it"
    )


@check("intervention", "callback")
def check_nothing_left_after_fit(lab: Lab) -> None:
    """Hooks, patches, replaced samplers or global switches stay behind and change whatever the user does next."""
    _leaves_nothing(lab, "", RuntimeError)


@check("intervention", "callback")
def check_nothing_left_after_exception(lab: Lab) -> None:
    """After an error in a step, a notebook's module is still patched, or the error is not seen at all."""
    for method in ("training_step", "validation_step", "configure_optimizers"):
        _leaves_nothing(lab, method, RuntimeError)


@check("intervention", "callback")
def check_nothing_left_after_interrupt(lab: Lab) -> None:
    """After Ctrl-C, a notebook's module is still patched, or the interrupt is not seen at all."""
    _leaves_nothing(lab, "training_step", KeyboardInterrupt)


_FAILING_CALL = {"training_step": 2, "validation_step": 3, "configure_optimizers": 1}
"""In the middle of the first epoch; after the sanity check; before training."""


def _leaves_nothing(lab: Lab, method: str, error: type[BaseException]) -> None:
    """Compare what stays behind with the component and without it; `method` of the module fails, if one is named."""
    ordinary = lab.case.module is None and lab.case.data is None and not lab.settings
    remember = _remember if ordinary else lab.remember
    allowed = remember(f"left behind: {method} {error.__name__}", lambda: _left_behind(lab, None, method, error))
    with preserved(), contextlib.suppress(Exception):  # what it imports is imported now, and is not held against it
        lab.component_run("validated", validation=lab.loader(shuffle=False))
    left = _left_behind(lab, lab.make(), method, error) - allowed
    where = f" after an error in {method}" if error is not KeyboardInterrupt and method else ""
    expect(not left, f"{'; '.join(sorted(left)[:4])}{where}")


_remembered: dict[str, set[str]] = {}


def _remember(key: str, compute: Callable[[], set[str]]) -> set[str]:
    """Return what `compute` returned the first time: what Lightning itself leaves does not depend on the component."""
    if key not in _remembered:
        _remembered[key] = compute()
    return _remembered[key]


def _left_behind(lab: Lab, component: Any, method: str, error: type[BaseException]) -> set[str]:
    """Train, and return in words what is not as it was: of the module, the loaders, the trainer and the process."""
    module, loader, validation = lab.module(), lab.loader(), lab.loader(shuffle=False)
    if method:
        _make_fail(module, method, error)
    callbacks = [] if component is None else [component]
    trainer = make_trainer(callbacks, max_epochs=1 if method else 2, **lab.settings)
    seed(module)
    surgery = _record_surgery(component)

    def look() -> findings.Findings:
        loaders = {"the DataLoader": loader, "the validation DataLoader": validation}
        found = findings.of_trainer(trainer)
        for name, some in loaders.items():
            found.update(findings.of_loader(some, name))
        return found

    with contained(), preserved():
        structure, others, process, running = findings.of_module(module), look(), settings(), helpers()
        _train(trainer, module, loader, validation, error if method else None)
        left = findings.changes(others, look()) | set(changed_settings(process).values())
        changed = findings.changes(structure, findings.of_module(module))
        changed = {text for text in changed if _without_value(text) not in surgery}
        left |= {text for text in changed if not any(f"`{name}`" in text for name in _LIGHTNINGS)}
        return left | {f"{name} is still running" for name in helpers_since(running)}


def _train(trainer: Any, module: Any, loader: Any, validation: Any, error: type[BaseException] | None) -> None:
    if error is None:
        trainer.fit(module, loader, validation)
        trainer.validate(module, validation, verbose=False)
        return
    expected: tuple[type[BaseException], ...] = (error, SystemExit) if error is KeyboardInterrupt else (error,)
    try:
        trainer.fit(module, loader, validation)
    except expected as raised:
        hidden = type(raised) is RuntimeError and "on purpose" not in str(raised)
        expect(not hidden, f"the user's {error.__name__} is replaced by another: {raised}")
    except Exception as raised:
        raise CheckError(
            f"the user's {error.__name__} is replaced by a {type(raised).__name__}: {str(raised).splitlines()[:1]}"
        ) from raised
    else:
        raise CheckError(f"{error.__name__} in the user's module was swallowed")


def _make_fail(module: Any, method: str, error: type[BaseException]) -> None:
    """Let a method of the module raise at one of its calls, as if the user had written it so."""
    cls = type(module)
    original = getattr(cls, method)
    calls = 0

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == _FAILING_CALL[method]:
            raise error("raised on purpose")
        return original(self, *args, **kwargs)

    failing.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    failing.__name__ = method
    names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}, failing"}
    module.__class__ = type(cls.__name__, (cls,), {method: failing, **names})


def _record_surgery(component: Any) -> set[str]:
    """Return a set that fills with what `operate` changes when it is first called: that stays, as the trained model does.

    What a later call changes is no part of it: then the model has been changed already.
    """
    recorded: set[str] = set()
    if not (isinstance(component, Intervention) and component.overrides("operate")):
        return recorded
    original = component.operate

    def operate(module: Any) -> None:
        before = findings.of_module(module)
        original(module)
        if not recorded:
            recorded.update(map(_without_value, findings.changes(before, findings.of_module(module))))

    vars(component)["operate"] = operate
    return recorded


def _without_value(change: str) -> str:
    """Return a change without the value of what is left: layers that surgery has put in may count, and remember."""
    return change.partition(" is left")[0]


@check("intervention")
def check_two_instances(lab: Lab) -> None:
    """Two of a kind, in one trainer or one after the other, share memory, so that the second undoes the first."""
    component = lab.make()
    shared = [cls for cls in type(component).__mro__ if not cls.__module__.startswith(("lightning.", "builtins"))]
    before = {cls: _class_attributes(cls) for cls in shared}
    alone = lab.component_run()
    _together(lab, [component, lab.make()])
    for cls in shared:
        changed = {key for key, value in _class_attributes(cls).items() if value != before[cls].get(key)}
        expect(not changed, f"training changes {', '.join(sorted(changed))} of the class, which all instances share")
    lab.fit([lab.make()], loader=lab.loader(batch_size=5), max_epochs=3)
    second = lab.fit([lab.make()])
    _expect_equal(alone, second, "an instance trains otherwise after another one has trained something else")
    if lab.case.off is not None:
        for makers in ((lab.make, lab.case.off), (lab.case.off, lab.make)):
            run = _together(lab, [make() for make in makers])
            if run is not None:
                _expect_equal(alone, run, "beside an instance that is switched off it trains otherwise")


def _class_attributes(cls: type) -> dict[str, Any]:
    """Return what a class holds as data."""
    return {
        key: _contents(value)
        for key, value in vars(cls).items()
        if not key.startswith("__") and key != "_abc_impl" and not callable(value) and not hasattr(value, "__get__")
    }


def _contents(value: Any) -> Any:
    inner = getattr(value, "__dict__", None)
    return (fingerprint(value), fingerprint(dict(inner)) if inner else None)


def _together(lab: Lab, instances: list[Any]) -> Run | None:
    """Train with several instances; None if they are refused, which must be by name."""
    keys = [instance.state_key for instance in instances]
    try:
        run = lab.fit(instances)
    except RefusedError as refusal:
        expect(instances[0].name in str(refusal).lower(), f"two instances are refused without their name: {refusal}")
        return None
    except RuntimeError as error:  # Lightning refuses two callbacks with state and one `state_key`, and names the key
        expect(keys[0] == keys[1] and "state_key" in str(error), f"two instances fail: {error}")
        return None
    expect(run.weights.isfinite().all(), "with two instances the parameters are not finite")
    addresses = [_addresses(instance.state_dict()) for instance in instances]
    expect(not addresses[0] & addresses[1], "the states of two instances are one and the same tensor")
    return run


def _addresses(state: Any) -> set[int]:
    if isinstance(state, torch.Tensor):
        return {state.untyped_storage().data_ptr()} - {0}
    entries = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return set().union(*map(_addresses, entries))


@check("intervention", "callback")
def check_fit_twice(lab: Lab) -> None:
    """A second `fit` with the same instance remembers the first one, or fails."""
    fresh, again = _validated(lab)[1], lab.make()
    twin = lab.fit([lab.make()], validation=lab.loader(shuffle=False))
    lab.fit([again], loader=lab.loader(batch_size=5), validation=lab.loader(shuffle=False), max_epochs=3)
    repeated = lab.fit([again], validation=lab.loader(shuffle=False))
    _expect_equal(fresh, repeated, "a second training differs from a first")
    states = [copied_state(run.callbacks[0]) for run in (fresh, twin, repeated)]
    if equal_states(states[0], states[1]):  # else it holds times, or the like
        expect(equal_states(states[0], states[2]), "after a second training its state is another than after a first")
    metrics = [run.trainer.callback_metrics for run in (fresh, twin, repeated)]
    steady = {name for name, value in metrics[0].items() if equal_states(value, metrics[1].get(name))}
    moved = {name for name in steady if not equal_states(metrics[0][name], metrics[2].get(name))}
    expect(not moved, f"a second training logs other values than a first: {', '.join(sorted(moved))}")


@check("intervention", "callback")
def check_fit_after_error(lab: Lab) -> None:
    """In a notebook, where a training has failed, the same instance trains otherwise than a new one, or not at all."""
    again, module = lab.make(), lab.module()
    _make_fail(module, "training_step", RuntimeError)
    with contextlib.suppress(RuntimeError):
        lab.fit([again], module=module)
    repeated = lab.fit([again], validation=lab.loader(shuffle=False))
    _expect_equal(_validated(lab)[1], repeated, "after a training that failed it trains otherwise than a new instance")


@check("intervention")
def check_validation_is_untouched(lab: Lab) -> None:
    """Validation, sanity check or `trainer.validate` advance the method, so that validating more often trains otherwise."""

    def train(validated: bool) -> Run:
        loader = lab.loader(generator=torch.Generator().manual_seed(3))  # validation draws from the global stream
        extra: dict[str, Any] = (
            {"validation": lab.loader(shuffle=False), "val_check_interval": 0.5} if validated else {}
        )
        return lab.fit([lab.make()], loader=loader, **extra)

    without, run = train(False), train(True)
    _expect_equal(without, run, "validating twice per epoch changes the trained parameters")
    intervention = run.callbacks[0]
    before = copied_state(intervention)
    expect(
        equal_states(copied_state(without.callbacks[0]), before), "validating twice per epoch changes its final state"
    )
    weights = run.weights
    with contained():
        run.trainer.validate(run.module, lab.loader(shuffle=False), verbose=False)
    expect(equal_states(before, copied_state(intervention)), "trainer.validate changes the state of the method")
    expect(torch.equal(weights, run.weights), "trainer.validate changes the parameters")


@check("intervention", "callback", "datamodule")
def check_constructor_draws_nothing(lab: Lab) -> None:
    """Constructing it moves the global random streams."""
    for make in filter(None, (lab.make, lab.case.off)):
        before = RandomStreams.now()
        make()
        expect(RandomStreams.now().same_as(before), "constructing it draws from the global random streams")
