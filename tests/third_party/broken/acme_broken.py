# SPDX-License-Identifier: Apache-2.0
"""A plugin that cannot be imported here."""

raise RuntimeError("acme needs a device that is not there")
