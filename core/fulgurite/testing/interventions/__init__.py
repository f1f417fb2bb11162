# SPDX-License-Identifier: Apache-2.0
"""The checks of interventions; those on traces and state hold for ordinary callbacks too."""

from fulgurite.testing.interventions import batches, costs, loops, precision, ranks, state, traces

__all__ = ["batches", "costs", "loops", "precision", "ranks", "state", "traces"]
