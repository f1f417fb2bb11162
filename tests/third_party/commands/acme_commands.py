# SPDX-License-Identifier: Apache-2.0
"""A command that another distribution adds."""

import os
import sys
from pathlib import Path

from fulgurite.errors import FulguriteError

if "THIRD_PARTY_MARKER" in os.environ:
    Path(os.environ["THIRD_PARTY_MARKER"]).touch()


def weigh(argv: list[str]) -> int:
    """Say what was given; return how much it was."""
    if "--heavy" in argv:
        raise FulguriteError("That is too heavy. Give less.")
    sys.stdout.write(f"weighed {argv}\n")
    return len(argv)
