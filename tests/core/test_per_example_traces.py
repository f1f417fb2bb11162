# SPDX-License-Identifier: Apache-2.0
"""What norms of gradients per example refuse, that they leave no trace in a training, and what they cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import RefusedError
from fulgurite.measurement import undisturbed
from fulgurite.per_example import cross_entropy, per_example_norms
from tests.core.per_example_cases import CLASSES, N, made

# What is refused


def test_batch_norm_in_training_mode_is_refused():
    model, x, y = made("batch norm")
    model[1].train()
    with pytest.raises(RefusedError, match="BatchNorm2d '1' is in training mode: every example's output depends on"):
        per_example_norms(model, x, y)
    with undisturbed(model) as network:
        assert per_example_norms(network, x, y).shape == (N,)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)).double().eval()
    with pytest.raises(RefusedError, match="BatchNorm1d '1' keeps no running statistics"):
        per_example_norms(model, torch.randn(N, 6).double(), y)


def test_an_embedding_that_changes_itself_is_refused():
    model = nn.Sequential(nn.Embedding(7, 3, max_norm=1.0), nn.Flatten(), nn.Linear(18, CLASSES))
    with pytest.raises(RefusedError, match="Embedding '0' has max_norm=1.0"):
        per_example_norms(model, torch.zeros(N, 6, dtype=torch.long), torch.zeros(N, dtype=torch.long))


def test_sharded_parameters_are_refused():
    model, x, y = made("mlp")
    model[0].weight.ds_id = 3
    with pytest.raises(RefusedError, match="Parameter '0.weight' is sharded"):
        per_example_norms(model, x, y)


def test_what_vmap_cannot_carry_is_refused():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale if x.sum() > 0 else -x * self.scale

    with pytest.raises(RefusedError, match="'scale' of Branching have no closed form here, and torch.func.vmap cannot"):
        per_example_norms(Branching(), torch.randn(N, CLASSES), torch.zeros(N, dtype=torch.long))


def test_losses_inputs_and_chunks_that_do_not_fit_are_refused():
    model, x, y = made("mlp")
    with pytest.raises(ValueError, match=r"one loss per example, \[1\], but got \[\]. Use reduction='none'"):
        per_example_norms(model, x, y, F.cross_entropy)
    with pytest.raises(ValueError, match=r"same number of examples along dimension 0, but got shapes \[5, 6\], \[4\]"):
        per_example_norms(model, x, y[:4])
    with pytest.raises(ValueError, match="`chunk` to be 'auto' or a positive number of examples, but got 0"):
        per_example_norms(model, x, y, chunk=0)


def test_an_input_that_was_overwritten_is_an_error_and_not_a_wrong_number():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            y = self.layer(x)
            x.zero_()
            return y

    with pytest.raises(RuntimeError, match="changed in place after the layer had used it"):
        per_example_norms(Overwrites(), torch.randn(N, 3), torch.zeros(N, dtype=torch.long))


def test_losses_without_a_gradient_are_refused():
    model, x, y = made("mlp")
    with pytest.raises(ValueError, match="but they carry no gradient. Remove `detach` or `no_grad`"):
        per_example_norms(model, x, y, lambda outputs, targets: cross_entropy(outputs.detach(), targets))


# No trace


class Stateful(nn.Module):
    """Draws random numbers, writes to a buffer and replaces another in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.layers = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x.detach().mean()
        return self.layers(x)


def test_random_state_buffers_modes_and_gradients_stay_what_they_were():
    torch.manual_seed(3)
    model = Stateful()
    model.layers[0].eval()
    x, y = torch.randn(N, 6), torch.zeros(N, dtype=torch.long)
    F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    last, hooks = model.last, [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    first = per_example_norms(model, x, y)
    assert torch.equal(per_example_norms(model, x, y), first)  # the same dropout masks again
    per_example_norms(model, x, y, parameters="last_layer")
    with pytest.raises(ValueError, match="one loss per example"):
        per_example_norms(model, x, y, F.cross_entropy)
    assert all(torch.equal(before[0][name], value) for name, value in model.state_dict().items())
    assert model.last is last
    assert [m.training for m in model.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_a_training_step_may_be_measured_between_its_forward_and_its_backward_pass():
    """Batch norm saves its buffers for the backward pass: they are not written to, not even with what they hold."""
    model, x, y = made("batch norm")
    loss = F.cross_entropy(model.train()(x), y)
    with undisturbed(model) as network:
        per_example_norms(network, x, y)
    loss.backward()
    assert all(module.training for module in model.modules())


def test_autocast_inference_mode_and_no_grad_around_it_change_nothing():
    model, x, y = made("convnet", torch.float32)
    expected = per_example_norms(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(per_example_norms(model, x, y), expected)
    with torch.no_grad():
        assert torch.equal(per_example_norms(model, x, y), expected)
    with torch.inference_mode():
        assert torch.equal(per_example_norms(model, x.clone(), y.clone()), expected)


def test_half_precision_parameters_are_squared_in_float32():
    model, x, y = made("mlp", torch.bfloat16)
    norms = per_example_norms(model, x, y)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, per_example_norms(model.float(), x.float(), y), rtol=0.05, atol=0)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_models_run_eagerly(how):
    model, x, y = made("mlp")
    expected = per_example_norms(model, x, y)

    def fails(*_: Any) -> Any:
        raise AssertionError("it was compiled")

    if how == "wrapped":
        model = torch.compile(model, backend=fails)
    else:
        model[0].compile(backend=fails)
    assert torch.equal(per_example_norms(model, x, y), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_carried_or_refused(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=reentrant)

    model, x, y = made("mlp")
    if not reentrant:
        assert torch.equal(per_example_norms(Checkpointed(model), x, y), per_example_norms(model, x, y))
        return
    with pytest.raises(ValueError, match="depend on the model's parameters, but they carry no gradient"):
        per_example_norms(Checkpointed(model), x, y)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        per_example_norms(nn.Sequential(nn.Linear(6, 6).double(), Checkpointed(model)), x, y)


# Cost


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations, and the numbers in their largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_neither_a_gradient_per_example_nor_a_loop_over_examples():
    model = nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, CLASSES))

    def cost(number: int) -> Largest:
        with Largest() as largest:
            per_example_norms(model, torch.randn(number, 100), torch.zeros(number, dtype=torch.long))
        return largest

    few, many = cost(20), cost(200)
    assert many.operations == few.operations
    assert many.numbers <= 200 * 300  # one layer's outputs; the gradients would be 200 * 31203
