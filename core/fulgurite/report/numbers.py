# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them, and which direction of a metric is better."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fulgurite.statistics import Direction, PairedRatio

# fmt: off
_LOWER = frozenset((
    "ace", "aurc", "brier", "ce", "cer", "eaurc", "ece", "err", "error", "fid", "loss", "mae", "mce", "mse", "nll",
    "nrmse", "perplexity", "ppl", "regret", "rmse", "wer",
))
_HIGHER = frozenset((
    "acc", "accuracy", "ap", "auc", "auprc", "auroc", "dice", "f1", "iou", "map", "miou", "precision", "psnr", "r2",
    "recall", "ssim", "top1", "top5",
))
# fmt: on
STAGE = re.compile(r"^(?P<stage>train|val|valid|validation|test)(?P<separator>[/_.\-])")
TIMES = "\N{MULTIPLICATION SIGN}"


def better_direction(metric: str) -> Direction | None:
    """Return whether lower or higher values of a metric are better, judged by its name; None if it does not tell.

    The last telling word decides: `val/f1_loss` is a loss.

    Example:
        >>> better_direction("val/MulticlassF1Score"), better_direction("test_nll"), better_direction("norm")
        ('higher', 'lower', None)
    """
    for word in reversed(re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", metric)):
        if word.lower() in _LOWER:
            return "lower"
        if word.lower() in _HIGHER:
            return "higher"
    return None


def format_number(value: float, digits: int = 4) -> str:
    """Return a number to so many significant digits, with an exponent only below 0.001 and from a million up.

    Example:
        >>> format_number(0.123456), format_number(97.5), format_number(1.5e-7)
        ('0.1235', '97.50', '1.500e-07')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def format_spread(mean: float, std: float) -> str:
    """Return `mean ± std`, both to the second significant digit of the spread.

    Example:
        >>> format_spread(0.68312, 0.01234), format_spread(0.5, float("nan"))
        ('0.683 ± 0.012', '0.5000')
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        return format_number(mean)
    return " ± ".join(_aligned((mean, std), std))


def format_interval(mean: float, low: float, high: float) -> str:
    """Return `mean [low, high]` with signs, to the second significant digit of half the interval's width.

    Example:
        >>> format_interval(-0.065, -0.0832, -0.0468)
        '-0.065 [-0.083, -0.047]'
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{'+' * (mean > 0)}{format_number(mean)}"
    centre, *ends = _aligned((mean, low, high), (high - low) / 2, sign="+")
    return f"{centre} [{', '.join(ends)}]"


def format_ratio(ratio: PairedRatio) -> str:
    """Return the ratio after a multiplication sign, and its interval, with two or three decimals."""
    if not math.isfinite(ratio.high):
        return f"{TIMES}{ratio.ratio:.2f}"
    decimals = 2 if ratio.high - ratio.low >= 0.02 else 3
    return f"{TIMES}{ratio.ratio:.{decimals}f} [{ratio.low:.{decimals}f}, {ratio.high:.{decimals}f}]"


def format_seconds(seconds: float) -> str:
    """Return a duration in µs, ms, s, min or h to three significant digits."""
    for limit, scale, unit in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < limit:
            return f"{format_number(seconds / scale, 3)} {unit}"
    return f"{format_number(seconds / 3600, 3)} h"


def format_bytes(size: float) -> str:
    """Return a size in KiB, MiB or GiB to three significant digits."""
    power = 1 if size < 2**20 else 2 if size < 2**30 else 3
    return f"{format_number(size / 1024**power, 3)} {'KMG'[power - 1]}iB"


def _aligned(values: Sequence[float], uncertainty: float, sign: str = "") -> list[str]:
    """Return the values with as many decimals as the uncertainty justifies, and with one exponent if any."""
    size = max(map(abs, values))
    power = math.floor(math.log10(size)) if size and not 1e-3 <= size < 1e6 else 0
    uncertainty, values = uncertainty / 10.0**power, [value / 10.0**power for value in values]
    decimals = min(max(1 - math.floor(math.log10(uncertainty)), 0), 8) if uncertainty > 0 else 4
    exponent = f"e{power:+03d}" if power else ""
    return [f"{value:{sign}.{decimals}f}{exponent}" for value in values]
