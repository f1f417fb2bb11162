# SPDX-License-Identifier: Apache-2.0
"""Reparametrisation: what the weights themselves are made of, or held to."""

from fulgurite.plugin import family_exports

__getattr__, __dir__ = family_exports(__name__, __path__)
