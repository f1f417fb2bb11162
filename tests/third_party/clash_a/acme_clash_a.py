# SPDX-License-Identifier: Apache-2.0
"""One of two plugins that claim the same name."""

import os
from pathlib import Path

from fulgurite.plugin import Component, Plugin

if "THIRD_PARTY_MARKER" in os.environ:
    Path(os.environ["THIRD_PARTY_MARKER"]).write_text(__name__)

plugin = Plugin("twice", "probes", "Clashes.", (Component("Twice", "acme_clash_a:Twice", "callback"),))


class Twice:
    """Something that could be used if there were no clash."""
