# SPDX-License-Identifier: Apache-2.0
"""Fulgurite: the methods of research papers on regularisation as plugins for PyTorch Lightning.

Everything public is imported when it is first used, so that `import fulgurite` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Capabilities": "intervention",
    "Classification": "tasks",
    "Component": "plugin",
    "FulguriteError": "errors",
    "Intervention": "intervention",
    "LossCall": "losses",
    "Paper": "plugin",
    "Plugin": "plugin",
    "Regression": "tasks",
    "SampleMemory": "samples",
    "SampleTracker": "samples",
    "Schedule": "schedule",
    "Splice": "splice",
    "Step": "intervention",
    "Task": "tasks",
    "TrainingSubset": "samples",
    "explain": "explanation",
}

__all__ = [
    "Capabilities",
    "Classification",
    "Component",
    "FulguriteError",
    "Intervention",
    "LossCall",
    "Paper",
    "Plugin",
    "Regression",
    "SampleMemory",
    "SampleTracker",
    "Schedule",
    "Splice",
    "Step",
    "Task",
    "TrainingSubset",
    "explain",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"fulgurite.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'fulgurite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
