# SPDX-License-Identifier: Apache-2.0
"""A plugin with one component that is there, and two that are not."""

from fulgurite.plugin import Component, Plugin

plugin = Plugin(
    name="lying",
    family="probes",
    summary="Promises too much.",
    components=(
        Component("There", "acme_lying:There", "module"),
        Component("NoModule", "acme_lying.nowhere:NoModule", "module"),
        Component("NoName", "acme_lying:NoName", "module"),
    ),
    card="NOWHERE.md",
)


class There:
    """The one that is there."""
