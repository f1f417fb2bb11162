# SPDX-License-Identifier: Apache-2.0
"""The script that tests start: `python -m tests.distributed.worker popen|spawn|fork FOLDER`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from tests.distributed.scenarios import SCENARIOS, memory


def main(start_method: str, folder: Path) -> None:
    """Run every scenario by script on each rank, or one of them in spawned or forked processes."""
    torch.set_num_threads(1)
    if start_method != "popen":
        torch.save(memory(2, folder, start_method), folder / "parent.pt")
        return
    for name, scenario in SCENARIOS.items():
        try:
            result = scenario(2, folder)
        except BaseException:
            result = {"traceback": traceback.format_exc()}
        torch.save(result, folder / f"{name}-{os.environ.get('LOCAL_RANK', 0)}.pt")
        if "traceback" in result:
            sys.exit(f"{name} failed:\n{result['traceback']}")  # the ranks are no longer in step


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
