# SPDX-License-Identifier: Apache-2.0
"""Measuring a model without leaving a trace in the training that goes on around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from fulgurite.random import get_random_state, replayed


@contextmanager
def undisturbed(model: nn.Module, training: bool | None = False) -> Iterator[nn.Module]:
    """Give the plain model for measurements, and put everything back that they may have changed.

    Inside, autocast is off, gradients can be taken, also in validation, and nothing is compiled. Afterwards, also after an
    exception, the mode of each submodule, all buffers and the random state are what they were, bit for bit.

    Args:
        model: The model; one that `torch.compile` has wrapped is unwrapped.
        training: The mode inside: evaluation by default; None leaves each submodule in its own.

    Yields:
        The unwrapped model.

    Example:
        >>> dropout = nn.Dropout().train()
        >>> with undisturbed(dropout) as plain:
        ...     plain(torch.ones(2))
        tensor([1., 1.])
        >>> dropout.training
        True
    """
    network: nn.Module = getattr(model, "_orig_mod", model)
    device = model_device(network)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        replayed(get_random_state(device), device),
        kept_buffers(network),
        kept_modes(network),
    ):
        if training is not None:
            network.train(training)
        yield network


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    first = next(chain[Tensor](model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put the mode of each submodule, training or evaluation, back after a block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put all buffers of a model back after a block, bit for bit; one that was not touched is not written to."""
    places = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    buffers = {id(buffer): buffer for _, found in places for buffer in found.values() if buffer is not None}
    copies = [(buffer, buffer.detach().clone(), _version(buffer)) for buffer in buffers.values()]
    try:
        yield
    finally:
        for module, found in places:
            module._buffers.update(found)
        with torch.no_grad():
            for buffer, copy, version in copies:
                # A backward pass that is still to come may need the version of a buffer.
                if version is None or _version(buffer) != version:
                    buffer.copy_(copy)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
