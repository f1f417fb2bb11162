# SPDX-License-Identifier: Apache-2.0
"""Measures of calibration and of the ranking of confidences that torchmetrics lacks, as functions and as metrics.

The area under the risk-coverage curve is that of Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for
Deep Neural Classifiers", ICLR 2019, with tied confidences averaged over their orderings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.compute import normalize_logits_if_needed
from torchmetrics.utilities.data import dim_zero_cat


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return the area under the risk-coverage curve, a fraction in [0, 1]; papers print it times 1000.

    With the examples sorted by falling confidence, risk_k is the share of errors among the first k, and the area is
    the mean of risk_k over k = 1..n. Among examples of equal confidence the order is arbitrary, so risk_k is its
    expectation over all orders; the result does not depend on the order of the input.

    Args:
        confidence: Confidence in each prediction, usually the largest probability [N].
        correct: Whether each prediction is right, as booleans or 0 and 1 [N].

    Returns:
        A scalar in float64 (float32 on devices without it); nan if `N` is 0 or a confidence is nan.

    Raises:
        ValueError: If the two are not vectors of one length.

    Example:
        >>> aurc(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        tensor(0.2778, dtype=torch.float64)
    """
    errors, counts = _cumulative_errors(confidence, correct)
    return _nan_unless_ranked((errors / counts).mean(), confidence)


def excess_aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return the AURC minus that of a perfect ranking with the same e errors, a fraction; papers print it times 1000.

    A perfect ranking puts every error last, which leaves (1/n) sum_{i=1..e} i / (n - e + i). What remains measures
    the ranking alone: 0 is perfect, whatever the accuracy.

    Args:
        confidence: Confidence in each prediction, usually the largest probability [N].
        correct: Whether each prediction is right, as booleans or 0 and 1 [N].

    Returns:
        A scalar in float64 (float32 on devices without it); nan if `N` is 0 or a confidence is nan.

    Raises:
        ValueError: If the two are not vectors of one length.

    Example:
        >>> excess_aurc(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        tensor(0.1667, dtype=torch.float64)
    """
    errors, counts = _cumulative_errors(confidence, correct)
    right = correct.sum(dtype=errors.dtype)
    unavoidable = (counts - right).clamp(min=0.0)
    return _nan_unless_ranked(((errors - unavoidable) / counts).mean(), confidence)


def _cumulative_errors(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expected errors among the k most confident, and k, for k = 1..N: [N] and [N]."""
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(
            "Expected `confidence` and `correct` to be vectors of one length [N], "
            f"but got shapes {tuple(confidence.shape)} and {tuple(correct.shape)}."
        )
    dtype = torch.float32 if confidence.device.type == "mps" else torch.float64
    ordered, order = confidence.detach().sort(descending=True)
    wrong = 1 - correct[order].to(dtype)
    _, block, sizes = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    wrong_in_block = torch.zeros(sizes.shape, dtype=dtype, device=wrong.device).index_add_(0, block, wrong)
    # Exact whole numbers up to the start of each block, then a straight line through the block.
    before = wrong_in_block.cumsum(0) - wrong_in_block
    counts = torch.arange(1, len(wrong) + 1, dtype=dtype, device=wrong.device)
    place = counts - (sizes.cumsum(0) - sizes)[block]
    return before[block] + wrong_in_block[block] * place / sizes[block], counts


def _nan_unless_ranked(value: Tensor, confidence: Tensor) -> Tensor:
    return torch.where(confidence.isnan().any(), torch.nan, value)


class AURC(Metric):
    """Area under the risk-coverage curve of the largest probability, a fraction; papers print it times 1000.

    Low means that the errors are few and carry the lowest confidences. See `aurc` for the formula and for ties. It
    keeps two numbers per example, in the metric's dtype (`set_dtype` raises float32 to float64).

    `update(preds, target)` takes probabilities or logits [N, C] (logits are recognised by values outside [0, 1], as
    everywhere in torchmetrics) and class indices [N].

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = AURC()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 0, 0]))
        >>> metric.compute()
        tensor(0.2778)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Both in the metric's dtype: torchmetrics stands in an empty tensor of it for a rank without data.
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: `preds` [N, C], `target` [N]."""
        confidence, predicted = _probabilities(preds, target).max(dim=1)
        self.confidence.append(confidence.to(self.dtype))
        self.correct.append((predicted == target).to(self.dtype))

    def compute(self) -> Tensor:
        """Return the measure over everything seen, in the metric's dtype; raises ValueError if that is nothing."""
        return aurc(dim_zero_cat(self.confidence), dim_zero_cat(self.correct)).to(self.dtype)


class ExcessAURC(AURC):
    """AURC minus that of a perfect ranking of the same predictions, a fraction; papers print it times 1000.

    It measures how well confidence separates errors from hits, whatever the accuracy. See `excess_aurc` for the
    formula, and `AURC` for what `update` takes and what is kept.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = ExcessAURC()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 0, 0]))
        >>> metric.compute()
        tensor(0.1667)
    """

    def compute(self) -> Tensor:
        """Return the measure over everything seen, in the metric's dtype; raises ValueError if that is nothing."""
        return excess_aurc(dim_zero_cat(self.confidence), dim_zero_cat(self.correct)).to(self.dtype)


class _MeanPerExample(Metric):
    """Mean over all examples of a value that `_values` gives for each."""

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: `preds` [N, C], `target` [N]."""
        values = self._values(preds, target)
        self.total = self.total + values.sum().to(self.total.dtype)
        self.count = self.count + len(values)

    def compute(self) -> Tensor:
        """Return the mean over everything seen; nan if that is nothing."""
        return self.total / self.count

    @staticmethod
    def _values(preds: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError


class BrierScore(_MeanPerExample):
    """Multiclass Brier score: the mean over examples of sum_c (p_c - y_c)^2, in [0, 2].

    `update(preds, target)` takes probabilities or logits [N, C] (logits are recognised by values outside [0, 1], as
    everywhere in torchmetrics) and class indices [N].

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = BrierScore()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.3125)
    """

    plot_upper_bound = 2.0

    @staticmethod
    def _values(preds: Tensor, target: Tensor) -> Tensor:
        probabilities = _probabilities(preds, target)
        truth = torch.nn.functional.one_hot(target, probabilities.shape[1])
        return (probabilities - truth).square().sum(dim=1)


class NegativeLogLikelihood(_MeanPerExample):
    """Mean of -log p of the true class, in nats.

    `update(preds, target)` takes probabilities or logits [N, C] (logits are recognised by values outside [0, 1], as
    everywhere in torchmetrics) and class indices [N]. Logits are exact; a probability that is 0 in its dtype counts
    as the smallest normal number of that dtype, so that the mean stays finite.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.6931)
    """

    @staticmethod
    def _values(preds: Tensor, target: Tensor) -> Tensor:
        preds = _checked(preds, target)
        are_logits = ((preds < 0) | (preds > 1)).any()
        logs = preds.clamp(min=torch.finfo(preds.dtype).tiny).log()
        logs = torch.where(are_logits, preds.log_softmax(dim=1), logs)
        return -logs.gather(1, target.unsqueeze(1)).squeeze(1)


def _probabilities(preds: Tensor, target: Tensor) -> Tensor:
    return normalize_logits_if_needed(_checked(preds, target), "softmax")


def _checked(preds: Tensor, target: Tensor) -> Tensor:
    """Return `preds` in at least float32, after checking the shapes."""
    if preds.ndim != 2 or target.ndim != 1 or len(preds) != len(target) or not preds.is_floating_point():
        raise ValueError(
            "Expected `preds` to be probabilities or logits [N, C] and `target` class indices [N], "
            f"but got {preds.dtype} {tuple(preds.shape)} and {target.dtype} {tuple(target.shape)}."
        )
    return preds.float() if preds.dtype.itemsize < 4 else preds
