# SPDX-License-Identifier: Apache-2.0
"""What the claim is measured with: a small circular network, and its accuracy under attack.

The attack is the projected gradient descent of Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models
Resistant to Adversarial Attacks", ICLR 2018, in the Euclidean norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite_plugins.reparametrization.orthogonal_convolutions.certificate import lipschitz_certificate


class CircularConvNet(nn.Sequential):
    """Three 3x3 convolutions with circular padding (16, 32 and 64 filters, strides 1, 2, 2), ReLU and a linear layer.

    Before them stands a fixed layer that multiplies pixels by `gain`. An orthogonal network keeps distances, so that
    the unit of its inputs matters: that of the standardised digits is turned into that of pixels which range over 1.

    Args:
        input_shape: Shape of one image, `(channels, height, width)`; height and width are multiples of 4.
        num_classes: Number of outputs.
        gain: What inputs are multiplied by; the standard deviation of the digits' pixels over their range.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, gain: float = 0.376) -> None:
        channels, height, width = input_shape
        unit = nn.Conv2d(channels, channels, 1, groups=channels, bias=False).requires_grad_(False)
        nn.init.constant_(unit.weight, gain)
        layers: list[nn.Module] = [unit]
        for filters, stride in ((16, 1), (32, 2), (64, 2)):
            layers += [nn.Conv2d(channels, filters, 3, stride, padding=1, padding_mode="circular"), nn.ReLU()]
            channels = filters
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), num_classes))


def pgd_l2(
    model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, radius: float, steps: int = 15
) -> Tensor:
    r"""Return adversarial inputs in the Euclidean ball of a radius around each input, by projected gradient ascent.

    Steps of length $2.5\, r / \text{steps}$ along the normalised gradient of the cross entropy, from the input itself.

    Args:
        model: Maps inputs to logits.
        inputs: Inputs `[B, *]`.
        targets: Classes `[B]`.
        radius: Radius $r$.
        steps: Number of steps.

    Returns:
        `[B, *]`, none further than `radius` from its input.
    """
    offset = torch.zeros_like(inputs)
    for _ in range(steps):
        attacked = (inputs + offset).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(attacked), targets, reduction="sum"), attacked)
        direction = F.normalize(gradient.flatten(1), dim=1).view_as(offset)
        offset = offset + 2.5 * radius / steps * direction
        lengths = torch.linalg.vector_norm(offset.flatten(1), dim=1).clamp_min(torch.finfo(offset.dtype).tiny)
        offset = offset * (radius / lengths).clamp_max(1.0).view(-1, *[1] * (offset.ndim - 1))
    return inputs + offset


class RobustAccuracy(pl.Callback):
    """Log, in a test, the accuracy under attack at several radii and the certified Lipschitz constant of the network.

    The LightningModule has a sequential `network`, as a `Classification` of `CircularConvNet` has. Radii and the constant
    refer to inputs whose values range over 1: `value_range / std` of the data converts them.

    Args:
        radii: Radii of the attack.
        value_range: Range of a raw input value; 16 for the digits.
        steps: Steps of the attack.
    """

    def __init__(self, radii: Sequence[float] = (0.3, 0.6, 1.0), value_range: float = 16.0, steps: int = 15) -> None:
        self.radii = tuple(radii)
        self.value_range = value_range
        self.steps = steps
        self._hits: list[list[Tensor]] = []

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._hits = [[] for _ in self.radii]

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack a batch."""
        with torch.inference_mode(False), torch.enable_grad():
            inputs, targets = (part.clone() for part in batch)
            for hits, radius in zip(self._hits, self.radii, strict=True):
                attacked = pgd_l2(pl_module.network, inputs, targets, radius * self._scale(trainer), self.steps)
                hits.append(pl_module.network(attacked).argmax(dim=1) == targets)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log."""
        for hits, radius in zip(self._hits, self.radii, strict=True):
            pl_module.log(f"test/pgd_{radius}", torch.cat(hits).float().mean())
        with torch.inference_mode(False):
            pl_module.log("test/lipschitz", self._scale(trainer) * lipschitz_certificate(pl_module.network).bound)

    def _scale(self, trainer: Any) -> float:
        return self.value_range / float(trainer.datamodule.std)
