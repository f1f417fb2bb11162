# SPDX-License-Identifier: Apache-2.0
"""What one training run of a comparison left behind: plain data that is appended to `runs.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class CurvePoint:
    """One value of a metric during training.

    Args:
        step: Optimizer steps made so far.
        epoch: Epoch in which it was measured, from 0.
        seconds: Seconds of training so far, validation not counted.
        value: The value.
    """

    step: int
    epoch: int
    seconds: float
    value: float


@dataclass(frozen=True)
class RunRecord:
    """The outcome of one run: one setting, one variant, one seed.

    Args:
        setting: Name of the setting (data and model); `"main"` in a plain comparison.
        variant: Name of the variant; the reference is called `"baseline"`.
        seed: The seed.
        status: `"ok"`, or `"failed"` with the reason in `error`.
        error: The last line of the error and the path of the log, if the run failed.
        metrics: Final value of every metric, by its logged name.
        curves: The history of every metric that was logged during training and validation.
        step_seconds: Median seconds of one training step; None if no step was timed.
        seconds: Seconds of the whole run.
        peak_memory: Peak memory in bytes: of the device if there is one, else of the process above its start.
        fingerprint: Hash of everything that determines the run; a record is reused only if it agrees.
    """

    setting: str
    variant: str
    seed: int
    status: Literal["ok", "failed"]
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, tuple[CurvePoint, ...]] = field(default_factory=dict)
    step_seconds: float | None = None
    seconds: float = 0.0
    peak_memory: int | None = None
    fingerprint: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the run inside a comparison."""
        return (self.setting, self.variant, self.seed)

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> RunRecord:
        """Read what `to_json` wrote."""
        data: dict[str, Any] = json.loads(line)
        data["curves"] = {name: tuple(CurvePoint(**p) for p in points) for name, points in data["curves"].items()}
        return cls(**data)


def append_record(path: Path, record: RunRecord) -> None:
    """Append one record to a `.jsonl` file and force it to disk, so that a kill loses at most the run in progress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + record.to_json() + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[RunRecord]:
    """Read a `.jsonl` file of records; the newest of equal keys wins, a line torn by a kill is skipped."""
    if not path.exists():
        return []
    records: dict[tuple[str, str, int], RunRecord] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = RunRecord.from_json(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        records[record.key] = record
    return list(records.values())


def select(records: Iterable[RunRecord], setting: str, variant: str) -> dict[int, RunRecord]:
    """Return the successful runs of one variant, by seed."""
    return {r.seed: r for r in records if r.setting == setting and r.variant == variant and r.status == "ok"}
