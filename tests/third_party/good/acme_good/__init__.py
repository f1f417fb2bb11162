# SPDX-License-Identifier: Apache-2.0
"""A plugin of another distribution; it leaves a mark when it is imported."""

import os
from pathlib import Path

from fulgurite.plugin import Component, Plugin

if "THIRD_PARTY_MARKER" in os.environ:
    Path(os.environ["THIRD_PARTY_MARKER"]).write_text(__name__)

plugin = Plugin(
    name="acme",
    family="probes",
    summary="Counts batches.",
    components=(
        Component("Counter", "acme_good.parts:Counter", "callback", "Counts training batches."),
        Component("Digits", "acme_good.parts:Counter", "datamodule", "Has the name of a built-in component."),
    ),
    card="CARD.md",
)
