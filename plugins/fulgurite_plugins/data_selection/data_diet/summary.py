# SPDX-License-Identifier: Apache-2.0
"""What is known of scores in numbers: how far runs agree, how the scores rank beside each other, what they find."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from scipy.stats import spearmanr
from torch import Tensor

from fulgurite_plugins.data_selection.data_diet.files import Scores
from fulgurite_plugins.data_selection.data_diet.statistics import auc, precision_and_recall, rank_agreement

if TYPE_CHECKING:
    from rich.table import Table


class Found(NamedTuple):
    """How well a score finds wrong labels: the area under the ROC curve, and the share of its suspects that are wrong.

    As many examples are suspected as have a wrong label, the highest scores first.
    """

    wrong: int
    auc: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Row:
    """One score.

    Args:
        name: Its name.
        single: Spearman's correlation of two single runs, mean over pairs; NaN of a single run.
        halves: Spearman's correlation of the means of two halves of the runs; NaN of a single run.
        ranks: Spearman's correlation with every score, in their order.
        found: How well it finds wrong labels; None if none are known.
    """

    name: str
    single: float
    halves: float
    ranks: tuple[float, ...]
    found: Found | None


def summarise(scores: Scores, parts: Sequence[Scores], wrong: Tensor | None) -> list[Row]:
    """Return a row per score.

    Args:
        scores: The means over runs.
        parts: The scores of each run.
        wrong: Which labels are wrong, boolean `[N]`; None if that is not known.
    """
    rows = []
    for name, values in scores.values.items():
        single, halves = rank_agreement([part.values[name] for part in parts])
        ranks = tuple(float(spearmanr(values, others).statistic) for others in scores.values.values())
        rows.append(Row(name, single, halves, ranks, _found(values, wrong)))
    return rows


def _found(values: Tensor, wrong: Tensor | None) -> Found | None:
    suspects = 0 if wrong is None else int(wrong.sum())
    if wrong is None or not suspects:
        return None
    return Found(suspects, auc(values, wrong), *precision_and_recall(values, wrong, suspects))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table as text, its heading first: to be printed or shown."""
    found = rows[0].found
    of_labels = ["AUC for wrong labels", f"precision of the {found.wrong} highest", "their recall"] if found else []
    ranks = [f"rank correlation with {row.name}" for row in rows] if len(rows) > 1 else []
    table = [["score", "two single runs agree", "two halves of the runs agree", *of_labels, *ranks]]
    for row in rows:
        line = [row.name, _text(row.single), _text(row.halves)]
        if row.found:
            line += [f"{row.found.auc:.3f}", *(f"{100 * share:.1f} %" for share in row.found[2:])]
        table.append(line + [_text(rank) for rank in row.ranks if ranks])
    return table


def _text(correlation: float) -> str:
    return "-" if math.isnan(correlation) else f"{correlation:.2f}"


def as_csv(rows: Sequence[Row]) -> str:
    """Return the table with all digits, for other programs; what is not known is left empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    ranks = [f"rank_{row.name}" for row in rows]
    writer.writerow(["score", "single_runs", "halves", *(f"labels_{name}" for name in Found._fields), *ranks])
    for row in rows:
        numbers = [row.single, row.halves, *(row.found or [math.nan] * len(Found._fields)), *row.ranks]
        writer.writerow([row.name, *("" if math.isnan(number) else repr(number) for number in numbers)])
    return stream.getvalue()


def printed(rows: Sequence[Row]) -> Table:
    """Return the table for a terminal, which is narrow: a column per score."""
    from rich.table import Table

    heading, *body = zip(*cells(rows), strict=True)
    table = Table(header_style="bold")
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in body:
        table.add_row(*row)
    return table
