# SPDX-License-Identifier: Apache-2.0
"""Grokking: generalisation long after the training set has been fitted, and what brings it about."""

from fulgurite.plugin import family_exports

__getattr__, __dir__ = family_exports(__name__, __path__)
