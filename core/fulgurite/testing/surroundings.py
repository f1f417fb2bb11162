# SPDX-License-Identifier: Apache-2.0
"""The settings of the process: what a training must leave as it was, and how the kit puts it back after each check."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _python_dispatch
from torch.utils.data import DataLoader

_DEVICES = ("cpu", "cuda")
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
_PATCHED_CLASSES = (nn.Module, pl.LightningModule, pl.Trainer, DataLoader, Tensor)
_HOOK_HOLDERS = tuple(sys.modules[name] for name in ("torch.nn.modules.module", "torch.optim.optimizer"))


@dataclass(frozen=True)
class Setting:
    """Something of the process that a training can change.

    Args:
        read: Returns its value.
        write: Puts a value back; None if that cannot be done.
    """

    read: Callable[[], Any]
    write: Callable[[Any], Any] | None = None


def _write_autocast(value: tuple[Any, ...]) -> None:
    for device, (enabled, dtype) in zip(_DEVICES, value, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _write_cudnn(value: tuple[bool, ...]) -> None:
    torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = value


def _shrink_modes(stack: Callable[[], list[Any]], pop: Callable[[], Any]) -> Callable[[int], None]:
    def write(length: int) -> None:
        while len(stack()) > length:
            pop()

    return write


def _global_hooks() -> dict[str, tuple[Any, ...]]:
    """Return the keys of hooks on all modules and on all optimizers."""
    return {
        name: tuple(hooks)
        for holder in _HOOK_HOLDERS
        for name, hooks in vars(holder).items()
        if name.startswith("_global_") and isinstance(hooks, dict)
    }


def _write_global_hooks(value: Mapping[str, tuple[Any, ...]]) -> None:
    for holder in _HOOK_HOLDERS:
        for name, keys in value.items():
            hooks = getattr(holder, name, {})
            for key in set(hooks) - set(keys):
                del hooks[key]


def _functions(holder: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(holder).items() if callable(value) and not isinstance(value, type)}


def _put_functions(holder: Any) -> Callable[[Mapping[str, Any]], None]:
    def write(value: Mapping[str, Any]) -> None:
        for name in _functions(holder).keys() - value.keys():
            delattr(holder, name)
        for name, function in value.items():
            if vars(holder).get(name) is not function:
                setattr(holder, name, function)

    return write


def _write_environment(value: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(value):
        del os.environ[name]
    os.environ.update(value)


def _write_signals(value: Mapping[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in value.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _write_filters(value: list[Any]) -> None:
    if warnings.filters != value:
        warnings.resetwarnings()
        warnings.filters[:] = value  # type: ignore[index]


def _function_modes() -> list[Any]:
    return torch.overrides._get_current_function_mode_stack()


def _open_figures() -> int:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return 0 if pyplot is None else len(pyplot.get_fignums())


SETTINGS: dict[str, Setting] = {
    "number of function modes": Setting(
        lambda: len(_function_modes()), _shrink_modes(_function_modes, torch.overrides._pop_mode)
    ),
    "number of dispatch modes": Setting(
        lambda: len(_python_dispatch._get_current_dispatch_mode_stack()),
        _shrink_modes(_python_dispatch._get_current_dispatch_mode_stack, _python_dispatch._pop_mode),
    ),
    "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": Setting(
        lambda: str(torch.get_default_device()), lambda name: torch.set_default_device(None if name == "cpu" else name)
    ),
    "deterministic algorithms": Setting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "gradient mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "inference mode": Setting(torch.is_inference_mode_enabled),
    "anomaly detection": Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "autocast": Setting(
        lambda: tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES), _write_autocast
    ),
    "number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "matmul precision": Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cuDNN (enabled, benchmark, deterministic)": Setting(
        lambda: (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        _write_cudnn,
    ),
    "hooks on saved tensors": Setting(
        lambda: torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        lambda present: None if present else torch._C._autograd._pop_saved_tensors_default_hooks(),
    ),
    "hooks on all modules or optimizers": Setting(_global_hooks, _write_global_hooks),
    "torch.nn.functional": Setting(lambda: _functions(F), _put_functions(F)),
    **{cls.__name__: Setting(lambda cls=cls: _functions(cls), _put_functions(cls)) for cls in _PATCHED_CLASSES},  # type: ignore[misc]
    "warnings filters": Setting(lambda: list(warnings.filters), _write_filters),
    "environment variables": Setting(lambda: dict(os.environ), _write_environment),
    "working directory": Setting(os.getcwd, os.chdir),
    "signal handlers": Setting(lambda: {number: signal.getsignal(number) for number in _SIGNALS}, _write_signals),
    "sys.excepthook": Setting(lambda: sys.excepthook, lambda value: setattr(sys, "excepthook", value)),
    "standard output": Setting(lambda: sys.stdout, lambda value: setattr(sys, "stdout", value)),
    "standard error": Setting(lambda: sys.stderr, lambda value: setattr(sys, "stderr", value)),
    "garbage collection": Setting(gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
    "recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "logging level of the root": Setting(lambda: logging.root.level, logging.root.setLevel),
    "logging handlers of the root": Setting(
        lambda: list(logging.root.handlers), lambda value: logging.root.handlers.__setitem__(slice(None), value)
    ),
    "NumPy's error handling": Setting(np.geterr, lambda value: np.seterr(**value)),
    "process group": Setting(lambda: torch.distributed.is_available() and torch.distributed.is_initialized()),
    "number of open figures": Setting(_open_figures),
}
"""Everything of the process that a training must leave as it was, by the words in which a report calls it.

Modes stand first: while one is left, it may see to it that the others cannot be read.
"""


def settings() -> dict[str, Any]:
    """Return the present value of every setting."""
    return {name: setting.read() for name, setting in SETTINGS.items()}


def changed_settings(before: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that are not as they were, each with what has become of it."""
    changes = {}
    for name, old in before.items():
        new = SETTINGS[name].read()
        if old != new:
            changes[name] = f"{name}: {_difference(old, new)}"
    return changes


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, Mapping):
        names = sorted(str(key) for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return f"{', '.join(names)} changed"
    if isinstance(old, list):
        return f"{len(old)} before, {len(new)} after" if len(old) != len(new) else "an entry was replaced"
    old, new = (getattr(value, "__qualname__", value) for value in (old, new))
    return f"{old} before, {new} after"


@contextmanager
def preserved() -> Iterator[None]:
    """Put back, at the end of a block, every setting that it has changed."""
    before = settings()
    try:
        yield
    finally:
        for name, value in before.items():
            setting = SETTINGS[name]
            if setting.write is not None and setting.read() != value:
                setting.write(value)


def helpers() -> dict[int | None, str]:
    """Return the threads and child processes that are running, by their number."""
    threads = {thread.ident: f"thread {thread.name}" for thread in threading.enumerate() if thread.is_alive()}
    return threads | _child_processes()


def _child_processes() -> dict[int | None, str]:
    """Return Python's own children, and on Linux those that were started in any other way."""
    found = {process.pid: f"process {process.name}" for process in multiprocessing.active_children()}
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread or the child has ended
            for number in map(int, path.read_text().split()):
                ended = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not ended and number != tracker:
                    found.setdefault(number, f"process {number}")
    return found


def helpers_since(before: Mapping[int | None, str], seconds: float = 0.5) -> list[str]:
    """Return those that were not running before, once they have had a moment to end."""
    end = time.monotonic() + seconds
    while True:
        left = [name for number, name in helpers().items() if number not in before]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


def fingerprint(value: Any, depth: int = 6) -> Any:
    """Return something that differs when a value differs: contents of tensors and containers, identity of the rest."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return (str(value.dtype), tuple(value.shape), hashlib.sha1(raw).hexdigest())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (str(value.dtype), value.shape, hashlib.sha1(value.tobytes()).hexdigest())
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value).__name__, repr(value))
    if depth and isinstance(value, Mapping):
        return tuple((repr(key), fingerprint(entry, depth - 1)) for key, entry in value.items())
    if depth and isinstance(value, (list, tuple)):
        return tuple(fingerprint(entry, depth - 1) for entry in value)
    if depth and isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    return id(value)
