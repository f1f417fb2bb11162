# SPDX-License-Identifier: Apache-2.0
"""One measurement of a training: the curvature at the present weights, and what it says about the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import lightning.pytorch as pl
import torch

from fulgurite.errors import RefusedError
from fulgurite.measurement import undisturbed
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.curvature.dynamical_stability import functional
from fulgurite_plugins.curvature.dynamical_stability.estimating import (
    Measuring,
    Quantity,
    Values,
    by_examples,
    by_products,
    sampling_error,
)
from fulgurite_plugins.curvature.dynamical_stability.features import feature_kernel
from fulgurite_plugins.curvature.dynamical_stability.rates import Rates, Sampling
from fulgurite_plugins.curvature.dynamical_stability.steps import StepOutputs

KERNEL_LIMIT = 1024
"""Examples times outputs up to which the exact limit is computed."""

SHARDED = dict.fromkeys(
    ("fsdp", "model_parallel", "deepspeed"),
    "curvature needs whole parameters, and they are sharded there. Measure on one device or under DDP.",
)


def measure(
    trainer: pl.Trainer, module: pl.LightningModule, rates: Rates, sampling: Sampling, measuring: Measuring
) -> Values:
    """Measure the curvature at the present weights, unnoticed by the training.

    Returns:
        `loss`, and of the asked `trace`, `frobenius`, `lambda_max`, `alignment`, `radius`, each with `_error` where it
        is an estimate, and the learning rates at which the limits lie: `max_lr_trace`, `max_lr_refined`,
        `max_lr_exact`, `max_lr_gd`, and the lowest of them, `max_lr_sgd`. Equal on all ranks.
    """
    decay = rates.weight_decay(measuring.user) if measuring.include_weight_decay else 0.0
    network = StepOutputs(trainer, module, measuring.user, measuring.criterion)
    if "exact" in measuring.quantities:
        found = _by_kernel(trainer, network, rates, sampling, measuring, decay)
    else:
        found = by_examples(trainer, network, rates, sampling, measuring)
        found |= by_products(trainer, module, rates, measuring)
        if measuring.curvature == "hessian" and "trace" in measuring.quantities:
            found["residual_trace"] = found["trace"] - found.pop("gauss_newton_trace")
        if "refined" in measuring.quantities:
            trace, norm, own = (torch.as_tensor(found[name]) for name in ("trace", "frobenius", "of_examples"))
            del found["of_examples"]
            batch = (sampling.batch_size, sampling.examples, sampling.replacement)
            found["max_lr_refined"] = float(functional.refined_bound(trace, norm, own, *batch))
    if "lambda_max" in found:
        sharpness = found["lambda_max"] + decay
        found["max_lr_gd"] = rates.gd_limit / sharpness if sharpness > 0 else math.inf
    limits = [value for name, value in found.items() if name.startswith("max_lr_")]
    if limits:
        found["max_lr_sgd"] = min(limits)
    return found


def check_quantities(user: str, quantities: Sequence[str], curvature: str) -> None:
    """Raise ValueError unless there are quantities, all of them known and measurable on this matrix."""
    known = get_args(Quantity)
    if isinstance(quantities, str) or not quantities or set(quantities) - set(known):
        raise ValueError(f"Expected `quantities` of {user} to be some of {', '.join(known)}, but got {quantities!r}.")
    if curvature == "hessian" and set(quantities) & {"refined", "exact"}:
        raise ValueError(
            f"Expected `quantities` of {user} without 'refined' and 'exact' for curvature='hessian', but got "
            f"{quantities!r}: they are of single examples' Gauss-Newton matrices."
        )


def _by_kernel(
    trainer: pl.Trainer, network: StepOutputs, rates: Rates, sampling: Sampling, measuring: Measuring, decay: float
) -> Values:
    """Everything at once, exactly, from the kernel of all examples; each rank computes all of it."""
    count = measuring.max_samples
    batches = FixedBatches(trainer, measuring.user, measuring.loader, count, batch_size=count, seed=measuring.seed)
    _refuse_large(measuring.user, len(batches.indices))
    batch = next(iter(batches), None)
    if batch is None:
        raise RefusedError(
            f"{measuring.user} measures {count} examples at once for 'exact', but the collate function makes no batch of "
            f"them. Give the plugin a DataLoader of its own, or leave 'exact' out of `quantities`."
        )
    with undisturbed(network):
        observed = network.observe(batch)
        examples, outputs = observed.outputs.shape
        _refuse_large(measuring.user, examples, outputs)
        weights = network.weights(rates.ratios)
        kernel = feature_kernel(network, (batch,), observed.outputs, observed.curvature, weights)
    size, population, replacement = sampling.batch_size, sampling.examples, sampling.replacement
    options: dict[str, Any] = {"examples": population, "weight_decay": decay, "tolerance": 1e-6}
    trace = functional.trace(kernel)
    lengths = functional.own_blocks(kernel).diagonal(dim1=1, dim2=2).sum(dim=1)
    found = {
        "loss": observed.loss,
        "trace": trace,
        "trace_error": sampling_error(lengths, population),
        "frobenius": functional.frobenius_norm(kernel),
        "lambda_max": functional.lambda_max(kernel),
        "max_lr_trace": functional.trace_bound(trace, size, observed.curvature.rank(outputs)),
        "max_lr_refined": functional.refined_trace_bound(kernel, size, replacement, examples=population),
        "max_lr_exact": functional.max_stable_lr(kernel, size, replacement, **options),
    }
    if rates.lr > 0:
        found["radius"] = functional.stability_radius(kernel, rates.lr, size, replacement, **options)
    if observed.residuals is not None:
        found["alignment"] = functional.alignment_factor(kernel, observed.residuals)
    return {name: float(value) for name, value in found.items()}


def _refuse_large(user: str, examples: int, outputs: int = 1) -> None:
    size = examples * outputs
    if size > KERNEL_LIMIT:
        raise RefusedError(
            f"{user} computes the exact limit on at most {KERNEL_LIMIT} outputs of all examples together, but got "
            f"{examples} examples{f' of {outputs} outputs' if outputs > 1 else ''}: about "
            f"{32 * size * size * 8 / 2**30:.1f} GiB, and {size}^3 operations in each of tens of steps. Set "
            f"max_samples to {max(1, KERNEL_LIMIT // outputs)} or less, or leave 'exact' out of `quantities`."
        )
