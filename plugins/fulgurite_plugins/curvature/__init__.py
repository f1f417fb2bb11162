# SPDX-License-Identifier: Apache-2.0
"""Curvature of the loss: second-order optimizers, pruning, learning rates and stability."""

from fulgurite.plugin import family_exports

__getattr__, __dir__ = family_exports(__name__, __path__)
