# SPDX-License-Identifier: Apache-2.0
"""A distribution whose entry point names a dictionary."""

plugin = {"name": "untyped"}
