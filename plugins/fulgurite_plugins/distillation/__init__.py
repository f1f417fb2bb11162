# SPDX-License-Identifier: Apache-2.0
"""Distillation: soft targets from the model itself, its past or another model."""

from typing import Any

_PAPERS = ("ps_kd",)


def __getattr__(name: str) -> Any:
    import importlib

    for paper in _PAPERS:
        module = importlib.import_module(f"{__name__}.{paper}")
        if name == paper or name in dir(module):
            return module if name == paper else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
