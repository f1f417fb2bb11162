# SPDX-License-Identifier: Apache-2.0
"""The course that hyperparameters took in a training: what is kept of it, the file that it is written to, its picture."""

from __future__ import annotations

import bisect
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.errors import FulguriteError
from fulgurite.files import write_whole

_FORMAT = "fulgurite self-tuning schedule"
_VERSION = 1


@dataclass
class Course:
    """Values of hyperparameters in their ranges, and scales of their perturbation, from certain optimizer updates on.

    Args:
        names: The hyperparameters.
        updates: After how many updates of the optimizer each row came into force, increasing; the first is 0.
        values: One row of `H` values for each.
        scales: One row of `H` scales for each, in the unconstrained coordinates in which hyperparameters are perturbed.
    """

    names: Sequence[str]
    updates: list[int] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    scales: list[list[float]] = field(default_factory=list)

    def append(self, updates: int, values: Sequence[float], scales: Sequence[float]) -> None:
        """Add a row; it replaces the last one if that came into force at the same update."""
        if self.updates and self.updates[-1] == updates:
            for rows in (self.updates, self.values, self.scales):
                rows.pop()
        self.updates.append(updates)
        self.values.append(list(values))
        self.scales.append(list(scales))

    def at(self, updates: int) -> list[float]:
        """Return the values `[H]` that were in force after so many updates; the last ones for ever."""
        return self.values[max(0, bisect.bisect_right(self.updates, updates) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the names, as tensors."""
        return {
            "updates": torch.tensor(self.updates, dtype=torch.long),
            "values": torch.tensor(self.values, dtype=torch.float64),
            "scales": torch.tensor(self.scales, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.updates = state["updates"].tolist()
        self.values, self.scales = state["values"].tolist(), state["scales"].tolist()

    def write(self, path: Path, hyperparameters: Sequence[Mapping[str, Any]]) -> None:
        """Write a JSON file that people can read, one row a line, and a picture beside it; both whole or not at all.

        Args:
            path: The file; the picture is called like it, with the suffix `.png`.
            hyperparameters: What the hyperparameters are, in plain data.
        """
        columns = ["update", *self.names, *(f"{name} scale" for name in self.names)]
        rows = [
            json.dumps([number, *(round(value, 6) for value in (*values, *scales))])
            for number, values, scales in zip(self.updates, self.values, self.scales, strict=True)
        ]
        described = [{**each, "range": [_in_json(end) for end in each["range"]]} for each in hyperparameters]
        head = {"format": _FORMAT, "version": _VERSION, "hyperparameters": described, "columns": columns}
        text = json.dumps(head, indent=2)[:-2] + ',\n  "rows": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
        write_whole(path, text)

    @classmethod
    def read(cls, path: Path) -> tuple[Course, list[dict[str, Any]]]:
        """Return the course and the hyperparameters of a file.

        Raises:
            FulguriteError: If there is no such file, or it is none of these.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FulguriteError(
                f"There is no schedule file {path}. SelfTuning writes one where it logs (`schedule_file`)."
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FulguriteError(f"Expected {path} to be a schedule file of SelfTuning, but got: {error}.") from None
        if not isinstance(found, dict) or found.get("format") != _FORMAT or found.get("version") != _VERSION:
            raise FulguriteError(
                f"Expected {path} to be a schedule file of SelfTuning (format {_FORMAT!r}, version {_VERSION}), but got "
                f"{ {key: found.get(key) for key in ('format', 'version')} if isinstance(found, dict) else type(found) }."
            )
        count = (len(found["columns"]) - 1) // 2
        course = cls(found["columns"][1 : count + 1])
        for number, *numbers in found["rows"]:
            course.append(number, numbers[:count], numbers[count:])
        return course, [{**each, "range": [float(end) for end in each["range"]]} for each in found["hyperparameters"]]

    def plot(self, path: Path) -> None:
        """Draw values and scales over the updates of the optimizer into a PNG file."""
        write_whole(path, draw({"": self}))


def _in_json(end: float) -> float | str:
    """Return an end of a range; JSON has no infinity."""
    return end if math.isfinite(end) else str(end)


def draw(courses: Mapping[str, Course]) -> bytes:
    """Return a PNG picture of one or more courses of the same hyperparameters: one panel each, and one of the scales.

    Args:
        courses: The courses by their name in the legend.
    """
    from matplotlib.figure import Figure

    names = next(iter(courses.values())).names
    panels = [*names, "scales"]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel("updates", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for number, (label, course) in enumerate(courses.items()):
        for i in range(len(names)):
            colour = f"C{number if len(courses) > 1 else i}"
            ends = {"drawstyle": "steps-post", "color": colour, "linewidth": 1.2}
            axes[i].plot(course.updates, [row[i] for row in course.values], label=label, **ends)
            axes[len(names)].plot(course.updates, [row[i] for row in course.scales], label=names[i], **ends)
    if len(courses) > 1:
        axes[0].legend(fontsize=8)
    elif len(names) <= 8:
        axes[len(names)].legend(fontsize=7)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
