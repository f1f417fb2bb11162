# SPDX-License-Identifier: Apache-2.0
"""Self-Tuning Networks: augmentations whose strength is tuned, against closed forms and the standard library's colours."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper, Knobs
from fulgurite_plugins.bilevel.self_tuning_networks.targets import (
    ColorJitter,
    Cutout,
    GaussianNoise,
    InputDropout,
    InputScale,
)
from fulgurite_plugins.bilevel.self_tuning_networks.targets.images import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    holes_mask,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 4, channels: int = 3, size: int = 6) -> Tensor:
    drawn = torch.rand(n, channels, size, size, dtype=torch.float64, generator=seeded())
    drawn[0, :, 0, :4] = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64)  # greys have no hue
    return drawn


def by_pixel(batch: Tensor, function: Any) -> Tensor:
    rows = [[function(i, *p.tolist()) for p in batch[i].flatten(1).T] for i in range(len(batch))]
    return torch.tensor(rows, dtype=torch.float64).transpose(1, 2).reshape(batch.shape)


def test_hue_turns_as_in_the_standard_library():
    batch, shift = images(), torch.tensor([0.0, 0.5, -0.31, 0.17], dtype=torch.float64)

    def turned(i: int, r: float, g: float, b: float) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb((hue + float(shift[i])) % 1.0, saturation, value)

    torch.testing.assert_close(adjust_hue(batch, shift), by_pixel(batch, turned), rtol=0, atol=1e-12)
    whole = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(adjust_hue(batch, whole), batch, rtol=0, atol=1e-12)


def test_brightness_contrast_and_saturation_are_their_closed_forms():
    batch, factor = images(), torch.tensor([0.0, 0.4, 1.0, 1.7], dtype=torch.float64)
    f = factor.view(4, 1, 1, 1)
    grey = (batch * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(adjust_brightness(batch, factor), (batch * f).clamp(0, 1))
    mean = grey.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(adjust_contrast(batch, factor), (f * batch + (1 - f) * mean).clamp(0, 1))
    torch.testing.assert_close(adjust_saturation(batch, factor), (f * batch + (1 - f) * grey).clamp(0, 1))
    single = images(channels=1)
    mean = single.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(adjust_contrast(single, factor), (f * single + (1 - f) * mean).clamp(0, 1))


@pytest.mark.parametrize("prop", ["hue", "contrast", "saturation", "brightness"])
def test_jitter_is_within_its_strength_and_none_of_it_leaves_images_nearly_alone(prop: Any):
    batch = 0.25 + 0.5 * images(256)
    target = ColorJitter(prop)
    weak = target.transform(batch, torch.zeros(256, dtype=torch.float64), seeded())
    assert float((weak - batch).abs().max()) < 5e-3  # 0 is squeezed to 0.001
    value = torch.full((256,), 0.3, dtype=torch.float64)
    drawn = 0.998 * 0.3 + 0.001
    noise = torch.rand(256, generator=seeded(1), dtype=torch.float64)
    amount = -drawn + 2 * drawn * noise + (0.0 if prop == "hue" else 1.0)
    function = {
        "hue": adjust_hue,
        "contrast": adjust_contrast,
        "saturation": adjust_saturation,
        "brightness": adjust_brightness,
    }[prop]
    torch.testing.assert_close(target.transform(batch, value, seeded(1)), function(batch, amount))


def test_normalised_images_are_changed_as_what_they_show():
    batch, mean, std = images(), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    value = torch.full((4,), 0.4, dtype=torch.float64)
    normalised = ColorJitter("hue", mean, std).transform((batch - m) / s, value, seeded())
    torch.testing.assert_close(normalised * s + m, ColorJitter("hue").transform(batch, value, seeded()))


def test_what_is_no_image_is_named():
    for prop, shape, expected in (
        ("hue", (4, 1, 5, 5), "[B, 3, H, W]"),
        ("brightness", (4, 2, 5, 5), "[B, 1 or 3, H, W]"),
        ("contrast", (4, 5), "[B, 1 or 3, H, W]"),
    ):
        with pytest.raises(ValueError, match="expects images of shape") as error:
            ColorJitter(prop).transform(torch.zeros(shape), torch.zeros(4), seeded())  # type: ignore[arg-type]
        assert expected in str(error.value)
    with pytest.raises(ValueError, match="Cutout expects images of shape \\[B, C, H, W\\]"):
        Cutout("length").transform(torch.zeros(4, 5), torch.zeros(4), seeded())
    with pytest.raises(ValueError, match="`prop` of ColorJitter"):
        ColorJitter("gamma")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both or neither"):
        ColorJitter("hue", mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="within \\(0, 0.5\\), as ColorJitter needs it"):
        Hyper("hue", ColorJitter("hue"), 0.05, (0, 1))


# Holes


def test_holes_have_their_length_and_their_number():
    length, holes = torch.tensor([0.0, 1.0, 4.0, 5.0]), torch.ones(4)
    sizes = torch.stack([holes_mask(length, holes, 3, (40, 50), seeded(s)).sum((1, 2, 3)) for s in range(200)])
    assert sizes.amax(0).tolist() == [0, 1, 16, 25]
    assert bool((sizes[:, 1] == 1).all())
    assert float((sizes[:, 3] == 25).float().mean()) > 0.75  # the others stick out
    counts = torch.tensor([0.0, 1.0, 2.0, 3.0])
    sizes = torch.stack([holes_mask(torch.ones(4), counts, 3, (40, 50), seeded(s)).sum((1, 2, 3)) for s in range(50)])
    assert sizes.amax(0).tolist() == [0, 1, 2, 3]
    mask = holes_mask(torch.full((1,), 4.0), torch.ones(1), 1, (40, 50), seeded())[0, 0]
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert int(mask.sum()) == len(rows) * len(columns)  # a rectangle
    assert (rows.diff() == 1).all()
    assert (columns.diff() == 1).all()


def test_centres_of_holes_are_uniform_over_the_pixels():
    n = 20_000
    covered = holes_mask(torch.ones(n), torch.ones(n), 1, (4, 5), seeded()).float().mean((0, 1))
    assert bool(((covered - 1 / 20).abs() < 5 * math.sqrt(0.05 * 0.95 / n)).all())


def test_length_and_number_of_holes_are_tuned_together_or_alone():
    x = torch.ones(300, 2, 20, 20)
    length = Hyper("length", Cutout("length"), 4, (0, 24), discrete=True)
    holes = Hyper("holes", Cutout("holes", length=2, most=3), 1, (0, 4), discrete=True)
    both = Knobs([length, holes], nn.Linear(1, 1))
    values = torch.tensor([[1.0, 3.0]]).expand(300, 2)
    removed = (both.transform(x, values, seeded()) == 0).sum((2, 3))
    assert torch.equal(removed[:, 0], removed[:, 1])
    assert int(removed.max()) == 3  # three pixels: neither two by two, nor twice
    alone = Knobs([holes], nn.Linear(1, 1))
    assert int((alone.transform(x, values[:, 1:], seeded()) == 0).sum((2, 3)).max()) == 12
    none = torch.tensor([5.0, 0.0])
    assert torch.equal(both.transform(x, none, seeded()), x)


# Inputs of any shape


def test_noise_scale_and_dropout_of_inputs_have_the_strength_of_their_example():
    n, strength = 20_000, torch.tensor([0.0, 0.3, 0.8])
    x = torch.ones(3, n)
    noise = GaussianNoise().transform(x, strength, seeded()) - x
    assert bool(((noise.std(1) - strength).abs() <= 5 * strength / math.sqrt(2 * n)).all())
    dropped = InputDropout().transform(x, strength, seeded())
    rate = (dropped == 0).float().mean(1)
    assert bool(((rate - strength).abs() <= 5 * (strength * (1 - strength) / n).sqrt()).all())
    torch.testing.assert_close(dropped.amax(1), 1 / (1 - strength))
    strengths = strength.repeat_interleave(4000)
    scaled = InputScale().transform(torch.ones(12_000, 2, 1), strengths, seeded())
    assert torch.equal(scaled[:, 0], scaled[:, 1])
    for v, factors in zip(strength.tolist(), scaled[:, 0, 0].view(3, 4000), strict=True):
        low, high = 1 / (1 + v), 1 + v
        assert low - 1e-6 <= float(factors.min()) <= float(factors.max()) <= high + 1e-6
        assert abs(float(factors.mean()) - (low + high) / 2) <= 5 * (high - low) / math.sqrt(12 * 4000) + 1e-6


@pytest.mark.parametrize(
    "target", [GaussianNoise(), InputDropout(), InputScale(), ColorJitter("hue"), Cutout("length")]
)
def test_inputs_keep_their_precision_and_the_noise_follows_from_the_generator(target: Any):
    x = images().bfloat16()
    value = torch.full((4,), 0.4 if not isinstance(target, Cutout) else 2.0)
    state = torch.get_rng_state()
    first, second = (target.transform(x, value, seeded(2)) for _ in range(2))
    assert first.dtype is torch.bfloat16
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, target.transform(x, value, seeded(3)))
