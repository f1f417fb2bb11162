# SPDX-License-Identifier: Apache-2.0
"""What every test is given."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment_as_found() -> Iterator[None]:
    """Put the environment back: Lightning keeps its seeds there, and the next test would train with them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
