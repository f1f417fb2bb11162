# SPDX-License-Identifier: Apache-2.0
"""How the pictures that callbacks draw are titled and written; their look is that of `fulgurite.report.pictures`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fulgurite.files import write_whole
from fulgurite.report.pictures import LIGHT, dress, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

TEXT = LIGHT.text
NEUTRAL, *COLOURS = LIGHT.colours


def finish(axes: Axes, title: str = "") -> None:
    """Give axes the look of the report, and a title at the left."""
    dress(axes)
    axes.set_title(plain(title, 44), fontsize=10, color=TEXT, loc="left")


def plain(name: str, limit: int = 30) -> str:
    """Return a name, shortened in the middle, that is not read as mathematics."""
    short = name if len(name) <= limit else f"{name[: limit // 2]}…{name[len(name) + 1 + limit // 2 - limit :]}"
    return short.replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Replace the PNG file at once; a full disk does not end a training."""
    try:
        write_whole(path, png(figure, 110))
    except OSError as error:
        log.warning("The picture %s could not be written: %s", path, error)
