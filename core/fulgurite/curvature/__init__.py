# SPDX-License-Identifier: Apache-2.0
"""Curvature of a loss: products with its matrices, estimates from random probes, and Lanczos' method."""

from fulgurite.curvature.estimators import MonteCarlo, hutchinson_diagonal, hutchinson_frobenius, hutchinson_trace
from fulgurite.curvature.lanczos import Tridiagonal, lanczos
from fulgurite.curvature.operators import EmpiricalFisher, FiniteDifferenceHessian, GaussNewton, Hessian, Operator
from fulgurite.curvature.sources import Evaluation, Source, example_losses, model_loss, step_loss

__all__ = [
    "EmpiricalFisher",
    "Evaluation",
    "FiniteDifferenceHessian",
    "GaussNewton",
    "Hessian",
    "MonteCarlo",
    "Operator",
    "Source",
    "Tridiagonal",
    "example_losses",
    "hutchinson_diagonal",
    "hutchinson_frobenius",
    "hutchinson_trace",
    "lanczos",
    "model_loss",
    "step_loss",
]
