# SPDX-License-Identifier: Apache-2.0
"""The checks of `nn.Module` components."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from fulgurite.testing.check import CheckError, InapplicableError, check, expect
from fulgurite.testing.lab import Lab


def _call(lab: Lab) -> tuple[Any, ...]:
    if lab.case.arguments is None:
        raise InapplicableError("the case names no `arguments` for a call")
    return lab.case.arguments()


def _made(lab: Lab) -> nn.Module:
    torch.manual_seed(0)
    return lab.make().eval()


def _joined(output: Any) -> Tensor:
    """Return what a module returned as one tensor; several, such as the state of a recurrent cell, side by side."""
    return output if isinstance(output, Tensor) else torch.cat([part.flatten(1) for part in output], dim=1)


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def scattered(tensor: Tensor) -> Tensor:
    """Return a copy that is transposed in memory and has gaps, so that no two dimensions can be viewed as one."""
    if tensor.ndim == 0:
        return tensor
    turned = tensor.transpose(0, -1)
    return torch.stack([turned, turned], dim=-1)[..., 0].transpose(0, -1)


@check("module")
def check_module_gradient(lab: Lab) -> None:
    """Its backward pass is not the derivative of its forward pass."""
    module = _made(lab).double()
    inputs = [a.double().requires_grad_() if a.is_floating_point() else a for a in _call(lab)]
    leaves = [*(a for a in inputs if a.requires_grad), *(p for p in module.parameters() if p.requires_grad)]
    try:
        torch.autograd.gradcheck(lambda *_: module(*inputs), leaves)
    except GradcheckError as error:
        raise CheckError(f"backward is not the derivative of forward: {str(error).splitlines()[0]}") from error


@check("module")
def check_batch_invariance(lab: Lab) -> None:
    """In eval mode, what comes out for an example depends on the others in the batch."""
    module, inputs = _made(lab), _call(lab)
    whole = _joined(module(*inputs))
    single = torch.cat([_joined(module(*(a[i : i + 1] for a in inputs))) for i in range(len(inputs[0]))])
    expect(_close(whole, single, 1e-4), "examples one by one give another result than together")


@check("module")
def check_module_state_round_trip(lab: Lab) -> None:
    """A checkpoint does not bring back what was saved."""
    module = _made(lab).train()
    for _ in range(2):  # what training gathers, such as running statistics, is state too
        module(*_call(lab))
    torch.manual_seed(5)
    other = lab.make().eval()
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    same = torch.equal(_joined(module.eval()(*_call(lab))), _joined(other(*_call(lab))))
    expect(same, "after load_state_dict it computes something else")


@check("module", quick=False)
def check_module_compiles(lab: Lab) -> None:
    """`torch.compile` breaks it or changes its result."""
    module = _made(lab)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    try:
        result = _joined(compiled(*_call(lab)))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CheckError(f"torch.compile cannot take it as one graph: {str(error).splitlines()[0]}") from error
    expect(_close(_joined(module(*_call(lab))), result), "compiled, it gives another result")


@check("module")
def check_module_under_autocast(lab: Lab) -> None:
    """Under bf16 autocast it fails or gives something else."""
    module = _made(lab)
    exact = _joined(module(*_call(lab)))
    with torch.autocast("cpu", torch.bfloat16):
        half = _joined(module(*_call(lab)))
    expect(
        _close(exact, half.to(exact.dtype), 0.05 * max(1.0, float(exact.detach().abs().max()))),
        "bf16 autocast gives another result",
    )


@check("module")
def check_module_takes_non_contiguous_input(lab: Lab) -> None:
    """A transposed or sliced input gives another result or an error."""
    module, inputs = _made(lab), _call(lab)
    strided = tuple(map(scattered, inputs))
    same = _close(_joined(module(*inputs)), _joined(module(*strided)))
    expect(same, "an input that is not contiguous gives another result")


@check("module")
def check_module_takes_an_empty_batch(lab: Lab) -> None:
    """A batch without examples, as a rank may get one, is an error."""
    module, inputs = _made(lab), _call(lab)
    result = _joined(module(*(a[:0] for a in inputs)))
    expect(
        result.shape == (0, *_joined(module(*inputs)).shape[1:]),
        f"an empty batch gives the shape {tuple(result.shape)}",
    )
