# SPDX-License-Identifier: Apache-2.0
"""A plugin whose manifest has another name than its entry point."""

from fulgurite.plugin import Plugin

plugin = Plugin("other_name", "probes", "Has two names.", ())
