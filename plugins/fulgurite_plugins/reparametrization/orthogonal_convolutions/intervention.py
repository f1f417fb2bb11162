# SPDX-License-Identifier: Apache-2.0
"""The penalty of Achour, Malgouyres, Mamalet (2022) as a callback."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention, Step
from fulgurite.schedule import Schedule
from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import (
    Correlated,
    Method,
    kernel_rows,
    residual,
    wang_norm,
)
from fulgurite_plugins.reparametrization.orthogonal_convolutions.layers import Layer, find_layers, weight_parameters
from fulgurite_plugins.reparametrization.orthogonal_convolutions.report import warnings_about, write_report

Variant = Literal["lorth", "kernel", "wang"]

_OWNER = "OrthogonalConvPenalty"
_REFUSED = {
    "fsdp": "outside the forward pass of a layer its weight is a flat shard, and the penalty needs the whole kernel. Use "
    "ModelParallelStrategy with fully_shard (FSDP2), or DDP.",
    "deepspeed": "its engine partitions and scales gradients on its own, and a penalty on whole kernels was never tried "
    "there. Use ModelParallelStrategy with fully_shard (FSDP2), or DDP.",
}


class OrthogonalConvPenalty(Intervention):
    r"""Drive every convolution, as an operator on images, towards an isometry.

    Adds $\lambda \sum_l L_\text{orth}(K_l / s)$ over the layers to the loss, once per optimizer update. Before training
    it reports for each layer whether an orthogonal convolution of its shape exists, and how near to an isometry the
    layer is. Frozen layers are left out as long as they are frozen; a weight that two layers share counts once.

    Args:
        weight: The factor $\lambda$ of the penalty, at least 0, or a `Schedule` of it. Sensible values span decades, 0.01
            to 1.
        modules: `"Conv"` for all convolutions, transposed ones included; else names of layers or patterns such as
            `"encoder.*"`.
        include_linear: Whether `"Conv"` takes linear layers too.
        skip_first: Whether to leave out the first convolution, the stem.
        variant: `"lorth"`: the paper's. `"kernel"`: the kernel as a matrix `[M, C k^n]`. `"wang"`: the formula of the
            code of Wang et al. (2020). The last two are baselines.
        method: How `"lorth"` is computed: see `lorth`.
        reduction: `"sum"` or `"mean"` over the layers.
        scale_target: The $s$ of `s` times an isometry, positive.
        on_impossible: What to do with a layer for which no orthogonal convolution exists: `"raise"`, or `"skip"` it.
        every_n_steps: Optimizer updates between two that are penalised; $\lambda$ is multiplied by it, so that the mean
            force is the same.
        exempt_from_weight_decay: Whether to set the weight decay of these layers, which pulls all singular values to 0,
            to 0.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[OrthogonalConvPenalty(weight=0.1)])  # doctest: +SKIP
    """

    capabilities = Capabilities(penalises_parameters=True, refused_strategies=_REFUSED)

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        modules: str | list[str] = "Conv",
        include_linear: bool = True,
        skip_first: bool = False,
        variant: Variant = "lorth",
        method: Method = "auto",
        reduction: Literal["sum", "mean"] = "sum",
        scale_target: float = 1.0,
        on_impossible: Literal["raise", "skip"] = "raise",
        every_n_steps: int = 1,
        exempt_from_weight_decay: bool = False,
    ) -> None:
        self.weight = weight
        self.schedule = weight if isinstance(weight, Schedule) else Schedule.constant(_not_negative(weight))
        for value in self.schedule.range:
            _not_negative(value)
        check_choice(variant, get_args(Variant), "variant", _OWNER)
        check_choice(method, get_args(Method), "method", _OWNER)
        check_choice(reduction, ("sum", "mean"), "reduction", _OWNER)
        check_choice(on_impossible, ("raise", "skip"), "on_impossible", _OWNER)
        positive = is_number(scale_target) and scale_target > 0
        check_argument(positive, "scale_target", _OWNER, "a positive number", scale_target)
        counts = is_number(every_n_steps) and isinstance(every_n_steps, int) and every_n_steps >= 1
        check_argument(counts, "every_n_steps", _OWNER, "a positive integer", every_n_steps)
        self.modules = modules
        self.include_linear = include_linear
        self.skip_first = skip_first
        self.variant = variant
        self.method = method
        self.reduction = reduction
        self.scale_target = scale_target
        self.on_impossible = on_impossible
        self.every_n_steps = every_n_steps
        self.exempt_from_weight_decay = exempt_from_weight_decay
        self.layers: list[Layer] = []

    def parameter_options(self, module: pl.LightningModule) -> Mapping[nn.Parameter, Mapping[str, Any]]:
        """Take the layers out of weight decay, if that is asked for."""
        if not self.exempt_from_weight_decay:
            return {}
        layers = self._possible(self._found(module))
        return {p: {"weight_decay": 0.0} for layer in layers for p in weight_parameters(layer)}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, and refuse shapes of which no orthogonal convolution exists."""
        found = self._found(pl_module)
        self.layers = self._possible(found)
        if not self.layers:
            raise RefusedError(
                f"OrthogonalConvPenalty: there is no layer to be penalised in {type(pl_module).__name__} (modules="
                f"{self.modules!r}, include_linear={self.include_linear}, {len(found) - len(self.layers)} impossible ones "
                f"skipped). Name the layers in `modules`, or remove the plugin."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report existence and isometry of every layer, and warn of what makes the penalty useless."""
        skipped = [layer for layer in self._found(pl_module) if not layer.existence().exists]
        rank_zero_info(write_report(self.layers, skipped, self.scale_target))
        for text in warnings_about(self.layers):
            rank_zero_warn(text)

    def penalty(self, step: Step) -> Tensor | None:
        """Return the weighted penalty of the layers that learn, in float32 or better."""
        if step.updates % self.every_n_steps:
            return None
        weight = self._weight(step.trainer) * self.every_n_steps
        layers = [layer for layer in self.layers if layer.learns]
        if weight == 0.0 or not layers:
            return None
        total = self._total(layers)
        if self.reduction == "mean":
            total = total / len(layers)
        step.module.log(f"{self.name}/{self.variant}", total.detach())
        return weight * total

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the layers, so that pickles of the callback do not hold the model."""
        self.layers = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the layers."""
        self.layers = []

    def _weight(self, trainer: pl.Trainer) -> float:
        if self.schedule.shape == "constant":
            return self.schedule.end
        return self.schedule.at(*lightning_adapter.train_progress(trainer, self.schedule.unit))

    def _total(self, layers: Sequence[Layer]) -> Tensor:
        """Add the residuals, those of equal shape in one batch."""
        if self.variant == "wang":
            norms = [wang_norm(x.weight() / self.scale_target, x.stride, x.groups) for x in layers]
            return torch.stack(norms).sum()
        if self.variant == "kernel":
            found = [Correlated(kernel_rows(x.weight(), x.groups), ()) for x in layers]
        else:
            found = [x.rows(self.method) for x in layers]
        alike = itertools.groupby(sorted(found, key=_geometry), key=_geometry)
        totals = []
        for (_, step), batch in alike:
            rows = torch.cat([one.rows for one in batch]) / self.scale_target
            totals.append(residual(rows, step, self.method).sum())
        return torch.stack(totals).sum()

    def _found(self, module: nn.Module) -> list[Layer]:
        return find_layers(module, self.modules, self.include_linear, self.skip_first)

    def _possible(self, layers: list[Layer]) -> list[Layer]:
        impossible = {layer: found for layer in layers if not (found := layer.existence()).exists}
        if impossible and self.on_impossible == "raise":
            reasons = "\n".join(f"  {layer.name}: {found.reason}" for layer, found in impossible.items())
            raise RefusedError(
                f"OrthogonalConvPenalty: no orthogonal convolution of these shapes exists:\n{reasons}\nChange the layers, "
                f"name others in `modules`, or leave these out with on_impossible='skip'."
            )
        return [layer for layer in layers if layer not in impossible]


def _geometry(found: Correlated) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(found.rows.shape[1:]), found.step


def _not_negative(weight: Any) -> float:
    fits = is_number(weight) and weight >= 0
    check_argument(fits, "weight", _OWNER, "a finite number of at least 0 (or a Schedule of such)", weight)
    return float(weight)
