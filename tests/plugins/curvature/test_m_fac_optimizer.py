# SPDX-License-Identifier: Apache-2.0
"""The MFAC optimizer: each step against a dense inverse of the Fisher of the last gradients."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_plugins.curvature import MFAC
from fulgurite_plugins.curvature.m_fac import preconditioner
from fulgurite_plugins.curvature.m_fac.fisher import FisherInverse
from tests.helpers import Plain, fit, loader, weights
from tests.plugins.curvature.test_m_fac import drawn

D, M, DAMPING, LR = 20, 4, 1e-2, 0.1


def parameter(size: int = D, dtype: torch.dtype = torch.float64, seed: int = 5) -> nn.Parameter:
    return nn.Parameter(drawn(size, seed=seed).to(dtype))


def optimizer(parameters: Any, **arguments: Any) -> MFAC:
    return MFAC(parameters, **{"lr": LR, "num_grads": M, "damping": DAMPING, "storage_dtype": "float64", **arguments})


def steps(made: MFAC, gradients: Tensor) -> list[Tensor]:
    """Make a step with each gradient of the first parameter; return what it moved by, over -lr."""
    (weight,) = made.param_groups[0]["params"]
    moves = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.to(weight).clone()
        made.step()
        moves.append((before - weight.detach()) / LR)
    return moves


def window_of(gradients: Tensor, step: int, rows: int = M) -> Tensor:
    """The last gradients of step `step`, counted from 0, with zeros where there is none yet."""
    last = gradients[max(0, step - rows + 1) : step + 1]
    return torch.cat([last, last.new_zeros(rows - len(last), last.shape[1])])


def direction(rows: Tensor, gradient: Tensor, damping: float = DAMPING) -> Tensor:
    """By the dense inverse of the Fisher."""
    matrix = damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / len(rows)
    return torch.linalg.solve(matrix, gradient)


def test_every_step_is_the_static_algorithm_on_the_last_gradients():
    gradients = drawn(M + 6, D)
    for i, move in enumerate(steps(optimizer([parameter()]), gradients)):
        rows = window_of(gradients, i)
        assert torch.allclose(move, direction(rows, gradients[i]), rtol=1e-9, atol=1e-11)
        assert torch.allclose(move, FisherInverse(rows, DAMPING).mul(gradients[i]), rtol=1e-9, atol=1e-11)


def test_the_first_step_is_a_scaled_gradient():
    (gradient,) = drawn(1, D)
    (move,) = steps(optimizer([parameter()]), gradient.unsqueeze(0))
    assert torch.allclose(move, gradient / (DAMPING + gradient @ gradient / M), rtol=1e-11)


def test_the_order_of_the_window_does_not_matter():
    gradients = drawn(M, D)
    shuffled = gradients[torch.tensor([2, 0, 1, 3])]
    assert torch.allclose(
        steps(optimizer([parameter()]), gradients)[-1], steps(optimizer([parameter()]), shuffled)[-1], rtol=1e-9
    )


def test_momentum_averages_directions_and_weight_decay_enters_the_window():
    gradients, weight = drawn(7, D), parameter()
    made = optimizer([weight], momentum=0.9, weight_decay=0.3)
    theta, average, rows = weight.detach().clone(), torch.zeros(D, dtype=torch.float64), torch.zeros(0, D).double()
    for gradient in gradients:
        decayed = gradient + 0.3 * theta
        rows = torch.cat([rows, decayed.unsqueeze(0)])
        average = 0.9 * average + 0.1 * direction(window_of(rows, len(rows) - 1), decayed)
        theta = theta - LR * average
        weight.grad = gradient.clone()
        made.step()
        assert torch.allclose(weight.detach(), theta, rtol=1e-9, atol=1e-11)


def test_groups_share_a_window_but_not_their_rates():
    a, b, gradients = parameter(8), parameter(5), drawn(6, 13)
    made = optimizer([{"params": [a]}, {"params": [b], "lr": 0.01}])
    before = torch.cat([a.detach(), b.detach()]).clone()
    for gradient in gradients:
        before = torch.cat([a.detach(), b.detach()]).clone()
        a.grad, b.grad = gradient[:8].clone(), gradient[8:].clone()
        made.step()
    expected = direction(window_of(gradients, 5), gradients[5]) * torch.tensor(
        [LR] * 8 + [0.01] * 5, dtype=torch.float64
    )
    assert torch.allclose(before - torch.cat([a.detach(), b.detach()]), expected, rtol=1e-8, atol=1e-12)


def test_groups_with_windows_of_their_own():
    a, b, gradients = parameter(8), parameter(5), drawn(6, 13)
    made = optimizer([{"params": [a]}, {"params": [b]}], per_group=True)
    for gradient in gradients:
        before = [a.detach().clone(), b.detach().clone()]
        a.grad, b.grad = gradient[:8].clone(), gradient[8:].clone()
        made.step()
    for old, new, part in zip(before, (a, b), (slice(8), slice(8, 13)), strict=True):
        expected = direction(window_of(gradients[:, part], 5), gradients[5, part])
        assert torch.allclose((old - new.detach()) / LR, expected, rtol=1e-8, atol=1e-10)


def test_a_parameter_without_a_gradient_is_a_column_of_zeros_and_stays():
    a, b, gradients = parameter(8), parameter(5), drawn(6, 13)
    made = optimizer([a, b], weight_decay=0.5, momentum=0.5)
    a.grad = gradients[0, :8].clone()
    b.grad = gradients[0, 8:].clone()
    made.step()
    kept, average = b.detach().clone(), made.state[b]["momentum_buffer"].clone()
    b.grad = None
    a.grad = gradients[1, :8].clone()
    made.step()
    assert torch.equal(b.detach(), kept)
    assert torch.equal(made.state[b]["momentum_buffer"], average)
    window = made.preconditioners[0].window
    assert window is not None
    assert window.in_order()[1, 8:].count_nonzero() == 0
    assert window.in_order()[0, 8:].count_nonzero() == 5


def test_no_gradients_at_all_change_nothing():
    weight = parameter()
    made = optimizer([weight], weight_decay=1.0)
    before = weight.detach().clone()
    assert made.step() is None
    assert torch.equal(weight.detach(), before)
    assert made.preconditioners[0].window is None


def test_a_closure_without_a_loss_still_makes_the_step():
    weight = parameter()
    made = optimizer([weight])
    before = weight.detach().clone()

    def closure() -> None:
        made.zero_grad()
        weight.square().sum().backward()

    assert made.step(closure) is None
    assert not torch.equal(weight.detach(), before)


def test_new_parameters_are_columns_of_zeros_in_the_past():
    a, b, gradients = parameter(8), parameter(5), drawn(6, 13)
    made = optimizer([a])
    for gradient in gradients[:3]:
        a.grad = gradient[:8].clone()
        made.step()
    made.add_param_group({"params": [b]})
    before = torch.cat([a.detach(), b.detach()]).clone()
    a.grad, b.grad = gradients[3, :8].clone(), gradients[3, 8:].clone()
    made.step()
    past = gradients[:4].clone()
    past[:3, 8:] = 0
    move = (before - torch.cat([a.detach(), b.detach()])) / LR
    assert torch.allclose(move, direction(past, gradients[3]), rtol=1e-9)


def test_sparse_leaves_out_what_is_zero():
    weight, gradients = parameter(), drawn(6, D)
    with torch.no_grad():
        weight[[2, 5, 11]] = 0.0
    made = optimizer([weight], sparse=True, momentum=0.5, weight_decay=0.1)
    dense_weight = nn.Parameter(weight.detach()[weight.detach() != 0].clone())
    other = optimizer([dense_weight], momentum=0.5, weight_decay=0.1)
    kept = (weight.detach() != 0).nonzero().squeeze(1)
    for gradient in gradients:
        weight.grad, dense_weight.grad = gradient.clone(), gradient[kept].clone()
        made.step()
        other.step()
    assert made.preconditioners[0].columns.total == D - 3
    assert weight.detach()[[2, 5, 11]].count_nonzero() == 0
    assert torch.allclose(weight.detach()[kept], dense_weight.detach(), rtol=1e-12)


def test_sparse_without_zeros_warns():
    with pytest.warns(UserWarning, match="found none among 20"):
        optimizer([parameter()], sparse=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_with_a_gradient_that_is_not_finite_is_none(momentum):
    gradients = drawn(7, D)
    whole, interrupted = (optimizer([parameter()], momentum=momentum) for _ in range(2))
    steps(whole, gradients)
    with_bad = torch.cat([gradients[:5], torch.full((2, D), torch.nan).double(), gradients[5:]])
    with_bad[6, 1:] = 1.0  # a single NaN
    with_bad[5, 0] = torch.inf
    steps(interrupted, with_bad)
    assert torch.equal(whole.param_groups[0]["params"][0], interrupted.param_groups[0]["params"][0])
    assert interrupted.skipped == 2
    assert whole.skipped == 0


def test_it_names_the_parameter_whose_gradient_is_not_finite():
    made = optimizer([("layer.weight", parameter(3)), ("layer.bias", parameter(2))], nonfinite="raise")
    weight, bias = made.param_groups[0]["params"]
    weight.grad, bias.grad = torch.ones_like(weight), torch.full_like(bias, torch.nan)
    before = weight.detach().clone()
    with pytest.raises(FulguriteError, match=r"the gradient of parameter layer.bias \(shape \[2\]\) is not finite"):
        made.step()
    assert torch.equal(weight.detach(), before)


def test_stored_in_bfloat16_it_is_exact_for_the_rounded_gradients():
    gradients = drawn(8, D)
    made = optimizer([parameter(dtype=torch.float32)], storage_dtype=torch.bfloat16)
    moves = steps(made, gradients.float())
    rounded = gradients.float().bfloat16().double()
    for i, move in enumerate(moves):
        expected = direction(window_of(rounded, i), rounded[i])
        assert float((move.double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e6])
def test_in_float32_it_stays_finite_with_gradients_that_are_nearly_equal(scale):
    noise = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 1e-4
    made = optimizer([parameter(300, torch.float32)], num_grads=64, damping=1e-10, storage_dtype="float32")
    for move in steps(made, scale * (1 + noise)):
        assert bool(move.isfinite().all())


def test_in_float32_more_gradients_than_parameters_are_no_harm():
    """S is m * damping, plus a matrix of rank 20 with elements that are far larger."""
    gradients = 3 * drawn(150, D)
    made = optimizer([parameter(dtype=torch.float32)], num_grads=64, damping=1e-4, storage_dtype="float32")
    for i, move in enumerate(steps(made, gradients.float())):
        expected = direction(window_of(gradients, i, 64), gradients[i], 1e-4)
        if i >= D:  # before, it is as large as 1 / damping in directions that no gradient has
            assert float((move.double() - expected).norm() / expected.norm()) < 5e-2


def test_num_grads_that_the_reference_refuses():
    gradients = drawn(3, D)
    made = optimizer([parameter()], num_grads=1029)
    for i, move in enumerate(steps(made, gradients)):
        assert torch.allclose(move, direction(window_of(gradients, i, 1029), gradients[i]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("arguments", [{}, {"per_group": True, "storage_dtype": "bfloat16"}, {"sparse": True}])
def test_it_resumes_exactly_and_its_state_loads_safely(arguments):
    def made() -> tuple[MFAC, list[nn.Parameter]]:
        parameters = [parameter(8), parameter(5)]
        with torch.no_grad():
            parameters[0][2] = 0.0
            parameters[1][1] = 0.0
        groups = [{"params": [parameters[0]]}, {"params": [parameters[1]]}]
        return optimizer(groups, momentum=0.9, **arguments), parameters

    def run(made: MFAC, parameters: list[nn.Parameter], gradients: Tensor) -> Tensor:
        for gradient in gradients:
            for p, g in zip(parameters, gradient.split([8, 5]), strict=True):
                p.grad = g.clone()
            made.step()
        return torch.cat([p.detach() for p in parameters])

    gradients, file = drawn(11, 13), io.BytesIO()
    (whole, parameters), (resumed, others) = made(), made()
    run(whole, parameters, gradients[:6])
    torch.save({"weights": [p.detach() for p in parameters], "optimizer": whole.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, saved in zip(others, state["weights"], strict=True):
            p.copy_(saved)
    resumed.load_state_dict(state["optimizer"])
    assert torch.equal(run(whole, parameters, gradients[6:]), run(resumed, others, gradients[6:]))


def test_a_copy_goes_its_own_way():
    gradients, weight = drawn(8, D), parameter()
    made = optimizer([weight])
    steps(made, gradients[:5])
    copied = copy.deepcopy(made)
    expected = steps(made, gradients[5:])
    for move, other in zip(expected, steps(copied, gradients[5:]), strict=True):
        assert torch.equal(move, other)


def test_without_its_window_it_starts_anew_and_says_so():
    gradients = drawn(6, D)
    made, other = optimizer([parameter()], checkpoint_window=False), optimizer([parameter()])
    steps(made, gradients[:5])
    with pytest.warns(UserWarning, match="has no window of gradients"):
        other.load_state_dict(made.state_dict())
    (move,) = steps(other, gradients[5:])
    assert torch.allclose(move, direction(window_of(gradients[5:], 0), gradients[5]), rtol=1e-10)


def test_a_checkpoint_of_other_sizes_is_refused():
    made = optimizer([parameter()])
    steps(made, drawn(2, D))
    state = made.state_dict()
    with pytest.raises(ValueError, match="num_grads=5, but got one with num_grads=4"):
        optimizer([parameter()], num_grads=5).load_state_dict(state)
    with pytest.raises(ValueError, match="for 19 parameters, but got one for 20"):
        optimizer([parameter(D - 1)]).load_state_dict(state)
    two = optimizer([{"params": [parameter()]}, {"params": [parameter()]}], per_group=True)
    one = {**two.state_dict(), "windows": state["windows"]}
    with pytest.raises(ValueError, match="with 2 windows, but got one with 1"):
        two.load_state_dict(one)


def test_a_window_that_does_not_fit_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(preconditioner, "free_bytes", lambda device: 1000)
    weight = parameter()
    made, before = optimizer([weight]), weight.detach().clone()
    with pytest.raises(RefusedError, match=r"4 gradients of 20 numbers needs 1,280 bytes, but 1,000 are free on cpu"):
        steps(made, drawn(1, D))
    assert torch.equal(weight.detach(), before)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    made = optimizer(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        made.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0}, "`damping` of MFAC to be a positive number, but got 0"),
        ({"num_grads": 0}, "`num_grads` of MFAC to be at least 1, but got 0"),
        ({"lr": -1.0}, "`lr` of MFAC to be 0 or more, but got -1.0"),
        ({"momentum": 1.0}, r"`momentum` of MFAC to be in \[0, 1\), but got 1.0"),
        ({"weight_decay": -0.1}, "`weight_decay` of MFAC"),
        ({"storage_dtype": "float16"}, "`storage_dtype` of MFAC to be one of 'float32', 'float64', 'bfloat16'"),
        ({"shard": "yes"}, "`shard` of MFAC to be one of False, True, 'local'"),
        ({"nonfinite": "ignore"}, "`nonfinite` of MFAC"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MFAC([parameter()], **arguments)
    with pytest.raises(ValueError, match="to be real"):
        MFAC([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


class Trained(Plain):
    """With gradients that are clipped and accumulated, as Lightning does it."""

    def configure_optimizers(self) -> Any:
        return MFAC(self.parameters(), lr=0.05, momentum=0.9, num_grads=8, damping=1e-2)


def test_it_trains_in_lightning_and_resumes_there(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    arguments: dict[str, Any] = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "epochs": 4}
    in_order = loader(shuffle=False)
    whole, resumed = Trained(), Trained()
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer = fit(whole, [saving], in_order, enable_checkpointing=True, **arguments)
    made = trainer.optimizers[0]
    assert isinstance(made, MFAC)
    assert int(made.preconditioners[0].window.pushed) == trainer.global_step == 8
    fit(resumed, [], in_order, ckpt=tmp_path / "epoch=1.ckpt", **arguments)
    assert torch.equal(weights(whole), weights(resumed))
    unclipped = Trained()
    fit(unclipped, [], in_order, **{**arguments, "gradient_clip_val": None})
    assert not torch.equal(weights(whole), weights(unclipped))


def test_a_window_on_another_device_makes_the_same_steps():
    gradients = drawn(6, D)
    here, there = optimizer([parameter()]), optimizer([parameter()], storage_device="cpu")
    for move, other in zip(steps(here, gradients), steps(there, gradients), strict=True):
        assert torch.equal(move, other)


def test_it_is_offered_on_the_command_line(tmp_path):
    """`--optimizer=MFAC` in Fulgurite's own CLI and in a plain LightningCLI that has imported it."""
    from fulgurite.cli import main

    arguments = [
        "fit",
        "--model=Classification",
        "--data=Digits",
        "--data.train_size=64",
        "--optimizer=MFAC",
        "--optimizer.num_grads=4",
        "--optimizer.damping=0.01",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not main(arguments)
