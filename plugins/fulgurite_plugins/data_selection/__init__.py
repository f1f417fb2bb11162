# SPDX-License-Identifier: Apache-2.0
"""Data selection: which training examples matter, which can be left out, which are labelled wrongly."""

from fulgurite.plugin import family_exports

__getattr__, __dir__ = family_exports(__name__, __path__)
