# SPDX-License-Identifier: Apache-2.0
"""Trace, norm and largest eigenvalue of the curvature of a training, with error bars: any number of examples and outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from fulgurite import distributed
from fulgurite.curvature import (
    GaussNewton,
    Hessian,
    Operator,
    hutchinson_frobenius,
    hutchinson_trace,
    lanczos,
    step_loss,
)
from fulgurite.measurement import undisturbed
from fulgurite.random import derived_seed
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.curvature.dynamical_stability import functional
from fulgurite_plugins.curvature.dynamical_stability.features import (
    NonFiniteError,
    signs,
    squared_lengths,
    squared_products,
)
from fulgurite_plugins.curvature.dynamical_stability.rates import Rates, Sampling
from fulgurite_plugins.curvature.dynamical_stability.steps import StepOutputs

Quantity = Literal["trace", "frobenius", "lambda_max", "refined", "exact"]
Values = dict[str, float]
"""What was measured, by name."""


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how.

    Args:
        user: Who measures, for messages.
        loader: On which examples: `"train"`, `"val"` or a DataLoader.
        max_samples: On how many of them at most.
        quantities: What is measured.
        curvature: Of the Gauss-Newton matrix, or of the whole Hessian.
        output_probes: Random combinations of outputs for the trace; None takes every output.
        probes: Probes for what is estimated by products with the matrix.
        lanczos_steps: Products for the largest eigenvalue.
        include_weight_decay: Whether weight decay adds to the curvature.
        criterion: The criterion, if the training step calls several losses.
        seed: Seeds examples and probes.
    """

    user: str
    loader: Any = "train"
    max_samples: int = 512
    quantities: tuple[Quantity, ...] = ("trace", "frobenius", "lambda_max", "refined")
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    output_probes: int | None = None
    probes: int = 16
    lanczos_steps: int = 20
    include_weight_decay: bool = False
    criterion: str | None = None
    seed: int = 0


def by_examples(
    trainer: pl.Trainer, network: StepOutputs, rates: Rates, sampling: Sampling, measuring: Measuring
) -> Values:
    """Return the loss, the trace and the mean of the refined bound, example by example; each rank measures its share."""
    refined = "refined" in measuring.quantities
    traced = refined or "trace" in measuring.quantities
    batches = _batches(trainer, measuring)
    weights = network.weights(rates.ratios)
    rows = [torch.zeros(0, 5, dtype=torch.float64)]
    place = trainer.global_rank
    for batch in batches:
        with undisturbed(network):
            observed = network.observe(batch)
            examples, outputs = observed.outputs.shape
            own = slice(place, place + examples * trainer.world_size, trainer.world_size)
            place += examples * trainer.world_size
            drawn = _drawn(measuring, len(batches.indices), outputs)[:, own].to(observed.outputs)
            given = (network, (batch,), observed.outputs, observed.curvature, weights)
            unknown = observed.outputs.new_zeros(2, examples)
            probes = measuring.output_probes
            lengths = squared_lengths(*given, None if probes is None else drawn[:probes]) if traced else unknown
            pairs = drawn[: 2 if outputs == 1 else 2 * measuring.probes]
            products = squared_products(*given, pairs) if refined else unknown[0]
        rank = observed.outputs.new_full((), observed.curvature.rank(observed.outputs.shape[1]))
        columns = [*_mean_and_variance(lengths, measuring.output_probes), products, observed.loss, rank]
        rows.append(torch.stack([column.expand(len(lengths[0])) for column in columns], dim=1).double().cpu())
    capacity = -(-len(batches.indices) // trainer.world_size)
    gathered = torch.cat(distributed.gather_rows(torch.cat(rows), capacity))
    lengths, noise, products, losses, ranks = gathered.unbind(dim=1)
    found = {"loss": losses.mean()}
    if traced and measuring.curvature == "hessian":
        found["gauss_newton_trace"] = lengths.mean()
    elif traced:
        found["trace"] = lengths.mean()
        of_probes = noise.sum().sqrt() / len(noise)
        found["trace_error"] = torch.hypot(of_probes, sampling_error(lengths, sampling.examples))
        found["max_lr_trace"] = functional.trace_bound(lengths.mean(), sampling.batch_size, int(ranks.max()))
    if refined:
        found["of_examples"] = products.mean()
    return {name: float(value) for name, value in found.items()}


def by_products(trainer: pl.Trainer, module: pl.LightningModule, rates: Rates, measuring: Measuring) -> Values:
    """Return what follows from products with the matrix: norm, largest eigenvalue, and the trace of the whole Hessian."""
    wanted = set(measuring.quantities)
    whole = measuring.curvature == "hessian"
    found: Values = {}
    if not (wanted - {"trace"} or whole):
        return found
    names = [name for name, ratio in rates.ratios.items() if ratio > 0]
    parameters = [module.get_parameter(name) for name in names]
    source = step_loss(trainer, module, _batches(trainer, measuring), measuring.user, measuring.criterion)
    with (Hessian if whole else GaussNewton)(source, parameters) as plain:
        roots = [p.new_full((p.numel(),), rates.ratios[n] ** 0.5) for n, p in zip(names, parameters, strict=True)]
        matrix = _Rated(plain, torch.cat(roots).to(plain.dtype))
        if whole and "trace" in wanted:
            estimate = hutchinson_trace(matrix, measuring.probes, measuring.seed)
            found |= {"trace": estimate.value, "trace_error": estimate.standard_error}
        if wanted & {"frobenius", "refined"}:
            estimate = hutchinson_frobenius(matrix, measuring.probes, measuring.seed)
            found |= {"frobenius": estimate.value, "frobenius_error": estimate.standard_error}
        if "lambda_max" in wanted:
            try:
                value, bound = lanczos(matrix, measuring.lanczos_steps, seed=measuring.seed).largest()
            except FloatingPointError as error:
                raise NonFiniteError(str(error)) from error
            found |= {"lambda_max": value, "lambda_max_error": bound}
    for name in ("trace", "frobenius"):
        if not math.isfinite(found.get(name, 0.0)):
            raise NonFiniteError(f"the {name} is not finite.")
    return found


def sampling_error(values: Tensor, population: int) -> Tensor:
    """Return the standard error of the mean of values `[N]` that were drawn from a finite population."""
    if len(values) < 2:
        return values.new_full((), 0.0 if population == len(values) else math.nan)
    missed = max(0.0, 1 - len(values) / population)
    return values.std() * math.sqrt(missed / len(values))


def _drawn(measuring: Measuring, examples: int, outputs: int) -> Tensor:
    """Return the signs of all examples `[probes, n, C]`: the same however they are divided into batches and ranks."""
    number = max(2 * measuring.probes, measuring.output_probes or 0)
    return signs(number, examples, outputs, torch.Generator().manual_seed(derived_seed(measuring.seed)))


def _batches(trainer: pl.Trainer, measuring: Measuring) -> FixedBatches:
    return FixedBatches(
        trainer, measuring.user, measuring.loader, measuring.max_samples, seed=measuring.seed, share=True
    )


def _mean_and_variance(lengths: Tensor, probes: int | None) -> tuple[Tensor, Tensor]:
    """Return the estimate for each example, `[N]`, and its variance due to the probes."""
    if probes is None:
        return lengths.sum(dim=0), torch.zeros_like(lengths[0])
    noise = lengths.var(dim=0) / probes if probes > 1 else torch.full_like(lengths[0], math.nan)
    return lengths.mean(dim=0), noise


class _Rated(Operator):
    """A matrix between the roots of relative learning rates, `[P]`."""

    def __init__(self, matrix: Operator, roots: Tensor) -> None:
        super().__init__(matrix.parameters)
        self.matrix, self.roots = matrix, roots

    def _multiply(self, rows: Tensor) -> Tensor:
        return self.roots * (self.matrix @ (self.roots * rows).mT).mT
