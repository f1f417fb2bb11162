# SPDX-License-Identifier: Apache-2.0
"""Strengths of penalties on weights and on activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.errors import RefusedError
from fulgurite_plugins.bilevel.self_tuning_networks.context import Conditioning
from fulgurite_plugins.bilevel.self_tuning_networks.layers.gated import Gated
from fulgurite_plugins.bilevel.self_tuning_networks.patterns import matches
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import own_weights
from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import PenaltyTarget, Site


class WeightDecay(PenaltyTarget):
    r"""The weight of $|W|^2$, summed over weights of at least two dimensions.

    The weights of gated layers are those at the hyperparameters of the first example, $W + \text{diag}(V_w h_1)\, U$.

    Args:
        pattern: Which weights, by the qualified names of parameters.
    """

    penalises = "parameters"

    def __init__(self, pattern: str = "*") -> None:
        self.pattern = pattern
        self._found: list[tuple[nn.Module, str]] = []
        self._conditioning = Conditioning()

    def attach(self, site: Site) -> None:
        """Find the weights.

        Raises:
            ValueError: If the pattern matches no trainable weight.
        """
        self._found = self._weights(site.module)
        self._conditioning = site.conditioning

    def detach(self) -> None:
        """Forget the weights."""
        self._found.clear()

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights that are penalised, which no optimizer should decay as well."""
        return [getattr(layer, name) for layer, name in self._found]

    def penalty(self, value: Tensor) -> Tensor:
        """Return the weighted sum of squares."""
        h = self._conditioning.h
        first = None if h is None else h.reshape(-1, h.shape[-1])[0]
        weights = [
            layer.effective(first, name.removeprefix("weight"))[0] if isinstance(layer, Gated) else getattr(layer, name)
            for layer, name in self._found
        ]
        return value * torch.stack(torch._foreach_norm(weights)).square().sum()

    def _weights(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        found = {
            weight: (layer, name)
            for qualified, layer, name, weight in own_weights(module)
            if weight.requires_grad and matches(qualified, [self.pattern])
        }
        if not found:
            raise ValueError(
                f"WeightDecay({self.pattern!r}) matches no trainable weight of {type(module).__name__}; give a pattern of "
                f"the names of parameters, such as 'encoder.*'."
            )
        return list(found.values())


class ActivationPenalty(PenaltyTarget):
    r"""The weight of the mean square of what layers return, summed over the layers.

    Args:
        pattern: Which layers, by qualified name. Of layers that return several things the first is taken.
    """

    penalises = "activations"

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._undo: list[Callable[[], None]] = []
        self._recorder = _Recorder(Conditioning(), self.measure)

    def measure(self, activations: Tensor) -> Tensor:
        """Return the mean square."""
        return activations.to(torch.promote_types(activations.dtype, torch.float32)).square().mean()

    def attach(self, site: Site) -> None:
        """Watch what the layers return.

        Raises:
            ValueError: If the pattern matches no layer.
        """
        layers = [layer for name, layer in site.module.named_modules() if name and matches(name, [self.pattern])]
        if not layers:
            raise ValueError(
                f"{type(self).__name__}({self.pattern!r}) matches no layer of {type(site.module).__name__}. Its layers are: "
                f"{', '.join(name for name, _ in site.module.named_modules() if name)}."
            )
        self._recorder = _Recorder(site.conditioning, self.measure)
        self._undo = [layer.register_forward_hook(self._recorder).remove for layer in layers]

    def detach(self) -> None:
        """Leave the layers alone."""
        while self._undo:
            self._undo.pop()()
        self._recorder.terms.clear()

    def penalty(self, value: Tensor) -> Tensor | None:
        """Return the weighted sum over the layers that were called since the last time."""
        terms = self._recorder.terms
        if not terms:
            return None
        total = value * torch.stack(terms).sum()
        terms.clear()
        return total


class TemporalActivationPenalty(ActivationPenalty):
    r"""The weight of the mean squared difference of what layers return at successive times, summed over the layers.

    Args:
        pattern: Which layers, by qualified name.
        time_dim: The dimension of time in what they return: 1 for `[B, T, *]`, 0 for `[T, B, *]`.
    """

    def __init__(self, pattern: str, time_dim: int = 1) -> None:
        super().__init__(pattern)
        self.time_dim = time_dim

    def measure(self, activations: Tensor) -> Tensor:
        """Return the mean squared difference."""
        return super().measure(activations.diff(dim=self.time_dim))


class _Recorder:
    """A forward hook that measures what layers return in a training step."""

    def __init__(self, conditioning: Conditioning, measure: Callable[[Tensor], Tensor]) -> None:
        self.conditioning = conditioning
        self.measure = measure
        self.terms: list[Tensor] = []

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not layer.training or self.conditioning.values is None:
            return
        if not torch.is_grad_enabled():
            raise RefusedError(
                f"{layer} was called without gradients in a training step, so that its activations cannot be penalised. If "
                f"that is torch.utils.checkpoint, use it with use_reentrant=False."
            )
        term = self.measure(output if isinstance(output, Tensor) else output[0])
        if self.conditioning.counts:  # a recomputation has to compute the same, but counts no second time
            self.terms.append(term)

    def __reduce__(self) -> Any:
        return _no_recorder, ()


def _no_recorder() -> Callable[..., None]:
    """Return what stands for a recorder in copies and pickles of a model, whose activations nobody penalises."""
    return _nothing


def _nothing(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Do nothing."""
