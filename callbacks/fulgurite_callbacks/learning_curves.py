# SPDX-License-Identifier: Apache-2.0
"""A picture of what is logged that is redrawn while training runs."""

from __future__ import annotations

import fnmatch
import logging
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_callbacks import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

MAX_POINTS = 4000
"""Points kept per metric; a longer history loses every second point."""

MAX_PANELS = 24
"""Quantities in one picture."""

_STAGES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_COLOURS = {"train": pictures.COLOURS[0], "val": pictures.COLOURS[1], "test": pictures.COLOURS[2]}


class LearningCurves(pl.Callback):
    """Keep a PNG file with the curves of everything that is logged, redrawn while training runs.

    One value per metric and epoch is drawn (and one per validation, if it runs more often), against optimizer steps. Metrics
    whose names differ only by their stage share an axis: `train_loss` and `val_loss`, `train/loss` and `val/loss`. Metrics
    that are logged per step only show their last value of the epoch. The file is replaced at once, on rank zero only, and
    also drawn at the end of training, after an exception and after an interrupt. The history is saved in checkpoints, so
    that a resumed run continues the picture (of the checkpoint's own epoch it lacks what the module itself logs in
    `on_train_epoch_end`); of more than 4000 points per metric every second is dropped.

    Args:
        path: The PNG file; by default `learning_curves.png` in the trainer's `default_root_dir`.
        metrics: Patterns of the names to draw, with `*`, `?` and `[...]`; by default all.
        every_n_epochs: Epochs between two drawings; raise it if drawing takes longer than an epoch.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LearningCurves("curves.png", metrics=["*loss*"])])  # doctest: +SKIP
    """

    def __init__(
        self, path: str | Path | None = None, metrics: Sequence[str] = ("*",), every_n_epochs: int = 1
    ) -> None:
        if path is not None and (not isinstance(path, str | Path) or Path(path).suffix.lower() != ".png"):
            raise ValueError(
                f"Expected `path` of LearningCurves to be a file name that ends in .png, but got {path!r}."
            )
        if isinstance(metrics, str) or not metrics or not all(isinstance(m, str) and m for m in metrics):
            raise ValueError(
                f"Expected `metrics` of LearningCurves to be a list of patterns such as ['val_*'], but got {metrics!r}."
            )
        if isinstance(every_n_epochs, bool) or not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(
                f"Expected `every_n_epochs` of LearningCurves to be a positive integer, but got {every_n_epochs!r}."
            )
        self.path = path
        self.metrics = tuple(metrics)
        self.every_n_epochs = every_n_epochs
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._seen: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """The file and the patterns tell two instances apart."""
        path = None if self.path is None else str(self.path)
        return self._generate_state_key(module=type(self).__module__, path=path, metrics=self.metrics)

    def file(self, trainer: pl.Trainer) -> Path:
        """Return the path of the picture."""
        return Path(trainer.default_root_dir) / "learning_curves.png" if self.path is None else Path(self.path)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two instances that would write one file, and a folder that cannot be made."""
        if str(getattr(stage, "value", stage)) != "fit":
            return
        mine = self.file(trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, LearningCurves) and other is not self and other.file(trainer) == mine:
                raise RefusedError(f"Expected each LearningCurves to have its own `path`, but got {str(mine)!r} twice.")
        if trainer.is_global_zero:
            try:
                mine.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FulguriteError(
                    f"Expected `path` of LearningCurves to lie in a folder that can be made, but got {str(mine)!r} "
                    f"({error}): choose another."
                ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what lies ahead: everything in a new training, nothing in one that goes on."""
        now = trainer.global_step
        kept = {name: [point for point in points if 0 < point[0] <= now] for name, points in self.history.items()}
        self.history = {name: points for name, points in kept.items() if points}
        self._seen = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record what was logged late in the epoch that is over, and draw."""
        self._record(trainer)
        if self.history and trainer.current_epoch % self.every_n_epochs == 0:
            self.draw(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record a validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the epoch, in time for a checkpoint; modules and later callbacks may still log."""
        self._record(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the last epoch and draw."""
        self._record(trainer)
        self.draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw what is known; reading more metrics could wait for a rank that is gone."""
        if trainer.state.fn != "fit" or not self.history:
            return
        try:
            self.draw(trainer)
        except Exception:
            log.warning("LearningCurves could not draw after the exception.", exc_info=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"version": 1, "history": {name: list(points) for name, points in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = {name: [(s, v) for s, v in points] for name, points in state_dict["history"].items()}

    def _record(self, trainer: pl.Trainer) -> None:
        """Add the values that are new since the last call; on all ranks, for reading them may be a collective."""
        for name, value in trainer.callback_metrics.items():
            previous = self._seen.get(name)
            # The memory of `previous` is still held: equal addresses mean that it is the same old value.
            if previous is not None and previous.data_ptr() == value.data_ptr():
                continue
            self._seen[name] = value
            points = self.history.setdefault(name, [])
            point = (trainer.global_step, float(value))
            if points and points[-1][0] == point[0]:
                points[-1] = point
            else:
                points.append(point)
            if len(points) > MAX_POINTS:
                del points[1:-1:2]

    def draw(self, trainer: pl.Trainer) -> None:
        """Draw the history, on rank zero."""
        from fulgurite.report.pictures import new_figure

        if not trainer.is_global_zero:
            return
        panels = group(choose(self.history, self.metrics))
        shown = dict(list(panels.items())[:MAX_PANELS])
        columns = max(1, min(3, math.ceil(math.sqrt(len(shown)))))
        rows = max(1, math.ceil(len(shown) / columns))
        figure = new_figure(max(5.0, 4.1 * columns), 2.9 * rows + 0.4, "white")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, (quantity, names) in zip(grid, shown.items(), strict=False):
            draw_panel(axes, quantity, {label: self.history[name] for label, name in names.items()})
        if not shown:
            self._explain(grid[0])
        left_out = len(panels) - len(shown)
        note = f"  ({left_out} more quantities: choose with `metrics`)" if left_out > 0 else ""
        title = f"Epochs: {trainer.current_epoch}, optimizer steps: {trainer.global_step:,}{note}"
        figure.suptitle(title, fontsize=10.5, color=pictures.TEXT, x=0.01, ha="left")
        pictures.save(figure, self.file(trainer))

    def _explain(self, axes: Axes) -> None:
        """Say on the picture why it is empty."""
        text = "Nothing has been logged yet."
        if self.history:
            known = list(self.history)
            text = f"Nothing that is logged matches {', '.join(self.metrics)}.\nLogged: {', '.join(known[:8])}"
            text += f" and {len(known) - 8} more" if len(known) > 8 else ""
        text = "\n".join(textwrap.fill(line, 70) for line in text.replace("$", r"\$").splitlines())
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9.5, color=pictures.TEXT, transform=axes.transAxes)


def choose(names: Iterable[str], patterns: Sequence[str]) -> dict[str, str]:
    """Return the names to draw, under the name that the user logged: Lightning's `_epoch` values, not its `_step` ones.

    Example:
        >>> choose(["loss", "loss_step", "loss_epoch", "lr"], ["loss*"])
        {'loss': 'loss_epoch'}
    """
    known = set(names)
    chosen: dict[str, str] = {}
    for name in names:
        base = name.removesuffix("_epoch").removesuffix("_step")
        forked = f"{base}_epoch" in known and f"{base}_step" in known
        drawn = f"{base}_epoch" if forked else name
        if name not in ("epoch", "step") and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            chosen.setdefault(base if forked else name, drawn)
    return chosen


def group(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the chosen names by quantity and label, where the label is the stage that is taken out of the name.

    Example:
        >>> group({"train_loss": "train_loss_epoch", "val_loss": "val_loss", "lr": "lr"})
        {'loss': {'train': 'train_loss_epoch', 'val': 'val_loss'}, 'lr': {'': 'lr'}}
    """
    panels: dict[str, dict[str, str]] = {}
    for name, drawn in names.items():
        quantity, label = split_stage(name)
        labels = panels.setdefault(quantity, {})
        labels[name if label in labels else label] = drawn
    return panels


def split_stage(name: str) -> tuple[str, str]:
    """Return quantity and label of a metric: the stage, and the number of the dataloader.

    Example:
        >>> split_stage("calibration/val_ece/dataloader_idx_1")
        ('calibration/ece', 'val 1')
    """
    base, _, loader = name.partition("/dataloader_idx_")
    parts = re.split(r"([/_.\-])", base)
    place = next((i for i, part in enumerate(parts) if part.lower() in _STAGES), None)
    if place is None or len(parts) == 1:
        return base, loader
    stage = _STAGES[parts[place].lower()]
    start = max(0, place - 1) if place == len(parts) - 1 else place
    del parts[start : start + 2]
    return "".join(parts), f"{stage} {loader}".strip()


def draw_panel(axes: Axes, quantity: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Draw the curves of one quantity; what is not finite leaves a gap."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    order = ("train", "val", "test")
    curves = dict(sorted(curves.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    spare = [colour for colour in pictures.COLOURS if colour not in {_COLOURS[x] for x in curves if x in _COLOURS}]
    for number, (label, points) in enumerate(curves.items()):
        steps = [step for step, _ in points]
        values = [value if math.isfinite(value) else math.nan for _, value in points]
        colour = _COLOURS.get(label) or (spare[number % len(spare)] if label else pictures.NEUTRAL)
        axes.plot(
            steps,
            values,
            color=colour,
            linewidth=1.7,
            marker="o" if len(points) <= 12 else None,
            markersize=3.5,
            linestyle="--" if label == "train" else "-",
            label=f"{pictures.plain(label)}  {points[-1][1]:.4g}".strip(),
        )
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("optimizer steps")
    pictures.finish(axes, quantity)
    axes.legend(loc="best", frameon=False, fontsize=8.5, labelcolor=pictures.TEXT)
