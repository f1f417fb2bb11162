# SPDX-License-Identifier: Apache-2.0
"""Perpendicular gradients and StableMax as callbacks (Prieto, Barsbey, Mediano, Birdal, 2025)."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.losses import LossCall, soft_cross_entropy
from fulgurite.splice import Splice
from fulgurite_plugins.grokking.grokking_stability.functional import (
    PRECISIONS,
    precision,
    refuse_non_finite,
    stable_logits,
)
from fulgurite_plugins.grokking.grokking_stability.projection import (
    Scope,
    check_projection,
    perp_grad_,
    sharded_copies,
)
from fulgurite_plugins.grokking.grokking_stability.selection import left_out, listed

_UNCHANGED = "unchanged"

_REFUSED = {
    "fsdp": "it flattens parameters, so that weights cannot be told apart. Use ModelParallelStrategy (FSDP2).",
    "deepspeed": "its gradients cannot be seen before the step.",
}


class PerpGrad(Intervention):
    r"""Remove the part along the weights from every gradient, before clipping and the optimizer's step.

    For a weight tensor $w$ with gradient $g$, $g' = g - \frac{w \cdot g}{w \cdot w} w$, and the optimizer gets $g'$ with
    the length of $g$. It logs `perpgrad/parallel`, the number of tensors whose gradient was parallel to their weights, and
    was set to zero.

    Args:
        rescale: Whether gradients keep their length, as in the authors' code.
        scope: `"tensor"`: each parameter by itself. `"row"`: each row of it along its first dimension. `"global"`: all
            parameters of an optimizer as one vector.
        include: Patterns of names of parameters, separated by commas or as a list (`"encoder.*"`); None for all.
            `"vectors"` means all of fewer than two dimensions.
        exclude: Patterns of parameters to leave alone. `"vectors"` leaves biases and the gains of norms alone.
        eps: Added to the squared norm of the weights.
        start_step: Optimizer updates before the first one that is changed.
        skip_scalars: Whether to leave parameters of one entry alone. All of their gradient is along the weight: without
            it they stay where they are.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PerpGrad()])  # doctest: +SKIP
    """

    capabilities = Capabilities(refused_strategies=_REFUSED)

    def __init__(
        self,
        rescale: bool = True,
        scope: Scope = "tensor",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        eps: float = 1e-30,
        start_step: int = 0,
        skip_scalars: bool = True,
    ) -> None:
        check_projection(scope, eps, "PerpGrad")
        for name, value in (("rescale", rescale), ("skip_scalars", skip_scalars)):
            check_argument(isinstance(value, bool), name, "PerpGrad", "True or False", value)
        whole = isinstance(start_step, int) and not isinstance(start_step, bool) and start_step >= 0
        check_argument(whole, "start_step", "PerpGrad", "a whole number of at least 0", start_step)
        self.rescale = rescale
        self.scope: Scope = scope
        self.include = listed(include, "include")
        self.exclude = listed(exclude, "exclude")
        self.eps = eps
        self.start_step = start_step
        self.skip_scalars = skip_scalars
        self._left_out: set[nn.Parameter] = set()
        self._parallel: Tensor | None = None
        self._warned = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters that are meant.

        Raises:
            RefusedError: If a pattern means none, a parameter is sharded in a way that cannot be handled, or another
                PerpGrad projects it too.
        """
        self._left_out = left_out(pl_module, self.include, self.exclude)
        self._parallel, self._warned = None, False
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, PerpGrad) and other is not self]
        taken = [left_out(pl_module, other.include, other.exclude) for other in others]
        for name, parameter in pl_module.named_parameters():
            if parameter in self._left_out:
                continue
            if isinstance(parameter, DTensor):
                sharded_copies(parameter, None, self.scope, name)
            if any(parameter not in left for left in taken):
                raise RefusedError(
                    f"Two PerpGrad callbacks both project the gradient of `{name}`: the second finds nothing left, or takes "
                    f"more than it should. Let their `include` or `exclude` keep them apart, or use one of them."
                )

    def transform_gradients(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Project the gradients of the parameters that an optimizer is about to move."""
        splice = Splice.of(module.trainer)
        if splice is not None and splice.updates < self.start_step:
            return
        moved = (p for group in optimizer.param_groups for p in group["params"] if p not in self._left_out)
        parallel = perp_grad_(moved, self.rescale, self.scope, self.skip_scalars, self.eps)
        self._parallel = parallel if self._parallel is None else torch.maximum(self._parallel, parallel)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how many gradients were parallel to their weights, and say so once."""
        if self._parallel is None:
            return
        most, self._parallel = self._parallel, None
        pl_module.log("perpgrad/parallel", most.float())
        if not self._warned and int(most) > 0:
            self._warned = True
            rank_zero_warn(
                f"PerpGrad: the gradients of {int(most)} parameters were parallel to their weights, and were set to zero: "
                f"these do not move. If they should, name them in `exclude`."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the parameters."""
        self._left_out = set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget the parameters."""
        self._left_out, self._parallel = set(), None


class ReplaceSoftmax(Intervention):
    r"""Replace the softmax in a training step's cross entropy, by StableMax or by the same softmax in another precision.

    StableMax is a softmax of the logits $g(z) = \mathrm{sign}(z) \log(1 + |z|)$, so that it is these that the criterion is
    given: class weights, `ignore_index`, label smoothing, soft targets and the reduction keep their meaning. A binary cross
    entropy of logits is taken too. Validation and prediction are untouched: the class that is predicted is the same, its
    probability is not; `predict_proba` gives it.

    Args:
        loss: `"stablemax"`, or `"cross_entropy"` to change only the precision.
        compute_dtype: The precision of the criterion: `"float16"`, `"bfloat16"`, `"float32"`, `"float64"`, or
            `"unchanged"`: that of the logits, which for StableMax is raised to float32 at least.
        alpha: What the logits are multiplied by, positive.
        check_finite: Whether to stop with the number of the batch when logits are not finite; it waits for the device in
            every step.
        criterion: The criterion to change: an attribute of the module or a function of `torch.nn.functional`; by default
            the only one that the training step calls.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ReplaceSoftmax()])  # doctest: +SKIP
    """

    def __init__(
        self,
        loss: Literal["stablemax", "cross_entropy"] = "stablemax",
        compute_dtype: str = "float64",
        alpha: float = 1.0,
        check_finite: bool = False,
        criterion: str | None = None,
    ) -> None:
        check_choice(loss, ("stablemax", "cross_entropy"), "loss", "ReplaceSoftmax")
        if compute_dtype != _UNCHANGED:
            compute_dtype = str(precision(compute_dtype, "ReplaceSoftmax")).removeprefix("torch.")
        check_argument(is_number(alpha) and alpha > 0, "alpha", "ReplaceSoftmax", "a positive number", alpha)
        check_argument(isinstance(check_finite, bool), "check_finite", "ReplaceSoftmax", "True or False", check_finite)
        self.loss = loss
        self.compute_dtype = compute_dtype
        self.alpha = alpha
        self.check_finite = check_finite
        self.criterion = criterion

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a precision that the trainer would not let through.

        Raises:
            RefusedError: If the loss is to be computed in half precision, and autocast computes losses in float32.
        """
        precision_name = lightning_adapter.precision_name(trainer)
        if stage == "fit" and self.compute_dtype in ("float16", "bfloat16") and precision_name.endswith("mixed"):
            raise RefusedError(
                f"ReplaceSoftmax(compute_dtype={self.compute_dtype!r}) cannot be used with precision={precision_name!r}: "
                f"autocast computes losses in float32. Use precision='32-true', or compute_dtype='float32' or 'float64'."
            )

    def on_loss(self, call: LossCall) -> LossCall:
        """Give the criterion other logits.

        Raises:
            RefusedError: If it is no cross entropy of logits.
            FulguriteError: If logits are not finite and `check_finite` is set.
        """
        if not _takes_logits(call):
            raise RefusedError(
                f"ReplaceSoftmax replaces the softmax in F.cross_entropy (or the sigmoid in "
                f"F.binary_cross_entropy_with_logits), but the training step of {type(call.step.module).__name__} calls "
                f"{call.name!r}, in which there is none. Compute the loss from logits, or name the right criterion with "
                f"`criterion=`."
            )
        if self.check_finite:
            refuse_non_finite(call.outputs, f"batch {call.step.batch_idx}")
        outputs = self._replaced(call.outputs)
        dtype = outputs.dtype
        targets = call.targets.to(dtype) if call.targets.is_floating_point() else call.targets
        given = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in call.arguments.items()
        }
        return call.replace(outputs=outputs, targets=targets, arguments=given)

    def predict_proba(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Return the probabilities that a model trained with this criterion means by its logits.

        Args:
            logits: Logits with classes along `dim`.
            dim: The dimension of the classes.
        """
        outputs = self._replaced(logits)
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).softmax(dim)

    def _replaced(self, logits: Tensor) -> Tensor:
        """Return the logits that the criterion is given in the place of those of the model."""
        dtype = None if self.compute_dtype == _UNCHANGED else PRECISIONS[self.compute_dtype]
        if self.loss == "stablemax":
            return stable_logits(logits, self.alpha, dtype)
        outputs = logits if dtype is None else logits.to(dtype)
        return outputs if self.alpha == 1 else self.alpha * outputs


def _takes_logits(call: LossCall) -> bool:
    if call.fn is soft_cross_entropy:
        return not call.arguments.get("log_probabilities", False)
    return call.fn in (F.cross_entropy, F.binary_cross_entropy_with_logits)
