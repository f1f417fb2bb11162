# SPDX-License-Identifier: Apache-2.0
"""What spectra and the learner cost: beside peers and the naive way, with more parameters and steps, and per epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.bench import Bench, Block, Case, Target, Training, batches, calls, convolutional, device, peer, trainers
from fulgurite.curvature import Hessian, model_loss
from fulgurite_plugins.curvature.batch_hessian_lr.density import slq_density
from fulgurite_plugins.curvature.batch_hessian_lr.intervention import SLQLearningRate

_K = 50
_OURS = "slq_density"


class _Residual(nn.Module):
    """Two convolutions with batch norm, and the input added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H / stride, W / stride]`."""
        past = x[..., :: self.stride, :: self.stride]
        return F.relu(self.body(x) + F.pad(past, (0, 0, 0, 0, 0, self.extra)))


def _resnet20() -> nn.Sequential:
    """The ResNet-20 of CIFAR-10: 270 thousand parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for stage, outputs in enumerate((16, 32, 64)):
        for block in range(3):
            layers.append(_Residual(width, outputs, 2 if stage and not block else 1))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def _problem(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = make().to(device()).eval()
    return network, torch.randn(*shape, device=device()), torch.randint(0, 10, shape[:1], device=device())


def _ours(network: nn.Module, x: Tensor, y: Tensor, steps: int = _K, keep_graphs: bool = True) -> Callable[[], object]:
    source = model_loss(network, functools.partial(F.cross_entropy, reduction="none"), [(x, y)])

    def density() -> object:
        with Hessian(source, network.parameters(), keep_graphs) as matrix:
            return slq_density(matrix, steps)

    return density


def _naive(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Lanczos without reorthogonalisation, its numbers on the CPU, the graph anew for each product."""
    parameters = list(network.parameters())

    def product(vector: Tensor) -> Tensor:
        gradients = torch.autograd.grad(F.cross_entropy(network(x), y), parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(flat @ vector, parameters)])

    def density() -> object:
        v = torch.randn(sum(p.numel() for p in parameters), device=x.device)
        v, past, beta = v / v.norm(), torch.zeros_like(v), torch.zeros(())
        diagonal, off_diagonal = [], []
        for _ in range(_K):
            image = product(v) - beta.to(x.device) * past
            diagonal.append((image @ v).cpu())
            image = image - diagonal[-1].to(x.device) * v
            beta = image.norm().cpu()
            off_diagonal.append(beta)
            past, v = v, image / beta.to(x.device)
        off = torch.stack(off_diagonal[:-1])
        return torch.linalg.eigh(torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1))

    return density


def _curvlinops(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    from curvlinops import HessianLinearOperator, lanczos_approximate_spectrum  # type: ignore[import-not-found]

    parameters = list(network.parameters())
    operator: Any = HessianLinearOperator(
        network, nn.CrossEntropyLoss(), parameters, [(x, y)], progressbar=False, check_deterministic=False
    )
    # With given boundaries it makes as many products as the others.
    return lambda: lanczos_approximate_spectrum(operator, _K, boundaries=(-10.0, 10.0))


def _eigenthings(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    from hessian_eigenthings import (  # type: ignore[import-not-found]
        HessianOperator,
        lanczos_tridiagonal,
        supervised_loss,
    )

    operator: Any = HessianOperator(network, [(x, y)], supervised_loss(F.cross_entropy))
    size = sum(parameter.numel() for parameter in network.parameters())
    return lambda: lanczos_tridiagonal(operator, torch.randn(size, device=x.device), _K)


def _peers(make: Callable[[], nn.Module], *shape: int) -> Mapping[str, Block]:
    problem = _problem(make, *shape)
    return calls(
        {
            _OURS: _ours(*problem),
            "slq_density, graphs not kept": _ours(*problem, keep_graphs=False),
            "naive: graph anew, no reorthogonalisation": _naive(*problem),
            "curvlinops": peer(lambda: _curvlinops(*problem), "curvlinops-for-pytorch"),
            "hessian-eigenthings": peer(lambda: _eigenthings(*problem), "hessian-eigenthings"),
        }
    )


_WIDTHS = {"6 thousand parameters": 50, "64 thousand": 220, "670 thousand": 780}


def _more_parameters() -> Mapping[str, Block]:
    return calls(
        {
            name: _ours(*_problem(functools.partial(_perceptron, width), 128, 64), steps=10)
            for name, width in _WIDTHS.items()
        }
    )


def _more_steps() -> Mapping[str, Block]:
    problem = _problem(functools.partial(_perceptron, 780), 128, 64)
    return calls({f"{steps} steps": _ours(*problem, steps=steps) for steps in (10, 20, 40, 80)})


_EPOCH = 400
"""Updates in an epoch, as of 50 000 examples in batches of 125."""


def _epochs() -> Mapping[str, Block]:
    training = Training(
        lambda: convolutional(10, channels=(16, 32)),
        batches(_EPOCH * 32, 768, 10, 32),
        untimed_epochs=1,
        steps=_EPOCH,
        cycle=_EPOCH,
    )
    return trainers(
        training,
        {
            "trainer alone": lambda: (),
            "trainer alone, once more": lambda: (),
            "SLQLearningRate()": lambda: (SLQLearningRate(lr_bounds=(0.01, 0.01)),),
        },
    )


BENCH = Bench(
    cases=(
        Case(
            name=f"Spectral density of the Hessian of a ResNet-20, {_K} Lanczos steps (batch 8, 3x32x32)",
            blocks=functools.partial(_peers, _resnet20, 8, 3, 32, 32),
            reference=_OURS,
            targets=tuple(
                Target(name, "ratio", at_least=1.5)
                for name in ("naive: graph anew, no reorthogonalisation", "curvlinops", "hessian-eigenthings")
            ),
            rounds=5,
        ),
        Case(
            name=f"Spectral density of the Hessian of a perceptron of 64 thousand parameters, {_K} steps (batch 128)",
            blocks=functools.partial(_peers, functools.partial(_perceptron, 220), 128, 64),
            reference=_OURS,
            rounds=10,
        ),
        Case(
            name="Spectral density of a perceptron, 10 steps: with more parameters (batch 128)",
            blocks=_more_parameters,
            reference="64 thousand",
            targets=(Target("670 thousand", "ratio", at_most=670 / 64),),
            rounds=10,
        ),
        Case(
            name="Spectral density of a perceptron of 670 thousand parameters: with more steps (batch 128)",
            blocks=_more_steps,
            reference="10 steps",
            targets=(Target("20 steps", "ratio", at_most=2.5), Target("80 steps", "ratio", at_most=16.0)),
            rounds=10,
        ),
        Case(
            name=f"A training step, averaged over epochs of {_EPOCH} updates, of a convolutional network (batch 32)",
            blocks=_epochs,
            reference="trainer alone",
            targets=(Target("SLQLearningRate()", "ratio", at_most=1.05),),
            rounds=8,
        ),
    )
)
