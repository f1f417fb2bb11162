# SPDX-License-Identifier: Apache-2.0
"""The papers, one package each, grouped in families."""
