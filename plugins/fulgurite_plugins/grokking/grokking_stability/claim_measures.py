# SPDX-License-Identifier: Apache-2.0
"""What the claim trains on, and when something first happens in its trainings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fulgurite.measurement import undisturbed
from fulgurite_datamodules.dataset import collate
from fulgurite_datamodules.modular_arithmetic import ModularArithmetic
from fulgurite_plugins.grokking.grokking_stability.monitor import NumericalStabilityMonitor


class _Passes(Sampler[int]):
    """All examples in their order, several times."""

    def __init__(self, size: int, passes: int) -> None:
        self.size = size
        self.passes = passes

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.passes):
            yield from range(self.size)

    def __len__(self) -> int:
        return self.size * self.passes


class ModularPasses(ModularArithmetic):
    """Modular addition in full batches, of which several make one epoch of the Trainer: its epochs cost more than a step.

    Args:
        modulus: The modulus.
        train_fraction: Fraction of the pairs to train on.
        passes: Full batches in an epoch of the Trainer.
    """

    def __init__(self, modulus: int = 59, train_fraction: float = 0.5, passes: int = 25) -> None:
        super().__init__(modulus=modulus, train_fraction=train_fraction)
        self.passes = passes

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of full batches."""
        self.setup()
        size = len(self.train_dataset)
        return DataLoader(self.train_dataset, size, sampler=_Passes(size, self.passes), collate_fn=collate)


class GrokkingTimes(pl.Callback):
    """Log the accuracy on held-out pairs at certain steps, and when it first was above 95 %.

    It logs `grokking/acc_at_STEP`; `grokking/step_95`, the first step that was looked at after which it was above 95 %,
    the last step plus one until then; and `grokking/weight_norm`, the length of all weights.

    Args:
        steps: Steps at which the accuracy is kept.
        every_n_steps: Steps between two looks.
    """

    def __init__(self, steps: tuple[int, ...] = (100, 200, 600), every_n_steps: int = 10) -> None:
        self.steps = tuple(steps)
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self._first = max(self.steps) + 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look, if it is time."""
        step = trainer.global_step
        if step % self.every_n_steps:
            return
        data = trainer.datamodule.val_dataset  # type: ignore[attr-defined]
        inputs, targets = data.inputs if data.transform is None else data.transform(data.inputs), data.targets
        with undisturbed(pl_module) as model, torch.no_grad():
            accuracy = (model(inputs).argmax(1) == targets).double().mean()
            norm = torch.stack([p.double().square().sum() for p in model.parameters()]).sum().sqrt()
        if accuracy > 0.95:
            self._first = min(self._first, step)
        found = {"step_95": torch.tensor(float(self._first)), "weight_norm": norm}
        if step in self.steps:
            found[f"acc_at_{step}"] = accuracy
        pl_module.log_dict({f"grokking/{name}": value.float() for name, value in found.items()})


class CollapseTimes(NumericalStabilityMonitor):
    """The monitor, over all examples, and when something was first found.

    Beside what the monitor logs: `stability/collapse_begins` and `stability/collapse_40`, the first step after which any, or
    more than 40 %, of the examples had collapsed in `dtype`; `stability/zero_gradients_begin`, the first after which any
    gradient for the logit of the own class was exactly 0; each the last step plus one until then.

    Args:
        dtype: The precision of the loss.
        last_step: The last step of training.
        every_n_steps: Steps between two looks.
    """

    def __init__(self, dtype: str, last_step: int, every_n_steps: int = 10) -> None:
        super().__init__(every_n_steps, (dtype,), max_samples=None)
        self.dtype = dtype
        self.last_step = last_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        super().on_train_start(trainer, pl_module)
        self._first: dict[str, int] = {}

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Return what would be logged now, by name."""
        found = super().measure(trainer, module)
        collapse = found[f"collapse_{self.dtype}"]
        for name, happened in (
            ("collapse_begins", collapse > 0),
            ("collapse_40", collapse > 0.4),
            ("zero_gradients_begin", found["zero_gradients"] > 0),
        ):
            if happened:
                self._first.setdefault(name, trainer.global_step)
            found[name] = torch.tensor(float(self._first.get(name, self.last_step + 1)))
        found["zero_gradients_later_by"] = found["zero_gradients_begin"] - found["collapse_begins"]
        return found | {"collapse": collapse}
