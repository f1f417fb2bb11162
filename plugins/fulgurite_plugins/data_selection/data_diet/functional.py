# SPDX-License-Identifier: Apache-2.0
r"""The equations of Paul, Ganguli, Dziugaite (2021), Deep Learning on a Data Diet.

| symbol | meaning | argument |
|---|---|---|
| $p$, $y$ | softmax of the logits; one-hot label, or soft target | `logits`, `targets` |
| $C$, $N$, $R$ | number of classes, of training examples, of runs | |
| $\chi_t(x, y)$ | GraNd: mean over runs of the norm of the example's own gradient after $t$ steps | `grand` |
| EL2N | mean over runs of $\lVert p - y \rVert_2$ | `el2n` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import check_choice
from fulgurite.measurement import undisturbed
from fulgurite.per_example import cross_entropy, per_example_norms

Strategy = Literal["hardest", "easiest", "window", "random"]
NeverLearned = Literal["inf", "max"]


def el2n(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return EL2N, the length of the error vector $\lVert p - y \rVert_2$, in $[0, \sqrt 2]$ for hard labels.

    Args:
        logits: `[B, C]`; log-probabilities do as well.
        targets: Classes `[B]`, or probabilities `[B, C]`.

    Returns:
        One score per example `[B]`, in float32 at least.

    Raises:
        ValueError: If the shapes do not fit together, or a class is outside 0 ... C - 1.

    Example:
        >>> el2n(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.7071])
    """
    return _error(logits, targets).norm(dim=1)


def l1_error(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return the L1 norm of the error vector, which for hard labels is $2 (1 - p_y)$; arguments as of `el2n`.

    Raises:
        ValueError: If the shapes do not fit together, or a class is outside 0 ... C - 1.
    """
    return _error(logits, targets).abs().sum(dim=1)


def max_margin(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return $\max_{c \ne y} p_c - p_y$, positive where another class wins.

    Args:
        logits: `[B, C]`, with at least two classes.
        targets: Classes `[B]`; of probabilities `[B, C]` the most probable class is taken.

    Raises:
        ValueError: If the shapes do not fit together, or a class is outside 0 ... C - 1.
    """
    probabilities = _probabilities(logits)
    index = _classes(probabilities, targets).unsqueeze(1)
    others = probabilities.scatter(1, index, -math.inf).amax(dim=1)
    return others - probabilities.gather(1, index).squeeze(1)


def sum_margin(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return $\sum_{c \ne y} (p_c - p_y) = (1 - p_y) - (C - 1) p_y = 1 - C p_y$; arguments as of `max_margin`.

    Raises:
        ValueError: If the shapes do not fit together, or a class is outside 0 ... C - 1.
    """
    probabilities = _probabilities(logits)
    true = probabilities.gather(1, _classes(probabilities, targets).unsqueeze(1)).squeeze(1)
    return 1 - probabilities.shape[1] * true


def output_error(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Return $\lVert f - y \rVert_2$ of raw outputs, which stands in for EL2N in regression.

    Args:
        outputs: `[B, *]`.
        targets: Of the same shape.

    Returns:
        One score per example `[B]`.

    Raises:
        ValueError: If the shapes differ.
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"Expected `targets` of shape {list(outputs.shape)}, but got {list(targets.shape)}.")
    return (_precise(outputs) - targets).reshape(len(outputs), -1).norm(dim=1)


def grand(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    parameters: str | Sequence[str] = "all",
    chunk: int | Literal["auto"] = "auto",
) -> Tensor:
    r"""Return GraNd of one run, $\lVert \nabla_w \ell(x, y) \rVert_2$ per example, in evaluation mode.

    Modes, buffers, `.grad` and random streams of the model stay as they are.

    Args:
        model: Maps `inputs` to outputs.
        inputs: What the model takes, with the examples along dimension 0.
        targets: What the loss takes beside the outputs.
        loss: Gives one loss per example `[B]` from outputs and targets.
        parameters: `"all"` that require gradients, `"last_layer"`, or patterns of names.
        chunk: Examples per pass.

    Returns:
        One score per example `[B]`.
    """
    with undisturbed(model) as network:
        return per_example_norms(network, inputs, targets, loss, parameters=parameters, chunk=chunk)


def forgetting_counts(correct: Tensor) -> Tensor:
    """Count how often each example was classified correctly at one presentation and wrongly at the next.

    Before its first presentation an example counts as wrong.

    Args:
        correct: Boolean `[T, N]`: whether example n was correct at presentation t.

    Returns:
        Counts `[N]` as float32; infinity for examples that were never correct.

    Example:
        >>> forgetting_counts(torch.tensor([[0, 1, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]]).bool())
        tensor([1., 0., inf])
    """
    events = (correct[:-1] & ~correct[1:]).sum(dim=0).float()
    return torch.where(correct.any(dim=0), events, math.inf)


def average_scores(
    scores: Sequence[Tensor] | Tensor, never_learned: NeverLearned = "inf", presentations: int | None = None
) -> Tensor:
    """Return the mean over runs: of GraNd and EL2N the mean of norms, not the norm of a mean.

    Args:
        scores: One tensor `[N]` per run, or `[R, N]`.
        never_learned: What an infinite forgetting score counts: `"inf"` makes the mean infinite, as in the authors'
            code; `"max"` takes `presentations` for it.
        presentations: How often each example was presented in a run; for `"max"`.

    Returns:
        `[N]`.

    Raises:
        ValueError: If there is no run, the runs have different numbers of examples, a score is NaN, or `presentations`
            is missing.

    Example:
        >>> average_scores([torch.tensor([1.0, 2.0]), torch.tensor([3.0, float("inf")])], "max", presentations=4)
        tensor([2., 3.])
    """
    check_choice(never_learned, get_args(NeverLearned), "never_learned", "average_scores")
    runs = list(scores)
    if not runs or len({tuple(run.shape) for run in runs}) > 1 or runs[0].ndim != 1:
        shapes = [list(run.shape) for run in runs]
        raise ValueError(f"Expected scores of at least one run, all of one shape [N], but got shapes {shapes}.")
    for number, run in enumerate(runs):
        check_scores(run, f"run {number}")
    stacked = torch.stack([run if run.is_floating_point() else run.float() for run in runs])
    if never_learned == "max":
        if presentations is None:
            raise ValueError("Expected `presentations`, a number, together with never_learned='max', but got None.")
        stacked = torch.where(stacked == math.inf, presentations, stacked)
    return stacked.mean(dim=0)


def select_examples(
    scores: Tensor,
    keep: float | int,
    strategy: Strategy = "hardest",
    offset: float | int = 0,
    labels: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Return which examples to keep, in the order of the dataset.

    Examples are ordered by score, ascending, equal scores by index. `"hardest"` keeps the last of this order,
    `"easiest"` the first, `"window"` the positions from `offset` on; `"random"` looks at no score. The suspicious top d
    are left out by the window `offset=N - keep - d`.

    Args:
        scores: `[N]`; infinite ones may be among them.
        keep: How many: a fraction in (0, 1] (a float), or a number (an integer).
        strategy: Which of them.
        offset: Where the window begins: a fraction in [0, 1) (a float), or a number (an integer).
        labels: Classes `[N]`. If given, the choice is made in each class for itself: classes keep their proportions (quotas
            by largest remainder), and window and offset are those of the class.
        seed: Seed of `"random"`.

    Returns:
        Indices `[m]`, ascending.

    Raises:
        ValueError: If an argument is outside its range or a score is NaN; the first such examples are named.

    Example:
        >>> select_examples(torch.tensor([0.3, 0.1, 0.2, 0.4]), keep=2)
        tensor([0, 3])
    """
    check_choice(strategy, get_args(Strategy), "strategy", "select_examples")
    check_scores(scores, "`scores`")
    n = len(scores)
    kept = _number("keep", keep, n, lowest=1)
    start = _number("offset", offset, n, lowest=0) if strategy == "window" else 0
    if isinstance(keep, float) and isinstance(offset, float) and keep + offset <= 1 + 1e-9:
        start = min(start, n - kept)  # both were rounded up
    if start + kept > n:
        raise ValueError(f"Expected offset + keep to be at most the {n} examples, but got {start} + {kept}.")
    if strategy == "random":
        scores = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = torch.sort(scores.detach().cpu(), stable=True).indices
    if labels is None:
        return _slice(order, kept, start, strategy).sort().values
    if len(labels) != n:
        raise ValueError(f"Expected one label for each of the {n} scores, but got {len(labels)}.")
    own = labels.cpu()[order]
    groups = [order[own == label] for label in labels.unique().cpu()]
    quotas = _largest_remainder(kept, [len(group) for group in groups])
    starts = [min(round(start * len(group) / n), len(group) - q) for group, q in zip(groups, quotas, strict=True)]
    parts = [_slice(group, q, s, strategy) for group, q, s in zip(groups, quotas, starts, strict=True)]
    return torch.cat(parts).sort().values


def check_scores(scores: Tensor, name: str) -> None:
    """Raise ValueError unless scores have the shape `[N]` and none is NaN."""
    if scores.ndim != 1:
        raise ValueError(f"Expected {name} of shape [N], but got {list(scores.shape)}.")
    missing = scores.isnan().nonzero().flatten()
    if len(missing):
        raise ValueError(
            f"Expected {name} to have a score for each of {len(scores)} examples, but {len(missing)} are NaN, among them "
            f"those of the examples {', '.join(map(str, missing[:5].tolist()))}. A run that diverged gives such scores, and "
            f"so do forgetting events of examples that were never presented."
        )


def _slice(order: Tensor, kept: int, start: int, strategy: str) -> Tensor:
    start = {"hardest": len(order) - kept, "window": start}.get(strategy, 0)
    return order[start : start + kept]


def _largest_remainder(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide a total in proportion to sizes, in whole numbers."""
    n = sum(sizes)
    quotas = [total * size // n for size in sizes]
    remainders = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % n), i))
    for i in remainders[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def _number(name: str, value: float | int, n: int, lowest: int) -> int:
    """Turn a fraction or a number of examples into a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"Expected `{name}` to be a fraction (float) or a number of examples (int), but got {value!r}."
        )
    if isinstance(value, int):
        if not lowest <= value <= n:
            raise ValueError(
                f"Expected `{name}` to be a number between {lowest} and the {n} examples, or a fraction as a float, but got "
                f"{value}."
            )
        return value
    if not (0 < value <= 1 if lowest else 0 <= value < 1):
        interval = "(0, 1]" if lowest else "[0, 1)"
        raise ValueError(f"Expected `{name}` to be a fraction in {interval}, or an integer, but got {value!r}.")
    return max(lowest, round(value * n))


def _precise(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _probabilities(logits: Tensor) -> Tensor:
    if logits.ndim != 2:
        raise ValueError(f"Expected logits of shape [B, C], one row per example, but got {list(logits.shape)}.")
    return _precise(logits).softmax(dim=1)


def _classes(probabilities: Tensor, targets: Tensor) -> Tensor:
    classes = probabilities.shape[1]
    if targets.is_floating_point():
        if targets.shape != probabilities.shape:
            raise ValueError(
                f"Expected classes [{len(probabilities)}] or probabilities {list(probabilities.shape)} as targets, but got "
                f"values of shape {list(targets.shape)}. For regression, score with 'error', the length of f - y."
            )
        return targets.argmax(dim=1)
    if targets.shape != probabilities.shape[:1]:
        raise ValueError(f"Expected classes of shape [{len(probabilities)}], but got {list(targets.shape)}.")
    # On another device the check would wait for it; scoring checks all targets once.
    if targets.device.type == "cpu" and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(
            f"Expected classes in 0 ... {classes - 1}, as many as the model has outputs, but got values from "
            f"{int(targets.min())} to {int(targets.max())}."
        )
    return targets.long()


def _error(logits: Tensor, targets: Tensor) -> Tensor:
    """Return p - y `[B, C]`."""
    probabilities = _probabilities(logits)
    index = _classes(probabilities, targets)
    if targets.is_floating_point():
        return probabilities - targets
    return probabilities - F.one_hot(index, probabilities.shape[1]).to(probabilities.dtype)
