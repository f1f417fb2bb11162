# SPDX-License-Identifier: Apache-2.0
"""How orthogonal the layers of a model are, measured exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fulgurite_plugins.reparametrization.orthogonal_convolutions.functional import lorth
from fulgurite_plugins.reparametrization.orthogonal_convolutions.layers import Layer, border_gap, find_layers
from fulgurite_plugins.reparametrization.orthogonal_convolutions.theory import conv_singular_values, isometry_bounds

MEASURES = ("lorth", "err_f", "err_s", "sigma_min", "sigma_max", "lipschitz_upper", "border_gap")


class ConvOrthogonality(Metric):
    r"""Residual, singular values and bounds of every convolution and linear layer of a model.

    `update(model)` measures the model as it is, `compute()` returns a flat dictionary, `"<layer>/<measure>"`, for
    `log_dict`. The measures of a layer are

    - `lorth`: $L_\text{orth}$;
    - `err_f`, `err_s`: Frobenius and spectral norm of the residual of its operator on `output_size` positions per axis;
    - `sigma_min`, `sigma_max`: the extreme singular values there (of the smaller side), exact for circular padding;
    - `lipschitz_upper`: $\sqrt{1 + \varepsilon}$, for inputs of any size;
    - `border_gap`: the share of the kernel's energy that its padding cuts off somewhere at the border; 0 for circular
      padding.

    It depends on parameters only and is the same on all ranks, so that nothing is exchanged; sharded parameters are
    gathered, for which all ranks have to call `update`. Frozen layers count too.

    Args:
        modules: `"Conv"` for all convolutions; else names of layers, or patterns.
        include_linear: Whether `"Conv"` takes linear layers too.
        output_size: Positions per axis of the output of each layer; at least `2 k - 1` per stride make `err_f` exact for
            every larger size.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If `output_size` is not positive, a model holds no such layer, or `compute` is called before `update`.

    Example:
        >>> metric = ConvOrthogonality()
        >>> metric.update(nn.Sequential(nn.Identity(), nn.Linear(3, 3)))
        >>> sorted(metric.compute())[:2]
        ['1/border_gap', '1/err_f']
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    values: Tensor

    def __init__(
        self,
        modules: str | Sequence[str] = "Conv",
        include_linear: bool = True,
        output_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"sync_on_compute": False, **kwargs})
        if not isinstance(output_size, int) or output_size < 1:
            raise ValueError(
                f"Expected `output_size` of ConvOrthogonality to be a positive integer, but got {output_size!r}."
            )
        self.modules_wanted = modules
        self.include_linear = include_linear
        self.output_size = output_size
        self.names: list[str] = []
        self.add_state("values", default=torch.empty(0, len(MEASURES)), dist_reduce_fx=None)

    def update(self, model: nn.Module) -> None:
        """Measure a model; what was measured before is forgotten."""
        layers = find_layers(model, self.modules_wanted, self.include_linear)
        if not layers:
            raise ValueError(
                f"Expected `model` of ConvOrthogonality to hold convolutions or linear layers, but a {type(model).__name__} "
                f"holds none. Wrap a single layer in nn.Sequential."
            )
        self.names = [layer.name for layer in layers]
        self.values = torch.stack([self._measure(layer) for layer in layers]).to(self.values)

    def compute(self) -> dict[str, Tensor]:
        """Return the measures of every layer."""
        if not len(self.values):
            raise ValueError("Expected ConvOrthogonality to have been given a model by `update` before `compute`.")
        return {
            f"{name}/{measure}": value
            for name, row in zip(self.names, self.values, strict=True)
            for measure, value in zip(MEASURES, row, strict=True)
        }

    @torch.no_grad()
    def _measure(self, layer: Layer) -> Tensor:
        weight = layer.weight()
        sizes = [1 if layer.linear else s * self.output_size for s in layer.stride]
        sigma = conv_singular_values(weight, layer.stride, sizes, layer.dilation, layer.groups)
        residual = sigma.square() - 1
        return torch.stack(
            [
                lorth(weight, layer.stride, layer.dilation, layer.groups),
                torch.linalg.vector_norm(residual),
                residual.abs().amax(),
                sigma.amin(),
                sigma.amax(),
                isometry_bounds(weight, layer.stride, layer.dilation, layer.groups).lipschitz_upper,
                border_gap(layer, weight).to(sigma),
            ]
        )
