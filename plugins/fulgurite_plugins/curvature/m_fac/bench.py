# SPDX-License-Identifier: Apache-2.0
"""What M-FAC costs: setting up, products and steps, beside the paper's recursions, and as sizes grow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.bench import Bench, Block, Case, Target, calls, device, peer
from fulgurite_plugins.curvature.m_fac.fisher import FisherInverse
from fulgurite_plugins.curvature.m_fac.functional import static_recursion, window_coefficients
from fulgurite_plugins.curvature.m_fac.optimizer import MFAC

_DAMPING = 1e-4
_OURS = "FisherInverse"
_STEP = "MFAC"


def _gradients(rows: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, size, generator=generator).mul_(0.1).to(device())


def _blocked_recursion(gradients: Tensor, damping: float, size: int) -> tuple[Tensor, Tensor]:
    """The paper's recursion in all blocks at a time, as the authors' code runs it: a loop over the gradients."""
    rows, blocks = len(gradients), gradients.view(len(gradients), -1, size)
    h = torch.empty_like(blocks)
    divisors = blocks.new_empty(rows, blocks.shape[1])
    for i, g in enumerate(blocks):
        factors = torch.einsum("jbk,bk->jb", h[:i], g) / divisors[:i]
        h[i] = g / damping - torch.einsum("jbk,jb->bk", h[:i], factors)
        divisors[i] = rows + (g * h[i]).sum(1)
    return h, divisors


def _block_by_block(gradients: Tensor, damping: float, size: int) -> list[tuple[Tensor, Tensor]]:
    """The paper's recursion in one block after the other."""
    return [static_recursion(block, damping) for block in gradients.split(size, dim=1)]


def _set_up_in_blocks(rows: int, size: int) -> Mapping[str, Block]:
    gradients = _gradients(rows, size)
    return calls(
        {
            _OURS: lambda: FisherInverse(gradients, _DAMPING, 128),
            "recursion, in all blocks at a time": lambda: _blocked_recursion(gradients, _DAMPING, 128),
            "recursion, block by block": lambda: _block_by_block(gradients, _DAMPING, 128),
        }
    )


def _set_up_whole(rows: int, size: int) -> Mapping[str, Block]:
    gradients = _gradients(rows, size)
    return calls(
        {
            _OURS: lambda: FisherInverse(gradients, _DAMPING),
            "recursion": lambda: static_recursion(gradients, _DAMPING),
        }
    )


def _conjugate_gradients(rows: int, size: int, x: Tensor) -> Callable[[], object]:
    from curvlinops import CGInverseLinearOperator, EFLinearOperator  # type: ignore[import-not-found]
    from curvlinops.examples import IdentityLinearOperator  # type: ignore[import-not-found]

    model, loss = nn.Linear(size, 1, bias=False).to(device()), nn.MSELoss()
    inputs = _gradients(rows, size)
    batch = [(inputs, torch.ones(rows, 1, device=inputs.device))]
    parameters = list(model.parameters())
    fisher = EFLinearOperator(model, loss, parameters, batch, check_deterministic=False)
    identity = IdentityLinearOperator([p.shape for p in parameters], inputs.device, inputs.dtype)
    inverse = CGInverseLinearOperator(fisher + _DAMPING * identity, tolerance=1e-4)
    return lambda: inverse @ x


def _products(rows: int, size: int) -> Mapping[str, Block]:
    gradients = _gradients(rows, size)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(gradients)
    inverse = FisherInverse(gradients, _DAMPING)
    blocks = FisherInverse(gradients, _DAMPING, 128)
    h, divisors = static_recursion(gradients, _DAMPING)

    def sequential() -> Tensor:
        result = x / _DAMPING
        for row, divisor in zip(h, divisors, strict=True):
            result = result - row * ((row @ x) / divisor)
        return result

    return calls(
        {
            _OURS: lambda: inverse.mul(x),
            "FisherInverse, blocks of 128": lambda: blocks.mul(x),
            "recursion, row by row": sequential,
            "curvlinops, conjugate gradients": peer(
                lambda: _conjugate_gradients(rows, size, x), "curvlinops-for-pytorch einops linear-operator"
            ),
        }
    )


class _SequentialStep:
    """A step as the paper writes it: coefficients in a loop over the window, and three passes over the gradients."""

    def __init__(self, parameter: Tensor, rows: int) -> None:
        self.parameter = parameter
        self.gradients = torch.zeros(rows, parameter.numel(), device=parameter.device)
        self.slot = 0

    def step(self) -> None:
        rows, gradient = len(self.gradients), self.parameter.grad
        assert gradient is not None
        self.gradients[self.slot] = gradient
        products = self.gradients @ gradient
        if self.slot == 0 and not hasattr(self, "gram"):
            self.gram = torch.zeros(rows, rows, dtype=torch.float64, device=gradient.device)
        self.gram[self.slot] = self.gram[:, self.slot] = products.double()
        coefficients = torch.zeros_like(self.gram)
        divisors = self.gram.new_ones(rows)
        for i in range(rows):
            factors = (coefficients[:i] @ self.gram[:, i]) / divisors[:i]
            coefficients[i] = -(factors @ coefficients[:i])
            coefficients[i, i] += 1 / _DAMPING
            divisors[i] = rows + coefficients[i] @ self.gram[:, i]
        inner = (coefficients @ (self.gradients @ gradient).double()) / divisors
        direction = gradient / _DAMPING - (coefficients.T @ inner).float() @ self.gradients
        with torch.no_grad():
            self.parameter.sub_(direction, alpha=1e-3)
        self.slot = (self.slot + 1) % rows


def _parameter(size: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(size, device=device()))
    parameter.grad = _gradients(1, size)[0]
    return parameter


def _mfac(size: int, rows: int, **arguments: Any) -> Callable[[], object]:
    """Return the step of an optimizer whose window is full."""
    parameter = _parameter(size)
    optimizer = MFAC([parameter], num_grads=rows, damping=_DAMPING, **arguments)
    for gradient in _gradients(rows, size):
        parameter.grad = gradient
        optimizer.step()
    return optimizer.step


def _sequential(size: int, rows: int) -> Callable[[], object]:
    stepper = _SequentialStep(_parameter(size), rows)
    for gradient in _gradients(rows, size):
        stepper.parameter.grad = gradient
        stepper.step()
    return stepper.step


def _steps(size: int, rows: int) -> Mapping[str, Block]:
    return calls(
        {
            _STEP: _mfac(size, rows),
            "MFAC(storage_dtype='bfloat16')": _mfac(size, rows, storage_dtype="bfloat16"),
            "sequential loop": _sequential(size, rows),
            "torch.optim.SGD": torch.optim.SGD([_parameter(size)], lr=1e-3, momentum=0.9).step,
            "torch.optim.Adam": torch.optim.Adam([_parameter(size)], lr=1e-3).step,
        }
    )


def _large_window(size: int, rows: int) -> Mapping[str, Block]:
    """A full window that is loaded, since a step for each of its gradients would take minutes."""
    gradients = _gradients(rows, size)
    parameter = _parameter(size)
    optimizer = MFAC([parameter], num_grads=rows, damping=_DAMPING)
    optimizer.step()
    state = optimizer.state_dict()
    gram = (gradients @ gradients.T).double()
    window = {"version": 1, "gradients": gradients, "pushed": torch.tensor([rows], device=gradients.device)}
    state["windows"] = [{**state["windows"][0], "window": window, "gram": gram, "factor": None}]
    optimizer.load_state_dict(state)
    slot = torch.zeros(1, dtype=torch.int64, device=gradients.device)
    return calls(
        {_STEP: optimizer.step, "a factorisation alone": lambda: window_coefficients(gram, slot, _DAMPING, 1e-6)}
    )


_SMALLEST = "10,000 parameters, 16 gradients"


def _growth() -> Mapping[str, Block]:
    sizes = ((10_000, 16), (10_000, 64), (10_000, 256), (100_000, 64), (1_000_000, 64))
    return calls({f"{size:,} parameters, {rows} gradients": _mfac(size, rows) for size, rows in sizes})


BENCH = Bench(
    cases=(
        *(
            Case(
                name=f"An inverse Fisher of 25,088 weights in blocks of 128, from {rows} gradients",
                blocks=functools.partial(_set_up_in_blocks, rows, 25_088),
                reference=_OURS,
                targets=(Target("recursion, in all blocks at a time", "ratio", at_least=5.0),) if rows == 256 else (),
                rounds=6,
            )
            for rows in (64, 256)
        ),
        Case(
            name="An inverse Fisher of 100,000 weights without blocks, from 128 gradients",
            blocks=functools.partial(_set_up_whole, 128, 100_000),
            reference=_OURS,
            rounds=6,
        ),
        Case(
            name="A product with the inverse Fisher of 100,000 weights and 128 gradients",
            blocks=functools.partial(_products, 128, 100_000),
            reference=_OURS,
            targets=(Target("recursion, row by row", "ratio", at_least=2.0),),
            rounds=10,
        ),
        *(
            Case(
                name=f"One step of the optimizer ({size:,} parameters, {rows} gradients)",
                blocks=functools.partial(_steps, size, rows),
                reference=_STEP,
                targets=(Target("sequential loop", "ratio", at_least=3.0),),
                rounds=10,
            )
            for size, rows in ((10_000, 128), (270_000, 128))
        ),
        Case(
            name="One step of the optimizer with a large window (10,000 parameters, 2048 gradients)",
            blocks=functools.partial(_large_window, 10_000, 2048),
            reference=_STEP,
            rounds=6,
        ),
        Case(
            name="One step of the optimizer, as parameters and window grow",
            blocks=_growth,
            reference=_SMALLEST,
            rounds=10,
        ),
    )
)
