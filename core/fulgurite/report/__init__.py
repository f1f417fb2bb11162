# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: tables for the terminal, one HTML page that opens offline, PNG, CSV, JSON and Markdown."""

from fulgurite.report.comparison import Row, comparison_table, default_metrics, grid_table, terminal_tables
from fulgurite.report.numbers import (
    better_direction,
    format_bytes,
    format_interval,
    format_number,
    format_ratio,
    format_seconds,
    format_spread,
)
from fulgurite.report.page import write_report

__all__ = [
    "Row",
    "better_direction",
    "comparison_table",
    "default_metrics",
    "format_bytes",
    "format_interval",
    "format_number",
    "format_ratio",
    "format_seconds",
    "format_spread",
    "grid_table",
    "terminal_tables",
    "write_report",
]
