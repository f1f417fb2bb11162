# SPDX-License-Identifier: Apache-2.0
"""The parts of the callback without a trainer: Adam, the schedule file and its picture, batches."""

from __future__ import annotations

import json
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_plugins.bilevel.self_tuning_networks.application import batch_size, with_inputs
from fulgurite_plugins.bilevel.self_tuning_networks.course import Course, draw
from fulgurite_plugins.bilevel.self_tuning_networks.tuning import Tuner


def tuner(**kwargs: Any) -> Tuner:
    lam, scale = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 0.2])
    return Tuner(lam, scale, **{"lr": 0.02, "scale_lr": 0.01, **kwargs})


def test_steps_are_those_of_torchs_adam():
    ours = tuner()
    lam, rho = (row.clone().requires_grad_() for row in ours.theta)
    theirs = torch.optim.Adam([{"params": [lam], "lr": 0.02}, {"params": [rho], "lr": 0.01}])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradient = torch.randn(2, 2, generator=generator)
        lam.grad, rho.grad = gradient.unbind()
        theirs.step()
        ours.step(gradient, torch.zeros(()))
    torch.testing.assert_close(ours.theta, torch.stack([lam, rho]).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.scale, F.softplus(rho).detach())


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_step_that_is_not_finite_moves_nothing_and_is_counted(where):
    one, other = tuner(), tuner()
    gradients = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    for gradient in gradients:
        one.step(gradient, torch.zeros(()))
        bad = torch.full((2, 2), torch.nan) if where == "gradient" else gradient
        other.step(gradient, torch.zeros(()))
        for _ in range(2):
            other.step(bad, torch.tensor(0.0 if where == "gradient" else torch.inf))
    assert torch.equal(one.theta, other.theta)
    assert all(torch.equal(a, b) for a, b in zip(one.adam, other.adam, strict=True))
    assert (int(other.skipped), int(other.in_a_row)) == (8, 2)
    other.step(gradients[0], torch.zeros(()))
    assert (int(other.skipped), int(other.in_a_row)) == (8, 0)


def test_gradient_is_clipped_by_its_norm():
    clipped, scaled = tuner(max_grad_norm=0.5), tuner()
    for gradient in torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)):
        clipped.step(10 * gradient, torch.zeros(()))
        scaled.step(gradient * 0.5 / gradient.norm(), torch.zeros(()))
    torch.testing.assert_close(clipped.theta, scaled.theta)


def test_learning_rate_of_zero_keeps_the_scales():
    kept = tuner(scale_lr=0.0)
    kept.step(torch.ones(2, 2), torch.zeros(()))
    torch.testing.assert_close(kept.scale, torch.tensor([0.5, 0.2]))
    assert not torch.equal(kept.lam, tuner().lam)


def course() -> Course:
    found = Course(["rate", "decay"])
    for update, value in ((0, 0.1), (4, 0.2), (6, 0.15)):
        found.append(update, [value, 10 * value], [0.5, 0.25])
    return found


def test_values_in_force_are_those_of_the_last_row_before():
    assert [course().at(update)[0] for update in (0, 3, 4, 5, 6, 1000)] == [0.1, 0.1, 0.2, 0.2, 0.15, 0.15]


def test_row_of_the_same_update_is_replaced():
    found = course()
    found.append(6, [0.4, 4.0], [0.1, 0.1])
    assert found.updates == [0, 4, 6]
    assert found.at(6) == [0.4, 4.0]


def test_file_is_whole_readable_and_read_back(tmp_path):
    path = tmp_path / "folder" / "schedule.json"
    described = [{"name": "rate", "range": [0.0, 0.9]}, {"name": "decay", "range": [0.0, float("inf")]}]
    course().write(path, described)
    read, hyperparameters = Course.read(path)
    assert read == course()
    assert hyperparameters == described
    assert [p.name for p in path.parent.iterdir()] == ["schedule.json"]
    lines = path.read_text().splitlines()
    assert "    [4, 0.2, 2.0, 0.5, 0.25]," in lines, "one row a line"
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["columns"] == ["update", "rate", "decay", "rate scale", "decay scale"]


def test_state_is_restored_exactly():
    other = Course(["rate", "decay"])
    other.load_state_dict(course().state_dict())
    assert other == course()


@pytest.mark.parametrize(
    ("text", "message"), [("not json", "but got: Expecting"), ('{"format": "x"}', "'format': 'x'"), ("[]", "list")]
)
def test_other_files_are_named(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FulguriteError, match=rf"a.json to be a schedule file of SelfTuning.*{message}"):
        Course.read(path)
    with pytest.raises(FulguriteError, match="There is no schedule file"):
        Course.read(tmp_path / "b.json")


def test_picture_is_a_png_and_leaves_no_figure_open(tmp_path):
    import matplotlib.pyplot as plt

    course().plot(tmp_path / "a.png")
    several = draw({"low": course(), "high": course()})
    for content in ((tmp_path / "a.png").read_bytes(), several):
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    assert plt.get_fignums() == []


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "batch",
    [
        [torch.zeros(6, 3), torch.zeros(6, dtype=torch.long)],
        (torch.zeros(6, dtype=torch.long), torch.zeros(6, 3)),
        {"y": torch.zeros(6, dtype=torch.long), "nested": {"x": torch.zeros(6, 3)}},
        Pair(torch.zeros(6, 3), "text"),
        torch.zeros(6, 3),
    ],
)
def test_batches_of_any_form(batch):
    """The first floating-point tensor with several dimensions is the input; the batch keeps its form."""
    assert batch_size(batch, "x") == 6
    changed = with_inputs(batch, lambda x: x + 1, "x")
    assert type(changed) is type(batch)
    values = torch.utils._pytree.tree_leaves(changed)
    assert sum(isinstance(v, torch.Tensor) and bool((v == 1).all()) for v in values) == 1


def test_batches_without_tensors_or_inputs_are_refused_by_name():
    with pytest.raises(RefusedError, match="tester gives each example .* the batch, a list, holds no tensor"):
        batch_size(["a", 3], "tester")
    with pytest.raises(RefusedError, match=r"tester has hyperparameters that act on the inputs, but the batch, a list"):
        with_inputs([torch.zeros(4, dtype=torch.long)], lambda x: x, "tester")
