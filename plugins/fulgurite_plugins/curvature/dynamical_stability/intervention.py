# SPDX-License-Identifier: Apache-2.0
"""A penalty on the trace that SGD's stability bounds; an extension that is not in the paper."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.errors import FulguriteError, RefusedError, check_argument, is_number
from fulgurite.intervention import Capabilities, Intervention, Step
from fulgurite.losses import LossCall
from fulgurite.per_example.recording import at_least_float32
from fulgurite.random import derived_seed
from fulgurite_plugins.curvature.dynamical_stability.features import OutputCurvature
from fulgurite_plugins.curvature.dynamical_stability.measuring import SHARDED
from fulgurite_plugins.curvature.dynamical_stability.steps import output_curvature


class TracePenalty(Intervention):
    r"""Add $\text{weight} \cdot \mathrm{Tr}(G)$ to the loss: what drives SGD with a large rate.

    With independent signs $\varepsilon_i$ for the outputs of each example of the batch, $\frac1N |\sum_i J_i^\top R_i
    \varepsilon_i|^2$ has the mean $\frac1N \sum_i |J_i^\top R_i|_F^2 =
    \mathrm{Tr}(G)$: one backward pass per probe, and one more through it.

    Args:
        weight: The weight of the penalty, not negative. 0 changes nothing.
        probes: Random combinations of outputs per batch.
        criterion: The criterion, if the training step calls several losses.
        seed: Seeds the signs.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[TracePenalty(weight=1e-3)])  # doctest: +SKIP
    """

    capabilities = Capabilities(extra_backwards=3.0, refused_strategies=SHARDED)

    def __init__(self, weight: float, probes: int = 1, criterion: str | None = None, seed: int = 0) -> None:
        name = "TracePenalty"
        check_argument(is_number(weight) and weight >= 0, "weight", name, "a number that is not negative", weight)
        check_argument(isinstance(probes, int) and probes >= 1, "probes", name, "a positive integer", probes)
        self.weight, self.probes, self.criterion, self.seed = weight, probes, criterion, seed
        self._curvature: OutputCurvature | None = None
        self._call: LossCall | None = None
        self._drawn = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what another training has left.

        Raises:
            RefusedError: If the model is compiled: what the compiler makes of it can be differentiated once.
        """
        compiled = lightning_adapter.is_compiled(pl_module) or any(map(_is_compiled, pl_module.modules()))
        if stage == "fit" and self.weight and compiled:
            raise RefusedError(
                "TracePenalty differentiates the model twice, which torch.compile does not support. Train without "
                "compiling, or without the penalty."
            )
        if stage == "fit":
            self._curvature = self._call = None
            if trainer.current_epoch == 0:
                self._drawn = 0

    def on_loss(self, call: LossCall) -> LossCall:
        """Keep the call of the criterion; nothing is changed."""
        self._call = call
        return call

    def penalty(self, step: Step) -> dict[str, Tensor] | None:
        """Return the weighted estimate of the trace, with its graph."""
        call, self._call = self._call, None
        if not self.weight or call is None:
            return None
        if self._curvature is None:
            self._curvature = output_curvature(call, type(self).__name__)
        self._drawn += 1
        seed = derived_seed(self.seed, step.trainer.global_rank, self._drawn)
        generator = torch.Generator().manual_seed(seed)
        parameters = [p for p in step.module.parameters() if p.requires_grad]
        trace = trace_estimate(call.outputs, parameters, self._curvature, self.probes, generator)
        return {"trace": self.weight * trace}

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches have drawn signs."""
        return {"version": 1, "drawn": self._drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on drawing where the checkpoint was."""
        self._drawn = state_dict["drawn"]


def trace_estimate(
    outputs: Tensor,
    parameters: list[torch.nn.Parameter],
    curvature: OutputCurvature,
    probes: int,
    generator: torch.Generator,
) -> Tensor:
    r"""Return an unbiased estimate of $\mathrm{Tr}(G)$ on a batch, with a graph.

    Args:
        outputs: The model's outputs `[N, *]`, with their graph.
        parameters: The parameters.
        curvature: The second derivative of the loss in the outputs.
        probes: Number of random combinations.
        generator: Where their signs come from.

    Raises:
        FulguriteError: If the model cannot be differentiated twice.
    """
    flat = outputs.reshape(len(outputs), -1)
    lengths = []
    for _ in range(probes):
        signs = (torch.randint(0, 2, flat.shape, generator=generator) * 2 - 1).to(at_least_float32(flat))
        vectors = curvature.times_root(flat, signs).to(flat.dtype)
        try:
            gradients = torch.autograd.grad(flat, parameters, vectors, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise FulguriteError(
                f"TracePenalty differentiates the model twice, which it does not allow: {error}"
            ) from error
        pushed = torch.cat([at_least_float32(gradient).reshape(-1) for gradient in gradients if gradient is not None])
        lengths.append(pushed.square().sum() / len(flat))
    return torch.stack(lengths).mean()


def _is_compiled(module: nn.Module) -> bool:
    """Return whether a module was wrapped by `torch.compile`, or compiled in place."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
