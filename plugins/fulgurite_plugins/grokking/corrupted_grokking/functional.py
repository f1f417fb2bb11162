# SPDX-License-Identifier: Apache-2.0
r"""What Doshi, Das, He, Gromov (2024) measure: spread of a neuron's weights, the curve of pruning, the phase of a training.

| symbol | meaning | argument |
|---|---|---|
| $w$, $\tilde w$ | weights of a neuron over the inputs; what they are in a basis | `weights`; `basis` |
| $K$ | number of components in the basis | |
| $\xi$ | fraction of corrupted labels | `corrupted` |
| $N$, $C$ | neurons; classes | |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Basis = Literal["fourier"] | Tensor | Callable[[Tensor], Tensor]
Phase = Literal["coexistence", "partial inversion", "full inversion", "memorisation", "forgetting", "confusion"]


def spectrum(weights: Tensor, basis: Basis = "fourier") -> Tensor:
    """Return the magnitudes `[..., K]` of weights `[..., d]` in a basis.

    Args:
        weights: Weights of neurons, each over the same `d` inputs.
        basis: `"fourier"`: the real Fourier transform, `K = d // 2 + 1`, so that a frequency and its negative count once.
            A tensor `[K, d]` of basis vectors. A function from `[..., d]` to `[..., K]`.

    Raises:
        ValueError: If a tensor does not have `d` columns.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if isinstance(basis, str):
        return torch.fft.rfft(weights).abs()
    if isinstance(basis, Tensor):
        if basis.ndim != 2 or basis.shape[1] != weights.shape[-1]:
            raise ValueError(
                f"Expected `basis` to have the shape [K, {weights.shape[-1]}] for neurons with {weights.shape[-1]} inputs, "
                f"but got {list(basis.shape)}."
            )
        return (weights @ basis.to(weights).mT).abs()
    return basis(weights).abs()


def inverse_participation_ratio(weights: Tensor, r: float = 2, basis: Basis = "fourier") -> Tensor:
    r"""Return $\sum_j (|\tilde w_j| / \|\tilde w\|_2)^{2r}$: 1 for a single component, $K^{1-r}$ for a flat spectrum.

    It does not depend on scale or sign; in the Fourier basis, which keeps the constant component, not on cyclic shifts
    either.

    Args:
        weights: `[..., d]`.
        r: The power, above 1; the paper has 2.
        basis: See `spectrum`.

    Returns:
        `[...]`; 0 where all weights are zero, of which there is no ratio.

    Raises:
        ValueError: If `r` is not above 1, or the basis does not fit.

    Example:
        >>> inverse_participation_ratio(torch.tensor([1.0, 0.0, 0.0]))
        tensor(0.5000)
    """
    if not r > 1:
        raise ValueError(f"Expected `r` to be above 1, but got {r!r}.")
    magnitudes = spectrum(weights, basis)
    largest = magnitudes.amax(-1, keepdim=True)
    scaled = magnitudes / torch.where(largest > 0, largest, 1)  # neither squares nor powers leave the range of the type
    powers = scaled.square()
    total = powers.sum(-1)
    return powers.pow(r).sum(-1) / torch.where(total > 0, total, 1).pow(r)


def gini(values: Tensor) -> Tensor:
    r"""Return the Gini coefficient $\sum_{ij} |x_i - x_j| / (2 n^2 \bar x)$: 0 for equal values, $1 - 1/n$ for a single one.

    Args:
        values: Non-negative `[..., n]`, such as a `spectrum`.

    Returns:
        `[...]`; 0 where all values are zero.

    Example:
        >>> gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        tensor(0.7500)
    """
    n = values.shape[-1]
    ordered = values.to(torch.promote_types(values.dtype, torch.float32)).sort(-1).values
    ranks = torch.arange(1 - n, n, 2, device=values.device, dtype=ordered.dtype)  # 2 i - n - 1 for i = 1 ... n
    total = ordered.sum(-1)
    return (ordered * ranks).sum(-1) / torch.where(total > 0, n * total, 1)


def neuron_scores(
    incoming: Sequence[Tensor], outgoing: Sequence[Tensor], r: float = 2, basis: Basis = "fourier"
) -> Tensor:
    """Return the score of every neuron `[N]`: the mean IPR of its weights in all layers.

    Args:
        incoming: Weights `[N, d]` of the layers that lead to the neurons.
        outgoing: Weights `[C, N]` of the layers that lead away from them.
        r: The power of the ratio.
        basis: See `spectrum`; used for all layers.

    Raises:
        ValueError: If there are no layers, or the basis does not fit one of them.
    """
    rows = [*incoming, *(weight.mT for weight in outgoing)]
    if not rows:
        raise ValueError("Expected `incoming` and `outgoing` to have at least one weight, but got none.")
    return torch.stack([inverse_participation_ratio(row, r, basis) for row in rows]).mean(0)


def prune_curve(hidden: Tensor, outgoing: Tensor, order: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a network predicts when 0, 1, ... N - 1 neurons are removed in an order: `[N, B]`.

    Removed neurons contribute nothing to `hidden @ outgoing.T + bias`. The logits are added up from the last neuron on, so
    that the whole curve takes `N` updates of rank one instead of `N` forward passes, and nothing cancels.

    Args:
        hidden: What the outgoing layer is given `[B, N]`, in evaluation mode.
        outgoing: Its weight `[C, N]`.
        order: The neurons in the order of their removal `[N]`.
        bias: Its bias `[C]`.

    Returns:
        Row `q` has the predicted classes with the first `q` neurons of the order removed.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    n = hidden.shape[1]
    if outgoing.shape[1] != n or len(order) != n:
        raise ValueError(
            f"Expected `hidden`, `outgoing` and `order` to have the same neurons, but got {n}, {outgoing.shape[1]} and "
            f"{len(order)}."
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    columns, rows = (side.detach().mT[order].to(dtype).contiguous() for side in (hidden, outgoing))
    logits = torch.zeros(len(hidden), len(outgoing), dtype=dtype, device=hidden.device)
    if bias is not None:
        logits += bias.detach()
    predictions = torch.empty(n, len(hidden), dtype=torch.int64, device=hidden.device)
    for q in reversed(range(n)):
        logits.addr_(columns[q], rows[q])
        if logits.device.type == "cpu":
            logits.numpy().argmax(1, out=predictions[q].numpy())  # torch takes seven times as long for it
        else:
            torch.argmax(logits, dim=1, out=predictions[q])
    return predictions


def split_accuracies(
    predictions: Tensor, labels: Tensor, true_labels: Tensor, is_corrupted: Tensor
) -> dict[str, Tensor]:
    """Return the accuracies on training examples some of whose labels are corrupted.

    Args:
        predictions: Predicted classes `[..., B]`.
        labels: The labels that are trained on `[B]`.
        true_labels: The true labels `[B]`.
        is_corrupted: Mask `[B]`.

    Returns:
        `[...]` for each of `"train"`, all labels as they are; `"as_labelled"` and `"true"`, the corrupted examples
        compared with their wrong and with their true labels; `"clean"`, the others. NaN for a group without examples.
    """
    fits, right = predictions == labels, predictions == true_labels
    corrupted, clean = is_corrupted.to(torch.float64), (~is_corrupted).to(torch.float64)
    return {
        "train": fits.double().mean(-1),
        "as_labelled": (fits * corrupted).sum(-1) / corrupted.sum(),
        "true": (right * corrupted).sum(-1) / corrupted.sum(),
        "clean": (fits * clean).sum(-1) / clean.sum(),
    }


def classify_phase(train: float, test: float, corrupted: float, chance: float, tolerance: float = 0.05) -> Phase:
    r"""Name the phase of a training from its accuracies on the labels as they are and on the test set.

    With $\xi$ corrupted labels and everything within the tolerance: `"coexistence"`: both 1. `"full inversion"`: test 1,
    training $1 - \xi$, so that no wrong label was kept. `"partial inversion"`: test 1, training between. `"memorisation"`:
    training 1 and test below 1. `"forgetting"`: both not above chance. `"confusion"`: everything else.

    Args:
        train: Training accuracy on the labels as they are.
        test: Test accuracy.
        corrupted: The fraction $\xi$ of wrong labels; of labels that were redrawn from all $p$ classes, one in $p$ is right.
        chance: Accuracy of guessing, one over the number of classes.
        tolerance: What counts as equal.

    Raises:
        ValueError: If an argument is outside [0, 1].

    Example:
        >>> classify_phase(0.80, 1.0, corrupted=0.2, chance=1 / 97)
        'full inversion'
    """
    given = {"train": train, "test": test, "corrupted": corrupted, "chance": chance, "tolerance": tolerance}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"Expected `{name}` of classify_phase to be in [0, 1], but got {value!r}.")
    fits = train >= 1 - tolerance
    if test >= 1 - tolerance:
        if fits:
            return "coexistence"
        if train > 1 - corrupted + tolerance:
            return "partial inversion"
        return "full inversion" if train >= 1 - corrupted - tolerance else "confusion"
    if fits:
        return "memorisation"
    return "forgetting" if max(train, test) <= chance + tolerance else "confusion"


def inversion_times(
    epochs: Sequence[int], train: Sequence[float], test: Sequence[float], corrupted: float, tolerance: float = 0.05
) -> tuple[int | None, int | None]:
    r"""Return when a training grokked, and when it then dropped the corrupted labels.

    Args:
        epochs: When the accuracies were measured, ascending.
        train: Training accuracies on the labels as they are.
        test: Test accuracies.
        corrupted: The fraction $\xi$ of wrong labels.
        tolerance: What counts as equal.

    Returns:
        The first epoch with a test accuracy of 1, within the tolerance; and the first at which the training accuracy
        moreover has come down to $1 - \xi$, within the tolerance. None for what has not happened.
    """
    grokked = inverted = None
    fitted = False
    for epoch, fit, right in zip(epochs, train, test, strict=True):
        fitted = fitted or fit > 1 - corrupted + tolerance
        if right < 1 - tolerance:
            continue
        grokked = epoch if grokked is None else grokked
        if inverted is None and fitted and fit <= 1 - corrupted + tolerance:
            inverted = epoch
    return grokked, inverted
