# SPDX-License-Identifier: Apache-2.0
"""Distillation: soft targets from the model itself, its past or another model."""

from fulgurite.plugin import family_exports

__getattr__, __dir__ = family_exports(__name__, __path__)
