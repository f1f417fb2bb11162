# SPDX-License-Identifier: Apache-2.0
"""The checks of optimizers; a case makes one from parameters: `make=lambda parameters: Mine(parameters, lr=0.1)`."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.testing.check import CheckError, InapplicableError, check, expect
from fulgurite.testing.lab import CLASSES, Lab, small_data, small_network


class _Training:
    """A few full-batch steps of a small network."""

    def __init__(
        self, make: Callable[[Any], Any], parameters: Callable[[nn.Module], Any] = nn.Module.parameters
    ) -> None:
        torch.manual_seed(0)
        self.network = small_network()
        self.inputs, self.targets = small_data().tensors
        self.optimizer = make(parameters(self.network))

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(self.inputs), self.targets)
        loss.backward()
        return loss

    def steps(self, number: int) -> Tensor:
        for _ in range(number):
            self.optimizer.step(self.closure)
        return self.weights

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.network.parameters()]).clone()


@check("optimizer")
def check_optimizer_is_deterministic(lab: Lab) -> None:
    """Two equal trainings end with different parameters."""
    expect(torch.equal(_Training(lab.make).steps(5), _Training(lab.make).steps(5)), "two equal trainings differ")


@check("optimizer")
def check_optimizer_learns(lab: Lab) -> None:
    """A step does not lower the loss of the batch it was made for."""
    training = _Training(lab.make)
    before = float(training.closure().detach())
    training.steps(20)
    after = float(training.closure().detach())
    expect(after < before, f"after 20 steps the loss went from {before:.3f} to {after:.3f}")


@check("optimizer")
def check_optimizer_returns_the_loss(lab: Lab) -> None:
    """`step(closure)` does not return the closure's loss, which Lightning needs."""
    training = _Training(lab.make)
    expected = training.closure().detach()
    found = training.optimizer.step(training.closure)
    expect(found is not None and torch.allclose(torch.as_tensor(found), expected), f"step(closure) returned {found!r}")


@check("optimizer")
def check_optimizer_resumes(lab: Lab) -> None:
    """After loading a checkpoint the first steps differ from an uninterrupted run, or the state does not load safely."""
    whole = _Training(lab.make)
    whole.steps(4)
    state: dict[str, Any] = {
        "model": copy.deepcopy(whole.network.state_dict()),
        "optimizer": copy.deepcopy(whole.optimizer.state_dict()),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckError(f"weights_only=True refuses its state: {str(error).splitlines()[0]}") from error
    resumed = _Training(lab.make)
    resumed.network.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    expect(torch.equal(whole.steps(3), resumed.steps(3)), "three steps after loading the state end elsewhere")


@check("optimizer")
def check_optimizer_parameter_groups(lab: Lab) -> None:
    """A group with a learning rate of its own is trained with that of the others."""

    def frozen_bias(network: nn.Module) -> list[dict[str, Any]]:
        weights = [p for p in network.parameters() if p.ndim > 1]
        return [{"params": weights}, {"params": [p for p in network.parameters() if p.ndim == 1], "lr": 0.0}]

    training = _Training(lab.make, frozen_bias)
    before = [p.detach().clone() for p in training.network.parameters()]
    training.steps(3)
    for old, new in zip(before, training.network.parameters(), strict=True):
        moved = not torch.equal(old, new)
        expect(
            moved == (new.ndim > 1), f"a parameter of shape {list(new.shape)} {'moved' if moved else 'did not move'}"
        )


@check("optimizer")
def check_optimizer_skips_missing_gradients(lab: Lab) -> None:
    """A parameter without a gradient fails, or moves."""
    unused = nn.Parameter(torch.ones(3))
    training = _Training(lab.make, lambda network: [*network.parameters(), unused])
    training.steps(2)
    expect(torch.equal(unused.detach(), torch.ones(3)), "a parameter without a gradient has moved")


@check("optimizer")
def check_optimizer_maximizes(lab: Lab) -> None:
    """`maximize=True` goes downhill all the same."""
    _takes(lab, "maximize")
    training = _Training(lambda parameters: lab.target(parameters, **_arguments(lab), maximize=True))
    before = float(training.closure().detach())
    training.steps(3)
    expect(float(training.closure().detach()) > before, "with maximize=True the loss falls")


@check("optimizer")
def check_optimizer_foreach(lab: Lab) -> None:
    """The fused path over all parameters computes something else than the loop over them."""
    _takes(lab, "foreach")
    loop = _Training(lambda parameters: lab.target(parameters, **_arguments(lab), foreach=False)).steps(4)
    fused = _Training(lambda parameters: lab.target(parameters, **_arguments(lab), foreach=True)).steps(4)
    expect(torch.allclose(loop, fused, rtol=1e-5, atol=1e-6), "foreach=True and foreach=False differ")


@check("optimizer")
def check_optimizer_refuses_sparse_gradients(lab: Lab) -> None:
    """A sparse gradient is silently taken for a dense one."""
    embedding = nn.Embedding(10, CLASSES, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = lab.make(embedding.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(embedding(torch.tensor([1, 2])), torch.tensor([0, 1]))
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except (RuntimeError, NotImplementedError) as error:
        expect(
            "sparse" in str(error).lower(), f"it fails without saying that sparse gradients are not supported: {error}"
        )
        return
    moved = (embedding.weight.detach() != before).any(dim=1).nonzero().flatten().tolist()
    expect(moved == [1, 2], f"rows {moved} moved, where the gradient has rows [1, 2]")


def _takes(lab: Lab, name: str) -> None:
    if name not in inspect.signature(lab.target).parameters:
        raise InapplicableError(f"it has no argument `{name}`")


def _arguments(lab: Lab) -> dict[str, Any]:
    """Return the arguments with which the case makes it, read from the defaults that it stores."""
    made = lab.make([nn.Parameter(torch.zeros(1))])
    known = inspect.signature(lab.target).parameters
    return {
        name: value for name, value in made.defaults.items() if name in known and name not in ("maximize", "foreach")
    }
