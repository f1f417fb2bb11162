# SPDX-License-Identifier: Apache-2.0
"""What a training may leave on the module, its loaders and its trainer, written down before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fulgurite.testing.surroundings import fingerprint

_ABSENT = object()
_PRIMITIVE = (bool, int, float, str, type(None))
_OWN = ("should_stop", "val_check_batch")
"""What a callback may set on the trainer, or a smaller training set: Lightning sets it anew at the next `fit`."""


class Same:
    """A value of which only the identity matters; it is written as what it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (self.value is other.value or self.value == other.value)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return getattr(self.value, "__qualname__", type(self.value).__name__)


Findings = dict[str, Any]
"""What was found, by the words in which a report calls it."""


def of_module(module: nn.Module) -> Findings:
    """Return attributes, methods, hooks, parameters and parametrisations of a module and all its submodules."""
    found: Findings = {}
    for name, child in module.named_modules():
        where = f"the module's `{name}`" if name else "the module"
        found[f"{where}, class"] = type(child).__qualname__
        found[f"{where}, parametrised"] = is_parametrized(child)
        for key, value in vars(child).items():
            if "_hooks" in key and isinstance(value, (dict, set)):
                found[f"{where}, {key}"] = len(value)
            elif key not in ("_parameters", "_buffers", "_modules"):
                found[f"{where}, attribute `{key}`"] = _shallow(value)
        for key, parameter in child.named_parameters(recurse=False):
            found[f"{where}, parameter `{key}`"] = Same(parameter)
            found[f"{where}, dtype and requires_grad of `{key}`"] = (parameter.dtype, parameter.requires_grad)
            hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
            found[f"{where}, hooks on `{key}`"] = sum(len(some or ()) for some in hooks)
        for key, _ in child.named_buffers(recurse=False):
            found[f"{where}, buffer `{key}`"] = True
    for cls in {base for child in module.modules() for base in type(child).__mro__}:
        if cls not in (object, nn.Module, pl.LightningModule):
            found[f"class {cls.__qualname__}, class"] = True
            found.update({f"class {cls.__qualname__}, `{k}`": Same(v) for k, v in vars(cls).items() if callable(v)})
    return found


def of_loader(loader: Any, name: str) -> Findings:
    """Return the attributes of a DataLoader, of its samplers and of its dataset, with the contents of tensors."""
    batches = loader.batch_sampler
    parts = {
        name: loader,
        f"the sampler of {name}": loader.sampler,
        f"the batch sampler of {name}": batches,
        f"the sampler in the batch sampler of {name}": getattr(batches, "sampler", None),
        f"the dataset of {name}": loader.dataset,
    }
    found: Findings = {f"{where}, class": type(part).__qualname__ for where, part in parts.items()}
    for where, part in parts.items():
        for key, value in getattr(part, "__dict__", {}).items():
            found[f"{where}, `{key}`"] = Same(value) if callable(value) else _Opaque(fingerprint(value))
    return found


def of_trainer(trainer: Any) -> Findings:
    """Return settings of the trainer, its list of callbacks, and which attributes its parts have on the instance."""
    found: Findings = {"trainer.callbacks": _Opaque(tuple(map(id, trainer.callbacks)))}
    found["names of trainer.callbacks"] = [type(callback).__name__ for callback in trainer.callbacks]
    for path, part in _parts(trainer):
        for key, value in vars(part).items():
            settles = part is trainer and isinstance(value, _PRIMITIVE) and key not in _OWN and not key.startswith("_")
            found[f"{path}.{key}"] = Same(value) if callable(value) else value if settles else True
    for loop, keys in ((trainer.fit_loop, ("min_epochs", "max_epochs")), (trainer.fit_loop.epoch_loop, ("max_steps",))):
        found.update({f"trainer.{key}": getattr(loop, key) for key in keys})
    for number, optimizer in enumerate(trainer.optimizers):
        for key, value in vars(optimizer).items():
            counted = "_hooks" in key and isinstance(value, dict)
            found[f"optimizer {number}, `{key}`"] = len(value) if counted else Same(value) if callable(value) else True
    return found


def _parts(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the trainer and what it is made of: strategy, plugins, connectors and loops."""
    public = ("strategy", "precision_plugin", "accelerator", "fit_loop", "validate_loop")
    waiting = [("trainer", trainer), *((f"trainer.{name}", getattr(trainer, name)) for name in public)]
    seen = set()
    while waiting:
        path, part = waiting.pop(0)
        if id(part) in seen or path.count(".") > 4:
            continue
        seen.add(id(part))
        yield path, part
        for key, value in vars(part).items():
            if key == "_data_fetcher":
                continue  # it leads to the same loaders once more, under other names
            module = type(value).__module__.partition(".")[0]
            theirs = module in ("lightning", "pytorch_lightning", "lightning_fabric") and hasattr(value, "__dict__")
            if theirs and not isinstance(value, (pl.LightningModule, pl.LightningDataModule, pl.Callback, type)):
                waiting.append((f"{path}.{key}", value))


class _Opaque:
    """A value that is compared, and too long to be written."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opaque) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return "another"


def _shallow(value: Any) -> Any:
    if isinstance(value, _PRIMITIVE):
        return value
    return Same(value) if callable(value) else True


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Return what is left, gone or different, each in words."""
    found = set()
    for key in before.keys() | after.keys():
        where, _, what = key.partition(", ")
        if what != "class" and (f"{where}, class" in before) != (f"{where}, class" in after):
            continue  # part of something that is left or gone as a whole
        if what == "class" and where.startswith("class "):
            continue  # of a submodule, which is reported
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if old is _ABSENT:
            found.add(f"{key} is left" if new is True or isinstance(new, _Opaque) else f"{key} is left ({new})")
        elif new is _ABSENT:
            found.add(f"{key} is gone")
        elif old != new:
            found.add(f"{key} was changed" if isinstance(new, _Opaque) else f"{key} was {old}, now {new}")
    return found
