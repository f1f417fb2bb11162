# SPDX-License-Identifier: Apache-2.0
"""`python -m fulgurite`: the same as the command `fulgurite`."""

import sys

from fulgurite.cli import main

sys.exit(main())
