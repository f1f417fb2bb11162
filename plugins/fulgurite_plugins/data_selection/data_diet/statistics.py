# SPDX-License-Identifier: Apache-2.0
"""How far scores agree, and how well they find wrong labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from scipy.stats import rankdata, spearmanr
from torch import Tensor

from fulgurite_plugins.data_selection.data_diet.functional import average_scores


def auc(scores: Tensor, wrong: Tensor) -> float:
    """Return the area under the ROC curve: how often a wrong label scores above a right one, ties counting half.

    Args:
        scores: `[N]`; infinite ones stand above all others.
        wrong: Boolean `[N]`.

    Example:
        >>> import torch
        >>> auc(torch.tensor([0.1, 0.9, 0.2]), torch.tensor([False, True, False]))
        1.0
    """
    positives, negatives = int(wrong.sum()), int((~wrong).sum())
    if not positives or not negatives:
        return math.nan
    ranks = rankdata(scores.numpy())
    return float((ranks[wrong.numpy()].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def precision_and_recall(scores: Tensor, wrong: Tensor, flagged: int) -> tuple[float, float]:
    """Return precision and recall of the labels that are suspected: those of the `flagged` highest scores.

    Args:
        scores: `[N]`.
        wrong: Boolean `[N]`.
        flagged: How many are suspected, at least 1.
    """
    found = int(wrong[scores.sort(stable=True).indices[len(scores) - flagged :]].sum())
    return found / flagged, found / max(1, int(wrong.sum()))


def rank_agreement(runs: Sequence[Tensor]) -> tuple[float, float]:
    """Return Spearman's correlation of two single runs (mean over pairs), and of the means of two halves of the runs.

    NaN where there are too few runs.
    """
    if len(runs) < 2:
        return math.nan, math.nan
    pairs = [float(spearmanr(a, b).statistic) for a, b in itertools.combinations(runs, 2)]
    half = len(runs) // 2
    halves = average_scores(runs[:half]), average_scores(runs[half : 2 * half])
    return sum(pairs) / len(pairs), float(spearmanr(*halves).statistic)
