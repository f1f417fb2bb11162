# SPDX-License-Identifier: Apache-2.0
"""Example distributions of others, as they look when they are installed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fulgurite.registry import Registry, registry

HERE = Path(__file__).parent
_MAIN = """
import sys
from fulgurite.cli import main
status = main()
if "torch" in sys.modules:
    sys.stderr.write("torch was imported")
sys.exit(status)
"""


@contextmanager
def installed(*names: str) -> Iterator[Registry]:
    """Put example distributions on this process's path, with a fresh registry; take them away afterwards."""
    path, modules = sys.path[:], set(sys.modules)
    sys.path[:0] = [str(HERE / name) for name in names]
    importlib.invalidate_caches()
    registry.cache_clear()
    try:
        yield registry()
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name.startswith("acme_"):
                del sys.modules[name]
        registry.cache_clear()


def fulgurite(*argv: str, path: tuple[str | Path, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with folders on its path; names mean example distributions.

    Standard error ends with "torch was imported" if it was.
    """
    folders = [str(HERE / entry) for entry in path]  # an absolute path stays as it is
    known = {key: value for key, value in os.environ.items() if not key.startswith("FULGURITE")}
    search = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", _MAIN, *argv],
        env={**known, **environment, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
