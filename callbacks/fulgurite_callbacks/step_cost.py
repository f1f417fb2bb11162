# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, and which intervention takes how much of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from fulgurite.splice import Splice
from fulgurite.timing import StepTimer, peak_memory


class StepCost(StepTimer):
    """Measure the median training step, the share that each intervention takes of it, and peak memory.

    At the end of every training epoch it logs `cost/step_seconds` (the median so far), `cost/peak_memory` (bytes) and, for
    each intervention, `cost/share_NAME`: the seconds in its hooks divided by the seconds in training steps. Only the hooks
    that `Intervention` adds are counted, not those that every Lightning callback has. At the end of `fit` it prints a table
    on rank zero; `results` holds the same for programs.

    Nothing waits for the device in a step. On an accelerator the device is synchronised only where a sequence of steps
    begins and ends, and the time of a step is the mean in between; what is measured in the hooks is the time of the host,
    which only queues the work there, so that a share says less than it costs.

    Args:
        table: Whether to print the table.

    Attributes:
        results: Empty before the first epoch has ended; then `device`, `step_seconds`, `training_seconds`, `peak_memory`,
            and the fractions `shares` (by intervention) and `hook_shares` (by intervention and hook).

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[StepCost()])  # doctest: +SKIP
    """

    def __init__(self, table: bool = True) -> None:
        if not isinstance(table, bool):
            raise ValueError(f"Expected `table` of StepCost to be a bool, but got {table!r}.")
        super().__init__()
        self.table = table
        self.results: dict[str, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the interventions timed; the splice was laid in `setup`."""
        super().on_fit_start(trainer, pl_module)
        self.results = {}
        splice = Splice.of(trainer)
        if splice is not None:
            splice.timed = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what is known so far."""
        super().on_train_epoch_end(trainer, pl_module)
        self.results = self._measure(trainer, pl_module)
        values = {name: self.results[name] for name in ("step_seconds", "peak_memory")}
        values.update({f"share_{name}": share for name, share in self.results["shares"].items()})
        for name, value in values.items():
            if value is not None:
                pl_module.log(f"cost/{name}", float(value), sync_dist=True, batch_size=1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table, when the progress bar is gone."""
        super().on_fit_end(trainer, pl_module)
        if self.table and self.results and trainer.is_global_zero:
            self.print_table()

    def print_table(self) -> None:
        """Print `results`.

        Raises:
            RuntimeError: If no epoch has ended yet.
        """
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from fulgurite.report import format_bytes, format_seconds

        if not self.results:
            raise RuntimeError("Expected `results` of StepCost to be filled, but no epoch has ended: call `fit` first.")
        step, memory = self.results["step_seconds"], self.results["peak_memory"]
        on_device = not self.results["device"].startswith("cpu")
        table = Table(title="Cost of a training step", title_justify="left", header_style="bold")
        for name in ("part", "time", "share"):
            table.add_column(name, justify="left" if name == "part" else "right")
        if step is not None:
            table.add_row("step (median)", format_seconds(step), "100 %")
            for name, hooks in self.results["hook_shares"].items():
                for hook, share in hooks.items():
                    part = Text(f"  {name}.{hook}{' (host only)' if on_device else ''}")
                    table.add_row(part, format_seconds(share * step), f"{100 * share:.1f} %")
        if memory is not None:
            table.add_row(f"peak memory of the {'device' if on_device else 'process'}", format_bytes(memory), "")
        Console().print(table)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        splice, total = Splice.of(trainer), self.training_seconds
        hook_shares: dict[str, dict[str, float]] = {}
        if splice is not None:
            hook_shares = {name: {} for name in splice.names.values()}
            for (name, hook), seconds in splice.seconds.items():
                hook_shares[name][hook] = seconds / total if total else 0.0
        return {
            "device": str(module.device),
            "step_seconds": self.median_seconds,
            "training_seconds": total,
            "peak_memory": peak_memory(module.device),
            "shares": {name: sum(hooks.values()) for name, hooks in hook_shares.items()},
            "hook_shares": hook_shares,
        }
