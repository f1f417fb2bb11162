# SPDX-License-Identifier: Apache-2.0
"""The machine that measures."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import lightning.pytorch as pl
import torch


def machine() -> dict[str, str]:
    """Return the facts about this machine and its software without which a time means nothing."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    facts = {
        "CPU": _cpu(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "torch threads": str(torch.get_num_threads()),
        "load average at the start": load,
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def device() -> torch.device:
    """Return the device that a Trainer uses by default."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def synchronize() -> None:
    """Wait until an accelerator, if there is one, has done what was asked of it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
