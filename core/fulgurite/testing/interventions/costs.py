# SPDX-License-Identifier: Apache-2.0
"""What a method must not cost: graphs that stay alive, waiting for the device, compiling again and again."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fulgurite.errors import RefusedError
from fulgurite.testing.check import InapplicableError, check, expect, refused
from fulgurite.testing.lab import Lab, Plain, expect_close
from fulgurite.testing.processes import on_ranks


@check("intervention", quick=False)
def check_compile(lab: Lab) -> str | None:
    """With `torch.compile` the method trains otherwise, or causes a new compilation in every step."""
    from torch._dynamo.utils import counters

    lab.needs_default_module()
    few: dict[str, Any] = {"limit_train_batches": 2, "max_epochs": 3}
    eager = lab.fit([lab.make()], **few)
    torch._dynamo.reset()
    counters.clear()
    watch = _Graphs()
    module: Any = torch.compile(lab.module(), backend="aot_eager")
    intervention = lab.make()
    try:
        with torch._dynamo.config.patch(recompile_limit=64):  # the usual limit of 8 would end the compiling in silence
            compiled = lab.fit([intervention, watch], module=module, **few)
    except RefusedError as refusal:
        return refused(intervention, refusal)
    finally:
        torch._dynamo.reset()
    expect_close(eager, compiled, "the compiled module trains otherwise", lab.rounding)
    expect(watch.graphs[0] > 0, "nothing was compiled")
    expect(
        watch.graphs[-1] == watch.graphs[1], f"compiled again after the second epoch: graphs per epoch {watch.graphs}"
    )
    return None


class _Graphs(pl.Callback):
    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_train_epoch_end(self, *_: Any) -> None:
        from torch._dynamo.utils import counters

        self.graphs.append(counters["stats"]["unique_graphs"])


class _Token:
    """Lives as long as the graph of one forward pass."""


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, marks: list[Any]) -> Tensor:
        ctx.token = _Token()
        marks.append(weakref.ref(ctx.token))
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Marked(Plain):
    """Knows the graphs of its forward passes that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return _Mark.apply(self.network(inputs), self.marks)


@check("intervention")
def check_no_graph_is_kept(lab: Lab) -> None:
    """Memory grows from step to step, or graphs and activations of past batches stay alive."""
    module = _Marked() if lab.case.module is None else lab.module()
    watch = _Memory(module)
    with _only_new_objects():
        lab.fit([watch, lab.make()], module=module, loader=lab.loader(drop_last=True), max_epochs=4)
    expect(not watch.graphs, f"when a step begins, the graphs of {watch.graphs} earlier ones are still alive")
    tensors = watch.tensors[-1] - watch.tensors[-2]
    expect(tensors < watch.steps, f"an epoch of {watch.steps} steps leaves {tensors} more tensors alive")
    size = watch.bytes[-1] - watch.bytes[-2]
    expect(size < 32 * watch.steps, f"an epoch of {watch.steps} steps leaves {size} more bytes of tensors alive")


@contextmanager
def _only_new_objects() -> Iterator[None]:
    """Let the garbage collector look only at what is made from now on, which is a thousand times quicker."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Memory(pl.Callback):
    """Counts the tensors that are alive at the end of each epoch, and the graphs that are alive when a step begins."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.graphs = self.steps = 0
        self.tensors: list[int] = []
        self.bytes: list[int] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if isinstance(self.module, _Marked) and trainer.current_epoch == 3:
            gc.collect()
            self.graphs = max(self.graphs, sum(mark() is not None for mark in self.module.marks))

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        gc.collect()
        alive = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
        self.tensors.append(len(alive))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive if _is_plain(t)}
        self.bytes.append(sum(storages.values()))
        self.steps = trainer.num_training_batches


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


class _Waits(TorchFunctionMode):
    """Counts what would wait for an accelerator; `numpy()`, which refuses a tensor that is there, waits never."""

    WAITING = frozenset(
        (
            Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__float__,
            Tensor.__int__, Tensor.__index__, Tensor.__contains__, Tensor.__repr__, Tensor.is_nonzero, torch.is_nonzero,
            Tensor.nonzero, torch.nonzero, torch.argwhere, Tensor.argwhere, torch.masked_select, Tensor.masked_select,
            Tensor.unique, torch.unique, torch.unique_consecutive, Tensor.unique_consecutive, torch.bincount,
            Tensor.bincount, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose,
        )
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        waits = func in self.WAITING or (func is torch.where and len(args) == 1) or _masks(func, args)
        if waits and not _loads_data(sys._getframe(1)):
            self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


def _loads_data(frame: Any) -> bool:
    """Whether a call comes from a DataLoader, also one of the method's own: samplers and collation work on the host."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.utils.data"):
            return True
        frame = frame.f_back
    return False


def _masks(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call selects by a boolean mask: how much it selects, the device must tell."""
    if func is not Tensor.__getitem__:
        return False
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


class _Synchronisations(pl.Callback):
    """Lets CUDA say where a step waits for the device, in two steps of the second epoch."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx in (1, 2):
            self.stack = ExitStack()
            self.heard = self.stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self.stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx in (1, 2):
            self.stack.close()
            self.places.update(f"{w.filename}:{w.lineno}" for w in self.heard if "synchroniz" in str(w.message))


@check("intervention")
def check_no_synchronisation_on_a_gpu(lab: Lab) -> None:
    """On a GPU, a step waits for the device where only CUDA can tell: a copy that blocks, an operation of unknown size."""
    if torch.cuda.device_count() == 0:  # `is_available` could make it impossible to fork
        raise InapplicableError("needs a CUDA device")

    def train(rank: int) -> tuple[Counter[str], Counter[str]]:
        found = []
        for callbacks in ([], [lab.make()]):
            watch = _Synchronisations()
            lab.fit([watch, *callbacks], loader=lab.loader(batch_size=4), accelerator="gpu")
            found.append(watch.places)
        return found[0], found[1]

    ((without, places),) = on_ranks(train, ranks=1)  # another process, as this one could not be forked any more
    extra = places - without
    expect(not extra, f"in two steps it waits {extra.total()} times for the device, at {', '.join(sorted(extra))}")


@check("intervention")
def check_no_synchronisation(lab: Lab) -> None:
    """A step waits for the device (`.item()`, `.cpu()`, a tensor as a condition), which costs more than the method."""
    alone = lab.remember("waits without the component", lambda: _waits(lab, []))
    extra = _waits(lab, [lab.make()]) - alone
    names = ", ".join(sorted(extra))
    expect(not extra, f"in two steps it makes {extra.total()} calls that wait for the device: {names}")


def _waits(lab: Lab, callbacks: list[Any]) -> Counter[str]:
    """Return what waits in two steps of the second epoch, none of which begins or ends it."""
    mode = _Waits()
    with ExitStack() as stack:

        class Counted(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if trainer.current_epoch == 1 and batch_idx == 1:
                    stack.enter_context(mode)

            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                if trainer.current_epoch == 1 and batch_idx == 2:
                    stack.close()

        lab.fit([Counted(), *callbacks], loader=lab.loader(batch_size=4))
    return mode.calls
