# SPDX-License-Identifier: Apache-2.0
"""What weights look like: how far from zero, how far from each other."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fulgurite_plugins.reparametrization.weight_compander.functional import compand
from fulgurite_plugins.reparametrization.weight_compander.selection import Place, listed, select

_NEAR_ZERO = 0.1
"""What counts as near zero, in standard deviations."""


@torch.no_grad()
def weight_shape(
    module: nn.Module, modules: str | list[str] = "Linear,Conv", exclude: str | list[str] = ""
) -> dict[str, dict[str, Tensor]]:
    """Return statistics of the weights of a model, plain or companded.

    Args:
        module: The model.
        modules: Which layers, as `WeightCompander` takes them.
        exclude: Layers to leave out, as there.

    Returns:
        For each trainable weight tensor, by name, scalar tensors: `kurtosis` (the fourth moment about the mean over the
        squared variance; 3 for a normal distribution), `near_zero` (the fraction of entries below a tenth of the standard
        deviation), `peak` (the largest entry over the standard deviation), and, if it is companded, `a` and `b`.

    Raises:
        RefusedError: If no trainable weight is found.

    Example:
        >>> weight_shape(nn.Linear(100, 100))["weight"]["peak"] < 1.8
        tensor(True)
    """
    return {place.name: _shape_of(place) for place in select(module, modules, exclude)}


def _shape_of(place: Place) -> dict[str, Tensor]:
    weight, compander = _whole(place.parameter), place.compander
    scales: dict[str, Tensor] = {}
    if compander is not None:
        a, b = map(_whole, compander.scales())
        weight = compand(weight, a, b, compander.companding)
        scales = {"a": a.squeeze(), "b": b.squeeze()}
    weight = weight.detach().float()
    centred = weight - weight.mean()
    variance = centred.square().mean()
    return {
        "kurtosis": centred.pow(4).mean() / variance.square(),
        "near_zero": (weight.abs() < _NEAR_ZERO * variance.sqrt()).float().mean(),
        "peak": weight.abs().max() / variance.sqrt(),
        **scales,
    }


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WeightShape(pl.Callback):
    """Log the statistics of `weight_shape` at the end of every training epoch; it changes nothing.

    They are logged as `weight_shape/NAME/STATISTIC` for every weight tensor, and their means over the tensors as
    `weight_shape/STATISTIC`.

    Args:
        modules: Which layers, as `WeightCompander` takes them.
        exclude: Layers to leave out, as there.
        per_tensor: Whether to log every tensor, or the means alone.

    Raises:
        ValueError: If `modules` names nothing.

    Example:
        >>> trainer = pl.Trainer(callbacks=[WeightShape()])  # doctest: +SKIP
    """

    def __init__(
        self, modules: str | list[str] = "Linear,Conv", exclude: str | list[str] = "", per_tensor: bool = True
    ) -> None:
        if not listed(modules):
            raise ValueError(f"Expected `modules` of WeightShape to name some layers, but got {modules!r}.")
        self.modules = modules
        self.exclude = exclude
        self.per_tensor = per_tensor

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the weights look like now."""
        shapes = weight_shape(pl_module, self.modules, self.exclude)
        gathered: dict[str, list[Tensor]] = {}
        for name, statistics in shapes.items():
            for statistic, value in statistics.items():
                gathered.setdefault(statistic, []).append(value)
                if self.per_tensor:
                    pl_module.log(f"weight_shape/{name}/{statistic}", value)
        for statistic, values in gathered.items():
            pl_module.log(f"weight_shape/{statistic}", torch.stack(values).mean())
