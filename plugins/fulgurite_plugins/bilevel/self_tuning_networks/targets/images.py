# SPDX-License-Identifier: Apache-2.0
"""Augmentations of images, with a strength for each example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import InputTarget
from fulgurite_plugins.bilevel.self_tuning_networks.targets.inputs import over

_Property = Literal["hue", "contrast", "saturation", "brightness"]
_Part = Literal["length", "holes"]


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply images `[B, C, H, W]` in [0, 1] by one factor each `[B]`, clipped to [0, 1]."""
    return (images * over(factor, images)).clamp(0.0, 1.0)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch images `[B, C, H, W]` in [0, 1] about their mean luminance by one factor each `[B]`, clipped to [0, 1]."""
    mean = _luminance(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, over(factor, images)).clamp(0.0, 1.0)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Stretch images `[B, 3, H, W]` in [0, 1] about their grey version by one factor each `[B]`, clipped to [0, 1]."""
    return torch.lerp(_luminance(images), images, over(factor, images)).clamp(0.0, 1.0)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    r"""Turn the hue of images `[B, 3, H, W]` in [0, 1] by one part of the circle each `[B]`.

    With $M$ and $m$ the largest and the smallest channel, $\delta = M - m$ and the hue $h$ in sixths of the circle, the
    channels of the same value and saturation are $M - \delta\,\text{clip}(\min(k, 4 - k), 0, 1)$ with
    $k = (n + h) \bmod 6$, where $n$ is 5 for red, 3 for green and 1 for blue.
    """
    red, green, blue = images.unbind(1)
    largest, smallest = images.amax(1), images.amin(1)
    delta = largest - smallest
    divisor = torch.where(delta > 0, delta, 1.0)
    hue = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0),
    )
    hue = hue + 6.0 * over(shift, hue)
    channel = torch.arange(5, 0, -2, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    k = torch.remainder(channel + hue.unsqueeze(1), 6.0)
    return largest.unsqueeze(1) - delta.unsqueeze(1) * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)


class ColorJitter(InputTarget):
    r"""Change one property of images at random, by an amount that is tuned.

    Brightness, contrast and saturation are scaled by factors uniform in $[\max(0, 1 - v), 1 + v]$, hue is turned by a part
    of the circle uniform in $[-v, v]$, each example by its own. The value is squeezed to $(1 - 0.002) v + 0.001$ first.

    Args:
        prop: Which property: `"hue"`, `"contrast"`, `"saturation"` or `"brightness"`.
        mean: Mean per channel by which the images have been normalised; None if they are in [0, 1].
        std: Standard deviation per channel by which they have been normalised.

    Raises:
        ValueError: If the property is unknown, or only one of `mean` and `std` is given.
    """

    def __init__(
        self, prop: _Property, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        if prop not in get_args(_Property):
            raise ValueError(f"Expected `prop` of ColorJitter to be one of {get_args(_Property)}, but got {prop!r}.")
        if (mean is None) != (std is None):
            raise ValueError("Expected `mean` and `std` of ColorJitter both or neither, but got one of them.")
        self.prop = prop
        self.mean = mean
        self.std = std
        self._statistics: Tensor | None = None
        self.bounds = (0.0, 0.5 if prop == "hue" else 1.0)  # type: ignore[misc]

    def transform(self, x: Tensor, value: Tensor, generator: Generator) -> Tensor:
        """Return the changed images `[B, C, H, W]`."""
        _check_images(x, f"ColorJitter({self.prop!r})", (3,) if self.prop in ("hue", "saturation") else (1, 3))
        images = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.mean is None or self.std is None:
            return self._jitter(images, value, generator).to(x.dtype)
        if self._statistics is None or self._statistics.device != images.device:
            self._statistics = images.new_tensor([self.mean, self.std]).view(2, 1, -1, 1, 1)
        mean, std = self._statistics
        return ((self._jitter(images * std + mean, value, generator) - mean) / std).to(x.dtype)

    def _jitter(self, images: Tensor, value: Tensor, generator: Generator) -> Tensor:
        value = 0.998 * value + 0.001
        noise = torch.rand(value.shape, generator=generator, device=images.device, dtype=value.dtype)
        if self.prop == "hue":
            return adjust_hue(images, torch.lerp(-value, value, noise))
        factor = torch.lerp((1.0 - value).clamp_min(0.0), 1.0 + value, noise)
        if self.prop == "contrast":
            return adjust_contrast(images, factor)
        return (adjust_saturation if self.prop == "saturation" else adjust_brightness)(images, factor)


class Cutout(InputTarget):
    """Set squares of images to zero: one of their length and their number is tuned, or each by its own hyperparameter.

    Centres are uniform over the pixels; what sticks out of the image is cut off.

    Args:
        part: What the hyperparameter is: `"length"`, the side of a square in pixels, or `"holes"`, the number of squares.
        length: The length if it is not tuned.
        holes: The number if it is not tuned.
        most: The largest number that can occur.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(self, part: _Part, length: int = 8, holes: int = 1, most: int = 8) -> None:
        if part not in get_args(_Part):
            raise ValueError(f"Expected `part` of Cutout to be one of {get_args(_Part)}, but got {part!r}.")
        if length < 0 or not 0 <= holes <= most or most < 1:
            raise ValueError(
                f"Expected `length` of Cutout to be at least 0 and `holes` in [0, most], but got length={length}, "
                f"holes={holes}, most={most}."
            )
        self.part = part
        self.length = length
        self.holes = holes
        self.most = most
        self.bounds = (0.0, float("inf") if part == "length" else most + 1.0)  # type: ignore[misc]

    def completes(self, other: object) -> bool:
        """Return whether another target is the other part of this one: both are applied together then."""
        return isinstance(other, Cutout) and other.part != self.part

    def transform(self, x: Tensor, value: Tensor, generator: Generator, other: Tensor | None = None) -> Tensor:
        """Return images `[B, C, H, W]` with holes; `other` `[B]` is the value of the other part if it is tuned too."""
        _check_images(x, "Cutout")
        fixed = self.holes if self.part == "length" else self.length
        other = torch.full_like(value, fixed) if other is None else other
        length, holes = (value, other) if self.part == "length" else (other, value)
        return x.masked_fill(holes_mask(length, holes, self.most, x.shape[-2:], generator), 0.0)


def holes_mask(
    length: Tensor, holes: Tensor, most: int, size: tuple[int, ...], generator: Generator | None = None
) -> Tensor:
    """Return where squares lie, boolean `[B, 1, H, W]`.

    Args:
        length: Side of the squares in pixels `[B]`, whole numbers.
        holes: Number of squares `[B]`, whole numbers up to `most`.
        most: The largest number that can occur.
        size: Height and width `(H, W)`.
        generator: Source of the centres, on the device of `length`.
    """
    inside = []
    for extent in size:
        noise = torch.rand(len(length), most, 1, generator=generator, device=length.device)
        first = torch.floor(noise * extent) - torch.floor(length / 2).view(-1, 1, 1)
        pixel = torch.arange(extent, device=length.device)
        inside.append((pixel >= first) & (pixel < first + length.view(-1, 1, 1)))
    rows, columns = inside
    rows = rows & (torch.arange(most, device=holes.device) < holes.view(-1, 1)).unsqueeze(-1)
    return (rows.unsqueeze(-1) & columns.unsqueeze(-2)).any(1, keepdim=True)


def _luminance(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _check_images(x: Tensor, owner: str, channels: tuple[int, ...] = ()) -> None:
    if x.ndim != 4 or (channels and x.shape[1] not in channels):
        expected = f"[B, {' or '.join(map(str, channels)) or 'C'}, H, W]"
        raise ValueError(f"{owner} expects images of shape {expected}, but got inputs of shape {list(x.shape)}.")
