# SPDX-License-Identifier: Apache-2.0
"""What the trace, the largest eigenvalue, the exact limit and a watched epoch cost, beside loops and other libraries."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fulgurite.bench import (
    Bench,
    Block,
    Callbacks,
    Case,
    Classifier,
    Missing,
    Target,
    Training,
    batches,
    calls,
    device,
    peer,
    trainers,
)
from fulgurite.curvature import GaussNewton, hutchinson_trace, lanczos, model_loss
from fulgurite.per_example import cross_entropy
from fulgurite_plugins.curvature.dynamical_stability.callbacks import StabilityMonitor
from fulgurite_plugins.curvature.dynamical_stability.features import gauss_newton_trace
from fulgurite_plugins.curvature.dynamical_stability.functional import max_stable_lr, stability_radius

_CLASSES, _BATCH, _STEPS = 10, 128, 20
_OURS, _LOOP = "gauss_newton_trace", "a loop over examples"
_CURVLINOPS = "curvlinops-for-pytorch einops einconv linear_operator jaxtyping"
_PRODUCTS = 100
"""Probes of the estimates that stand beside the exact trace; they are then a few per cent off."""


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, _CLASSES))


def _convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, _CLASSES))


def _data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator)
    return inputs.to(device()), torch.randint(0, _CLASSES, shape[:1], generator=generator).to(device())


def _traces(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Mapping[str, Block]:
    """Return the ways to the trace of the Gauss-Newton matrix of cross entropy; exact ones are checked once."""
    torch.manual_seed(0)
    model = make().to(device())
    x, y = _data(shape)
    exact: dict[str, Callable[[], Any]] = {
        _OURS: lambda: gauss_newton_trace(model, x, "cross_entropy"),
        _LOOP: functools.partial(_by_loop, model, x),
        "vmap(jacrev) by hand, chunks of 32": functools.partial(_by_vmap, model, x),
        "BackPACK DiagGGNExact": peer(lambda: _by_backpack(copy.deepcopy(model), x, y), "backpack-for-pytorch"),
    }
    expected = exact[_LOOP]()
    for function in exact.values():
        if not isinstance(function, Missing):
            torch.testing.assert_close(function(), expected, rtol=1e-4, atol=0)
    source = model_loss(model, cross_entropy, [(x, y)])
    estimates: dict[str, Callable[[], Any]] = {
        "gauss_newton_trace(probes=1)": lambda: gauss_newton_trace(model, x, "cross_entropy", probes=1),
        f"Hutchinson, {_PRODUCTS} products": lambda: hutchinson_trace(
            GaussNewton(source, model.parameters()), _PRODUCTS
        ),
        f"curvlinops hutchinson_trace, {_PRODUCTS} products": peer(lambda: _by_curvlinops(model, x, y), _CURVLINOPS),
    }
    return calls({**exact, **estimates})


def _by_loop(model: nn.Module, x: Tensor) -> Tensor:
    parameters = list(model.parameters())
    total = x.new_zeros(())
    for i in range(len(x)):
        outputs = model(x[i : i + 1])[0]
        p = outputs.detach().softmax(dim=0)
        roots = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for column in roots.unbind(dim=1):
            gradients = torch.autograd.grad(outputs, parameters, column, retain_graph=True)
            total += torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    return total / len(x)


def _by_vmap(model: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def of_example(x: Tensor) -> Tensor:
        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(model, parameters, (x.unsqueeze(0),)).squeeze(0)

        j = torch.cat([rows.flatten(1) for rows in jacrev(outputs)(parameters).values()], dim=1)
        p = outputs(parameters).softmax(dim=0)
        return ((torch.diag(p) - torch.outer(p, p)) * (j @ j.T)).sum()

    return vmap(of_example, chunk_size=32)(x).mean()


def _by_backpack(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    backpack = importlib.import_module("backpack")
    diagonal = importlib.import_module("backpack.extensions").DiagGGNExact()
    model, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())

    def trace() -> Tensor:
        with backpack.backpack(diagonal):
            loss(model(x), y).backward()
        return torch.stack([parameter.diag_ggn_exact.sum() for parameter in model.parameters()]).sum()  # type: ignore[attr-defined]

    return trace


def _by_curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    curvlinops = importlib.import_module("curvlinops")
    return lambda: curvlinops.hutchinson_trace(_of_curvlinops(model, x, y), _PRODUCTS)


def _of_curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    curvlinops = importlib.import_module("curvlinops")
    parameters = [p for p in model.parameters() if p.requires_grad]
    return curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)


def _eigenvalues() -> Mapping[str, Block]:
    torch.manual_seed(0)
    model = _mlp().to(device())
    x, y = _data((512, 64))
    source = model_loss(model, cross_entropy, [(x, y)])
    return calls(
        {
            "GaussNewton and lanczos, 20 products": lambda: lanczos(
                GaussNewton(source, model.parameters()), 20
            ).largest(),
            "power iteration, 100 products": functools.partial(_by_power, model, x, y),
            "curvlinops and scipy's eigsh": peer(lambda: _eigsh(model, x, y), _CURVLINOPS),
        }
    )


def _by_power(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    matrix = GaussNewton(model_loss(model, cross_entropy, [(x, y)]), model.parameters())
    vector = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(0)).to(x)
    for _ in range(100):
        vector = matrix @ (vector / vector.norm())
    return vector.norm()


def _eigsh(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    importlib.import_module("curvlinops")  # missing here, rather than when it is timed
    eigsh = importlib.import_module("scipy.sparse.linalg").eigsh

    def largest() -> Any:
        return eigsh(_of_curvlinops(model, x, y).to_scipy(), k=1, which="LA", tol=1e-4, return_eigenvectors=False)

    return largest


def _exact(examples: int) -> Mapping[str, Block]:
    j = torch.randn(examples, 2 * examples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = (j @ j.T).to(device())
    limit = float(max_stable_lr(kernel, 4))
    return calls(
        {
            "max_stable_lr": lambda: max_stable_lr(kernel, 4),
            "stability_radius": lambda: stability_radius(kernel, limit, 4),
            "bisection of the radius by power iteration": functools.partial(_by_bisection, kernel, limit),
        }
    )


def _by_bisection(kernel: Tensor, limit: float) -> float:
    """Return the limit as one would find it from the map of the residuals' second moment, to a thousandth."""
    n, batch = len(kernel), 4
    own, both = (n - batch) / (batch * n * (n - 1)), (batch - 1) / (batch * n * (n - 1))

    def grows(lr: float) -> bool:
        moment = torch.eye(n).to(kernel)
        for _ in range(100):
            moment = moment / moment.norm()
            pushed = kernel @ moment
            noise = kernel @ (own * torch.diag(moment.diagonal()) + both * moment) @ kernel
            moment = moment - lr / n * (pushed + pushed.T) + lr**2 * noise
        return bool(moment.norm() > 1)

    low, high = limit / 4, 4 * limit
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


def _watched() -> Mapping[str, Block]:
    variants: dict[str, Callbacks] = {
        "trainer alone": lambda: (),
        "trainer alone, once more": lambda: (),  # tells how far two equal trainings are apart
        "StabilityMonitor(), trace": lambda: (StabilityMonitor(max_samples=_BATCH, quantities=("trace",)),),
        "StabilityMonitor()": lambda: (StabilityMonitor(max_samples=_BATCH),),
    }
    data = batches(_STEPS * _BATCH, 784, _CLASSES, _BATCH)
    return trainers(Training(lambda: Classifier((784, 800, 460, _CLASSES)), data, steps=_STEPS, cycle=_STEPS), variants)


BENCH = Bench(
    cases=(
        Case(
            name="Trace of the Gauss-Newton matrix, 512 examples, perceptron 64-128-128-10",
            blocks=functools.partial(_traces, _mlp, (512, 64)),
            reference=_OURS,
            targets=(Target(_LOOP, "ratio", at_least=20.0),),
            rounds=10,
        ),
        Case(
            name="Trace of the Gauss-Newton matrix, 128 examples, three convolutions on 16x16 pixels",
            blocks=functools.partial(_traces, _convnet, (128, 3, 16, 16)),
            reference=_OURS,
            targets=(Target(_LOOP, "ratio", at_least=2.0),),
            rounds=6,
        ),
        Case(
            name="Largest eigenvalue, 512 examples, perceptron 64-128-128-10",
            blocks=_eigenvalues,
            reference="GaussNewton and lanczos, 20 products",
            rounds=6,
        ),
        Case(
            name="Exact limit of 128 examples",
            blocks=functools.partial(_exact, 128),
            reference="max_stable_lr",
            targets=(Target("bisection of the radius by power iteration", "ratio", at_least=5.0),),
            rounds=6,
        ),
        Case(
            name=f"A training step of a perceptron of a million parameters, in epochs of {_STEPS} steps that are measured",
            blocks=_watched,
            reference="trainer alone",
            rounds=6,
        ),
    )
)
