# SPDX-License-Identifier: Apache-2.0
"""Fixed examples as a network and its criterion see them, and what is measured on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError
from fulgurite.losses import LossCall
from fulgurite.measurement import undisturbed


@dataclass(frozen=True)
class Examples:
    """Some examples.

    Args:
        batches: Batches, as the training step takes them.
        sizes: Examples in each of them.
        inputs: What the network is called with for all of them, `[N, *]`.
        targets: `[N, C]`; of classes, one-hot.
        trivial: The loss of a network whose outputs are zero.
        loss_name: The name of the criterion.
    """

    batches: Sequence[Any]
    sizes: Sequence[int]
    inputs: tuple[Tensor, ...]
    targets: Tensor
    trivial: float
    loss_name: str

    def __len__(self) -> int:
        return len(self.targets)

    def mean(self, values: Iterable[Tensor]) -> Tensor:
        """Return the mean over examples of a value per batch."""
        weighted = [size * value for size, value in zip(self.sizes, values, strict=True)]
        return torch.stack(weighted).sum() / len(self)


class Whole(nn.Module):
    """A network, and its twin if it has one, which is trained like it but stands elsewhere in the LightningModule.

    Args:
        network: The network.
        twin: The twin.
    """

    def __init__(self, network: nn.Module, twin: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.twin = twin

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return what the network gives."""
        outputs: Tensor = self.network(*inputs)
        return outputs


class Probe:
    """Calls a network as the training step does, on fixed examples, unnoticed by the training.

    Args:
        captured: Runs the user's own training step.
        network: The network in it.
        user: Who measures, for messages.
    """

    def __init__(self, captured: CapturedLoss, network: nn.Module, user: str) -> None:
        self._captured = captured
        self._network = network
        self._user = user
        self._features_of: nn.Module | None = None

    def examples(self, batches: Iterable[Any]) -> Examples:
        """Return examples, with what the network and the criterion are given of them.

        Args:
            batches: Batches, as the training step takes them; None is skipped, as Lightning does.

        Raises:
            RefusedError: If there are none, the network is not called once with tensors alone, or its outputs do not fit
                the targets.
        """
        kept = [batch for batch in batches if batch is not None]
        if not kept:
            raise RefusedError(f"{self._user} found no examples to measure on. Give it a DataLoader by `dataloader=`.")
        inputs, targets, calls = zip(*map(self._seen, kept), strict=True)
        sizes = [len(part) for part in targets]
        examples = Examples(
            kept, sizes, tuple(map(torch.cat, zip(*inputs, strict=True))), torch.cat(targets), 0.0, calls[0].name
        )
        trivial = examples.mean(call.replace(outputs=torch.zeros_like(call.outputs)).evaluate() for call in calls)
        return replace(examples, trivial=float(trivial))

    def loss(self, examples: Examples) -> Tensor:
        """Return the user's loss on the examples."""
        return examples.mean(self._captured(batch).criterion_loss.detach() for batch in examples.batches)

    def _seen(self, batch: Any) -> tuple[tuple[Tensor, ...], Tensor, LossCall]:
        """Return what the network is called with for a batch, the targets `[B, C]`, and the call of the criterion."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        hook = self._network.register_forward_hook(
            lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
        )
        try:
            call = self._captured(batch).call
        finally:
            hook.remove()
        good = len(calls) == 1 and not calls[0][1] and all(isinstance(a, Tensor) for a in calls[0][0])
        if not good or not isinstance(calls[0][2], Tensor) or calls[0][2].ndim != 2:
            gave = f", and gave {_shape(calls[0][2])}" if calls else ""
            raise RefusedError(
                f"{self._user} measures a network that the training step calls once, with tensors as positional arguments, "
                f"and that gives [N, C]; {type(self._network).__name__} was called {len(calls)} times{gave}. Name another "
                f"network by `module=`."
            )
        args, _, outputs = calls[0]
        return tuple(a.detach() for a in args), self._targets(call.targets, outputs), call

    def outputs(self, examples: Examples) -> Tensor:
        """Return the network's outputs `[N, C]`."""
        with undisturbed(self._network) as network, torch.no_grad():
            outputs: Tensor = network(*examples.inputs)
        return outputs

    def features(self, examples: Examples) -> Tensor:
        """Return what the network's last layer with parameters is given, `[N, F]`."""
        seen: list[tuple[nn.Module, Tensor]] = []

        def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.append((layer, args[0]))

        layers = [self._features_of] if self._features_of is not None else _layers(self._network)
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            self.outputs(examples)
        finally:
            for hook in hooks:
                hook.remove()
        self._features_of, features = seen[-1] if seen else (self._network, examples.inputs[0])
        return features.flatten(1)

    def _targets(self, targets: Tensor, outputs: Tensor) -> Tensor:
        if not targets.is_floating_point() and targets.shape == outputs.shape[:1]:
            return F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        if targets.numel() != outputs.numel():
            raise RefusedError(
                f"{self._user} compares outputs [N, C] with targets of classes [N] or of values [N, C], but "
                f"{type(self._network).__name__} gives {list(outputs.shape)}, and the targets are {list(targets.shape)}. "
                f"Name another network by `module=`."
            )
        return targets.detach().reshape(outputs.shape).to(outputs.dtype)


def refuse_batch_norm(network: nn.Module, user: str) -> None:
    """Refuse a network with batch normalisation, whose examples depend on each other in training.

    Raises:
        RefusedError: If there is such a layer.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise RefusedError(
                f"{user}: the network has {type(module).__name__} {name!r}, which couples the examples of a batch in "
                f"training, so that it has no kernel. Give allow_batchnorm_eval=True to measure that of the network in "
                f"evaluation mode, or replace the layer by GroupNorm."
            )


def trained(network: Whole, module: pl.LightningModule) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a network and its twin, by the names that they have in the LightningModule."""
    own = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in own}


def _layers(network: nn.Module) -> list[nn.Module]:
    """Return the modules that own parameters themselves, without those of what the output scale subtracts."""
    others = [other for name, other in network.named_modules() if name.endswith("output_scaling.other")]
    left_out = {id(module) for other in others for module in other.modules()}
    return [m for m in network.modules() if m is not network and m._parameters and id(m) not in left_out]


def _shape(output: Any) -> str:
    return str(list(output.shape)) if isinstance(output, Tensor) else type(output).__name__
