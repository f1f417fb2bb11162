# SPDX-License-Identifier: Apache-2.0
"""Bilevel optimisation: hyperparameters tuned by gradient while the model trains."""

from fulgurite.plugin import family_exports

__getattr__, __dir__ = family_exports(__name__, __path__)
