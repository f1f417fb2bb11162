# SPDX-License-Identifier: Apache-2.0
"""A component that imports what it needs at once."""

import a_solver_that_is_not_installed  # noqa: F401


class AtImport:
    """Never reached."""
