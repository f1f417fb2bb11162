# SPDX-License-Identifier: Apache-2.0
"""A plugin with an extra that is not installed."""

from fulgurite.plugin import Component, Plugin

plugin = Plugin(
    name="extras",
    family="probes",
    summary="Needs an extra.",
    components=(
        Component("AtImport", "acme_extras_part:AtImport", "module"),
        Component("AtUse", "acme_extras:AtUse", "module"),
    ),
    extras=("solver",),
)


class AtUse:
    """Imports what it needs when it is constructed."""

    def __init__(self) -> None:
        import a_solver_that_is_not_installed  # noqa: F401
